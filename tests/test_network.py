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
SIZES = (7, 6), (5, 6, 4)


start = jax.jit(network.start, static_argnums=(1, 2, 3))


# ---- neurons -------------------------------------------------------------------------------------


def case(sizes):
    """Dynamics, weights of a network that spikes, and inputs."""
    decays = np.exp(-np.arange(1, len(sizes) + 1) / 10).tolist()
    layers = tuple(map(network.Lif, decays))
    g = start(KEY, PCM, sizes, 1)
    hidden = tuple(1.7 * analog.weights(PCM, g) + 0.05 for g in g.hidden)
    readout = jax.random.normal(KEY, (sizes[-1],))
    u = jnp.linspace(-5.0, 5.0, 9)
    return network.Dynamics(layers, 0.6, 0.7), network.Network(hidden, readout), u


@pytest.mark.parametrize("sizes", SIZES)
def test_simulation_equals_a_plain_loop(x64, sizes):
    dynamics, w, u = case(sizes)
    spikes, traces = oracle.loop(dynamics, w.hidden, u)
    assert 0.02 < spikes[-1].mean() < 0.98
    activity = jax.jit(partial(network.simulate, dynamics))(w.hidden, u)
    rates = [1000 * np.mean(z, (0, 2)) for z in spikes]
    np.testing.assert_allclose(activity.e, traces, atol=1e-12)
    np.testing.assert_allclose(network.rates(activity).T, rates, rtol=1e-12)


def test_yardstick_equals_a_plain_loop(x64):
    dynamics, w, u = case(SIZES[1])
    _, traces = oracle.loop(dynamics, w.hidden, u)
    expected = traces @ np.asarray(w.readout)
    outputs = jax.vmap(partial(oracle.output, dynamics, w), out_axes=1)(u)
    np.testing.assert_allclose(outputs, expected, atol=1e-12)
    y = jnp.sin(u)
    error = oracle.squared_error(dynamics, w, u, y)
    np.testing.assert_allclose(
        error, np.mean((expected - np.asarray(y)) ** 2), rtol=1e-12
    )


def test_gradient_equals_that_of_single_time_steps(x64):
    dynamics, w, u = case(SIZES[1])
    probe = jax.random.normal(KEY, (network.N_STEPS, len(u)))

    def whole(w):
        e = network.simulate(dynamics, w.hidden, u).e
        return jnp.sum(probe * (e @ w.readout) ** 2)

    def step_by_step(w):
        outputs = jax.vmap(partial(oracle.output, dynamics, w))(u)  # [L, T]
        return jnp.sum(probe * outputs.T**2)

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
    np.testing.assert_allclose(
        second(u), -2 * np.sign(u) / (1 + np.abs(u)) ** 3, rtol=1e-6
    )


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


def test_start():
    g = start(KEY, PCM, (40, 30, 20), 3)
    shapes = [x.shape for x in jax.tree.leaves(g)]
    assert shapes == [(2, 6, 40), (2, 41, 30), (2, 31, 20), (2, 20, 1)]
    first, *later = [analog.weights(PCM, x) for x in g.hidden]
    for half in np.split(first, 2):
        assert np.all(half == half[0])
    assert 0.9 < np.abs(first).max() <= 1
    for w, n in zip(later, (70, 50), strict=True):
        bound = (6 / n) ** 0.5
        largest = np.abs(w[:-1]).max()
        assert 0.95 * bound < largest < 1.0001 * bound
        assert np.all(w[-1] == 0)  # the bias
    for x in g.hidden:
        assert np.all(np.min(x, 0) == np.float32(PCM.g_min))  # one-sided pairs
    np.testing.assert_allclose(g.readout, 0.5, rtol=1e-6)


# ---- chips ---------------------------------------------------------------------------------------

LEVELS = np.array([2.0, 8.0, 4.0])  # µS, of all devices of a crossbar


def chip_of(device, error_share):
    """Chip of three crossbars of 4,000 devices, programmed with an error of that share of
    G."""

    def make(key, device, g):
        return analog.fabricate(key, device, g, error_share * g)

    *hidden, readout = [jnp.full((2, 50, 40), level) for level in LEVELS.tolist()]
    g = network.Network(tuple(hidden), readout)
    return network.assemble(KEY, device, make, g)


def assert_own(samples, std):
    """Check the spread of each row of samples, within 5 standard errors; no two may
    correlate."""
    rows, n = samples.shape
    np.testing.assert_allclose(samples.std(1), std, rtol=5 / (2 * n) ** 0.5)
    correlation = np.corrcoef(samples) - np.eye(rows)
    assert np.abs(correlation).max() < 5 / n**0.5


def test_each_crossbar_has_errors_and_drift_of_its_own():
    xbars = chip_of(PCM, 0.05).xbars
    errors, drifts = [], []
    for xbar, level in zip((*xbars.hidden, xbars.readout), LEVELS, strict=True):
        errors.append(np.ravel(xbar.g) - level)
        drifts.append(np.ravel(xbar.nu))
    assert_own(np.array(errors + drifts), [*0.05 * LEVELS, 0.008, 0.008, 0.008])


def test_each_crossbar_is_read_with_noise_of_its_own(monkeypatch):
    """Every read, too."""
    monkeypatch.setattr(network, "mean_over_rows", lambda w: w)
    still = PCM._replace(law=PCM.law._replace(nu_mean=0.0, nu_std=0.0))
    chip = chip_of(still, 0.0)
    reads = []
    for key in jax.random.split(KEY):
        reads += network.read_hidden(key, still, chip, 100.0, False)
    samples = [np.ravel(w) for w in reads]
    std = (
        2**0.5 * (0.03 * LEVELS[:2] + 0.13) / 11.9
    )  # of the weight of two equal devices
    assert_own(np.array(samples), [*std, *std])


def ramp(first, last, shape):
    """Array from first to last."""
    return jnp.linspace(first, last, np.prod(shape)).reshape(shape)


CELLS = network.Network(
    (ramp(2, 9, (2, 6, 5)), ramp(9, 2, (2, 6, 5))), ramp(2, 7, (2, 5, 1))
)


# Without noise, and all devices drift alike.
EQUAL = PCM._replace(law=analog.Nandakumar(0.04, 0.0, 0.0, 0.0))


def test_a_weight_of_layer_0_is_the_mean_over_its_rows():
    of_input, of_bias = np.random.default_rng(0).normal(size=(2, 3, 5))
    found = network.mean_over_rows(jnp.concatenate([of_input, of_bias]))
    expected = [sum(of_input) / 3, network.BIAS * sum(of_bias) / 3]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def with_nu_by_neuron(xbar):
    """The crossbar with a drift exponent for each of its columns."""
    nu = jnp.linspace(0.02, 0.06, xbar.nu.shape[-1])
    return xbar._replace(nu=jnp.broadcast_to(nu, xbar.nu.shape))


def test_devices_keep_their_places_and_a_neurons_drift_is_undone():
    def make(key, device, g):
        return analog.fabricate(key, EQUAL, g)

    chip = jax.jit(partial(network.assemble, device=EQUAL, make=make))(KEY, g=CELLS)
    assert [x.shape for x in chip.reference] == [(5,), (5,)]  # one number per neuron
    drifting = tuple(map(with_nu_by_neuron, chip.xbars.hidden))
    chip = chip._replace(xbars=chip.xbars._replace(hidden=drifting))
    w = jax.tree.map(partial(analog.weights, EQUAL), CELLS)
    hidden = network.mean_over_rows(w.hidden[0]), w.hidden[1]
    plain = network.read_hidden(KEY, EQUAL, chip, 1e6, False)
    compensated = network.read_hidden(KEY, EQUAL, chip, 1e6, True)
    readout = network.read_readout(KEY, EQUAL, chip.xbars.readout, 1e6)
    clock = 1e6 / 38.6
    factor = clock ** -np.linspace(0.02, 0.06, 5)
    for expected, drifted, restored in zip(hidden, plain, compensated, strict=True):
        np.testing.assert_allclose(drifted, factor * expected, atol=1e-6)
        np.testing.assert_allclose(restored, expected, atol=1e-6)
    np.testing.assert_allclose(readout, clock**-0.04 * w.readout[:, 0], atol=1e-6)


def test_a_column_that_reads_as_zero_is_no_error():
    blank = jax.tree.map(jnp.zeros_like, CELLS)
    device = analog.IBM

    def make(key, device, g):
        return analog.fabricate(key, device, g)

    chip = jax.jit(partial(network.assemble, device=device, make=make))(KEY, g=blank)
    for w in network.read_hidden(KEY, device, chip, 1e6, True):
        assert not np.any(w)


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
