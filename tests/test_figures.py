"""Figures show all that they are given; studies run from start to figure."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from conftest import TINY

import analog
import network
import train
from img import figures, presentation, studies

KEY = jax.random.key(5)
BASELINES = {"predicting 0": 4.2, "best function that ignores the task": 3.0}


def rows(n):
    """Rows of metrics.csv with errors that fall."""
    return [{"step": 200 * k, "loss": 24.0 / k} for k in range(1, n + 1)]


@pytest.mark.parametrize("n", [1, 5])
def test_the_axes_of_training_show_all_data(n):
    figure = figures.training(rows(n), BASELINES)
    low, high = figure.axes[0].get_ylim()
    assert low <= 3.0 and high >= 24.0 and low <= 24.0 / n


def episodes_of(n, n_levels, errors):
    """Episodes of n tasks on n_levels = 2^dac_bits levels, with errors [n, 2]."""
    cfg, _ = train.configure({"dac_bits": n_levels.bit_length() - 1, "task_size": 5})
    tasks = jax.vmap(train.family_of(cfg).task)(jax.random.split(KEY, n))
    return train.Episode({"mse": errors}, tasks, np.ones((n, 2, n_levels, 1)), None)


def results_of(**means):
    """What results.json holds of a meta-test."""
    usual = {
        "pulses": 3.0,
        "mse_day": 0.5,
        "rates": [55.0, 48.0],
        "silent": [12.0, 30.0],
        "spikes": 987.0,
    }
    return {name: {"mean": mean} for name, mean in (usual | means).items()}


def test_the_axes_of_testing_show_all_data():
    """Also with two levels and with errors far from the usual."""
    errors = np.geomspace(1e-2, 300.0, 16).reshape(8, 2)
    edges = np.linspace(-5, 5, 3)
    figure = figures.testing(edges, episodes_of(8, 2, errors), results_of())
    limits = {axes.get_xlim() for axes in figure.axes if axes.get_xscale() == "linear"}
    assert limits == {(-5, 5)}
    (chips,) = (axes for axes in figure.axes if axes.get_xscale() == "log")
    assert chips.get_xlim()[0] <= 0.01 and chips.get_xlim()[1] >= 300


def test_testing_draws_the_task_itself():
    """The curve of a task is its query, and goes through its samples but for the width of a
    level."""
    episodes = episodes_of(4, 64, np.ones((4, 2)))
    figure = figures.testing(np.linspace(-5, 5, 65), episodes, results_of())
    panels = {axes.get_label(): axes for axes in figure.axes}
    for panel, x, y in zip("ABCD", episodes.task.x, episodes.task.y, strict=True):
        truth = panels[panel].patches[0].get_data().values
        level = network.level(6, x)
        assert np.abs(truth[level] - y).max() < 5 * 10 / 64  # amplitude · width


def test_testing_says_what_the_network_does():
    figure = figures.testing(
        np.linspace(-5, 5, 9), episodes_of(4, 8, np.ones((4, 2))), results_of()
    )
    words = "".join(
        [axes.get_title() + "".join(text.get_text() for text in axes.texts) for axes in figure.axes]
    )
    for part in ("987 spikes", "55 and 48 Hz", "12 and 30 % silent", "3 pulses", "0.5 a day later"):
        assert part in words


@pytest.mark.parametrize("n, said, n_rows", [(5, "all 5", 5), (200, "64 of 200", 64)])
def test_a_raster_shows_every_spike_of_its_neurons(n, said, n_rows):
    t, z = np.arange(1.0, 101), np.zeros((100, n))
    z[9::20] = 1  # every neuron, at 10, 30, … 90 ms
    figure = figures.presentation(t, 1.5, [z], np.zeros(100), np.linspace(0, 2, 100), 3.0)
    raster, *_, readout = figure.axes
    assert "50 Hz" in raster.get_ylabel() and said in raster.get_ylabel()
    spikes = [list(row.get_positions()) for row in raster.collections]
    assert spikes == n_rows * [[10, 30, 50, 70, 90]]
    low, high = readout.get_ylim()
    assert low < 0 and high > 3 and "x = 1.5" in figure.get_suptitle()


def test_errors_that_a_logarithmic_axis_cannot_show_are_left_out():
    for before, after in (([1.0, 2.0], [0.0, -1e-9]), ([0.0], [0.0]), ([np.nan, 1.0], [2.0])):
        _, axes = figures.empty(4)
        figures.show_errors(axes, np.array(before), np.array(after), "3 pulses")
        low, high = axes.get_xlim()
        assert 0 < low < high < np.inf


def test_settings_of_the_users_matplotlib_have_no_say():
    with matplotlib.rc_context({"text.usetex": True, "font.family": "nowhere"}):
        figure = figures.training(rows(3), BASELINES)
        assert figures.png(figure, "run/1, seed 0")[:4] == b"\x89PNG"


def test_an_interval_needs_64_chips():
    assert "ci95" not in train.summary(np.arange(63.0))
    found = train.summary(np.arange(64.0))
    assert found["ci95"] == pytest.approx(1.96 * np.std(np.arange(64), ddof=1) / 8)


# ---- studies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [studies.restore, studies.refresh])
def test_keeping_a_readout_keeps_its_mean_weight(policy):
    """Five times, 1,000 s apart."""
    device = analog.PCM
    target = analog.conductances(device, jnp.full((1000, 1), 0.4))

    def again(readout, inputs):
        key, t = inputs
        return policy(key, device, readout, target, t)[0], None

    @jax.jit
    def last(key):
        xbar = analog.deploy(key, device, target)
        start = network.Tile(xbar, network.total(device, target))
        times = 1000.0 * jnp.arange(1.0, 6.0)
        readout = jax.lax.scan(again, start, (jax.random.split(key, 5), times))[0]
        return network.read(key, device, readout, 5100.0, True)

    w = last(KEY)
    # A read at g_min is clipped: 0.0045. A refresh loses that each time. The rest are 4 standard
    # errors.
    lost = 0.0045 * (6 if policy is studies.refresh else 1)
    assert abs(jnp.mean(w) - 0.4) < lost + 4 * jnp.std(w) / len(w) ** 0.5


def test_a_reset_readout_is_at_its_lowest():
    device = analog.PCM
    xbar = analog.deploy(KEY, device, jnp.full((2, 50, 1), 6.0))
    readout, done = studies.reset(KEY, device, network.Tile(xbar, 1.0), xbar.g, 100.0)
    assert readout.xbar.g.max() < 0.2 and done.resets.sum() == 100
    assert readout.reference == pytest.approx(100 * device.reset_mean)


def test_nothing_is_done_to_a_readout():
    xbar = analog.deploy(KEY, analog.PCM, jnp.full((2, 5, 1), 6.0))
    readout = network.Tile(xbar, 1.0)
    kept, done = studies.nothing(KEY, analog.PCM, readout, xbar.g, 100.0)
    assert kept is readout and done.pulses.sum() == done.resets.sum() == 0


def test_ridge_regression_finds_the_weights_that_made_its_samples():
    """And stays where it starts at a very large ridge."""
    e = jax.random.normal(KEY, (8, 3))
    w = jnp.array([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]])
    share = jnp.full(8, 1 / 8)
    samples = train.Samples(share, share[:, None] * (e @ w), 0.0)
    start = jnp.ones_like(w)
    np.testing.assert_allclose(studies.solve(e, samples, 1e-6, start), w, atol=1e-4)
    np.testing.assert_allclose(studies.solve(e, samples, 1e6, start), start, atol=1e-4)


@pytest.mark.parametrize("device", analog.DEVICES.values(), ids=analog.DEVICES)
def test_a_device_without_noise_and_drift_reads_what_it_has(device):
    quiet = studies.others_of(device)["no noise, no drift"]
    xbar = analog.fabricate(KEY, quiet, jnp.full((2, 50, 1), 6.0))
    xbar = analog.pulse(KEY, quiet, xbar, jnp.ones((2, 50, 1)), 0.0)
    read = analog.read(KEY, quiet, xbar, 1e6)
    assert jnp.ptp(read) == 0 and read[0, 0, 0] == pytest.approx(xbar.g[0, 0, 0])


def test_steps_of_adam_are_as_large_as_its_rate():
    """Those of a gradient that is always the same."""
    steps = studies.walk(jnp.zeros((4, 1)), lambda w: jnp.full(w.shape, 7.0))
    assert steps.shape == (100, 4, 1)
    np.testing.assert_allclose(steps, 1e-3, rtol=1e-3)


def test_devices_of_a_run_come_first_and_as_they_are():
    mine = analog.PCM._replace(t0=1.0)
    run = train.Run(None, {"pcm": mine}, None)
    found = studies.devices_for(run)
    assert found["pcm"] == mine and "perf" not in found
    assert next(iter(found)) == "pcm" and found.keys() == analog.DEVICES.keys() - {"perf"}


def save_tiny(folder):
    """A run of a tiny network that was not trained."""
    cfg, devices = train.configure(train.parse(TINY)[0])
    state = train.start(cfg, train.lot_of(cfg, devices))
    train.save(train.Run(cfg, devices, state), folder)


def test_a_study_from_start_to_figure(here, monkeypatch, capsys):
    monkeypatch.setattr(studies, "RESTS", (10.0, 1e6))
    save_tiny(here / "mine")
    studies.main(["drift", "mine", "--n", "3", "--out", "."])
    out = capsys.readouterr().out
    assert "second task, readout restored before, 1e+06 s" in out and "(n = 3)" in out
    assert (here / "drift.png").exists() and (here / "drift.json").exists()


def test_a_network_at_work_is_drawn(here, monkeypatch):
    save_tiny(here / "mine")
    monkeypatch.setattr(presentation, "FOLDER", here)
    presentation.draw("mine")
    assert (here / "network.png").exists()


@pytest.mark.parametrize("words", ["drift", "chips mine --n 0", "life mine other", "nothing mine"])
def test_bad_input_to_a_study_is_one_line(here, capsys, words):
    with pytest.raises(SystemExit) as end:
        studies.main(words.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
