"""A run that survives, repeats and explains itself: kills, full disks, folders in the way, terminals, divergence."""
import contextlib
import csv
import fcntl
import hashlib
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY, arrays, call, launch

import network
import train

LENGTH = "--n_iter", str(10*train.CHUNK)


def outcome(folder):
    """Digests of what a run leaves."""
    return [(name, hashlib.sha256((folder/name).read_bytes()).hexdigest())
            for name in ("checkpoint.npz", "config.json", "metrics.csv", "results.json")]


def limited(*settings):
    """A command that limits itself as `resource` or `os` can before it starts Python. (Forking this process, in which JAX
    has started threads, could hang.)"""
    code = "; ".join(("import os, resource, sys", *settings, "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"))
    return [sys.executable, "-c", code]


def test_twenty_kills_leave_the_same_run(tmp_path):
    """SIGKILL at 20 moments drawn over the length of a run, each time resumed, ends bit for bit like a run in one go."""
    folder, random = tmp_path/"killed", np.random.default_rng(0)

    def run(name, timeout=300):
        going_on = ["--resume"] if (tmp_path/name/"checkpoint.npz").exists() else []
        process = launch(tmp_path, *TINY, *LENGTH, "--run_dir", name, *going_on)
        try:
            return process.wait(timeout)
        finally:
            process.kill()
            process.wait()

    assert run("whole") == 0    # compiles; the next finds its programs compiled
    began = time.time()
    assert run("again") == 0
    seconds = time.time() - began
    for moment in random.uniform(0, seconds, 20):
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert run("killed", moment) == 0
        if (folder/"checkpoint.npz").exists():
            assert train.load(folder).step % train.CHUNK == 0
    assert run("killed") == 0
    for name in ("again", "killed"):
        for expected, found in zip(outcome(tmp_path/"whole"), outcome(tmp_path/name), strict=True):
            assert expected == found
    assert not list(tmp_path.glob("*.1"))
    with open(folder/"metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:2] == ["step", "loss"] and [row[0] for row in rows] == [str(train.CHUNK*k) for k in range(1, 11)]
    assert np.isfinite(np.array(rows, float)).all()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=lambda end: end.name)
def test_ended_at_any_phase_with_one_line(tmp_path, end):
    """While libraries load, programs compile, chips are trained and tested; within seconds, however long a step takes."""
    random = np.random.default_rng(1)
    for moment in random.uniform(0.3, 8, 5):
        process = launch(tmp_path, *TINY, "--n_iter", "1000000", "--run_dir", f"run {moment:.2f}")
        time.sleep(moment)
        process.send_signal(end)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 128 + end and err.count("\n") == 1 and "interrupted" in err


def test_the_seed_decides(here, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert call(capsys, "--n_iter", "3", "--seed", seed, "--run_dir", name)[0] == 0
    a, b, c = ((here/name/"metrics.csv").read_bytes() for name in "abc")
    assert a == b != c


def test_resuming_to_a_larger_n_iter_keeps_the_schedule_and_says_so(here, capsys):
    flags = TINY[:TINY.index("--lr_drop")]
    assert train.main([*flags, "--n_iter", "4"]) == 0
    assert train.main([*flags, "--n_iter", "8", "--resume"]) == 0
    assert "schedule: lr_out drops at iteration 2, as in the checkpoint" in capsys.readouterr().out
    assert train.load(here/"run/pcm").cfg.lr_drop == 2


def test_a_file_system_that_takes_no_more_loses_nothing(tmp_path):
    assert launch(tmp_path, *TINY, "--n_iter", "0").wait(timeout=300) == 0
    before = arrays(tmp_path/"run/pcm")
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path/"compiled")}    # what is kept is cut off, too
    done = subprocess.run([*limited("resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"), ROOT/"train.py", *TINY,
                           "--n_iter", "400", "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr and "untouched" in done.stderr
    after = arrays(tmp_path/"run/pcm")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("in_the_way, status, words", [("run", 2, "cannot use the run folder"),
                                                       ("img", 1, "cannot make the folder img")])
def test_a_file_where_a_folder_should_be(here, capsys, in_the_way, status, words):
    (here/in_the_way).write_text("mine")
    ended, _, err = call(capsys, "--n_iter", "0")
    assert ended == status and err.count("\n") == 1 and words in err and (here/in_the_way).read_text() == "mine"
    assert (here/"run/pcm/results.json").exists() == (in_the_way == "img")    # what was computed is kept


def test_more_than_the_memory_holds(tmp_path):
    limit = limited("resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))")
    done = subprocess.run([*limit, ROOT/"train.py", *TINY, "--n_h1", "4096", "--batch_train", "1000000", "--n_iter", "1"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("train.py: out of memory; try fewer tasks")
    assert "Traceback" not in done.stderr and train.load(tmp_path/"run/pcm").step == 0


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with the scripts alone, whose compiled programs are kept where a user's are."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    folder = tmp_path/"scripts"
    folder.mkdir()
    for name in ("train.py", "network.py", "analog.py"):
        shutil.copy(ROOT/name, folder)
    shutil.copytree(ROOT/"img", folder/"img", ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    return folder


def test_compiled_programs_are_kept_and_a_damaged_one_is_compiled_again(scripts, tmp_path):
    def run(name):
        done = subprocess.run([sys.executable, scripts/"train.py", *TINY, "--n_iter", "2", "--run_dir", name], cwd=tmp_path,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return arrays(tmp_path/name)

    first, kept = run("first"), list((scripts/"__pycache__").glob("*/*train_chunk*"))
    assert kept
    for path in kept:
        os.truncate(path, 1000)
    second = run("second")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_scripts_in_a_folder_that_cannot_be_written(scripts, tmp_path):
    read_only = ["unshare", "--mount", "sh", "-c", 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && '
                 '"$@"', "sh", scripts] if os.geteuid() == 0 else []
    if not read_only:
        scripts.chmod(0o555)
    elif subprocess.run([*read_only, "true"], capture_output=True).returncode:
        pytest.skip("root writes everywhere, and this system lets nobody mount")
    (tmp_path/"work").mkdir()
    touch = subprocess.run([*read_only, "touch", scripts/"x"], capture_output=True)
    assert touch.returncode != 0
    done = subprocess.run([*read_only, sys.executable, scripts/"train.py", *TINY, "--n_iter", "1"], cwd=tmp_path/"work",
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path/"work/img/drift.png").exists()


@pytest.mark.parametrize("columns", [40, 1000])
def test_the_progress_bar_fits_its_terminal(tmp_path, columns):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, str(ROOT/"train.py"), *TINY, *LENGTH], cwd=tmp_path, stderr=theirs,
                               stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:    # the terminal's other end is closed
            break
    assert process.wait(timeout=100) == 0
    bars = shown.decode().split("\r")
    assert any("100%" in bar for bar in bars) and max(map(len, bars)) <= columns


def test_one_core_is_enough(tmp_path):
    done = subprocess.run([*limited("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"), ROOT/"train.py", *TINY,
                           "--n_iter", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "(1 devices, 1 cores)" in done.stdout


def zero_weights(key, device, n_h0, n_h1):
    return network.Network(*(jnp.full((2, *shape), device.g_min) for shape in ((2, n_h0), (n_h0 + 1, n_h1), (n_h1, 1))))


def full_weights(key, device, n_h0, n_h1):
    g = zero_weights(key, device, n_h0, n_h1)
    return g._replace(hidden0=g.hidden0.at[0, 1].set(device.g_max), hidden1=g.hidden1.at[0].set(device.g_max))


@pytest.mark.parametrize("flags, init, words", [(["--lambda_fr", "1e38"], None, "not finite"),
                                                ([], zero_weights, "layer 0 are silent"),
                                                ([], full_weights, "layer 1 fire at nearly every step")])
def test_a_run_that_diverges_stops_at_the_last_good_checkpoint(here, capsys, monkeypatch, flags, init, words):
    if init:
        monkeypatch.setattr(train.network, "init", init)
        train.jax.clear_caches()
    with train.jax.debug_nans(False):
        status, _, err = call(capsys, "--n_iter", "50", "--perf", "--off_noise", "0", "--n_h0", "20", *flags)
    assert status == 1 and words in err and err.count("\n") == 1 and "try" in err
    assert train.load(here/"run/perf").step == 0
    train.jax.clear_caches()


def test_importing_leaves_everything_as_it_was():
    code = ("import os, signal, sys; now = lambda: (signal.getsignal(2), dict(os.environ)); before = now(); "
            "import analog, network, train; assert now() == before and 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
