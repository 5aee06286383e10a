"""The device against its laws: sample moments, closed forms, gradients, conservation."""
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analog
from analog import PCM, PCM_HISTORY, PERF

AIHWKIT = analog.aihwkit(PCM)

N = 200_000
KEY = jax.random.key(11)
ONES = jnp.ones((2, N//2, 1))


def clipped_moments(mean, std, low, high):
    """Mean and standard deviation of a normal variable clipped to [low, high]."""
    def cdf(z):
        return 0.5*(1 + math.erf(z/math.sqrt(2)))

    def pdf(z):
        return math.exp(-z*z/2)/math.sqrt(2*math.pi)

    a, b = (low - mean)/std, (high - mean)/std
    inside = cdf(b) - cdf(a)
    first = low*cdf(a) + high*(1 - cdf(b)) + mean*inside + std*(pdf(a) - pdf(b))
    second = (low**2*cdf(a) + high**2*(1 - cdf(b)) + (mean**2 + std**2)*inside + 2*mean*std*(pdf(a) - pdf(b))
              + std**2*(a*pdf(a) - b*pdf(b)))
    return first, math.sqrt(second - first**2)


def assert_law(samples, mean, std):
    """Mean within 3 standard errors, standard deviation within 1 %."""
    samples = np.asarray(samples, np.float64).ravel()
    assert samples.size >= 100_000
    assert abs(samples.mean() - mean) < 3*std/math.sqrt(samples.size) + 1e-6
    assert abs(samples.std() - std) <= 0.01*std + 1e-6


def exactly(device, g):
    """Crossbar at g (µS) with no programming error."""
    return analog.fabricate(KEY, device._replace(prog_err=0.0), g*ONES)


@pytest.mark.parametrize("device", [PCM, PCM_HISTORY, PERF], ids=lambda device: device.name)
@pytest.mark.parametrize("g", [0.1, 2.0, 6.0, 11.5])
def test_set_pulse_follows_its_law(device, g):
    xbar = exactly(device, g)
    p = float(xbar.p[0, 0, 0])*math.exp(-1/device.history_decay)
    mean = g + device.set_slope*g + device.set_offset + device.set_history*p
    std = device.set_std_slope*g + device.set_std_offset + device.set_std_history*p
    pulsed = analog.set_pulse(KEY, device, xbar, ONES, 5.0)
    expected = clipped_moments(mean, std, device.g_min, device.g_max) if std else (min(mean, device.g_max), 0.0)
    assert_law(pulsed.g, *expected)
    np.testing.assert_allclose(pulsed.p, p, rtol=1e-6)
    assert np.all(pulsed.t_prog == 5.0)


@pytest.mark.parametrize("g", [0.1, 3.0, 12.0])
def test_read_noise_follows_its_law(g):
    device = PCM._replace(nu_mean=0.0, nu_std=0.0)
    assert_law(analog.read(KEY, device, exactly(device, g), 100.0), *clipped_moments(g, 0.03*g + 0.13, 0.1, 12.0))


def test_reset_follows_its_law():
    xbar = analog.reset(KEY, PCM, exactly(PCM, 5.0), ONES > 0, 7.0)
    assert_law(xbar.g, *clipped_moments(0.1, 0.01, 0.1, 12.0))
    assert np.all(xbar.p == 1) and np.all(xbar.t_prog == 7.0)


def test_programming_error_and_drift_exponent_follow_their_laws():
    xbar = analog.fabricate(KEY, PCM, 6.0*ONES)
    assert_law(xbar.g, 6.0, 0.05*6.0)
    assert_law(xbar.nu, 0.04, 0.008)
    assert np.all(xbar.t_prog == 0)


def test_drift_is_exact_without_spread():
    device = PCM._replace(nu_std=0.0)
    for t in (1.0, 38.6, 100.0, 1e7):
        np.testing.assert_allclose(analog.drift(device, exactly(device, 5.0), t)[0, :3, 0], 5*(t/38.6)**-0.04, rtol=1e-5)
    assert np.isfinite(analog.drift(device, exactly(device, 5.0), 0.0)).all()    # age floored at 1 s


def test_noise_free_recursion_of_the_published_history():
    g, p = analog.staircase(PCM_HISTORY, 20)
    np.testing.assert_allclose(g[[1, 2, 3, 5, 8, 20]], [1.92, 3.29, 4.34, 5.80, 7.15, 9.38], atol=0.006)
    np.testing.assert_allclose(p, np.exp(-np.arange(21)/2.6), rtol=1e-6)
    np.testing.assert_allclose(analog.history(PCM_HISTORY, jnp.array(g)), p, rtol=1e-4, atol=1e-6)


def test_clipped_samples_of_the_history_have_other_means():
    xbar, means = analog.reset(KEY, PCM_HISTORY, exactly(PCM_HISTORY, 1.0), ONES > 0, 0.0), [0.0]
    for key in jax.random.split(KEY, 20):
        xbar = analog.set_pulse(key, PCM_HISTORY, xbar, ONES, 0.0)
        means.append(float(xbar.g.mean()))
    np.testing.assert_allclose(np.array(means)[[1, 2, 3, 5, 8, 20]], [2.06, 3.43, 4.47, 5.90, 7.15, 8.91], atol=0.02)


@pytest.mark.parametrize("device", [PCM, PCM_HISTORY], ids=lambda device: device.name)
def test_an_unpulsed_device_is_unchanged(device):
    xbar = analog.fabricate(KEY, device, 4.0*ONES)
    mask = (jnp.arange(N).reshape(ONES.shape) % 2).astype(float)
    for changed in (analog.set_pulse(KEY, device, xbar, mask, 9.0), analog.reset(KEY, device, xbar, mask > 0, 9.0)):
        for before, after in zip(xbar, changed):
            assert np.array_equal(before[mask == 0], after[mask == 0])
        assert np.all(changed.t_prog[mask == 1] == 9.0) and np.array_equal(changed.nu, xbar.nu)


@pytest.mark.parametrize("effect, fields", [
    ({"prog_err": 0.0}, {"g", "p"}), ({"nu_std": 0.0}, {"nu"}), ({"nu_mean": 0.0}, {"nu"}),
    ({"read_slope": 0.0, "read_offset": 0.0}, {"read"}), ({"set_std_slope": 0.0, "set_std_offset": 0.0}, {"pulsed"})])
def test_switching_off_one_effect_changes_that_effect_alone(effect, fields):
    def observe(device):
        xbar = analog.fabricate(KEY, device, 4.0*ONES)
        fixed = analog.fabricate(KEY, PCM, 4.0*ONES)
        return {**xbar._asdict(), "read": analog.read(KEY, device, fixed, 9.0),
                "pulsed": analog.set_pulse(KEY, device, fixed, ONES, 9.0).g}

    whole, part = observe(PCM), observe(PCM._replace(**effect))
    changed = {name for name in whole if not np.array_equal(whole[name], part[name])}
    assert changed == fields - {"p"} or changed == fields    # P depends on G where the device has a memory


def test_keys_decide_everything_and_are_independent():
    xbar = exactly(PCM, 5.0)
    same, again, other = (analog.read(key, PCM, xbar, 50.0) for key in (KEY, KEY, jax.random.key(12)))
    assert np.array_equal(same, again)
    assert abs(np.corrcoef(np.ravel(same), np.ravel(other))[0, 1]) < 3/math.sqrt(N) + 0.01
    chip = analog.fabricate(KEY, PCM, 5.0*ONES)
    assert abs(np.corrcoef(np.ravel(chip.g), np.ravel(chip.nu))[0, 1]) < 4/math.sqrt(N)


def test_clip_has_derivative_one_on_the_closed_range():
    slope = jax.vmap(jax.grad(lambda x: analog.clip(x, 0.1, 12.0)))
    np.testing.assert_array_equal(slope(jnp.array([0.0, 0.1, 5.0, 12.0, 12.1])), [0, 1, 1, 1, 0])


@pytest.mark.parametrize("device", [PCM, PCM_HISTORY, PERF, AIHWKIT], ids=lambda device: device.name)
@pytest.mark.parametrize("g", [0.1, 5.0, 12.0])
def test_gradients_are_finite_everywhere(device, g):
    def through(g, mask):
        xbar = analog.fabricate(KEY, device, g)
        xbar = analog.set_pulse(KEY, device, xbar, mask, 1.0)
        return analog.weights(device, analog.read(KEY, device, xbar, 1.0)).sum()

    g = jnp.full((2, 50, 1), g)
    for mask in (jnp.zeros_like(g), jnp.ones_like(g)):
        for gradient in jax.grad(through, (0, 1))(g, mask):
            assert np.isfinite(gradient).all()


def test_an_unpulsed_device_passes_gradient_exactly_one():
    xbar = exactly(PCM, 0.1)
    gradient = jax.grad(lambda g: analog.set_pulse(KEY, PCM, xbar._replace(g=g), 0*ONES, 1.0).g.sum())(xbar.g)
    assert np.all(gradient == 1)


def test_injected_error_is_straight_through():
    g = jnp.linspace(0.1, 12.0, 40).reshape(2, 20, 1)
    error = jax.random.normal(KEY, g.shape)
    value, gradient = jax.value_and_grad(lambda g: analog.inject(error, PCM, g, jnp.max(g)).sum())(g)
    assert abs(value - g.sum()) > 0.1 and np.all(gradient == 1)


def test_outcome_has_the_moments_of_pulses_and_reads():
    quiet = PCM._replace(nu_mean=0.0, nu_std=0.0, prog_err=0.0)
    xbar = analog.fabricate(KEY, quiet, jnp.array([[[2.0]], [[0.1]]]))    # a pair
    read_alone = analog.outcome(KEY, quiet, xbar, 0, 5.0, 9.0, N)
    still = quiet._replace(read_slope=0.0, read_offset=0.0)
    pulsed = analog.outcome(KEY, still, xbar, 1, 5.0, 9.0, N)
    for i, g in enumerate((2.0, 0.1)):
        for outcome, state, mean, std in ((read_alone, 0, g, 0.03*g + 0.13), (pulsed, 0, g, 0.0),
                                          (pulsed, 1, g - 0.084*g + 0.892, 0.09*g + 0.575)):
            mean, std = clipped_moments(mean, std, 0.1, 12.0) if std else (mean, std)
            assert abs(outcome.mean[state, i, 0, 0] - mean) < 3.5*std/math.sqrt(N) + 1e-6
            assert abs(math.sqrt(outcome.var[state, i, 0, 0]) - std) <= 0.01*std + 1e-6


def test_pulse_train_is_pulse_after_pulse():
    xbar = analog.fabricate(KEY, PCM_HISTORY, 2.0*ONES[:, :50])
    masks = jax.random.bernoulli(KEY, 0.5, (3, *xbar.g.shape)).astype(float)
    states, one = analog.pulse_train(KEY, PCM_HISTORY, xbar, masks, 7.0), xbar
    for i, (key, mask) in enumerate(zip(jax.random.split(KEY, 3), masks)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-6), states, one)
        one = analog.set_pulse(key, PCM_HISTORY, one, mask, 7.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[3], y, rtol=1e-5, atol=1e-6), states, one)


def test_weights_invert_conductances():
    w = jax.random.uniform(KEY, (7, 3), minval=-1.0)
    g = analog.conductances(PCM, w)
    np.testing.assert_allclose(analog.weights(PCM, g), w, atol=1e-6)
    assert np.all(np.min(g, 0) == np.float32(0.1))


def test_pulses_act_on_the_drifted_conductance_where_the_device_says_so():
    device = PCM._replace(nu_std=0.0, set_std_slope=0.0, set_std_offset=0.0, set_on_drifted=1.0)
    drifted = 5*(1e6/38.6)**-0.04
    g = analog.set_pulse(KEY, device, exactly(device, 5.0), ONES, 1e6).g[0, 0, 0]
    np.testing.assert_allclose(g, drifted*(1 - 0.084) + 0.892, rtol=1e-4)


@pytest.mark.parametrize("device", [PCM, PCM_HISTORY], ids=lambda device: device.name)
def test_program_and_verify_reaches_its_targets(device):
    target = jax.random.uniform(KEY, (2, 2000, 5), minval=0.1, maxval=5.0)
    program = jax.jit(analog.program, static_argnums=1)
    done = program(KEY, device, analog.fabricate(KEY, device, target), target)
    error = np.asarray(done.xbar.g - target)
    assert done.done.mean() > 0.99 and abs(error.mean()) < 0.15 and error.std() < 0.45
    assert np.all(done.resets >= 1) and 1 < done.pulses.mean() < 15
    ideal = device._replace(read_slope=0.0, read_offset=0.0, nu_std=0.0)
    verified = program(KEY, ideal, analog.fabricate(KEY, ideal, target), target)
    assert np.all(np.abs(verified.xbar.g - target)[verified.done] <= 0.4 + 1e-4)    # ν at its mean: reads are exact


def test_refresh_keeps_weights_and_removes_the_common_part():
    pair = jnp.stack([jnp.full((4000, 1), 9.0), jnp.full((4000, 1), 7.0)])
    xbar = analog.fabricate(KEY, PCM._replace(prog_err=0.0), pair)
    fresh = jax.jit(analog.refresh, static_argnums=1)(KEY, PCM, xbar, 500.0).xbar
    difference = np.asarray(fresh.g[0] - fresh.g[1])
    drifted = 2*(500/38.6)**-0.04
    assert abs(difference.mean() - drifted) < 0.15 and difference.std() < 0.9    # reads of 9 and 7 µS: 0.52 µS together
    assert fresh.g.max() < 6 and np.array_equal(fresh.nu, xbar.nu) and np.all(fresh.t_prog == 500)


def test_aihwkit_law_at_published_points():
    device, scale = AIHWKIT, 12/25
    r = 0.5
    xbar = analog.fabricate(KEY, device, r*12*ONES)
    assert_law(xbar.g, r*12, scale*(0.26348 + 1.9650*r - 1.1731*r**2))
    settled = exactly(device._replace(prog_std=(0.0, 0.0, 0.0)), r*12)
    assert_law(settled.nu, *clipped_moments(max(-0.0155*math.log(r) + 0.0244, 0.049), 0.008, 0.0, 1.0))
    still = settled._replace(nu=0*settled.nu)
    q = min(0.0088/r**0.65, 0.2)*math.sqrt(math.log((1e4 + 250e-9)/500e-9))
    assert_law(analog.read(KEY, device, still, 1e4), *clipped_moments(6.0, 6.0*q, 0.1, 12.0))


def test_a_users_device_file(tmp_path):
    path = tmp_path/"mine.json"
    constants = {key: value for key, value in PCM._asdict().items() if key not in PCM._field_defaults}
    path.write_text(json.dumps(constants | {"name": "mine", "g_max": 20.0}))
    assert analog.load_device(str(path)) == PCM._replace(name="mine", g_max=20.0)
    assert analog.load_device("perf") is PERF
    for key, value in (("g_min", 13), ("g_min", -1), ("nu_std", -0.1), ("t0", 0), ("set_slope", float("nan")), ("oops", 1),
                       ("read_offset", "0.1"), ("reset_std", None), ("name", "two words"), ("prog_err", True),
                       ("nu_log", [1, 2]), ("prog_std", 0.1)):
        path.write_text(json.dumps(constants | {key: value}))
        with pytest.raises(ValueError, match=key):
            analog.load_device(str(path))
    for key in constants:
        path.write_text(json.dumps({name: value for name, value in constants.items() if name != key}))
        with pytest.raises(ValueError, match=key):
            analog.load_device(str(path))
    for text in ("", "[]", "{", '"x"'):
        path.write_text(text)
        with pytest.raises(ValueError):
            analog.load_device(str(path))
    with pytest.raises(ValueError):
        analog.load_device(str(tmp_path))
