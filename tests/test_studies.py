"""Every study from training to its figure, over the smallest networks."""
import matplotlib.image
import numpy as np
from conftest import TINY

import analog
import train
from img import studies

KEY = train.jax.random.key(5)


def test_every_study_draws(here, capsys, monkeypatch):
    tiny, *_ = train.given([*TINY, "--grad_thr", "0.05"])    # so that there are pulses to study
    configure = train.configure
    monkeypatch.setattr(train, "configure", lambda flags: configure({**tiny, **flags}))
    for name, value in (("BITS", (2,)), ("STEPS", (1, 2)), ("N_TASKS", 4), ("FOLDER", here),
                        ("QUIET", {"drift": studies.QUIET["drift"]})):
        monkeypatch.setattr(studies, name, value)
    usual = train.comparators, train.fire, train.expected_weights
    for study in (studies.bits, studies.steps, studies.limits, studies.updates, studies.cost):
        study(2)
        assert matplotlib.image.imread(here/f"{study.__name__}.png")[..., :3].std() > 0.02
    out = capsys.readouterr().out
    assert "nan" not in out and (train.comparators, train.fire, train.expected_weights) == usual and train.load(here/"run/studies/pcm_real").step == 2


def test_real_valued_updates_are_what_pulses_round(x64):
    device = analog.PERF
    readout = analog.fabricate(KEY, device, train.jnp.full((2, 3, 1), 3.0))
    amounts = studies.amounts(None, train.jnp.array([-0.4, 0.0, 2.5]), 1.0)
    step = train.Step(KEY, readout, amounts, 101.0)
    after = train.fire(device, step)
    np.testing.assert_allclose(after.g[..., 0] - 3.0, 0.75*np.array([[0.4, 0, 0], [0, 0, 2.5]]))
    assert np.array_equal(after.t_prog > 0, amounts[0] > 0)
    w, w_var = studies.drawn_weights(None, None, device, step, 151.0)
    np.testing.assert_allclose(w, analog.weights(device, after.g)[:, 0])
    assert np.all(w_var == 0)
    far = studies.saturating(device, step._replace(masks=100*amounts))
    assert far.g.max() == device.g_max and np.all(far.g >= 3.0)


def test_imprecise_thresholds_are_of_the_same_tasks(here):
    cfg, device = train.configure(train.given(TINY)[0])
    meta, times = train.meta_of(train.start(cfg, device)), train.Times(100.0, 101.0, 251.0)
    exact, same, off = (train.test(experiment, cfg, device, meta, times, 8, KEY)
                        for experiment in (train.episode, studies.imprecise(0.0), studies.imprecise(2.0)))
    np.testing.assert_array_equal(same.mse, exact.mse)
    np.testing.assert_array_equal(off.mse[:, 0], exact.mse[:, 0])
    assert np.any(off.pulses != exact.pulses)


def test_no_readout_beats_the_best_one(here):
    cfg, device = train.configure(train.given(TINY)[0])
    meta = train.meta_of(train.start(cfg, device))
    errors = train.test(studies.bounds, cfg, device, meta, train.Times(100.0, 101.0, 251.0), 8, KEY)
    assert np.all(errors[:, 0] <= errors[:, 1:].min(1) + 1e-3)
