"""The network against a plain loop, and its custom derivative against autodiff."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analog
import benchmark
import network

DECAY = network.Decay(float(np.exp(-0.1)), float(np.exp(-1.0)))
KEY = jax.random.key(5)


def weights(n_h0=7, n_h1=6):
    return network.Network(*map(lambda g: 1.5*analog.weights(analog.PCM, g), network.init(KEY, analog.PCM, n_h0, n_h1)))


def loop(w, u):
    """Spikes of layer 0 [T, L, H0], potentials, spikes and traces of layer 1, by the equations, one number at a time."""
    w0, w1 = np.asarray(w.hidden0), np.asarray(w.hidden1)
    z0, v1, z1, e = (np.zeros((network.N_STEPS, len(u), n)) for n in (w0.shape[1], *3*[w1.shape[1]]))
    for level, x in enumerate(np.asarray(u)):
        v = np.zeros(w0.shape[1])
        for t in range(network.N_STEPS):
            for j in range(len(v)):
                v[j] = DECAY.alpha*v[j] + x*w0[0, j] + w0[1, j] - (z0[t - 1, level, j] if t else 0)
                z0[t, level, j] = v[j] > 1
            for k in range(w1.shape[1]):
                drive = sum(z0[t, level, j]*w1[j, k] for j in range(len(v))) + w1[-1, k]
                last = (v1[t - 1, level, k], z1[t - 1, level, k], e[t - 1, level, k]) if t else (0, 0, 0)
                v1[t, level, k] = DECAY.alpha*last[0] + drive - last[1]
                z1[t, level, k] = v1[t, level, k] > 1
                e[t, level, k] = DECAY.kappa*last[2] + z1[t, level, k]
    return z0, v1, z1, e


def test_simulation_equals_a_plain_loop(x64):
    w, u = weights(), jnp.linspace(-5.0, 5.0, 9)
    z0, _, z1, e = loop(w, u)
    active = network.simulate(DECAY, w, u)
    assert 0 < z1.mean() < 1
    np.testing.assert_allclose(active.trace, e, atol=1e-12)
    np.testing.assert_allclose(active.rate0, z0.mean(), atol=1e-12)
    np.testing.assert_allclose(active.rate1, z1.mean(), atol=1e-12)


def test_yardstick_equals_a_plain_loop(x64):
    w, u = weights(), jnp.linspace(-5.0, 5.0, 4)
    w = w._replace(readout=jax.random.normal(KEY, w.readout.shape))
    e = loop(w, u)[3]
    outputs = jax.vmap(lambda u: benchmark.output(DECAY, w, u), out_axes=1)(u)
    np.testing.assert_allclose(outputs, e @ np.asarray(w.readout)[:, 0], atol=1e-12)


def test_custom_derivative_equals_autodiff(x64):
    w, u = weights(), jnp.linspace(-5.0, 5.0, 9)
    probe = jax.random.normal(KEY, (network.N_STEPS, 9, 6))

    def scalar(w):
        active = network.simulate(DECAY, w, u)
        return jnp.sum(probe*active.trace**2) + 3*active.rate0 + 5*active.rate1**2

    fast = jax.grad(scalar)(w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "lif_trace", lambda *inputs: network.lif(*inputs)[1])
        plain = jax.grad(scalar)(w)
    for a, b in zip(fast, plain):
        np.testing.assert_allclose(a, b, atol=1e-10*max(1, np.abs(b).max()))


def test_surrogate_is_differentiable_twice():
    first = jax.grad(network.spike)
    for u in jnp.array([-2.0, -0.1, 0.3, 4.0]):
        np.testing.assert_allclose(first(u), 1/(1 + abs(u))**2, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(first)(u), -2*np.sign(u)/(1 + abs(u))**3, rtol=1e-6)


@pytest.mark.parametrize("n_bits", [1, 7, 12])
def test_input_converter(n_bits):
    n = 2**n_bits
    centres = network.level_centres(n_bits)
    assert centres.shape == (n,) and np.array_equal(network.level(n_bits, centres), np.arange(n))
    assert network.level(n_bits, -9.0) == 0 and network.level(n_bits, 9.0) == n - 1 == network.level(n_bits, 5.0)
    x = np.random.default_rng(0).uniform(-5, 5, 1000).astype(np.float32)
    assert np.abs(centres[network.level(n_bits, x)] - x).max() <= 5/n + 1e-5


def test_start():
    g = network.init(KEY, analog.PCM, 40, 30)
    assert [x.shape for x in g] == [(2, 2, 40), (2, 41, 30), (2, 30, 1)]
    w = network.Network(*map(lambda g: analog.weights(analog.PCM, g), g))
    bound = (6/70)**0.5
    assert 0.9 < np.abs(w.hidden0).max() <= 1 and 0.95*bound < np.abs(w.hidden1).max() <= bound
    assert np.all(w.hidden1[-1] == 0) and np.all(g.readout == 0.5)
    assert all(np.all(np.min(x, 0) == np.float32(0.1)) for x in g[:2])    # one-sided pairs


def test_reading_modules_changes_nothing():
    import subprocess
    import sys
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import analog, network, train; "
            "assert 'matplotlib.pyplot' not in sys.modules; import jax; assert not jax.config.jax_enable_x64")
    subprocess.run([sys.executable, "-c", code, str(network.__file__).rsplit("/", 1)[0]], check=True)


def crossbars(*levels):
    """A Network of crossbars of 4,000 devices, each of one conductance, in µS."""
    return network.Network(*(jnp.full((2, 50, 40), level) for level in levels))


def test_each_crossbar_is_programmed_with_errors_of_its_own():
    """The std of 4,000 devices within 5 standard errors of 5 % of their own crossbar's G; no two crossbars' correlate."""
    chip = network.fabricate(KEY, analog.PCM, crossbars(1.0, 8.0, 3.0))
    errors = [np.ravel(xbar.g - level) for xbar, level in zip(chip, (1.0, 8.0, 3.0))]
    spreads = [np.ravel(xbar.nu - analog.PCM.nu_mean) for xbar in chip]
    n = errors[0].size
    np.testing.assert_allclose([x.std() for x in errors], [0.05, 0.4, 0.15], rtol=5/(2*n)**0.5)
    np.testing.assert_allclose([x.std() for x in spreads], analog.PCM.nu_std, rtol=5/(2*n)**0.5)
    correlation = np.corrcoef([*errors, *spreads])
    assert np.abs(correlation - np.eye(6)).max() < 5/n**0.5


def test_each_crossbar_is_read_with_noise_of_its_own():
    still = analog.PCM._replace(prog_err=0.0, nu_mean=0.0, nu_std=0.0)
    chip = network.fabricate(KEY, still, crossbars(2.0, 8.0, 4.0))
    noise = [np.ravel(w) for w in network.read(KEY, still, chip, 100.0)]    # of pairs of equal devices
    n, std = noise[0].size, still.read_slope*np.array([2.0, 8.0, 4.0]) + still.read_offset
    np.testing.assert_allclose([x.std() for x in noise], 2**0.5*std/(still.g_max - still.g_min), rtol=5/(2*n)**0.5)
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 5/n**0.5


def test_devices_of_a_chip_stay_in_their_places():
    g = network.init(KEY, analog.PERF, 7, 6)
    chip = network.fabricate(KEY, analog.PERF, g)
    for xbar, target, w in zip(chip, g, network.read(KEY, analog.PERF, chip, 100.0)):
        np.testing.assert_allclose(xbar.g, target, rtol=1e-6)
        np.testing.assert_allclose(w, analog.weights(analog.PERF, target), atol=1e-6)
        assert all(field.shape == target.shape for field in xbar) and not np.any(xbar.t_prog)
