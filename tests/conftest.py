"""Every test runs on one CPU device, with checks for NaN, and imports the scripts from the folder
above."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# To compile faster; the results are held against laws.
FASTER = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=FASTER)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
# Compiled programs are shared by the tests' workers and the runs that they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analog
import network
import train
from img import figures

jax.config.update("jax_debug_nans", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

TINY = (
    "--n_rows 2 --n_h0 5 --n_h1 4 --n_inner 2 --batch_train 4 --task_size 3 --dac_bits 3 "
    "--batch_test 5 --n_iter 6 --lr_drop 3 --off_noise 0.05"
).split()

SMALL = {
    "n_rows": 3,
    "n_h0": 7,
    "n_h1": 6,
    "n_inner": 2,
    "batch_train": 4,
    "task_size": 5,
    "dac_bits": 4,
    "n_iter": 4,
    "off_noise": 0.02,
}


def configured(**flags):
    """Config and devices of a small run."""
    return train.configure({**SMALL, **flags})


def random_meta(cfg, population, family):
    """Meta-parameters as train.start has them, but for thresholds, which are all 0.02: train.start
    would take seconds to compile."""
    kind = jax.tree.map(lambda x: x[0], population.kinds[0])
    columns = 1 if family.exchangeable else family.n_out
    sizes, n_rows = train.sizes_of(cfg), train.rows_of(cfg, family)
    key = train.stream(cfg, 0)
    g = network.start(key, kind.device, sizes, family.n_in, columns, n_rows)
    log_theta = jnp.full((cfg.n_inner, cfg.n_h1, columns), np.log(0.02), float)
    return train.project(train.Meta(g, log_theta, jnp.zeros(())), population.low, population.high)


def started(cfg, devices, family=None):
    """Population of devices, and a state with random_meta; the family of tasks is that of functions
    by default."""
    population = train.population_of(cfg, devices)
    meta = random_meta(cfg, population, family or train.families_of(cfg).training)
    zero = jax.tree.map(jnp.zeros_like, meta)
    return population, train.State(meta, zero, zero)


def begun(cfg, devices):
    """A run with random_meta, before its first iteration."""
    families = train.families_of(cfg)
    _, state = started(cfg, devices, families.training)
    return train.Run(cfg, devices, families, state, versions=train.provenance())


def tile_of(device, xbar, target):
    """A tile of a crossbar that was programmed to target [2, rows, cols] in µS."""
    gain = jnp.ones(target.shape[2])
    return network.Tile(xbar, network.total(device, target), gain, network.Circuit())


@pytest.fixture
def x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    analog.program_table.cache_clear()  # as its draws depend on the precision
    yield
    jax.config.update("jax_enable_x64", False)
    analog.program_table.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, the current one of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- runs of train.py ----------------------------------------------------------------------------


def call(*flags):
    """Exit status, standard output and error of a tiny run of train.py in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main([*TINY, *flags])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def launch(folder, *arguments, **variables):
    """Python as a subprocess with these arguments in a folder."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def arrays(folder):
    """The arrays of a run's checkpoint by name."""
    with np.load(Path(folder) / "checkpoint.npz") as file:
        return {name: file[name] for name in file.files}


def write_classes(path, **changes):
    """A file of 4 × 4 images of the classes 10, 11, …, 18, the last three for the test: 4 samples
    of the first, one more of each next, in any order. Changes are other arrays, None for none."""
    random = np.random.default_rng(0)
    y = random.permutation(np.repeat(np.arange(10, 19), np.arange(4, 13)))
    test = y > 15
    patterns = random.uniform(40, 180, (9, 4, 4))[y - 10]
    x = np.round(patterns + random.uniform(-30, 30, patterns.shape) + 20 * test[:, None, None])
    given = {"x": x.astype(np.uint8), "y": y, "test": test} | changes
    np.savez(path, **{name: array for name, array in given.items() if array is not None})
    return str(path)


# ---- runs of stand-ins, where only what is around the computation is tested ----------------------


@jax.jit(static_argnums=0)
def quick_start(cfg, population, family):
    """Stands for train.start: all conductances as low as they go."""
    n_h0, n_h1 = train.sizes_of(cfg)
    shapes = [(2, 2 * cfg.n_rows, n_h0), (2, n_h0 + 1, n_h1), (2, n_h1, 1)]
    *hidden, readout = [jnp.full(shape, population.low, float) for shape in shapes]
    log_theta = jnp.zeros((cfg.n_inner, 1 if cfg.shared_thr else n_h1, 1))
    meta = train.Meta(network.Network(tuple(hidden), readout), log_theta, jnp.zeros(()))
    zero = jax.tree.map(jnp.zeros_like, meta)
    return train.State(meta, zero, zero)


def quick_chunk(key, cfg, population, family, state, first, last):
    """Stands for train.train_chunk: every iteration moves the state by its own random
    number."""
    time.sleep(0.02)
    moves = [jax.random.uniform(jax.random.fold_in(key, step)) for step in range(first, last)]
    measured = {
        "loss": float(sum(moves)),
        "mse": 4.0 + float(sum(moves)),
        "pulses": 3.0,
        "rates": np.full(2, 100.0),
        "silent": np.full(2, 0.25),
        "spikes": 90.0,
    }
    return jax.tree.map(lambda x: x + np.float32(sum(moves)), state), measured


def quick_reported(key, meta, cfg, family, device):
    """Stands for train.reported, whose shapes are not needed here."""
    return meta


def quick_test(key, experiment, cfg, family, device, n, meta):
    """Stands for train.test: random numbers that depend on the network."""
    random = np.random.default_rng(abs(int(1e3 * np.sum(meta.log_theta))))
    measured = {"mse": random.random((n, cfg.n_inner + 1))}
    measured |= {name: random.random((n, 2)) for name in ("rates", "silent")}
    of_one = set(figures.MEASURED) - {"accuracy", "accuracy_day", *measured}
    measured |= {name: random.random(n) for name in sorted(of_one)}
    u = family.pool(key)
    tasks = jax.vmap(family.task, (0, None))(jax.random.split(key, n), u)
    pools = np.broadcast_to(u, (n, *u.shape))
    return train.Episode(measured, tasks, pools, random.random((n, 2, len(u), 1)), None)


def quick_draw(run, episodes, results, folder):
    """Stands for train.draw: no figure."""


QUICK = {
    "CHUNK": 2,
    "start": quick_start,
    "train_chunk": quick_chunk,
    "reported": quick_reported,
    "test": quick_test,
    "draw": quick_draw,
}


@pytest.fixture
def quick(here, monkeypatch):
    """An empty folder in which runs are of stand-ins."""
    for name, stand_in in QUICK.items():
        monkeypatch.setattr(train, name, stand_in)
    monkeypatch.setattr(train, "HERE", here)  # where img/ is
    return here


def quick_main():
    """train.py with stand-ins, for a subprocess."""
    for name, stand_in in QUICK.items():
        setattr(train, name, stand_in)
    train.end_at_once()
    train.main()
