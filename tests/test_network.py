"""The network against a plain loop, its gradient, and its chips."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import ROOT

import analog
import network
from analog import PCM

KEY = jax.random.key(5)
# neurons of each layer, inputs, outputs, rows of an input
SHAPES = ((7, 6), 1, 1, 1), ((5, 6, 4), 2, 2, 3)


start = jax.jit(network.start, static_argnums=(2, 3, 4, 5))


# ---- neurons -------------------------------------------------------------------------------------


def case(shape):
    """Dynamics, weights of a network that spikes, and inputs [L, n_in]."""
    sizes, n_in, n_out, _ = shape
    decays = np.exp(-np.arange(1, len(sizes) + 1) / 10).tolist()
    layers = tuple(map(network.Lif, decays))
    g = start(KEY, PCM, *shape)
    first, *later = [1.7 * analog.weights(PCM, x) + 0.05 for x in g.hidden]
    first += 0.3 * jax.random.normal(KEY, first.shape)  # no two rows of an input are alike
    readout = jax.random.normal(KEY, (sizes[-1], n_out))
    u = jax.random.uniform(KEY, (9, n_in), minval=-5.0, maxval=5.0)
    dynamics = network.Dynamics(0.4, layers, 0.6, 0.7, 100)
    return dynamics, network.Network((first, *later), readout), u


@pytest.mark.parametrize("shape", SHAPES)
def test_simulation_equals_a_plain_loop(x64, shape):
    dynamics, w, u = case(shape)
    spikes, traces = oracle.loop(dynamics, w.hidden, u)
    assert 0.02 < spikes[-1].mean() < 0.98
    activity = jax.jit(partial(network.present, dynamics))(w.hidden, u)
    np.testing.assert_allclose(activity.e, traces, atol=1e-12)
    for rates, z in zip(network.rates(activity), spikes, strict=True):
        np.testing.assert_allclose(rates, 1000 * np.mean(z, (0, 1)), rtol=1e-12)


def test_step_by_step_equals_a_plain_loop(x64):
    dynamics, w, u = case(SHAPES[1])
    _, traces = oracle.loop(dynamics, w.hidden, u)
    expected = traces[-1] @ np.asarray(w.readout)
    outputs = jax.vmap(partial(oracle.output, dynamics, w))(u)
    np.testing.assert_allclose(outputs, expected, atol=1e-12)
    y = jnp.concatenate([jnp.sin(u), u], 1)[:, 1:3]
    error = oracle.squared_error(dynamics, w, u, y)
    plain = np.mean(np.sum((expected - np.asarray(y)) ** 2, 1))
    np.testing.assert_allclose(error, plain, rtol=1e-12)


def test_gradient_equals_that_of_single_time_steps(x64):
    dynamics, w, u = case(SHAPES[1])
    probe = jax.random.normal(KEY, (len(u), 2))

    def whole(w):
        e = network.present(dynamics, w.hidden, u).e[-1]
        return jnp.sum(probe * (e @ w.readout) ** 2)

    def step_by_step(w):
        return jnp.sum(probe * jax.vmap(partial(oracle.output, dynamics, w))(u) ** 2)

    found = jax.jit(jax.grad(whole))(w)
    expected = jax.jit(jax.grad(step_by_step))(w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max())


def test_derivative_of_a_spike_is_that_of_the_fast_sigmoid():
    u = jnp.array([-2.0, -0.1, 0.3, 4.0])
    first = jax.vmap(jax.grad(network.spike))
    second = jax.vmap(jax.grad(jax.grad(network.spike)))
    assert network.spike(u).tolist() == [0, 0, 1, 1]
    assert np.all(network.spike(0 * u) == 0)
    np.testing.assert_allclose(first(u), 1 / (1 + np.abs(u)) ** 2, rtol=1e-6)
    np.testing.assert_allclose(second(u), -2 * np.sign(u) / (1 + np.abs(u)) ** 3, rtol=1e-6)


# ---- input and start -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_bits", [1, 7, 12])
def test_input_converter(n_bits):
    n = 2**n_bits
    centres = network.level_centres(n_bits)
    found = network.level(n_bits, centres)
    assert np.array_equal(found, np.arange(n))
    ends = jnp.array([-9.0, -5.0, 5.0, 9.0])
    assert network.level(n_bits, ends).tolist() == [0, 0, n - 1, n - 1]
    x = jnp.linspace(-5.0, 5.0, 1000)
    converted = centres[network.level(n_bits, x)]
    assert np.abs(converted - x).max() <= 5 / n + 1e-5


@pytest.mark.parametrize("n_in, largest", [(1, 1.0), (25, 0.8)])
def test_start(n_in, largest):
    """Uniform weights, those of later layers as Glorot and Bengio have them; no bias, and the rows
    of an input alike; one device of a pair carries the weight."""
    g = start(KEY, PCM, (40, 30, 20), n_in, 2, 3)
    shapes = [x.shape for x in jax.tree.leaves(g)]
    assert shapes == [(2, 3 * (n_in + 1), 40), (2, 41, 30), (2, 31, 20), (2, 20, 2)]
    first, *later = [analog.weights(PCM, x) for x in g.hidden]
    rows = first.reshape(n_in + 1, 3, 40)
    assert np.all(rows == rows[:, :1])
    assert 0.9 * largest < np.abs(first).max() <= largest * 1.0001
    for w, n in zip(later, (70, 50), strict=True):
        bound = (6 / n) ** 0.5
        assert 0.95 * bound < np.abs(w[:-1]).max() < 1.0001 * bound
        assert np.all(w[-1] == 0)  # the bias
    for x in g.hidden:
        assert np.all(np.min(x, 0) == np.float32(PCM.g_min))
    np.testing.assert_allclose(g.readout, 0.5, rtol=1e-6)


# ---- chips ---------------------------------------------------------------------------------------

# Without noise, and all devices drift alike.
EQUAL = PCM._replace(law=analog.Nandakumar(0.04, 0.0, 0.0, 0.0))
LEVELS = np.array([2.0, 8.0, 4.0])  # µS, of all devices of a crossbar


def parts(network):
    """The values of a network: of hidden layers, then of the readout."""
    return *network.hidden, network.readout


def ramp(first, last, shape):
    """Array from first to last."""
    return jnp.linspace(first, last, np.prod(shape)).reshape(shape)


SHAPE = 2, 50, 40  # of every crossbar here
# The readout has devices at g_min, which drift below the range of the converter.
CELLS = network.Network((ramp(2, 9, SHAPE), ramp(9, 2, SHAPE)), ramp(0.1, 7, SHAPE))


IDEAL = network.Circuit()


@partial(jax.jit, static_argnames=("make", "circuit"))
def chip_of(device, g, make=analog.fabricate, circuit=IDEAL):
    """A chip of the conductances g."""
    return network.assemble(KEY, device, make, g, circuit)


@jax.jit
def read(key, device, chip, t):
    """Weights of all crossbars, hidden ones first: as they are read, and compensated."""
    return [parts(network.each(network.read, key, device, chip, t, on)) for on in (False, True)]


def with_error(key, device, target):
    """A crossbar programmed with an error of 5 % of its target."""
    table = analog.EXACT._replace(target=np.array([0.0, 12.0]), std=np.array([0.0, 0.6]))
    mean, age = np.zeros((2, 2))
    return analog.fabricate(key, device, target, table._replace(mean=mean, age=age))


def blocks(device, make=analog.fabricate):
    """Chip of three crossbars of 4,000 devices at LEVELS."""
    *hidden, readout = [jnp.full(SHAPE, level) for level in LEVELS.tolist()]
    return chip_of(device, network.Network(tuple(hidden), readout), make)


def assert_own(samples, std):
    """Check the spread of each row of samples, within 5 standard errors; no two may
    correlate."""
    rows, n = samples.shape
    np.testing.assert_allclose(samples.std(1), std, rtol=5 / (2 * n) ** 0.5)
    correlation = np.corrcoef(samples) - np.eye(rows)
    assert np.abs(correlation).max() < 5 / n**0.5


def test_each_crossbar_has_errors_and_drift_of_its_own():
    errors, drifts = [], []
    for tile, level in zip(parts(blocks(PCM, with_error)), LEVELS, strict=True):
        errors.append(np.ravel(tile.xbar.g) - level)
        drifts.append(np.ravel(tile.xbar.nu))
    assert_own(np.array(errors + drifts), [*0.05 * LEVELS, 0.008, 0.008, 0.008])


def test_each_crossbar_is_read_with_noise_of_its_own():
    """Every read, too."""
    still = PCM._replace(law=PCM.law._replace(nu_mean=0.0, nu_std=0.0))
    chip = blocks(still)
    reads = [w for key in jax.random.split(KEY) for w in read(key, still, chip, 100.0)[0]]
    samples = np.array([np.ravel(w) for w in reads])
    std = 2**0.5 * (0.03 * LEVELS + 0.13) / 11.9  # of the weight of two equal devices
    assert_own(samples, [*std, *std])


# ---- drift compensation --------------------------------------------------------------------------


@jax.jit
def fire(device, xbar, counts, t):
    """The crossbar after at most one pulse of each device at time t (s), and those fired."""
    return analog.fire(KEY, device, xbar, counts, 1, t)


def test_compensation_undoes_drift_that_is_equal():
    """In every crossbar, that of the readout too, whose lowest devices the converter clips."""
    chip, t = chip_of(EQUAL, CELLS), 1e6
    left = (t / 38.6) ** -0.04
    plain, compensated = read(KEY, EQUAL, chip, t)
    for g, drifted, restored in zip(parts(CELLS), plain, compensated, strict=True):
        seen = np.maximum(left * np.asarray(g, float), 0.1)
        w = (seen[0] - seen[1]) / 11.9
        np.testing.assert_allclose(drifted, w, atol=1e-6)
        np.testing.assert_allclose(restored, w / left, atol=1e-6)
        kept = np.min(g, 0) > 0.2  # neither device is clipped
        expected = np.asarray(analog.weights(EQUAL, g))[kept]
        np.testing.assert_allclose(restored[kept], expected, atol=1e-6)


def test_a_crossbar_is_compensated_by_one_number():
    """Σ of what it was programmed to, over Σ of what is read, whatever each device does."""
    spread = PCM._replace(law=analog.Nandakumar(0.04, 0.02, 0.0, 0.0))
    chip, t = chip_of(spread, CELLS, with_error), 1e6
    plain, compensated = read(KEY, spread, chip, t)
    for tile, g, w, scaled in zip(parts(chip), parts(CELLS), plain, compensated, strict=True):
        xbar = jax.tree.map(lambda x: np.asarray(x, float), tile.xbar)
        present = xbar.g * (t / 38.6) ** -xbar.nu
        factor = np.sum(np.asarray(g, float)) / present.sum()
        assert factor > 1.1
        np.testing.assert_allclose(scaled, factor * np.asarray(w), atol=1e-5)


def test_compensation_where_devices_are_stuck():
    """Both sums count stuck devices, and those beside them as they were programmed. Stuck ones do
    not drift, so that 5 % of them leave an error of a few per cent."""
    device = EQUAL._replace(stuck_low=0.03, stuck_high=0.02)
    plus, minus, t = 6.0, 2.0, 1e6
    g = jnp.stack([jnp.full(SHAPE[1:], plus), jnp.full(SHAPE[1:], minus)])
    chip = chip_of(device, network.Network((g, g), g))
    left = (t / 38.6) ** -0.04
    for tile, w in zip(parts(chip), read(KEY, device, chip, t)[1], strict=True):
        free = np.asarray(tile.xbar.free)
        assert abs(np.mean(~free) - 0.05) < 5 * (0.05 * 0.95 / free.size) ** 0.5
        programmed = np.asarray(tile.xbar.g, float)
        factor = programmed.sum() / np.sum(np.where(free, left, 1) * programmed)
        restored = np.mean(np.asarray(w)[free[0] & free[1]]) / ((plus - minus) / 11.9)
        np.testing.assert_allclose(restored, left * factor, rtol=1e-4)
        assert left < 0.67 and abs(restored - 1) < 0.06


def test_a_tile_that_reads_as_zero_is_no_error():
    device = EQUAL._replace(g_min=0.0)
    chip = chip_of(device, jax.tree.map(jnp.zeros_like, CELLS))
    for w in read(KEY, device, chip, 1e6)[1]:
        assert not np.any(w)


def test_a_pulsed_crossbar_refers_to_its_own_read():
    """All devices pulsed at once: later reads are scaled to what it was at its reference."""
    chip = chip_of(EQUAL, CELLS)
    pulsed, _ = fire(EQUAL, chip.hidden[0].xbar, jnp.ones(SHAPE), 500.0)
    tile = network.with_reference(KEY, EQUAL, chip.hidden[0]._replace(xbar=pulsed), 501.0)
    _, (found, *_) = read(KEY, EQUAL, chip._replace(hidden=(tile, tile)), 1e5)
    expected = analog.weights(EQUAL, pulsed.g) * (1 / 38.6) ** -0.04
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_old_chip_keeps_the_times_of_fresh_pulses():
    """float32 tells times apart by 8 s at an age of 1e8 s, but not on a clock that starts late."""
    chip = network.later(chip_of(EQUAL, CELLS), 1e8)
    drifted, _ = read(KEY, EQUAL, chip, 0.0)
    for g, w in zip(parts(CELLS)[:2], drifted, strict=False):
        expected = (1e8 / 38.6) ** -0.04 * analog.weights(EQUAL, g)
        np.testing.assert_allclose(w, expected, atol=1e-6)
    one = jnp.zeros(SHAPE).at[0, 0, 0].set(1.0)
    pulsed, _ = fire(EQUAL, chip.readout.xbar, one, 2.5)
    for t, age in ((3.75, 1.25), (5.0, 2.5), (1002.5, 1000.0)):
        left = analog.drift(EQUAL, pulsed, t) / pulsed.g
        np.testing.assert_allclose(left[0, 0, 0], (age / 38.6) ** -0.04, rtol=1e-5)
        np.testing.assert_allclose(left[1], (1e8 / 38.6) ** -0.04, rtol=1e-4)


# ---- modules -------------------------------------------------------------------------------------

IMPORT = """
import os, signal, sys
before = dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()]
import analog, network, train
after = dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()]
assert before == after
assert 'matplotlib.pyplot' not in sys.modules
import jax
assert not jax.config.jax_enable_x64
"""


def test_importing_changes_nothing():
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert run.stderr == "" and run.returncode == 0


def test_a_step_uses_all_that_a_neuron_has():
    """A constant or a state that a step forgets would be as if it were 0."""
    lif = network.Lif(*np.linspace(0.5, 0.8, len(network.Lif._fields)).tolist())
    shape = len(network.Neurons._fields), 1, 9
    before = network.Neurons(*jax.random.uniform(KEY, shape))

    def later(lif, neurons):
        for _ in range(2):
            neurons = network.lif_step(lif, neurons, 0.4)
        return jnp.sum(neurons.v)

    slopes = jax.grad(later, (0, 1))(lif, before)
    assert all(np.any(x) for x in jax.tree.leaves(slopes))
    after = network.lif_step(lif, before, 0.4)
    assert all(np.any(a != b) for a, b in zip(after, before, strict=True))
    assert not network.Lif._field_defaults and not network.Neurons._field_defaults
