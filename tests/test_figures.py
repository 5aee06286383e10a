"""Figures show all that they are given; studies run from start to figure."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from conftest import TINY

import analog
import train
from img import figures, studies

KEY = jax.random.key(5)
YARDSTICKS = {"predicting 0": 4.2, "best function that ignores the task": 3.0}


def rows(n):
    """Rows of metrics.csv with errors that fall."""
    return [{"step": 200 * k, "loss": 24.0 / k} for k in range(1, n + 1)]


@pytest.mark.parametrize("n", [1, 5])
def test_the_axes_of_training_show_all_data(n):
    figure = figures.training(rows(n), YARDSTICKS)
    low, high = figure.axes[0].get_ylim()
    assert low <= 3.0 and high >= 24.0 and low <= 24.0 / n


def test_the_axes_of_testing_show_all_data():
    """Also with two levels and with errors far from the usual."""
    cfg, _ = train.configure({"dac_bits": 1, "task_size": 5})
    trial = jax.vmap(lambda key: train.draw_trial(key, cfg))(jax.random.split(KEY, 8))
    errors = np.geomspace(1e-2, 300.0, 16).reshape(8, 2)
    episodes = train.Episode({"mse": errors}, trial, np.ones((8, 3, 2)))
    edges = np.linspace(-5, 5, 3)
    figure = figures.testing(edges, episodes, {"pulses": {"mean": 3.0}})
    limits = {axes.get_xlim() for axes in figure.axes if axes.get_xscale() == "linear"}
    assert limits == {(-5, 5)}
    (chips,) = (axes for axes in figure.axes if axes.get_xscale() == "log")
    assert chips.get_xlim()[0] <= 0.01 and chips.get_xlim()[1] >= 300


def test_errors_that_a_logarithmic_axis_cannot_show_are_left_out():
    for before, after in (([1.0, 2.0], [0.0, -1e-9]), ([0.0], [0.0]), ([np.nan, 1.0], [2.0])):
        _, axes = figures.empty(4)
        figures.show_errors(axes, np.array(before), np.array(after), 3.0)
        low, high = axes.get_xlim()
        assert 0 < low < high < np.inf


def test_settings_of_the_users_matplotlib_have_no_say():
    with matplotlib.rc_context({"text.usetex": True, "font.family": "nowhere"}):
        figure = figures.training(rows(3), YARDSTICKS)
        assert figures.png(figure, "run/pcm, seed 0")[:4] == b"\x89PNG"


def test_an_interval_needs_64_chips():
    assert "ci95" not in train.summary(np.arange(63.0))
    found = train.summary(np.arange(64.0))
    assert found["ci95"] == pytest.approx(1.96 * np.std(np.arange(64), ddof=1) / 8)


# ---- studies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [analog.program, studies.refresh])
def test_keeping_a_readout_keeps_its_mean_weight(policy):
    """Five times, 1,000 s apart."""
    device = analog.PCM
    target = analog.conductances(device, jnp.full((1000, 1), 0.4))

    def again(readout, inputs):
        key, t = inputs
        return policy(key, device, readout, target, t).xbar, None

    @jax.jit
    def last(key):
        xbar = analog.deploy(key, device, target)
        times = 1000.0 * jnp.arange(1.0, 6.0)
        return jax.lax.scan(again, xbar, (jax.random.split(key, 5), times))[0]

    w = analog.weights(device, last(KEY).g)
    # Pulses approach a target from below: 0.008 at 4.9 µS. A read at g_min is clipped: 0.0045.
    # A refresh loses both each time, the rest are 4 standard errors.
    lost = 5 * 0.0125 if policy is studies.refresh else 0.008
    assert abs(jnp.mean(w) - 0.4) < lost + 4 * jnp.std(w) / len(w) ** 0.5


def test_a_reset_readout_is_at_its_lowest():
    device = analog.PCM
    xbar = analog.deploy(KEY, device, jnp.full((2, 50, 1), 6.0))
    done = studies.reset(KEY, device, xbar, xbar.g, 100.0)
    assert done.xbar.g.max() < 0.2 and done.resets.sum() == 100


def test_a_study_from_start_to_figure(here, monkeypatch, capsys):
    monkeypatch.setattr(studies, "AGES", (150.0, 1e6))
    cfg, devices = train.configure(train.parse(TINY)[0])
    state = train.start(cfg, devices)
    train.save(train.Run(cfg, devices, state), here / "mine")
    studies.main(["drift", "mine", "--n", "3", "--out", "."])
    out = capsys.readouterr().out
    assert (
        "second task at that age, restored before, 1e+06 s" in out and "(n = 3)" in out
    )
    assert (here / "drift.png").exists() and (here / "drift.json").exists()


@pytest.mark.parametrize(
    "words", ["drift", "chips mine --n 0", "life mine other", "nothing mine"]
)
def test_bad_input_to_a_study_is_one_line(here, capsys, words):
    with pytest.raises(SystemExit) as end:
        studies.main(words.split())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
