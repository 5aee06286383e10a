"""The command line from start to figures, its errors, and what survives them."""
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, TINY, arrays, call, launch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train

@pytest.mark.parametrize("mode, suffix", [([], ""), (["--perf", "--n_inner", "2"], "_perf")], ids=("pcm", "perf"))
def test_from_start_to_figures(tmp_path, mode, suffix):
    folder = tmp_path/"a path with späces"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "HOME")}
    process = launch(folder, *TINY, "--n_iter", "2", *mode, env=environment | {"MPLCONFIGDIR": str(tmp_path)})
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")    # no progress bar in a log
    assert out.startswith("meta-analog on cpu (") and f"{'perf' if mode else 'pcm'} devices, seed 0, run folder" in out
    assert "MSE before adaptation" in out and f"MSE after inner step {2 if mode else 1}" in out
    for name in ("meta_training", "meta_testing", "drift"):
        image = matplotlib.image.imread(folder/"img"/f"{name}{suffix}.png")
        assert image.shape[1] >= 900 and image[..., :3].std() > 0.03
    run = folder/"run"/("perf" if mode else "pcm")
    assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoint.npz", "config.json", "metrics.csv",
                                                           "results.json"]
    config = json.loads((run/"config.json").read_text())
    assert config["config"]["n_h0"] == 5 and config["config"]["device_constants"]["g_max"] == 12.0
    assert config["versions"]["jax"]
    results = json.loads((run/"results.json").read_text())
    steps = 3 if mode else 2
    assert results["mse"]["n"] == 5 and len(results["mse"]["mean"]) == len(results["mse"]["ci95"]) == steps
    assert np.isfinite(results["drift"]["once"]["mean"]).all()
    with open(run/"metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2"] and float(rows[0]["theta_0"]) > 0
    checkpoint = arrays(run)
    assert checkpoint["step"] == 2 and checkpoint["hidden1"].shape == (2, 6, 4)
    np.testing.assert_allclose(checkpoint["theta"], np.exp(checkpoint["log_theta"]))


BAD = ["--n_iter -1", "--n_inner 0", "--n_bits 1", "--n_bits 9", "--dac_bits 0", "--task_size 0", "--n_h0 0", "--n_h1 0",
       "--batch_train 0", "--batch_test 3", "--n_chips 0", "--lr_out 0", "--lr_out nan", "--lr_out inf", "--tau_mem 0",
       "--tau_out -1", "--tau_out nan", "--off_noise -0.1", "--tread 101", "--tprog 99", "--twait 0.5", "--ttest 101",
       "--n_inner 60", "--n_iter two", "--lr_out x", "--nonsense 3", "--device nowhere", "--perf --device pcm",
       "--seed -1", "--resume", "--run_dir /proc/nowhere", "--lr", "--n_it 3", "stray", "--grad_thr 0", "--lr_drop -2"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(here, capsys, flags):
    status, out, err = call(capsys, *flags.split())
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("train.py: ")
    assert not list(here.rglob("*.npz"))


def test_bad_input_as_a_process(tmp_path):
    process = launch(tmp_path, "--n_inner", "0")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1) and "n_inner" in err


def test_help_names_units_and_defaults(tmp_path):
    process = launch(tmp_path, "--help")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "default: 251.0" in out and "µS" in out and "time constant of the membranes, s" in out


def test_resume_repeats_the_run_in_one_go(here, capsys):
    assert call(capsys, "--n_iter", "6", "--run_dir", "whole")[0] == 0
    assert call(capsys, "--n_iter", "2", "--run_dir", "parts")[0] == 0
    status, out, _ = call(capsys, "--n_iter", "6", "--run_dir", "parts", "--resume")
    assert status == 0 and "resuming after iteration 2 of 6" in out
    whole, parts = arrays(here/"whole"), arrays(here/"parts")
    for name in ("hidden0", "hidden1", "readout", "theta", "hidden1_m", "readout_v", "step"):
        assert np.array_equal(whole[name], parts[name])
    assert (here/"whole/results.json").read_bytes() == (here/"parts/results.json").read_bytes()
    assert call(capsys, "--resume", "--run_dir", "parts")[0] == 0    # n_iter reached: only tests
    assert np.array_equal(arrays(here/"parts")["hidden1"], whole["hidden1"])
    status, _, err = call(capsys, "--resume", "--run_dir", "parts", "--n_iter", "3")
    assert status == 2 and "past --n_iter 3" in err and arrays(here/"parts")["step"] == 6
    assert call(capsys, "--resume", "--run_dir", "parts", "--n_iter", "7", "--lr_drop", "7")[0] == 0
    assert train.load(here/"parts").cfg.lr_drop == 7


def test_an_earlier_run_is_moved_aside(here, capsys):
    for _ in range(3):
        status, out, _ = call(capsys, "--n_iter", "0")
        assert status == 0
    assert "earlier run: pcm is now pcm.2" in out
    for name in ("pcm", "pcm.1", "pcm.2"):
        assert (here/"run"/name/"checkpoint.npz").exists()


def test_resume_refuses_other_settings_and_damaged_checkpoints(here, capsys):
    assert call(capsys, "--n_iter", "0")[0] == 0
    path = here/"run/pcm/checkpoint.npz"
    good = path.read_bytes()
    for flags in (["--n_h0", "6"], ["--lr_out", "0.5"], ["--seed", "3"],
                  ["--device", "pcm_history", "--run_dir", "run/pcm"]):
        status, out, err = call(capsys, "--resume", *flags)
        assert status == 2 and err.count("\n") == 1 and flags[0] in err and path.read_bytes() == good
    random = np.random.default_rng(0)
    for trial in range(1000):
        data = bytearray(good)
        if trial % 4 == 0:
            data = data[:random.integers(len(data))]
        else:
            for at in random.integers(len(data), size=random.integers(1, 4)):
                data[at] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            loaded = train.load(path.parent)    # a flip in the archive's padding or times may be harmless
        except train.UserError as error:
            assert "\n" not in str(error)
        else:
            path.write_bytes(good)
            whole = train.load(path.parent)
            assert all(np.array_equal(a, b) for a, b in zip(train.jax.tree.leaves(loaded.state),
                                                            train.jax.tree.leaves(whole.state)))
            assert loaded._replace(state=0) == whole._replace(state=0)


def test_a_folder_in_use_is_refused(here, capsys):
    lock = train.hold(here/"run/pcm")
    status, _, err = call(capsys)
    assert status == 2 and "in use" in err
    lock.close()


def test_a_full_disk_loses_nothing(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (here/"file").write_text("old")
    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(train.UserError, match="No space left"):
        train.write(here/"file", b"new")
    assert (here/"file").read_text() == "old"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda end: end.name)
def test_an_ended_run_goes_on(here, end):
    process = launch(here, *TINY, "--n_iter", "1000000")
    deadline = time.time() + 200
    metrics = here/"run/pcm/metrics.csv"
    while time.time() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
        time.sleep(0.2)
    process.send_signal(end)
    _, err = process.communicate(timeout=100)
    if end == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + end and err.count("\n") == 1 and "--resume" in err
    assert train.load(here/"run/pcm").step >= 2*train.CHUNK
    shutil.rmtree(here/"run")


def test_a_users_device_trains(here, capsys):
    status, out, _ = call(capsys, "--n_iter", "2", "--device", str(ROOT/"tests/reram.json"))
    assert status == 0 and "reram devices" in out and (here/"img/drift_reram.png").exists()
    g = arrays(here/"run/reram")["readout"]
    assert np.all(g >= 2) and np.all(g <= 100) and g.max() > 5
    assert call(capsys, "--resume", "--device", str(ROOT/"tests/reram.json"))[0] == 0


values = st.one_of(st.text(max_size=4), st.sampled_from([
    "0", "1", "-1", "3", "2.5", "nan", "inf", "-inf", "1e9", "1e400", "x", "µ", "9999999999", "pcm", "perf", "--perf"]))
names = st.sampled_from([field.name for field in dataclasses.fields(train.Config)] + ["perf", "nonsense", "n", ""])


@settings(max_examples=500, deadline=None, derandomize=True)
@example([("nonsense", "\r0")])
@given(st.lists(st.tuples(names, values), max_size=4))
def test_any_command_line_is_taken_or_refused_in_one_line(flags):
    argv = [word for name, value in flags for word in (f"--{name}", value)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cfg, device = train.configure(train.given(argv)[0])
    except train.UserError as error:
        assert error.status == 2 and len(str(error).splitlines()) <= 1
    except SystemExit as end:    # --help among the words
        assert end.code == 0
    else:
        assert cfg.n_iter >= 0 and 0 < cfg.lr_out < np.inf and device.g_min < device.g_max


def test_snippets_of_the_readme_run():
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT/"README.md").read_text(), re.DOTALL):
        subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, check=True, capture_output=True)


def test_settings_of_the_readme_are_taken():
    text = (ROOT/"README.md").read_text()
    found = re.findall(r"^    python train\.py(.*?)(?:#|$)|`(?:python train\.py )?(--[^`]* [^`]*)`", text, re.MULTILINE)
    found = [(line or span).split() for line, span in found if not re.search(r"\b[A-Z]+\b|--help", line + span)]
    for flags in found:
        train.configure(train.given(flags)[0])
    assert len(found) > 20


def test_a_chips_life(here, capsys):
    assert call(capsys, "--n_iter", "0")[0] == 0
    code = f"import sys; sys.path.insert(0, {str(ROOT/'img')!r}); import lifelong; from pathlib import Path; " \
           "lifelong.__file__ = 'lifelong.py'; lifelong.main('run/pcm', n_chips=2)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.count("tasks 41 to 50") == 3 and (here/"lifelong.png").exists()


def test_the_saved_run_is_one_of_the_present_defaults():
    run = train.load(ROOT/"img/pcm")
    assert (run.cfg, run.device) == train.configure({"n_iter": run.step}) and run.step == 50_000
