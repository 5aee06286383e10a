"""The device against its laws: moments of samples, closed forms, conservation, gradients."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import analog
from analog import DEVICES, IBM, PCM, PERF

KEY, OTHER_KEY = jax.random.key(11), jax.random.key(12)
SHAPE = 2, 12_500, 2  # of nearly all samples, so that compiled operations are shared
ONES = jnp.ones(SHAPE)
PCM_HISTORY, IBM_HISTORY = DEVICES["pcm_history"], DEVICES["ibm_history"]
RERAM = analog.load_device(str(ROOT / "tests/reram.json"))
SLOW = PCM._replace(t_verify=PCM.t0)  # verified at the age at which G is specified
deploy = jax.jit(analog.deploy)
program = jax.jit(analog.program)
fire = jax.jit(analog.fire, static_argnums=4)
table_of = analog.program_table


def table(mean=0.0, std=0.0, age=0.0):
    """A ProgramTable of the same error and age at every target."""
    return analog.ProgramTable(*np.float32([[0.0], [mean], [std], [age]]))


@functools.cache
def at(device, g):
    """Crossbar at g (µS) exactly."""
    return analog.fabricate(KEY, device, g * ONES)


def moments(function, mean, std):
    """Mean and std of function(x), x = N(mean, std²), by quadrature."""
    z = np.linspace(-8.0, 8.0, 100_001)
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    y = function(mean + std * z)
    first = weight @ y
    return first, np.sqrt(weight @ (y - first) ** 2)


def clipped(device, mean, std):
    """Mean and std of N(mean, std²) clipped to the range of the device."""
    return moments(lambda x: np.clip(x, device.g_min, device.g_max), mean, std)


def measured(samples):
    """Mean and std of the samples [2], and the standard error of each [2]."""
    x = np.ravel(samples).astype(np.float64)
    mean, std = x.mean(), x.std()
    fourth = np.mean((x - mean) ** 4)
    error_of_variance = math.sqrt(max(fourth - std**4, 0) / x.size)
    errors = std / math.sqrt(x.size), error_of_variance / max(2 * std, 1e-9)
    return np.array([mean, std]), np.array(errors)


def assert_law(samples, mean, std):
    """Check that mean and std of the samples are within 4 of their standard errors."""
    found, errors = measured(samples)
    assert np.all(np.abs(found - (mean, std)) <= 4 * errors + 1e-5)


def assert_independent(*samples):
    """Check that correlations of the samples are below 5 standard errors."""
    rows = [np.ravel(x) for x in samples]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / math.sqrt(rows[0].size)


# ---- laws ----------------------------------------------------------------------------------------

# Mean ΔG = a·G + b + c·P and std of ΔG = d·G + e + f·P of a SET pulse, as published.
WITHOUT_MEMORY = -0.084, 0.892, 0.0, 0.09, 0.575, 0.0
WITH_MEMORY = -0.084, 0.880, 1.40, 0.091, 0.260, 2.15
SET = {
    "pcm": WITHOUT_MEMORY,
    "pcm_history": WITH_MEMORY,
    "ibm": WITHOUT_MEMORY,
    "ibm_history": WITH_MEMORY,
    "perf": (0.0, 0.75, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("g", [0.1, 6.0, 11.5])
def test_set_pulse(name, g):
    a, b, c, d, e, f = SET[name]
    device = DEVICES[name]
    xbar = at(device, g)._replace(p=0.8 * ONES)
    pulsed = analog.pulse(KEY, device, xbar, ONES, 5.0)
    p = 0.8 * math.exp(-1 / 2.6)
    mean, std = g + a * g + b + c * p, d * g + e + f * p
    assert_law(pulsed.g, *clipped(device, mean, std))
    np.testing.assert_allclose(pulsed.p, p, rtol=1e-6)
    assert np.all(pulsed.t_prog == 5)


@pytest.mark.parametrize("device", [PCM, IBM], ids=["pcm", "ibm"])
def test_reset(device):
    xbar = analog.reset(KEY, device, at(device, 5.0), ONES > 0, 7.0)
    assert_law(xbar.g, *clipped(device, 0.1, 0.01))
    assert np.all(xbar.p == 1)
    assert np.all(xbar.t_prog == 7)


@pytest.mark.parametrize("g", [0.1, 3.0, 12.0])
def test_read_noise(g):
    xbar = at(PCM, g)._replace(nu=0 * ONES)
    read = analog.read(KEY, PCM, xbar, 100.0)
    assert_law(read, *clipped(PCM, g, 0.03 * g + 0.13))


def test_the_key_decides():
    xbar = at(PCM, 5.0)._replace(nu=0.04 * ONES)
    read = analog.read(KEY, PCM, xbar, 100.0)
    again = analog.read(KEY, PCM, xbar, 100.0)
    other = analog.read(OTHER_KEY, PCM, xbar, 100.0)
    assert np.array_equal(read, again)
    assert_independent(read, other)


def test_drift_exponent_of_a_device_stays():
    xbar = analog.fabricate(KEY, PCM, 6 * ONES, table(std=0.3))
    assert_law(xbar.g, 6.0, 0.3)
    assert_law(xbar.nu, 0.04, 0.008)
    assert_independent(xbar.g, xbar.nu)
    pulsed = analog.pulse(KEY, PCM, xbar, ONES, 5.0)
    erased = analog.reset(KEY, PCM, xbar, ONES > 0, 5.0)
    assert np.array_equal(pulsed.nu, xbar.nu)
    assert np.array_equal(erased.nu, xbar.nu)


def ibm_nu(r):
    """Mean and std of ν of IBM's devices at the share r of g_max, as published."""
    mean = np.clip(-0.0155 * math.log(r) + 0.0244, 0.049, 0.1)
    std = np.clip(-0.0125 * math.log(r) - 0.0059, 0.008, 0.045)
    return moments(np.abs, mean, std)


def test_drift_exponent_follows_conductance_on_ibm():
    still = IBM._replace(set_std_slope=0.0, set_std_offset=0.0, reset_std=0.0)
    xbar = at(still, 0.3)
    pulsed = analog.pulse(KEY, still, xbar, ONES, 5.0)
    erased = analog.reset(OTHER_KEY, still, xbar, ONES > 0, 5.0)
    levels = 0.3, 0.3 * 0.916 + 0.892, 0.1
    for found, g in zip((xbar, pulsed, erased), levels, strict=True):
        np.testing.assert_allclose(found.g, g, rtol=1e-5)
        assert_law(found.nu, *ibm_nu(g / 12))
    assert_independent(xbar.nu, pulsed.nu, erased.nu)


def test_drift():
    """An age below 1 s counts as 1 s. Ideal devices do not drift."""
    state = {"nu": 0.07 * ONES, "t_prog": 3 * ONES}
    for age in (0.0, 1.0, 38.6, 1e7):
        later = max(age, 1.0)
        expected = {PCM: later / 38.6, IBM: (later + 20) / 20}
        for device, clock in expected.items():
            g = analog.drift(device, at(device, 5.0)._replace(**state), 3 + age)
            np.testing.assert_allclose(g, 5 * clock**-0.07, rtol=1e-5)
        assert np.all(analog.drift(PERF, at(PERF, 5.0), 3 + age) == 5)


def plain_drift(xbar, age):
    """G (µS) of PCM devices at an age (s), in double precision."""
    return np.float64(xbar.g) * (age / 38.6) ** -np.float64(xbar.nu)


def test_a_later_clock_keeps_old_ages_and_resolves_new_ones():
    """After 10⁷ s the float32 of one clock is exact to 1 s; that of a later one is to more."""
    amount = jnp.asarray(np.arange(ONES.size).reshape(SHAPE) % 2, jnp.float32)
    xbar = analog.pulse(KEY, PCM, at(PCM, 5.0), amount, 142.0)
    xbar = analog.later(xbar, 1e7)
    for t in (0.0, 3.0, 1e4):
        age = 1e7 + t - np.where(amount, 142.0, 0.0)
        found = analog.drift(PCM, xbar, t)
        np.testing.assert_allclose(found, plain_drift(xbar, age), rtol=1e-5)
    fresh = analog.pulse(OTHER_KEY, PCM, xbar, ONES, 2.0)
    for age in (1.0, 1.5):
        found = analog.drift(PCM, fresh, 2 + age)
        np.testing.assert_allclose(found, plain_drift(fresh, age), rtol=1e-6)


def test_published_history():
    g, p = map(np.asarray, analog.staircase(PCM_HISTORY, 20))
    figures = [1.92, 3.29, 4.34, 5.80, 7.15, 9.38]
    np.testing.assert_allclose(g[[1, 2, 3, 5, 8, 20]], figures, atol=0.006)
    np.testing.assert_allclose(p, np.exp(-np.arange(21) / 2.6), rtol=1e-6)
    found = analog.history(PCM_HISTORY, g)
    np.testing.assert_allclose(found, p, rtol=1e-4, atol=1e-6)


# ---- conservation --------------------------------------------------------------------------------


def some_stuck(device):
    """The device, where some are stuck."""
    return device._replace(stuck_low=0.2, stuck_high=0.1)


def sound(xbar):
    """Where both devices of a pair are free."""
    return np.broadcast_to(np.all(xbar.free, 0), xbar.free.shape)


def test_shares_of_stuck_devices():
    """They do not drift either."""
    xbar = at(some_stuck(PCM), 5.0)
    aged = analog.drift(PCM, xbar, 1e7)
    assert np.array_equal(aged == xbar.g, ~xbar.free)
    low = ~xbar.free & (xbar.g == np.float32(0.1))
    high = xbar.g == 12
    assert np.array_equal(low | high, ~xbar.free)
    assert np.all(xbar.g[sound(xbar)] == 5)
    assert_law(low, 0.2, math.sqrt(0.2 * 0.8))
    assert_law(high, 0.1, math.sqrt(0.1 * 0.9))
    assert np.all(at(PCM, 5.0).free)


def assert_only(acted, before, after, earliest=9.0):
    """Check that devices have changed where acted is true, at 9 s or from an earliest time on,
    and in no part elsewhere."""
    acted = np.asarray(acted)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[~acted], new[~acted])
    times = after.t_prog[acted]
    assert np.all((earliest <= times) & (times <= 9))
    assert np.mean(after.g[acted] != before.g[acted]) > 0.9


STUCK = some_stuck(IBM_HISTORY)


def test_only_pulsed_devices_change():
    """Neither a device that is not fired changes, nor one that is stuck."""
    xbar = at(STUCK, 4.0)
    amount = jnp.asarray(np.arange(ONES.size).reshape(SHAPE) % 2, jnp.float32)
    fired = amount > 0
    acted = fired & xbar.free
    assert_only(acted, xbar, analog.pulse(KEY, STUCK, xbar, amount, 9.0))
    assert_only(acted, xbar, analog.reset(KEY, STUCK, xbar, fired, 9.0))
    assert_only(acted, xbar, fire(KEY, STUCK, xbar, amount, 3, 9.0)[0])


@pytest.mark.parametrize("device", [PCM, IBM], ids=["pcm", "ibm"])
def test_programming_leaves_stuck_devices(device):
    device = some_stuck(device)
    xbar = analog.blank(KEY, device, (2, 50, 2))  # at g_max
    done = program(KEY, device, xbar, 5 * ONES[:, :50], 9.0)
    assert_only(xbar.free, xbar, done.xbar, 9.0 - analog.MAX_STEPS)
    assert not np.any(np.where(xbar.free, 0, done.pulses + done.reads))


# ---- many pulses ---------------------------------------------------------------------------------


def test_fire_is_pulse_after_pulse():
    xbar = at(STUCK, 2.0)
    counts = jnp.asarray(
        np.arange(ONES.size).reshape(SHAPE) % 7 / 2, jnp.float32
    )  # 0, 0.5, … 3
    fired, amount = fire(KEY, STUCK, xbar, counts, 3, 7.0)
    np.testing.assert_allclose(amount, counts)
    one = xbar
    for i, key in enumerate(jax.random.split(KEY, 3)):
        amount = jnp.clip(counts - i, 0.0, 1.0)
        one = analog.pulse(key, STUCK, one, amount, 7.0)
    for a, b in zip(fired, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    n_pulses = np.where(xbar.free, np.ceil(counts), 0)
    np.testing.assert_allclose(fired.p, xbar.p * np.exp(-n_pulses / 2.6), rtol=1e-5)
    assert np.array_equal(fired.t_prog == 7, n_pulses > 0)


def test_part_of_a_pulse_is_that_part_of_its_step():
    pulsed = analog.pulse(KEY, PERF, at(PERF, 2.0), 0.25 * ONES, 7.0)
    np.testing.assert_allclose(pulsed.g, 2 + 0.25 * 0.75, rtol=1e-6)


def test_a_negative_count_is_not_a_number():
    """It is seen in its own device alone, fired or not."""
    counts = jnp.broadcast_to(jnp.array([-1e-3, 0.0, -2.0, 1.5]), (2, 1, 4))
    xbar = analog.fabricate(KEY, PCM, jnp.full(counts.shape, 5.0))
    with jax.debug_nans(False):
        fired, _ = fire(KEY, PCM, xbar, counts, 2, 7.0)
    assert np.array_equal(np.isnan(fired.g), counts < 0)


# ---- gradients -----------------------------------------------------------------------------------


def test_a_count_passes_the_gradient_of_one_pulse():
    """Every pulse of PERF adds 0.75 µS, so that is the derivative at each count up to the
    largest, whole or not."""
    counts = jnp.broadcast_to(jnp.arange(0.0, 3.1, 0.25), (2, 1, 13))
    xbar = analog.fabricate(KEY, PERF, jnp.full(counts.shape, 2.0))

    def total(counts):
        return jnp.sum(fire(KEY, PERF, xbar, counts, 3, 7.0)[0].g)

    np.testing.assert_allclose(jax.grad(total)(counts), 0.75, rtol=1e-5)


def test_clip_has_derivative_one_on_the_closed_range():
    slope = jax.vmap(jax.grad(lambda x: analog.clip(x, 0.1, 12.0)))
    assert slope(jnp.array([0.0, 0.1, 5.0, 12.0, 12.1])).tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_gradients_are_finite_everywhere(device):
    """At the ends and the middle of the range, with a pulse and without, at the instant of
    it."""

    def through(g, amount):
        xbar = analog.fabricate(KEY, device, g, table(0.1, 0.1, 5.0))
        xbar = analog.pulse(KEY, device, xbar, amount, 1.0)
        return analog.weights(device, analog.read(KEY, device, xbar, 1.0)).sum()

    middle = (device.g_min + device.g_max) / 2
    g = jnp.tile(jnp.array([device.g_min, middle, device.g_max]), (2, 50, 1))
    amount = jnp.zeros_like(g).at[:, 25:].set(1.0)
    for gradient in jax.jit(jax.grad(through, (0, 1)))(g, amount):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0)


def test_gradient_past_no_pulse_and_past_an_error_is_exactly_one():
    """Through no pulse, and through the error of programming, which is straight-through."""

    def not_pulsed(g):
        after = analog.pulse(KEY, PCM, xbar._replace(g=g), 0 * ONES, 1.0)
        return jnp.sum(after.g)

    def new(g):
        return jnp.sum(analog.fabricate(KEY, PCM, g, slope).g)

    xbar = at(some_stuck(PCM), 0.1)
    assert np.all(jax.grad(not_pulsed)(xbar.g) == 1)
    slope = analog.ProgramTable(*np.float32([[0.0, 9.0]] * 4))  # depends on the target
    assert np.all(jax.grad(new)(3 * ONES) == 1)
    assert not np.any(jax.jacobian(slope.at)(jnp.float32(3)))


# ---- programming ---------------------------------------------------------------------------------

GRID = jnp.tile(jnp.linspace(0.5, 10.0, 11), (2, 200, 1))  # µS, 400 devices a target


@functools.cache
def programmed_grid(device=PCM):
    """Devices, new and programmed to GRID."""
    return program(KEY, device, analog.fabricate(KEY, device, GRID), GRID, 9.0)


def test_program_reaches_its_targets():
    """A saturated read or a RESET may pass at the ends."""
    error = np.asarray(programmed_grid().xbar.g - GRID)
    means = np.mean(error, (0, 1))
    assert math.sqrt(np.mean(error**2)) < 0.45
    assert np.abs(means[1:-1]).max() < 0.25
    assert abs(means.mean()) < 0.15


def plain_programming(random, name, target, t_verify):
    """G (µS) and time of the last pulse (s) of one nandakumar device after program-and-verify
    that ends at 0 s, step by step."""
    a, b, c, d, e, f = SET[name]
    nu = abs(random.normal(0.04, 0.008))
    g, p, last = max(random.normal(0.1, 0.01), 0.1), 1.0, -120 * t_verify
    for step in range(1, 121):
        now = (step - 120) * t_verify
        seen = g * ((now - last) / 38.6) ** -nu
        seen += random.normal(0, 0.03 * seen + 0.13)
        error = seen - target * (t_verify / 38.6) ** -0.04
        if abs(error) <= 0.4 or (error > 0 and step > 80):
            break
        if error < 0:
            p *= math.exp(-1 / 2.6)
            g += random.normal(a * g + b + c * p, d * g + e + f * p)
        else:
            g, p = random.normal(0.1, 0.01), 1.0
        g, last = min(max(g, 0.1), 12.0), now
    return g, last


@pytest.mark.parametrize("name, t_verify", [("pcm", 1.0), ("pcm_history", 38.6)])
@pytest.mark.parametrize("column", [3, 7])
def test_programming_on_its_clock_equals_a_plain_loop(name, t_verify, column):
    """Mean and std of G and of the times of the last pulses, within 5 standard errors;
    programming of the grid ended at 9 s."""
    random, target = np.random.default_rng(0), float(GRID[0, 0, column])
    loop = [plain_programming(random, name, target, t_verify) for _ in range(2000)]
    xbar = programmed_grid(DEVICES[name]._replace(t_verify=t_verify)).xbar
    done = xbar.g[..., column], xbar.t_prog[..., column] - 9
    for samples, expected in zip(done, np.transpose(loop), strict=True):
        found, errors = measured(samples)
        wanted, others = measured(expected)
        assert np.all(np.abs(found - wanted) < 5 * np.hypot(errors, others))


def test_each_device_keeps_its_own_time_of_programming():
    """From the first RESET on, 120 steps before the end, each pulse takes a step. At the time
    of a common read, its own age counts. Higher targets, which take more pulses, end later."""
    xbar, pulses, resets, _ = programmed_grid()
    assert np.array_equal(xbar.t_prog, 9 - 120 + pulses + resets - 1)
    assert np.all(np.diff(np.mean(xbar.t_prog, (0, 1))[:-1]) > 0)
    age = np.maximum(109 - np.asarray(xbar.t_prog), 1)
    found = analog.drift(PCM, xbar, 109.0)
    np.testing.assert_allclose(found, plain_drift(xbar, age), rtol=1e-4)


def goal_of(t, other_t, stuck_at):
    """What a device is programmed to in a pair of targets t and other_t (µS); stuck_at is where the
    other one is stuck, None where it is not."""
    return t if stuck_at is None else min(max(t + stuck_at - other_t, 0.1), 10.0)


def test_the_other_device_of_a_pair_makes_up_for_a_stuck_one():
    """The pair has its weight, or comes as close as the range allows; its gradient is that of a
    sound one. Others are programmed as ever."""
    target = jax.random.uniform(KEY, SHAPE, minval=0.1, maxval=10.0)
    xbar = analog.fabricate(KEY, some_stuck(PCM), target)
    g, t, free = (np.asarray(x, float).reshape(2, -1) for x in (xbar.g, target, xbar.free))
    for k in range(3000):
        for side in (0, 1):
            if free[side, k]:
                stuck_at = None if free[1 - side, k] else g[1 - side, k]
                goal = goal_of(t[side, k], t[1 - side, k], stuck_at)
                assert g[side, k] == pytest.approx(goal, abs=1e-5)

    def weight(target):
        return jnp.sum(analog.weights(PCM, analog.fabricate(KEY, some_stuck(PCM), target).g))

    by_plus, by_minus = np.asarray(jax.grad(weight)(target)).reshape(2, -1) * 11.9
    repaired = (free.sum(0) > 0) & (np.abs(g[0] - g[1] - t[0] + t[1]) < 1e-4)
    assert repaired.mean() > 0.6
    np.testing.assert_allclose(by_plus[repaired], 1, rtol=1e-4)
    np.testing.assert_allclose(by_minus[repaired], -1, rtol=1e-4)


@pytest.mark.parametrize("device", [PCM, IBM], ids=["pcm", "ibm"])
def test_a_chip_is_programmed_around_its_stuck_devices(device):
    """Weights of 0.5 on pairs that are sound, or of which G− is stuck: on average within 0.05."""
    target = jnp.stack([7 * ONES[0, :800], ONES[1, :800]])
    xbar = deploy(KEY, some_stuck(device), target)
    w = np.asarray(analog.weights(device, xbar.g))
    plus, minus = np.asarray(xbar.free)
    for chosen in (plus & minus, plus & (xbar.g[1] < 0.2)):
        assert chosen.sum() > 100
        assert w[chosen].mean() == pytest.approx(6 / analog.span(device), abs=0.05)


TARGETS = np.linspace(0.1, 10, 33)  # µS, of a table of PCM



@functools.cache
def deployed(device):
    """New devices, some of them stuck, programmed to TARGETS [33], 600 devices a target."""
    target = jnp.tile(jnp.asarray(TARGETS, jnp.float32), (2, 300, 1))
    return deploy(OTHER_KEY, some_stuck(device), target)


@pytest.mark.parametrize("device", [PCM, SLOW], ids=["1s", "t0"])
def test_at_its_own_age_t0_a_device_is_where_programming_has_left_it(device):
    """Each device is at its G, t0 after its own last pulse, and the sum of thousands is that of
    their targets and of the mean errors of their table."""
    xbar, found = deployed(device), table_of(device)
    own = np.asarray(analog.drift(device, xbar, xbar.t_prog + device.t0))
    np.testing.assert_allclose(own, xbar.g, rtol=1e-5)
    chosen = sound(xbar) & (TARGETS >= 1) & (TARGETS <= 9)
    wanted = np.broadcast_to(TARGETS + found.mean, chosen.shape)
    assert np.sum(chosen) > 5000
    assert np.sum(own[chosen]) / np.sum(wanted[chosen]) == pytest.approx(1, abs=0.01)


def test_program_counts_what_it_does():
    """Each read but the last leads to a pulse, and only the first RESET follows no read."""
    done = programmed_grid()
    missed = done.reads != done.pulses + done.resets
    assert np.mean(missed) < 1e-3
    assert np.all(done.reads[missed] == analog.MAX_STEPS)
    assert np.all(done.resets >= 1)
    pulses = done.pulses.mean((0, 1))
    assert np.all(np.diff(pulses[:-1]) > 0)  # a higher target takes more


def test_a_device_that_overshoots_late_stays(monkeypatch):
    """Without a RESET it is finished as it is; those that are too low still get SETs."""
    monkeypatch.setattr(analog, "NO_RESET", 0)
    xbar = jax.tree.map(lambda x: x[:, :2500], at(PCM, 6.0))
    target = jnp.full_like(xbar.g, 2.0)
    done = analog.program_by_pulses(KEY, PCM, xbar, target, 9.0)
    assert np.all(done.resets == 1)  # the first
    assert np.all(done.reads == done.pulses + 1)  # that which finishes it is the last
    assert np.mean(done.xbar.g > 2.0 + 2 * 0.4) > 0.01
    assert np.mean(done.xbar.g < 2.0 - 2 * 0.4) < 0.01


def test_program_as_published_is_unbiased():
    done = program(KEY, IBM, at(IBM, 1.0), 6 * ONES, 9.0)
    assert_law(done.xbar.g, 6.0, 12 / 25 * (0.26348 + 1.9650 / 2 - 1.1731 / 4))
    assert_law(done.xbar.nu, *ibm_nu(0.5))
    exact = program(KEY, PERF, at(PERF, 1.0), 6 * ONES, 9.0)
    assert np.all(exact.xbar.g == 6)


IN_MICROSIEMENS = (
    "g_min",
    "g_max",
    "g_prog",
    "reset_mean",
    "reset_std",
    "set_offset",
    "set_history",
    "set_std_offset",
    "set_std_history",
)


@pytest.mark.parametrize("factor", [0.1, 100.0])
def test_program_is_the_same_in_every_range(factor):
    """Apart from the few reads that rounding moves to the other side of the tolerance."""
    scaled = {key: factor * getattr(PCM, key) for key in IN_MICROSIEMENS}
    law = PCM.law._replace(read_offset=factor * PCM.law.read_offset)
    device = PCM._replace(law=law, **scaled)
    new = analog.fabricate(KEY, device, factor * GRID)
    done = program(KEY, device, new, factor * GRID, 9.0)
    ratio = np.asarray(done.xbar.g / factor / programmed_grid().xbar.g)
    assert np.mean(np.abs(ratio - 1) > 1e-3) < 0.01


def test_programming_again_keeps_the_mean():
    """Mean conductances, and so mean weights, of each target within 5 standard errors."""
    first = done = programmed_grid()
    for key in jax.random.split(OTHER_KEY, 3):
        done = program(key, PCM, done.xbar, GRID, 500.0)
    shift = np.asarray(done.xbar.g - first.xbar.g)
    assert np.mean(shift != 0) > 0.9
    error = shift.std((0, 1)) / math.sqrt(400)
    assert np.all(np.abs(shift.mean((0, 1))) < 5 * error)


def assert_entry(found, i, error, age):
    """Check mean, std and age of a table's i-th target, which are of 2000 devices, against
    samples of other devices, within 5 standard errors."""
    entry = found.mean[i], found.std[i], found.age[i]
    (moments, errors), (ages, age_errors) = measured(error), measured(age)
    expected = np.append(moments, ages[0])
    errors = np.append(errors, age_errors[0]) * math.sqrt(1 + np.size(error) / 2000)
    assert np.all(np.abs(entry - expected) < 5 * errors + 1e-6 * ages[0] + 1e-6)


@pytest.mark.parametrize("device", [PCM, SLOW], ids=["1s", "t0"])
def test_a_table_is_what_deploy_leaves_of_devices_that_are_not_stuck(device):
    """Mean, std and age at each target, where deploy of other devices leaves some stuck."""
    found, xbar = table_of(device), jax.device_get(deployed(device))
    np.testing.assert_allclose(found.target, TARGETS, rtol=1e-6)
    for i, target in enumerate(TARGETS):
        free = sound(xbar)[..., i]
        g, t_prog = xbar.g[..., i][free], xbar.t_prog[..., i][free]
        assert_entry(found, i, g - target, -t_prog)


def test_a_table_is_the_published_error():
    """Clipped to the range. Stuck devices do not count, and no device has an age."""
    found, random = table_of(some_stuck(IBM)), np.random.default_rng(0)
    for i, target in enumerate(found.target):
        r = target / 12
        std = 12 / 25 * (0.26348 + 1.9650 * r - 1.1731 * r**2)
        g = np.clip(random.normal(target, std, 50_000), 0, 12)
        assert_entry(found, i, g - target, np.zeros(g.size))
    assert not np.any(found.age)
    assert not np.any(table_of(PERF)[1:])


def test_between_its_targets_a_table_is_on_a_line():
    """And as at its ends beyond them."""
    found = table_of(some_stuck(IBM))
    random = np.random.default_rng(0)
    found = found._replace(age=random.random(33, np.float32))
    g = np.append(random.uniform(-1, 13, 50), found.target).astype(np.float32)
    for value, column in zip(found.at(g), found[1:], strict=True):
        expected = np.interp(g, found.target, column)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [2.575, 6.1])  # the first of the table, one between
def test_a_new_crossbar_is_as_its_table_says(target):
    found = table_of(PCM)
    xbar = analog.fabricate(KEY, PCM, target * ONES, found)
    mean, std, age = (np.interp(target, found.target, x) for x in found[1:])
    assert_law(xbar.g, target + mean, std)
    assert_law(xbar.nu, 0.04, 0.008)
    assert_independent(xbar.g, xbar.nu)
    np.testing.assert_allclose(xbar.t_prog, -age, rtol=1e-5)
    exact = analog.fabricate(KEY, PCM, target * ONES)
    assert np.all(exact.g == np.float32(target)) and np.all(exact.t_prog == 0)


def test_weights_invert_conductances():
    w = jax.random.uniform(KEY, (7, 3), minval=-1.0)
    g = analog.conductances(PCM, w)
    np.testing.assert_allclose(analog.weights(PCM, g), w, atol=1e-6)
    assert np.all(np.min(g, 0) == np.float32(0.1))


# ---- IBM's devices -------------------------------------------------------------------------------

# Mean and std (µS) after programming to the target (µS) in front, and of reads 1, 100, 10⁴ and
# 10⁷ s later. From 1.6·10⁷ draws each, in NumPy, of the formulas of aihwkit's PCMLikeNoiseModel
# with g_max 25 µS; then times 12/25.
AGES = 1.0, 1e2, 1e4, 1e7
AIHWKIT = {
    0.24: (
        (0.2430, 0.1389),
        (0.2431, 0.1745),
        (0.2101, 0.1544),
        (0.1485, 0.1218),
        (0.0921, 0.0962),
    ),
    2.40: (
        (2.4000, 0.2926),
        (2.3943, 0.3851),
        (2.1976, 0.3653),
        (1.7730, 0.3447),
        (1.2781, 0.3396),
    ),
    4.80: (
        (4.8000, 0.4136),
        (4.7886, 0.5222),
        (4.3970, 0.4924),
        (3.5441, 0.4480),
        (2.5375, 0.4130),
    ),
    7.20: (
        (7.2002, 0.4898),
        (7.1830, 0.6124),
        (6.5956, 0.5799),
        (5.3161, 0.5497),
        (3.8062, 0.5438),
    ),
    9.60: (
        (9.6000, 0.5207),
        (9.5770, 0.6604),
        (8.7940, 0.6308),
        (7.0880, 0.6295),
        (5.0746, 0.6664),
    ),
}


@jax.jit
def aged(target):
    """G of 200,000 devices programmed to target (µS), then of reads at AGES."""
    xbar = analog.deploy(KEY, IBM, target * jnp.ones((2, 50_000, 2)))
    found = [xbar.g]
    for key, age in zip(jax.random.split(KEY, len(AGES)), AGES, strict=True):
        found.append(analog.read(key, IBM, xbar, age))
    return jnp.stack(found)


@pytest.mark.parametrize("target", AIHWKIT)
def test_ibm_equals_aihwkit(target):
    g = np.float64(aged(target))
    found = np.stack([g.mean((1, 2, 3)), g.std((1, 2, 3))], 1)
    np.testing.assert_allclose(found, AIHWKIT[target], rtol=0.01)


# ---- devices of one's own ------------------------------------------------------------------------

FLAT = analog.describe("mine", PCM)


@pytest.mark.parametrize("name, device", [*DEVICES.items(), RERAM])
def test_describe_and_from_constants_are_inverse(name, device, tmp_path):
    constants = json.loads(json.dumps(analog.describe(name, device)))
    assert analog.from_constants(constants) == (name, device)
    path = tmp_path / "mine.json"
    text = json.dumps(constants | {"name": "mine", "comment": "of my own"})
    for encoding in ("utf-8", "utf-8-sig"):  # the second begins with a mark
        path.write_text(text, encoding=encoding)
        assert analog.load_device(str(path)) == ("mine", device)


def test_a_file_goes_before_a_built_in_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, device in DEVICES.items():
        (tmp_path / "pcm").mkdir(exist_ok=True)  # a folder is no file
        assert analog.load_device(name) == (name, device)
    (tmp_path / "ibm").write_text(json.dumps(FLAT))
    assert analog.load_device("ibm") == ("mine", PCM)


def test_another_constant_compiles_nothing_anew():
    """Neither does a whole number in a file, which is the same constant."""
    traces = []

    @jax.jit
    def mean_g(device):
        traces.append(device)
        xbar = analog.deploy(KEY, device, jnp.full((2, 9, 1), 5.0))
        xbar, _ = analog.fire(KEY, device, xbar, jnp.ones_like(xbar.g), 1, 7.0)
        return jnp.mean(analog.read(KEY, device, xbar, 9.0))

    expected = mean_g(PCM)
    _, whole = analog.from_constants(FLAT | {"g_max": 12, "set_history": 0})
    assert mean_g(whole) == expected
    for other in (PCM_HISTORY, SLOW, jax.tree.map(lambda x: 1.01 * x, PCM), RERAM[1]):
        assert mean_g(other) != expected
    assert len(traces) == 1


OPTIONAL = "law", "t_verify", "tolerance", "stuck_low", "stuck_high"


def without(*keys):
    """The constants of a file without some of them."""
    return {key: value for key, value in FLAT.items() if key not in keys}


def test_constants_with_defaults():
    assert analog.from_constants(without(*OPTIONAL)) == ("mine", PCM)


def test_either_family_may_state_its_error():
    """All of it, else what is missing is named; without it a device is programmed by pulses."""
    stated = analog.StatedError(0.01, 0.02, -0.01)
    constants = FLAT | stated._asdict()
    assert analog.from_constants(constants) == ("mine", PCM._replace(stated=stated))
    for key in stated._fields:
        part = {field: x for field, x in constants.items() if field != key}
        with pytest.raises(ValueError, match=rf"\b{key} is missing"):
            analog.from_constants(part)
    pulsed = IBM._replace(stated=None, g_prog=10.0)
    assert analog.from_constants(analog.describe("mine", pulsed)) == ("mine", pulsed)


WRONG = (
    ("prog_err", 0.1),
    ("stated", 0.1),  # unknown
    ("name", "two words"),
    ("name", 3),
    ("name", True),
    ("name", None),
    ("law", "ideal"),
    ("read_offset", "0.1"),
    ("reset_std", None),
    ("t0", True),
    ("set_slope", math.nan),
    ("set_offset", math.inf),
    ("set_offset", 1e39),  # not finite in float32
    ("set_slope", -(10**400)),
    ("g_min", -1.0),
    ("nu_std", -0.1),
    ("t0", 0),
    ("history_decay", 0),
    ("g_max", 12e-6),  # in siemens
    ("g_min", 12.0),
    ("g_prog", 13.0),
    ("g_prog", 0.05),
    ("reset_mean", 13.0),
    ("reset_mean", 10.0),  # that of g_prog
    ("reset_mean", 0.05),
    ("tolerance", 0),
    ("stuck_low", 1.1),
    ("stuck_high", -0.1),
)


@pytest.mark.parametrize("change", [{"g_prog": 10.7}, {"set_history": -1.0}])
def test_a_device_that_pulses_cannot_raise_is_refused(change):
    """SET ends at 10.6 µS; with such a history the first pulse lowers G."""
    with pytest.raises(ValueError, match="g_prog is out of reach"):
        analog.from_constants(FLAT | change)


@pytest.mark.parametrize("key, value", WRONG)
def test_a_wrong_constant_is_named(key, value):
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        analog.from_constants(FLAT | {key: value})


def test_a_missing_constant_is_named():
    for key in without(*OPTIONAL):
        with pytest.raises(ValueError, match=rf"\b{key}\b"):
            analog.from_constants(without(key))


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps(FLAT | {"name": "pcm"}), "that of a built-in"),
        (json.dumps(FLAT | {"law": ["ibm"]}), "law"),
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "JSON object"),
        ("[" * 100_000, "recursion"),
        (json.dumps(without("t0"))[:-1] + ', "t0": 1' + "0" * 5000 + "}", "t0"),
        ('"x"', "JSON object"),
        ("\xff", "JSON"),
        (None, "nor a JSON object"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, words):
    path = tmp_path / "mine.json"
    if text is not None:  # else there is no file
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        analog.load_device(str(path))


def test_perf_has_no_noise():
    perf = analog.describe("perf", analog.PERF)
    noise = "read_", "prog_", "nu_"
    assert not any(x for name, x in perf.items() if "std" in name or name.startswith(noise))
