"""Times of this code against an earlier commit, by hand and on an otherwise idle machine.

python tests/benchmark.py                  # ms of a meta-iteration, old and new in turn
python tests/benchmark.py --full           # python train.py whole, nothing compiled before
python tests/benchmark.py --accelerator    # of this code only: many tasks, many chips
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD = "10bc5ca"

# What both are compared at, and what the old code needs to do the same.
SAME = {
    "device": "pcm,pcm_history",
    "n_inner": 8,
    "n_bits": 2,
    "n_h0": 64,
    "n_h1": 128,
    "batch_train": 128,
    "n_chips": 1,
    "tlook": 20.0,
    "max_age": 1e7,
}
OLD_ALONE = {"twait": 150.0, "gain_out": 0.15}

# Prints the ms of a meta-iteration; the first chunk compiles and is not timed.
CODE = """
import json, sys, time
import numpy as np, train
train.configure_backend()
flags, n = json.loads(sys.argv[1]), int(sys.argv[2])
cfg, population = train.configure(flags)
if hasattr(train, "population_of"):
    population = train.population_of(cfg, population)
key = train.stream(cfg, 1)
if hasattr(train, "families_of"):
    family = train.families_of(cfg).training
    state = train.start(cfg, population, family)
    chunk = train.train_chunk, key, cfg, population, family, state, 0, n
else:
    chunk = train.train_chunk, cfg, population, train.start(cfg, population), key, np.arange(n)
for _ in range(2):
    began = time.perf_counter()
    train.jax.block_until_ready(chunk[0](*chunk[1:]))
print(1e3*(time.perf_counter() - began)/n)
"""


def extract(commit, folder):
    """The folder, with the files of a commit in it."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True
    )
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def copy(folder):
    """The folder, with the files of this code in it as they are."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


def on_cores(cores, *command):
    """The command on so many cores; on all if there is no such choice."""
    if cores is None:
        return command
    return "taskset", "-c", ",".join(map(str, range(cores))), *command


def milliseconds(scripts, cores, flags, n):
    """Time of a meta-iteration, by a process of its own on so many cores."""
    command = on_cores(cores, sys.executable, "-c", CODE, json.dumps(flags), str(n))
    environment = {**os.environ, "PYTHONPATH": str(scripts)}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return float(run.stdout.split()[-1])


def show(what, old, new, unit):
    """Print medians, the median of the ratios and each of them."""
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"{what:<32}old {statistics.median(old):9.2f} {unit}   "
        f"new {statistics.median(new):9.2f} {unit}   "
        f"new/old {statistics.median(ratios):.2f}, each {each}",
        flush=True,
    )


def compare(old, rounds, n):
    """Print the times of a meta-iteration of old and new code, taken in turn on one core."""
    times = [], []
    for _ in range(rounds):
        times[0].append(milliseconds(old, 1, SAME | OLD_ALONE, n))
        times[1].append(milliseconds(ROOT, 1, SAME, n))
    show("8 looks, 64 and 128 neurons", *times, "ms")


def seconds_of_a_run(scripts, flags):
    """Time of python train.py from start to end."""
    variables = {key: x for key, x in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "train.py", *flags],
        cwd=scripts,
        env=variables,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def compare_whole(folder, rounds, flags):
    """Print the times of python train.py of old and new code, each from a fresh copy."""
    times = [], []
    for k in range(rounds):
        times[0].append(seconds_of_a_run(extract(OLD, folder / f"old{k}"), flags))
        times[1].append(seconds_of_a_run(copy(folder / f"new{k}"), flags))
    show("python train.py", *times, "s")


MANY = {
    "2 chips x 128 tasks": {"batch_train": 256},
    "32 chips x 2,048 tasks": {"n_chips": 16, "batch_train": 4096},
}


def accelerator(folder, n):
    """Print the times of this code on whatever JAX finds."""
    for what, flags in MANY.items():
        took = milliseconds(ROOT, None, SAME | flags, n)
        print(f"{what:<32}{took / 1e3:9.5f} s per meta-iteration", flush=True)
    took = seconds_of_a_run(copy(folder / "new"), [])
    print(f"{'python train.py, whole':<32}{took:9.1f} s")


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="time whole runs")
    parser.add_argument("--accelerator", action="store_true", help="time this code alone")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (3)")
    parser.add_argument("--n", type=int, default=50, help="meta-iterations timed (50)")
    parser.add_argument("--n_iter", help="of the whole runs (default: train.py's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.accelerator:
            accelerator(folder, options.n)
        elif options.full:
            flags = ["--n_iter", options.n_iter] if options.n_iter else []
            compare_whole(folder, options.rounds, flags)
        else:
            compare(extract(OLD, folder / "old"), options.rounds, options.n)


if __name__ == "__main__":
    main()
