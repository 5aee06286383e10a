"""Figures show all that they are given; studies run from start to figure."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from conftest import TINY, begun, configured, tile_of, write_classes

import analog
import network
import train
from img import figures, presentation, studies

KEY = jax.random.key(5)
BASELINES = {
    "squared error of predicting 0": 4.2,
    "squared error of the best function that ignores the task": 3.0,
}
TESTED = {"mse": {"mean": [2.9, 0.1]}, "baselines": BASELINES}  # of results.json


def rows(n):
    """Rows of metrics.csv with errors that fall."""
    return [{"step": 200 * k, "loss": 1.0, "mse": 24.0 / k} for k in range(1, n + 1)]


@pytest.mark.parametrize("n", [1, 5])
def test_the_axes_of_training_show_all_data(n):
    figure = figures.training(rows(n), TESTED)
    low, high = figure.axes[0].get_ylim()
    assert low <= 3.0 and high >= 24.0 and low <= 24.0 / n


def test_the_training_of_classes_shows_their_accuracy():
    shown = [{"step": 200, "mse": 0.5, "accuracy": 40.0}, {"step": 400, "accuracy": 90.0}]
    levels = {"accuracy (%) of chance": 20.0}
    results = {"accuracy": {"mean": [19.0, 90.0]}, "baselines": levels}
    figure = figures.training(shown, results)
    (axes,) = figure.axes
    assert axes.get_ylim() == (0, 100) and "accuracy" in axes.get_ylabel()
    assert axes.lines[0].get_ydata().tolist() == [40, 90]
    assert [text.get_text() for text in axes.texts] == ["chance: 20"]


def episodes_of(family, n, **measured):
    """Episodes of n tasks of a family, with what they measured."""
    u = family.pool(KEY)
    tasks = jax.vmap(family.task, (0, None))(jax.random.split(KEY, n), u)
    outputs = np.ones((n, 2, len(u), family.n_out))
    found = train.Episode(measured, tasks, np.broadcast_to(u, (n, *u.shape)), outputs, None)
    return jax.device_get(found)


def sinusoids(n, n_bits, errors):
    """Episodes of n sinusoids on 2^n_bits levels, with errors [n, 2]."""
    return episodes_of(train.Regression(train.Sinusoid, n_bits, 5), n, mse=errors)


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
    figure = figures.testing(sinusoids(8, 1, errors), results_of())
    limits = {axes.get_xlim() for axes in figure.axes if axes.get_xscale() == "linear"}
    assert limits == {(-5, 5)}
    (chips,) = (axes for axes in figure.axes if axes.get_xscale() == "log")
    assert chips.get_xlim()[0] <= 0.01 and chips.get_xlim()[1] >= 300


def test_testing_draws_the_tasks_themselves():
    """The curve of a task is its query, and goes through its samples but for the width of a
    level."""
    episodes = sinusoids(4, 6, np.ones((4, 2)))
    figure = figures.testing(episodes, results_of())
    panels = {axes.get_label(): axes for axes in figure.axes}
    support, query = episodes.task
    for i, panel in enumerate("ABCD"):
        truth = panels[panel].patches[0].get_data().values
        np.testing.assert_allclose(truth, 64 * query.y[i, :, 0], rtol=1e-5)
        x, y = panels[panel].lines[0].get_data()
        level = network.level(6, x)
        np.testing.assert_array_equal(level, np.flatnonzero(support.share[i]))
        assert len(x) and np.abs(truth[level] - y).max() < 5 * 10 / 64  # amplitude · width


def test_testing_says_what_the_network_does():
    figure = figures.testing(sinusoids(4, 3, np.ones((4, 2))), results_of())
    words = "".join(
        [axes.get_title() + "".join(text.get_text() for text in axes.texts) for axes in figure.axes]
    )
    for part in ("987 spikes", "55 and 48 Hz", "12 and 30 % silent", "3 pulses", "0.5 a day later"):
        assert part in words


@pytest.mark.parametrize("side, n_panels", [(4, 3 * 2 + 3 * 8 + 1), (0, 1)])
def test_the_figure_of_classes_shows_images_where_there_are_any(here, side, n_panels):
    """Frames tell which queries were answered rightly: here all of one class, as the largest of
    equal outputs is the first."""
    data = train.load_data(write_classes("few.npz"))._replace(side=side)
    cfg, _ = configured(n_way=3, task_size=6)
    family = train.classes_of(cfg, data, True)
    episodes = episodes_of(family, 4, accuracy=np.full((4, 3), 33.0))
    found = {"accuracy": [20.0, 30.0, 33.0], "accuracy_day": 31.0}
    results = results_of(**found) | {"baselines": {"accuracy (%) of chance": 33.3}}
    figure = figures.classes(side, episodes, results)
    assert len(figure.axes) == n_panels
    words = [text.get_text() for text in figure.axes[-1].texts]
    assert words == ["chance", "33 %, a day later 31 %"]
    if side:
        wrong = [axes.spines["top"].get_edgecolor() for axes in figure.axes[6:-1]]
        assert wrong[:8] == 8 * [matplotlib.colors.to_rgba(figures.AFTER)]
        assert wrong[8:] == 16 * [matplotlib.colors.to_rgba(figures.LATE)]
        seen = [axes.images[0].get_array().ravel() for axes in figure.axes[:-1]]
        assert all(np.any(np.all(episodes.u[0] == image, 1)) for image in seen)


@pytest.mark.parametrize("n, said, n_rows", [(5, "all 5", 5), (200, "64 of 200", 64)])
def test_a_raster_shows_every_spike_of_its_neurons(n, said, n_rows):
    t, z = np.arange(1.0, 101), np.zeros((100, n))
    z[9::20] = 1  # every neuron, at 10, 30, … 90 ms
    figure = figures.presentation(t, [1.5], [z], np.zeros(100), np.linspace(0, 2, 100), 3.0)
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
        figure = figures.training(rows(3), TESTED)
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
        start = tile_of(device, xbar, target)
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
    readout, done = studies.reset(KEY, device, tile_of(device, xbar, xbar.g), xbar.g, 100.0)
    assert readout.xbar.g.max() < 0.2 and done.resets.sum() == 100
    assert readout.reference == pytest.approx(100 * device.reset_mean)


def test_ridge_regression_finds_the_weights_that_made_its_samples():
    """And stays where it starts at a very large ridge."""
    e = jax.random.normal(KEY, (8, 3))
    w = jnp.array([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]])
    share = jnp.full(8, 1 / 8)
    samples = train.Samples(share, share[:, None] * (e @ w), 0.0)
    start = jnp.ones_like(w)
    np.testing.assert_allclose(studies.solve(e[None], samples, 1e-6, start), w, atol=1e-4)
    np.testing.assert_allclose(studies.solve(e[None], samples, 1e6, start), start, atol=1e-4)


@pytest.mark.parametrize("device", analog.DEVICES.values(), ids=analog.DEVICES)
def test_a_device_without_noise_and_drift_reads_what_it_has(device):
    quiet = studies.others_of(device)["no noise, no drift"]
    xbar = analog.fabricate(KEY, quiet, jnp.full((2, 50, 1), 6.0))
    xbar = analog.pulse(KEY, quiet, xbar, jnp.ones((2, 50, 1)), 0.0)
    read = analog.read(KEY, quiet, xbar, 1e6)
    assert jnp.ptp(read) == 0 and read[0, 0, 0] == pytest.approx(xbar.g[0, 0, 0])


def test_the_best_float_step_lowers_the_error_most():
    """More than one that is a little shorter or longer."""
    e = jax.random.normal(KEY, (8, 3))
    w = jnp.ones((3, 2))
    samples = train.samples_of(jnp.ones(8), 2.0 * e[:, :2])
    step = studies.best_step(e, w, samples)
    errors = [train.squared_error(e @ (w + x * step), samples) for x in (0.0, 0.9, 1.0, 1.1)]
    assert errors[2] < min(errors[1], errors[3]) < errors[0]
    gradient = train.delta_rule(e, e @ w, samples)
    np.testing.assert_allclose(step / gradient, (step / gradient)[0, 0], rtol=1e-4)
    assert jnp.sum(step * gradient) < 0


def test_devices_of_a_run_come_first_and_as_they_are():
    mine = analog.PCM._replace(t0=1.0)
    run = train.Run(None, {"pcm": mine}, None, None)
    found = studies.devices_for(run)
    assert found["pcm"] == mine and "perf" not in found
    assert next(iter(found)) == "pcm" and found.keys() == analog.DEVICES.keys() - {"perf"}


def save_tiny(folder):
    """A run of a tiny network that was not trained."""
    train.save(begun(*train.configure(train.parse(TINY)[0])), folder)


def test_the_nearest_mean_is_that_of_a_plain_loop(here):
    cfg, _ = configured(n_way=3, task_size=6, tasks=write_classes("few.npz"))
    family = train.families_of(cfg).testing
    g = network.Network((), jnp.ones((2, 4, 1)))
    meta = train.Meta(g, None, None)

    @jax.jit
    def found(key):
        _, u, task, _ = train.scene(key, meta, cfg, family, analog.PERF)
        return u, task, studies.nearest_mean(key, meta, cfg, family, analog.PERF)

    u, (support, query), error = jax.device_get(found(KEY))
    means = np.stack([u[column > 0].mean(0) for column in support.y.T])
    wrong = [
        np.argmin([np.linalg.norm(x - mean) for mean in means]) != np.argmax(y)
        for x, y in zip(u, query.y, strict=True)
        if y.any()
    ]
    (error,) = error.values()
    np.testing.assert_allclose(error, 100 * np.mean(wrong), atol=1e-3)


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
