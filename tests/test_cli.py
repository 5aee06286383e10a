"""The command line from start to figures, its errors, and what survives them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shlex
import signal
import time

import jax
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, TINY, arrays, call, launch, write_classes
from hypothesis import given, settings
from hypothesis import strategies as st

import analog
import train

FILES = ["checkpoint.npz", "config.json", "metrics.csv", "results.json"]
RERAM = str(ROOT / "tests" / "reram.json")
DRAW = train.draw  # itself, where a test replaces it
# A process of its own, whose figures go to img/ in its current folder.
WHOLE = """
import pathlib, train
train.CHUNK, train.HERE = 2, pathlib.Path.cwd()
train.end_at_once()
train.main()
"""


# ---- from start to figures -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder in which a process has run in one go on two of JAX's devices, and what it
    printed."""
    folder = tmp_path_factory.mktemp("a path with späces")
    places = {"JAX_NUM_CPU_DEVICES": "2"}
    process = launch(folder, "-c", WHOLE, *TINY, PYTHONIOENCODING="ascii", **places)
    out, err = process.communicate(timeout=400)
    assert (process.returncode, err) == (0, "")  # the progress bar is on stdout
    return folder, out


def assert_complete(run, out, n_inner):
    """A run folder holds all that a run leaves, and its table was printed."""
    assert set(FILES) <= {path.name for path in run.iterdir()}
    assert out.startswith(f"run folder run/{run.name}, tasks ")
    assert f"squared error after look {n_inner}" in out
    results = json.loads((run / "results.json").read_text())
    assert results["mse"]["n"] == 5 and len(results["mse"]["mean"]) == n_inner + 1
    checkpoint = arrays(run)
    assert checkpoint["step"] == 6 and checkpoint["hidden1"].shape == (2, 6, 4)
    np.testing.assert_allclose(
        checkpoint["theta"], np.exp(checkpoint["log_theta"]), rtol=1e-6
    )


def assert_figures(folder):
    """The figures of a run are there and not empty."""
    for name in ("meta_training", "meta_testing"):
        image = matplotlib.image.imread(folder / "img" / f"{name}.png")
        assert image.shape[1] >= 600 and image[..., :3].std() > 0.02


def test_from_start_to_figures(whole):
    folder, out = whole
    assert_complete(folder / "run" / "1", out, 2)
    assert_figures(folder)
    assert "?|?W| over the synapses" in out  # on a terminal that lacks the signs
    g = arrays(folder / "run" / "1")["readout"]
    assert np.float32(0.1) <= g.min() and g.max() <= 10
    results = json.loads((folder / "run" / "1" / "results.json").read_text())
    assert results["devices"].keys() == {"pcm", "pcm_history"}
    assert results["devices"]["pcm"]["mse_day"] == results["mse_day"]


def test_lines_on_a_device_file_from_start_to_figures(quick, monkeypatch):
    monkeypatch.setattr(train, "draw", DRAW)
    status, out, err = call("--tasks", "lines", "--device", RERAM)
    assert (status, err) == (0, "")
    assert_complete(quick / "run" / "1", out, 2)
    assert_figures(quick)
    run = train.load("run/1")
    assert run.devices == dict([analog.load_device(RERAM)]) and run.cfg.tasks == "lines"
    assert arrays(quick / "run" / "1")["readout"].min() >= 2  # its g_min


def test_a_run_keeps_all_settings(whole):
    folder = whole[0] / "run" / "1"
    saved = json.loads((folder / "config.json").read_text())
    assert train.Config(**saved["config"]) == train.load(folder).cfg
    assert saved["config"]["n_h0"] == 5 and saved["data"] is None
    described = map(analog.from_constants, saved["device"])
    assert dict(described) == {name: analog.DEVICES[name] for name in ("pcm", "pcm_history")}
    assert saved["versions"]["jax"] == jax.__version__
    run = train.load(folder)
    assert [row["step"] for row in run.rows] == [2, 4, 6]
    assert all(np.isfinite(list(row.values())).all() for row in run.rows)
    for name in run.devices:
        with np.load(folder / f"chips_{name}.npz") as errors:
            assert errors["mse"].shape == (5, 3) and errors["mse_day"].shape == (5,)


def test_after_a_full_disk_a_run_goes_on_and_ends_the_same(quick, monkeypatch):
    replace, moved = train.os.replace, []

    def full(part, path):
        moved.append(path.name)
        if moved.count("checkpoint.npz") == 3:  # that of iteration 4
            raise OSError(28, "No space left on device")
        replace(part, path)

    assert call("--run_dir", "whole")[0] == 0
    run = quick / "run" / "1"
    monkeypatch.setattr(train.os, "replace", full)
    status, _, err = call()
    assert status == 1 and err.count("\n") == 1
    assert "No space left" in err
    assert arrays(run)["step"] == 2 and not list(run.glob(".check*"))
    monkeypatch.setattr(train.os, "replace", replace)
    status, out, _ = call("--resume")
    assert status == 0 and "resuming run/1 after iteration 2" in out
    assert_same(quick / "whole", run)


def assert_same(one, other):
    """Two runs have left the same bytes."""
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    for name in ("metrics.csv", "results.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


CLASSES = "--n_way 3 --task_size 6 --drive 1 --perf".split()


def test_classes_from_start_to_figures(here, monkeypatch):
    monkeypatch.setattr(train, "HERE", here)
    flags = "--tasks", write_classes("few.npz"), *CLASSES
    status, out, err = call(*flags, "--run_dir", "whole")
    assert (status, err) == (0, "") and "accuracy (%) of chance" in out
    assert_figures(here)
    results = json.loads((here / "whole" / "results.json").read_text())
    assert len(results["accuracy"]["mean"]) == 3 and 0 <= results["accuracy_day"]["mean"] <= 100
    about = json.loads((here / "whole" / "config.json").read_text())["data"]
    content = (here / "few.npz").read_bytes()
    assert about["sha256"] == hashlib.sha256(content).hexdigest()
    with np.load("few.npz") as file:
        training, test = file["x"][~file["test"]], file["x"][file["test"]]
    low, high = training.min(), training.max()
    assert (about["low"], about["high"]) == (low, high)
    assert about["clipped"] == np.sum((test < low) | (test > high)) > 0
    assert f"{about['clipped']} numbers of the test part were clipped" in out

    (here / "few.npz").write_bytes(content + b"x")
    status, _, err = call(*flags, "--run_dir", "whole", "--resume")
    assert status == 2 and err.count("\n") == 1 and "few.npz is not the file that it was" in err


# ---- run folders ---------------------------------------------------------------------------------


def test_a_new_run_has_a_folder_of_its_own(quick):
    for name in ("1", "2"):
        status, out, _ = call("--n_iter", "2")
        assert status == 0 and f"run folder run/{name}," in out
    (quick / "run" / "other").mkdir()
    assert call("--n_iter", "2", "--preset", "one_look")[0] == 0
    assert {path.name for path in (quick / "run").iterdir()} == {"1", "2", "3", "other"}
    (quick / "run" / "10").mkdir()  # of a run that was killed before it saved anything
    status, out, _ = call("--n_iter", "4", "--resume", "--preset", "one_look")
    assert status == 0 and "resuming run/3 after iteration 2" in out
    assert arrays(quick / "run" / "2")["step"] == 2
    assert arrays(quick / "run" / "3")["step"] == 4


def test_a_folder_that_holds_a_run_is_refused(quick):
    assert call("--run_dir", "mine")[0] == 0
    before = (quick / "mine" / "checkpoint.npz").read_bytes()
    status, _, err = call("--run_dir", "mine")
    assert status == 2 and err.count("\n") == 1 and "--resume" in err
    assert (quick / "mine" / "checkpoint.npz").read_bytes() == before


def test_resume_goes_on_where_it_should(quick):
    assert call("--run_dir", "whole")[0] == 0
    assert call("--run_dir", "parts", "--n_iter", "2")[0] == 0
    assert call("--run_dir", "parts", "--n_iter", "6", "--resume")[0] == 0
    assert_same(quick / "whole", quick / "parts")
    assert call("--run_dir", "parts", "--resume")[0] == 0  # n_iter is reached: only tests
    assert_same(quick / "whole", quick / "parts")
    status, _, err = call("--run_dir", "parts", "--resume", "--n_iter", "3")
    assert status == 2 and "past --n_iter 3" in err
    assert call("--run_dir", "parts", "--resume", "--n_iter", "8", "--lr_drop", "8")[0] == 0
    assert train.load("parts").cfg.lr_drop == 8


def test_a_preset_that_disagrees_is_refused_at_resume(quick):
    assert call("--preset", "one_look")[0] == 0
    assert call("--preset", "one_look", "--resume", "--n_iter", "8")[0] == 0
    cfg = train.load("run/1").cfg
    assert (cfg.n_iter, cfg.n_inner, cfg.gain_out) == (8, 2, 0.12)  # flags win
    assert call("--n_iter", "2", "--run_dir", "mine")[0] == 0
    status, _, err = call("--preset", "one_look", "--run_dir", "mine", "--resume")
    assert status == 2 and err.count("\n") == 1 and "other devices" in err


@pytest.mark.parametrize("flags", ["--lr_out 0.5", "--seed 3", "--device perf", "--tasks lines"])
def test_resume_refuses_other_settings(quick, flags):
    assert call("--run_dir", "mine", "--n_iter", "2")[0] == 0
    before = (quick / "mine" / "checkpoint.npz").read_bytes()
    status, _, err = call("--run_dir", "mine", "--n_iter", "2", "--resume", *flags.split())
    assert status == 2 and err.count("\n") == 1 and flags.strip("-").split()[0] in err
    assert (quick / "mine" / "checkpoint.npz").read_bytes() == before


def refused(folder):
    """What load says of a folder that it refuses."""
    with pytest.raises(train.Refused) as refusal:
        train.load(folder)
    return str(refusal.value)


def test_what_a_run_lacks_is_refused_by_name(quick):
    assert call("--run_dir", "mine", "--n_iter", "2")[0] == 0
    config, checkpoint = quick / "mine" / "config.json", quick / "mine" / "checkpoint.npz"
    good, found = config.read_text(), arrays(quick / "mine")
    for field in dataclasses.fields(train.Config):
        saved = json.loads(good)
        del saved["config"][field.name]
        config.write_text(json.dumps(saved))
        assert field.name in refused("mine")
    config.write_text(good.replace('"n_h0": 5', '"n_h0": 6'))
    assert "other code: cannot reshape" in refused("mine")
    config.write_text(good)
    for name in found.keys() - {"theta"}:
        np.savez(checkpoint, **{key: x for key, x in found.items() if key != name})
        assert name in refused("mine")


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("config", "n_iter", "8"),
        ("config", "n_iter", 8.0),
        ("config", "compensate", "false"),
        ("config", "compensate", 0),
        ("config", "tau_mem", None),
        ("config", "tau_mem", -1.0),
        ("config", "n_bits", 9),
        ("config", "rule", ["comparators"]),
        ("config", "tasks", "nowhere.npz"),
        ("config", "more", 1),
        (None, "config", [1]),
        (None, "device", "pcm"),
        (None, "data", {}),
        (None, "versions", None),
        (None, "versions", "x"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_one_line(quick, part, name, value):
    assert call("--run_dir", "mine", "--n_iter", "2")[0] == 0
    path = quick / "mine" / "config.json"
    saved = json.loads(path.read_text())
    (saved[part] if part else saved)[name] = value
    path.write_text(json.dumps(saved))
    status, _, err = call("--run_dir", "mine", "--resume")
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: mine holds no run")
    assert part is None or str(value if name == "tasks" else name) in err


def test_damaged_checkpoints_are_refused_in_one_line(quick):
    assert call("--run_dir", "mine", "--n_iter", "2")[0] == 0
    path = quick / "mine" / "checkpoint.npz"
    good, random = path.read_bytes(), np.random.default_rng(0)
    whole = jax.tree.leaves(train.load("mine").state)
    for trial in range(60):
        data = bytearray(good)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data[: random.integers(len(data))] if trial % 4 == 0 else data)
        try:
            loaded = train.load("mine")  # a flip in the archive's padding may be harmless
        except train.Refused as error:
            assert "\n" not in str(error) and "mine" in str(error)
        else:
            leaves = jax.tree.leaves(loaded.state)
            assert all(np.array_equal(a, b) for a, b in zip(leaves, whole, strict=True))


def test_the_order_of_devices_is_that_of_the_report_alone(quick):
    for names in ("ibm,pcm", "pcm,ibm"):
        assert call("--device", names, "--run_dir", names)[0] == 0
    one, other = arrays("ibm,pcm"), arrays("pcm,ibm")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    for names in ("ibm,pcm", "pcm,ibm"):
        results = json.loads((quick / names / "results.json").read_text())
        assert list(results["devices"]) == names.split(",")
        first, _ = results["devices"].values()
        assert results["mse"] == first["mse"]
    assert call("--device", "pcm,ibm", "--run_dir", "ibm,pcm", "--resume")[0] == 0
    assert list(train.load("ibm,pcm").devices) == ["ibm", "pcm"]


# ---- interruptions -------------------------------------------------------------------------------


def quick_process(folder, *flags, command="import conftest; conftest.quick_main()"):
    """A run of stand-ins in a process of its own."""
    return launch(folder, "-c", command, *TINY, "--n_iter", "24", "--run_dir", "run", *flags)


def wait_for_step(process, folder, step):
    """Wait until a run has saved the iteration."""
    deadline = time.time() + 100
    while time.time() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if arrays(folder / "run")["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_an_ended_run_goes_on_and_ends_the_same(quick):
    assert call("--n_iter", "24", "--run_dir", "whole")[0] == 0
    for step, end in enumerate((signal.SIGKILL, signal.SIGINT)):
        process = quick_process(quick, *(["--resume"] if step > 0 else []))
        wait_for_step(process, quick, 6 * step)
        time.sleep(0.01 * step)
        process.send_signal(end)
        process.communicate(timeout=10)
        assert process.returncode == -end
    process = quick_process(quick, "--resume")
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 0
    assert_same(quick / "whole", quick / "run")


def test_a_run_that_diverges_stops_with_one_line(quick, monkeypatch):
    good = train.train_chunk

    def chunk(*arguments):
        state, measured = good(*arguments)
        return state, {**measured, "loss": np.nan} if arguments[-2] == 2 else measured

    monkeypatch.setattr(train, "train_chunk", chunk)
    status, _, err = call()
    assert status == 1 and err.count("\n") == 1 and "not finite; try" in err
    assert train.load("run/1").step == 2


def test_too_little_memory_is_one_line(quick, monkeypatch):
    def chunk(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(train, "train_chunk", chunk)
    status, _, err = call()
    assert status == 1 and err.startswith("error: out of memory; try fewer tasks")


# ---- surroundings --------------------------------------------------------------------------------


def test_a_log_shows_progress(quick):
    assert re.search(r"6/6 .*loss=\d+\.\d", call()[1])


def test_a_table_has_the_columns_of_all_its_rows():
    """A run that other code began goes on with other columns."""
    table = train.csv_of([{"step": 1, "old": 2}, {"step": 3, "new": 4}])
    assert table.split() == [b"step,old,new", b"1,2,", b"3,,4"]


def test_a_side_product_does_not_end_a_run(quick, monkeypatch):
    """The name of the folder is no formula, and img/ cannot be written."""
    monkeypatch.setattr(train, "draw", DRAW)
    (quick / "img").write_text("a file where the folder should be")
    status, out, err = call("--run_dir", "a$x_$b\udcff")
    assert (status, err) == (0, "") and "warning: cannot write" in out
    run = quick / "a$x_$b\udcff"
    assert matplotlib.image.imread(run / "meta_testing.png").std() > 0.02
    assert b"\r" not in (run / "metrics.csv").read_bytes()


def test_names_of_devices_may_have_spaces_around(here):
    cfg, devices = train.configure({"device": "pcm , ibm"})
    assert list(devices) == ["pcm", "ibm"] and cfg.device == "pcm,ibm"
    status, _, err = call("--device", f"pcm,{RERAM}")
    assert status == 2 and "'pcm': 12.0, 'reram': 100.0" in err


def test_a_platform_that_is_absent_is_one_line(tmp_path):
    process = launch(tmp_path, str(ROOT / "train.py"), JAX_PLATFORMS="tpu")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.count("\n") == 1 and "JAX cannot start" in err


def test_what_has_changed_since_is_said(quick):
    assert call("--n_iter", "2", "--run_dir", "mine")[0] == 0
    _, out, _ = call("--n_iter", "4", "--run_dir", "mine", "--resume")
    assert "changed since: none" in out
    config = quick / "mine" / "config.json"
    saved = json.loads(config.read_text())
    saved["versions"] |= {"jax": "0.0", "jax_enable_x64": True}
    config.write_text(json.dumps(saved))
    _, out, _ = call("--n_iter", "6", "--run_dir", "mine", "--resume")
    assert "after iteration 4; versions changed since: ['jax', 'jax_enable_x64']" in out


def test_a_resume_that_only_tests_keeps_the_versions_of_the_training(quick):
    assert call("--run_dir", "mine")[0] == 0
    config = quick / "mine" / "config.json"
    saved = json.loads(config.read_text())
    saved["versions"]["jax"] = "0.0"
    config.write_text(json.dumps(saved))
    assert call("--run_dir", "mine", "--resume")[0] == 0
    assert json.loads(config.read_text())["versions"]["jax"] == "0.0"
    assert call("--run_dir", "mine", "--resume", "--n_iter", "8")[0] == 0
    assert json.loads(config.read_text())["versions"]["jax"] == jax.__version__


def test_the_commit_is_that_of_the_scripts(tmp_path, monkeypatch):
    """Not that of a repository which the environment names."""
    train.provenance.cache_clear()
    expected = train.provenance()["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    train.provenance.cache_clear()
    assert train.provenance()["commit"] == expected


def test_numbers_that_are_not_finite_are_null_and_counted(here):
    found = train.summary([[1.0, np.nan], [2.0, 3.0], [np.inf, 4.0]])
    train.write_json(here / "x.json", found)
    saved = json.loads((here / "x.json").read_text())
    assert saved == {"mean": [None, None], "n": 3, "not_finite": 2}


def test_a_mean_of_many_keeps_its_digits():
    x = np.full(2**20, 0.1, np.float32)
    assert train.summary(x)["mean"] == pytest.approx(np.float32(0.1), rel=1e-12)


def test_a_folder_is_that_of_one_run_at_a_time(quick):
    """The second of two is refused; what a killed one was writing is removed."""
    assert call("--run_dir", "mine", "--n_iter", "2")[0] == 0
    left = quick / "mine" / ".checkpoint.npz.0123.part"
    left.write_bytes(b"half a file")
    with train.held(quick / "mine"):
        status, _, err = call("--run_dir", "mine", "--resume")
        assert status == 2 and err == "error: mine is in use by another run\n"
    assert call("--run_dir", "mine", "--resume")[0] == 0
    assert sorted(path.name for path in (quick / "mine").iterdir() if path.name[0] == ".") == []


def test_another_package_img_does_not_stand_in(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "__init__.py").write_text("raise SystemExit('not ours')")
    process = launch(tmp_path, str(ROOT / "train.py"), "--help", PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "") and "usage" in out


def test_no_iteration_leaves_the_figures_of_others(quick, monkeypatch):
    monkeypatch.setattr(train, "draw", DRAW)
    (quick / "img").mkdir()
    theirs = quick / "img" / "meta_training.png"
    theirs.write_bytes(b"theirs")
    assert call("--n_iter", "0")[0] == 0
    assert theirs.read_bytes() == b"theirs"
    assert not (quick / "run" / "1" / "meta_training.png").exists()


def test_a_run_needs_no_stdout(quick):
    close = "import sys; sys.stdout = None; import conftest; conftest.quick_main()"
    process = quick_process(quick, "--n_iter", "2", command=close)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert arrays(quick / "run")["step"] == 2


# ---- the command line ----------------------------------------------------------------------------

BAD = [
    "--n_iter -1",
    "--n_inner 0",
    "--n_bits 1",
    "--n_bits 9",
    "--dac_bits 0",
    "--task_size 0",
    "--n_rows 0",
    "--n_h0 0",
    "--n_h1 0",
    "--batch_train 0",
    "--n_chips 0",
    "--lr_out 0",
    "--lr_out nan",
    "--lr_out inf",
    "--tau_mem 0",
    "--tau_out -1",
    "--tau_out nan",
    "--off_noise -0.1",
    "--tprog 100.1",
    "--tprog 99",
    "--twait 0.5",
    "--tlook 1.1",
    "--max_rest 5",
    "--ttest 101",
    "--max_age 9",
    "--n_iter two",
    "--lr_out x",
    "--nonsense 3",
    "--device nowhere",
    f"--device {'long' * 99}",
    "--device pcm,pcm",
    "--device pcm,perf --batch_train 5",
    f"--device pcm,{RERAM}",
    "--seed -1",
    "--resume",
    "--run_dir /proc/nowhere",
    "--lr",
    "--n_it 3",
    "stray",
    "--grad_thr 0",
    "--lr_drop -2",
    "--tasks x",
    "--rule x",
    "--preset x",
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(here, flags):
    status, out, err = call(*shlex.split(flags))
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert not list(here.rglob("*.npz"))


def test_help_names_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "default: 0.2)" in shown
    assert "as soon as the samples have been shown" in shown
    assert all(f"--{field.name} " in shown for field in dataclasses.fields(train.Config))


WORDS = "0 1 -1 3 2.5 nan inf -inf 1e9 1e400 x µ 9999999999 pcm perf pcm,ibm one_look --perf"
VALUES = st.one_of(st.text(max_size=4), st.sampled_from(WORDS.split()))
SETTINGS = [field.name for field in dataclasses.fields(train.Config)]
NAMES = st.sampled_from([*SETTINGS, "perf", "preset", "nonsense", "n", ""])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_any_command_line_is_taken_or_refused_in_one_line(flags):
    argv = [word for name, value in flags for word in (f"--{name}", value)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cfg, devices = train.configure(train.parse(argv)[0])
    except train.Refused as error:
        assert error.status == 2 and "\n" not in str(error)
    except SystemExit as end:
        assert end.code == 0  # --help among the words
    else:
        assert cfg.n_iter >= 0 < cfg.lr_out
        assert all(device.g_min < device.g_max for device in devices.values())


def test_times_are_as_soon_as_the_samples_allow():
    """A presentation takes 0.05 s, and a read after the pulses t_verify, 1 s."""
    cfg, _ = train.configure({"n_inner": 8})
    assert (cfg.tprog, cfg.tlook, cfg.ttest) == (101.0, 20.0, 251.0)
    cfg, _ = train.configure({"task_size": 600, "n_inner": 2})
    assert (cfg.tprog, cfg.tlook, cfg.ttest) == (130.0, 31.0, 171.0)
    cfg, _ = train.configure({"tread": 1000.0, "n_inner": 1, "twait": 50.0})
    assert (cfg.tprog, cfg.ttest) == (1001.0, 1051.0)


@pytest.mark.parametrize("flag, shortest", [("tprog", 101.0), ("tlook", 2.0), ("ttest", 242.0)])
def test_what_is_too_early_is_refused_with_the_earliest(flag, shortest):
    with pytest.raises(train.Refused, match=f"--{flag} must be {shortest} s or more"):
        train.configure({"n_inner": 8, flag: shortest - 0.125})
    cfg, _ = train.configure({"n_inner": 8, flag: shortest})
    assert getattr(cfg, flag) == shortest


def test_verifying_slowly_takes_its_time(here):
    """A device whose verify reads come late."""
    constants = analog.describe("slow", analog.PCM) | {"t_verify": 30.0}
    (here / "slow.json").write_text(json.dumps(constants))
    cfg, _ = train.configure({"device": "pcm,slow.json", "n_inner": 2, "twait": 30.0})
    assert (cfg.device, cfg.tlook, cfg.ttest) == ("pcm,slow", 31.0, 162.0)
    with pytest.raises(train.Refused, match="--twait must be t_verify, 30.0 s, or more"):
        train.configure({"device": "pcm,slow.json", "twait": 29.0})


def test_flags_beside_a_preset_win():
    given, *_ = train.parse(["--preset", "one_look", "--n_iter", "7"])
    assert given == train.PRESETS["one_look"] | {"n_iter": 7}


PAGES = [ROOT / "README.md", ROOT / "img" / "gallery" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_of_the_pages_are_taken(page, monkeypatch):
    """Those of an earlier commit's studies are for that commit."""
    monkeypatch.chdir(ROOT)
    text, *_ = page.read_text().split("# Studies of commit")
    commands = re.findall(r"python train\.py([^`#\n|]*)", text)
    assert commands
    for command in commands:
        words = [word for word in shlex.split(command) if word != "--help"]
        if not re.search(r"\b[A-Z]{2,}\b|…|\.\.\.", command):
            train.configure(train.parse(words)[0])


def test_the_shipped_network_learns_as_the_readme_shows():
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    snippet = snippet.replace("/path/to/meta-analog", str(ROOT))
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(snippet, names)
    x = np.linspace(-5, 5, 64)
    y = names["learned"].predict(jax.random.key(3), x)[:, 0]
    assert names["learned"].pulses.sum() > 10
    assert np.mean((y - 2 * np.sin(x + 1)) ** 2) < 1  # predicting 0 has 2
