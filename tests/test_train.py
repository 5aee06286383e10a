"""Closed forms against autodiff of the time steps; the protocol; the outer loop; learning."""

import functools
import socket

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import launch

import analog
import network
import train

KEY = jax.random.key(3)
start = train.start
SMALL = {
    "n_rows": 3,
    "n_h0": 7,
    "n_h1": 6,
    "batch_train": 4,
    "task_size": 5,
    "dac_bits": 4,
    "n_iter": 4,
}


def configured(**flags):
    return train.configure({**SMALL, **flags})


def close(a, b, tolerance=1e-5):
    """Equal to tolerance of the largest component, leaf by leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(y).max()
        assert scale > 0
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0)


# ---- tasks ---------------------------------------------------------------------------------------


def test_sinusoids_are_drawn_as_they_should():
    n = 100_000
    task = jax.jit(jax.vmap(train.Sinusoid.draw))(jax.random.split(KEY, n))
    for x, low, high in ((task.amplitude, 0.1, 5.0), (task.phase, 0.0, np.pi)):
        assert x.min() >= low and x.max() <= high
        assert abs(x.mean() - (low + high) / 2) < 4 * (high - low) / (12 * n) ** 0.5
        assert abs(x.std() - (high - low) / 12**0.5) < 4 * (high - low) / n**0.5
    x = np.linspace(-5, 5, 7)
    first = jax.tree.map(lambda p: p[0], task)
    expected = first.amplitude * np.sin(x + np.float32(first.phase))
    np.testing.assert_allclose(first.target(x), expected, atol=1e-4)


def test_yardsticks_are_those_of_the_law():
    """E[y²] = E[A²]·mean of sin², and the best function is E[A]·(2/π)·cos x."""
    x = np.linspace(-5, 5, 20_001)
    sine2 = np.mean(0.5 - (np.sin(2 * x + 2 * np.pi) - np.sin(2 * x)) / (4 * np.pi))
    zero = (5**3 - 0.1**3) / (3 * 4.9) * sine2
    best = zero - np.mean((2.55 * 2 / np.pi * np.cos(x)) ** 2)
    assert (round(zero, 3), round(best, 3)) == (4.252, 3.006)
    cfg, _ = configured(dac_bits=7)
    found = train.yardsticks(cfg)
    assert found["predicting 0"] == pytest.approx(zero, rel=0.03)
    assert found["best function that ignores the task"] == pytest.approx(best, rel=0.03)


def test_a_sum_over_levels_keeps_every_sample():
    cfg, _ = configured(task_size=50)
    trial = train.draw_trial(KEY, cfg)
    assert trial.x.min() >= -5 and trial.x.max() <= 5
    level = network.level(cfg.dac_bits, trial.x)
    counts = np.bincount(level, minlength=16)
    np.testing.assert_allclose(trial.support.share, counts / 50, rtol=1e-5)
    np.testing.assert_allclose(trial.support.y.sum(), trial.y.mean(), atol=1e-5)


# ---- closed forms --------------------------------------------------------------------------------


def traces(cfg):
    """Hidden weights of a network that spikes, and its traces [T, L, H] over the levels."""
    g = network.start(KEY, analog.PCM, train.sizes_of(cfg), 1)
    hidden = tuple(1.7 * analog.weights(analog.PCM, g) + 0.05 for g in g.hidden)
    u = network.level_centres(cfg.dac_bits)
    return hidden, network.simulate(train.dynamics_of(cfg), hidden, u).e


def test_delta_rule_equals_autodiff_of_the_time_steps(x64):
    cfg, _ = configured()
    hidden, e = traces(cfg)
    trial = train.draw_trial(KEY, cfg)
    u = network.level_centres(cfg.dac_bits)[network.level(cfg.dac_bits, trial.x)]

    def error(w):
        weights = network.Network(hidden, w)
        return oracle.squared_error(train.dynamics_of(cfg), weights, u, trial.y)

    w = jax.random.normal(KEY, (cfg.n_h1,))
    found = 2 * train.residual(train.moments_of(e), trial.support, w)
    close(found, jax.jit(jax.grad(error))(w), 1e-9)


@pytest.mark.parametrize("last", [False, True])
def test_query_error_equals_the_mean_over_a_fine_grid(x64, last):
    cfg, _ = configured()
    _, e = traces(cfg)
    e = e[-1:] if last else e
    task = train.Sinusoid.draw(KEY)
    w = jax.random.normal(KEY, (cfg.n_h1,))
    x = (
        jnp.linspace(-5.0, 5.0, 16 * 2000 + 1)[:-1] + 5 / 16 / 2000
    )  # midpoints, 2,000 a level
    outputs = (e @ w)[:, network.level(cfg.dac_bits, x)]
    expected = jnp.mean((outputs - task.target(x)) ** 2)
    query = train.query_of(cfg, task)
    moments = train.moments_of(e)
    # The 16 midpoints of a level are 0.04 apart: to 0.04²/24 of the largest derivatives.
    close(train.squared_error(moments, query, w), expected, 1e-3)


def plain_residual(moments, samples, w):
    """Half the gradient of the plain squared error over pairs x, y, by autodiff."""
    levels, y = samples

    def error(w):
        return jnp.mean((moments.second[:, levels] @ w - y) ** 2)

    return jax.grad(error)(w) / 2


def plain_squared_error(cfg, moments, task, w):
    """Mean over the time steps and over the midpoints of 256 parts of the range."""
    x = network.level_centres(8)
    outputs = (moments.second @ w)[:, network.level(cfg.dac_bits, x)]  # [T, 256]
    return jnp.mean((outputs - task.target(x)) ** 2)


def make_plain(patch, cfg):
    """Replace closed forms by explicit squared errors and autodiff."""

    def traces_themselves(e):
        return train.Moments(e, e)

    def pairs(cfg, x, y):
        return network.level(cfg.dac_bits, x), y

    patch.setattr(train, "support_of", pairs)
    patch.setattr(train, "query_of", lambda cfg, task: task)
    patch.setattr(train, "moments_of", traces_themselves)
    patch.setattr(train, "residual", plain_residual)
    patch.setattr(train, "squared_error", functools.partial(plain_squared_error, cfg))


def test_meta_gradient_equals_second_order_autodiff(x64):
    cfg, devices = configured(device="perf", n_inner=2, grad_thr=0.3, lambda_fr=0.1)
    meta = start(cfg, devices).meta

    def gradient():
        def loss(meta):
            return train.meta_loss(KEY, meta, cfg, devices[0], 3)[0]

        return jax.jit(jax.grad(loss))(meta)

    fast = gradient()
    with pytest.MonkeyPatch.context() as patch:
        make_plain(patch, cfg)
        close(fast, gradient())


# ---- protocol ------------------------------------------------------------------------------------


def test_comparators_count_thresholds_passed():
    cfg, _ = configured(n_bits=3)
    g = jnp.array([-5.0, -2.5, -1.0, 1.5, 0.2, 7.0])
    for theta, plus, minus in (
        ([1.0], [3, 2, 0, 0, 0, 0], [0, 0, 0, 1, 0, 3]),
        ([0.5, 0.5, 0.5, 4.0, 4.0, 4.0], [3, 3, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]),
    ):
        counts = train.comparators(KEY, cfg, g, jnp.array(theta))
        np.testing.assert_array_equal(counts[..., 0], [plus, minus])


def test_times_of_an_adaptation():
    cfg, _ = configured(n_inner=3, tlook=20.0)
    times = train.times_of(cfg, 1000.0, 50.0)
    np.testing.assert_array_equal(times.reads, [1000.0, 1021.0, 1041.0])
    np.testing.assert_array_equal(times.pulses, [1001.0, 1021.0, 1041.0])
    assert times.query == 1051.0


@functools.cache
def met():
    """train.Learned of 3 tasks with the same samples on one chip, and the times."""
    cfg, devices = configured(device="ibm", n_inner=3, grad_thr=0.01)
    times = train.times_of(cfg, cfg.tread, cfg.twait)
    key = jax.random.key(1)  # its network spikes
    trial = train.draw_trial(key, cfg)
    make = functools.partial(train.injected, cfg)
    meta = start(cfg, devices).meta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_trial", lambda key, cfg: trial)
        run = jax.jit(
            lambda meta: train.meet(key, meta, cfg, devices[0], make, times, 3)
        )
        return run(meta)[1], times


def test_only_pulsed_devices_change_at_the_time_of_their_pulse():
    done, times = met()
    for k, (before, after) in enumerate(
        zip(done.readouts, done.readouts[1:], strict=False)
    ):
        fired = done.pulses[k] > 0
        assert 0 < fired.sum() < fired.size
        assert np.all(after.t_prog[fired] == times.pulses[k])
        assert not np.any(np.all(fired, 1))  # never both devices of a pair
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(x[~fired], y[~fired], rtol=1e-5)
        changed = before.g[fired] != after.g[fired]
        assert np.mean(changed) > 0.5  # a noisy pulse may leave a device at g_min


def test_tasks_share_the_first_look_and_no_other_read():
    done, _ = met()
    first = done.pulses[0]
    assert np.array_equal(first[0], first[1]) and np.array_equal(first[0], first[2])
    assert np.array_equal(done.readouts[0].g[0], done.readouts[0].g[1])
    assert not np.array_equal(done.readouts[1].g[0], done.readouts[1].g[1])
    for w in done.w:
        assert np.all(w[0] != w[1]) and np.all(w[0] != w[2])


def test_meta_training_reads_hidden_crossbars_once_and_the_test_at_every_look(
    monkeypatch,
):
    cfg, devices = configured(n_inner=3)
    meta, reads = start(cfg, devices).meta, []

    def look_at(key, cfg, device, chip, times):
        reads.append(times.reads.tolist())
        raise StopIteration

    monkeypatch.setattr(train, "look_at", look_at)
    for run in (train.episode, functools.partial(train.meta_loss, n_tasks=2)):
        with pytest.raises(StopIteration):
            run(KEY, meta, cfg, devices[0])
    assert reads[0] == [100.0, 102.0, 103.0] and len(reads[1]) == 1


def test_ages_of_meta_training_are_log_uniform(monkeypatch):
    cfg, devices = configured()
    ages = []

    def times_of(cfg, age, wait):
        ages.append(float(age))
        raise StopIteration

    monkeypatch.setattr(train, "times_of", times_of)
    for key in jax.random.split(KEY, 400):
        with pytest.raises(StopIteration):
            train.meta_loss(key, None, cfg, devices[0], 1)
    share = np.sort(np.log(np.array(ages) / 100) / np.log(1000))
    assert 0 <= share[0] and share[-1] <= 1
    uniform = np.linspace(0, 1, 400)
    assert (
        np.abs(share - uniform).max() < 1.63 / 400**0.5
    )  # Kolmogorov and Smirnov, 1 %


# ---- outer loop ----------------------------------------------------------------------------------


def test_adam_by_hand():
    gradients = [1.0, -0.5, 0.25]
    memory = train.Adam.start({"x": jnp.zeros(())})
    mean = square = 0.0
    for n, g in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        expected = -(mean / (1 - 0.9**n)) / ((square / (1 - 0.999**n)) ** 0.5 + 1e-8)
        direction, memory = memory.move(n - 1, {"x": jnp.array(g)})
        np.testing.assert_allclose(direction["x"], expected, rtol=1e-4)


def test_a_steep_gradient_is_shortened():
    """To the same length in every unit of conductance; a gentle one keeps its length."""
    steep = train.Meta(network.Network((3.0,), 4.0), 5.0)
    for factor in (1.0, 100.0):
        device = analog.PCM._replace(g_min=0.0, g_max=12.0 * factor)
        g = network.Network((3.0 / factor,), 4.0 / factor)
        found = train.clipped(steep._replace(g=g), device)
        shares = np.array([found.g.hidden[0], found.g.readout])
        norm = np.hypot(np.hypot(*shares), found.log_theta)
        np.testing.assert_allclose(norm, train.MOST_NORM, rtol=1e-6)
        np.testing.assert_allclose(shares / found.log_theta, [7.2, 9.6], rtol=1e-6)
    gentle = jax.tree.map(lambda x: x / 100, steep)
    found = train.clipped(gentle, analog.PCM)
    np.testing.assert_allclose(found.g.readout, 0.04 * 11.9, rtol=1e-6)
    np.testing.assert_allclose(found.log_theta, 0.05, rtol=1e-6)


def test_steps_drop():
    cfg, _ = configured(n_iter=100)
    factors = [float(train.Adam.schedule(cfg, step)) for step in (0, 59, 60, 99)]
    assert cfg.lr_drop == 60
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1], rtol=1e-6)


def test_the_first_step_has_the_length_of_its_setting(monkeypatch):
    """As Adam's has, whatever the gradient: a share of the device's range, and 0.1 in ln
    θ."""
    cfg, devices = configured(device="perf", lr_out=0.01, seed=7)

    def gradient_of(cfg, devices, meta, key):
        return jax.tree.map(jnp.ones_like, meta), {}

    monkeypatch.setattr(train, "gradient_of", gradient_of)
    before = start(cfg, devices)
    after, _ = train.train_chunk(cfg, devices, before, KEY, np.arange(1))
    step = jax.tree.map(jnp.subtract, before.meta, after.meta)
    np.testing.assert_allclose(step.g.readout, 0.01 * 11.9, rtol=1e-5)
    np.testing.assert_allclose(step.log_theta, 0.1, rtol=1e-5)


def test_firing_rates_are_penalized(monkeypatch):
    moments = train.Moments(jnp.eye(2)[None], jnp.zeros((16, 2)))
    query = train.Query(jnp.zeros(16), jnp.ones(()))
    trial = train.Trial(None, None, None, jax.tree.map(lambda x: x[None], query))
    seen = train.Seen(moments, moments, jnp.array([100.0, 350.0]))
    pulses, w = [jnp.ones((1, 2, 2, 1))], [jnp.zeros((1, 2))]
    done = seen, train.Learned(trial, [], pulses, w)
    monkeypatch.setattr(train, "meet", lambda *arguments: done)
    for weight, expected in ((0.0, 1.0), (0.01, 1 + 0.01 * (1 + 1.5**2))):
        cfg, devices = configured(lambda_fr=weight)
        loss, measured = train.meta_loss(KEY, None, cfg, devices[0], 1)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert measured["loss"] == 1 and measured["pulses"] == 4


def test_conductances_stay_where_all_devices_can_be_programmed():
    devices = analog.PCM, analog.PERF._replace(g_min=0.5)
    g = network.Network((jnp.array([0.0, 5.0, 11.0]),), jnp.array([20.0]))
    found = train.project(devices, train.Meta(g, jnp.array([-3.0])))
    np.testing.assert_array_equal(found.g.hidden[0], np.float32([0.5, 5.0, 10.0]))
    np.testing.assert_array_equal(found.g.readout, [10.0])
    assert found.log_theta == -3


def test_devices_share_the_tasks(monkeypatch):
    cfg, devices = configured(device="pcm,perf", batch_train=6, n_chips=2)
    seen = []

    def meta_loss(key, meta, cfg, device, n_tasks):
        seen.append((device.name, n_tasks))
        factor = device.g_prog * jax.random.uniform(key)
        return factor * meta, {"factor": factor}

    monkeypatch.setattr(train, "meta_loss", meta_loss)
    run = jax.jit(lambda meta: train.gradient_of(cfg, devices, meta, KEY))
    gradient, measured = run(jnp.ones(()))
    assert set(seen) == {("pcm", 3), ("perf", 3)}
    chips = [jax.random.split(key, 2) for key in jax.random.split(KEY, 2)]
    draws = np.array([[jax.random.uniform(key) for key in keys] for keys in chips])
    np.testing.assert_allclose(gradient, np.mean(draws * [[10.0], [12.0]]), rtol=1e-6)
    assert gradient == measured["factor"]


PARTS = """
import sys
import jax, numpy as np, train
train.configure_backend()
import test_train
found = test_train.on_chips_of_a_network(int(sys.argv[2]))
if jax.process_index() == 0:
    assert jax.device_count() == 2
    np.savez(sys.argv[1], *jax.tree.leaves(found))
"""


def on_chips_of_a_network(n_chips):
    """What a chip shows and the gradient of its loss, on as many devices as there are."""
    cfg, devices = configured(device="ibm", n_chips=2, lambda_fr=0.01)

    def one(key, meta):
        make = functools.partial(train.injected, cfg)
        chip = network.assemble(key, devices[0], make, meta.g)
        seen = train.observe(key, cfg, devices[0], chip, 100.0)
        loss = functools.partial(train.meta_loss, cfg=cfg, device=devices[0], n_tasks=2)
        gradient, _ = jax.grad(loss, 1, has_aux=True)(key, meta)
        return seen, chip, train.draw_trial(key, cfg), gradient

    run = jax.jit(lambda keys, meta: train.on_chips(one, keys, meta))
    return run(jax.random.split(KEY, n_chips), start(cfg, devices).meta)


def hosts(n):
    """Environments of n processes that act as one, of two devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    if n == 1:
        return [{"JAX_NUM_CPU_DEVICES": "2"}]
    joint = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)}
    return [
        {**joint, "JAX_NUM_CPU_DEVICES": "1", "JAX_PROCESS_ID": str(i)}
        for i in range(n)
    ]


@pytest.mark.parametrize("n_hosts, n_chips", [(1, 1), (2, 2)])
def test_two_devices_equal_one(tmp_path, n_hosts, n_chips):
    """One chip's levels over both; a chip on each of two hosts."""
    file = str(tmp_path / "found.npz")
    runs = [
        launch(tmp_path, "-c", PARTS, file, str(n_chips), **host)
        for host in hosts(n_hosts)
    ]
    for run in runs:
        _, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
    expected = jax.tree.leaves(on_chips_of_a_network(n_chips))
    with np.load(file) as found:
        for name, x in zip(found.files, expected, strict=True):
            np.testing.assert_allclose(
                found[name], x, atol=1e-5 * (np.abs(x).max() + 1e-9), rtol=0
            )


# ---- learning ------------------------------------------------------------------------------------

LENGTH = 120


@functools.cache
def learned():
    """Config, device, states and means of two chunks of a run on ideal devices, and
    episodes."""
    cfg, devices = configured(
        device="perf",
        n_h0=14,
        n_h1=14,
        batch_train=32,
        task_size=20,
        n_iter=2 * LENGTH,
        lr_drop=2 * LENGTH,
        lr_out=0.025,
    )
    state, chunks = start(cfg, devices), []
    for first in (0, LENGTH):
        steps = np.arange(first, first + LENGTH)
        state, measured = jax.device_get(
            train.train_chunk(cfg, devices, state, train.stream(cfg, 1), steps)
        )
        chunks.append(measured)
    episodes = train.test(
        train.episode, cfg, devices[0], 64, train.stream(cfg, 2), state.meta
    )
    return cfg, devices, state, chunks, episodes


def test_the_start_has_the_types_of_later_states():
    """Else XLA compiles for the first chunk, and again for the second."""
    cfg, devices, state, _, _ = learned()
    first, later = jax.tree.leaves(start(cfg, devices)), jax.tree.leaves(state)
    for a, b in zip(first, later, strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False)


def test_a_short_run_learns():
    _, _, _, chunks, episodes = learned()
    assert chunks[1]["loss"] < 0.95 * chunks[0]["loss"]
    before, after = np.mean(episodes.measured["mse"], 0)
    assert after < 0.75 * before


def plain_episode(cfg, device, meta, x, y):
    """What an episode on ideal devices measures, by a plain loop over neurons and time
    steps."""

    def weights(g):
        return (g[0] - g[1]) / (device.g_max - device.g_min)

    g = jax.tree.map(lambda g: np.asarray(g, float), meta.g)
    first, *later = map(weights, g.hidden)
    of_input, of_bias = first.reshape(2, cfg.n_rows, -1).mean(1)
    hidden = np.stack([of_input, 2 * of_bias]), *later
    centres = np.asarray(network.level_centres(cfg.dac_bits))
    _, e = oracle.loop(train.dynamics_of(cfg), hidden, centres)
    before, theta = weights(g.readout)[:, 0], np.exp(meta.log_theta[0])
    at = e[:, np.asarray(network.level(cfg.dac_bits, x))]  # [T, N, H]
    gradient = 2 * np.mean((at @ before - y)[..., None] * at, (0, 1))
    fired = np.stack([gradient < -theta, gradient > theta])
    raised = np.minimum(g.readout + 0.75 * fired[..., None], device.g_max)
    after = weights(raised)[:, 0]
    return (
        e,
        before,
        after,
        {
            "pulses": fired.sum(),
            "touched": 100 * fired.mean(),
            "dw": np.abs(after - before).sum(),
        },
    )


def test_episodes_equal_a_plain_loop():
    """To 2 %, as rounding may flip a spike."""
    cfg, devices, state, _, episodes = learned()
    for i in range(3):
        one = jax.tree.map(lambda x: x[i], episodes)  # noqa: B023
        e, before, after, expected = plain_episode(
            cfg, devices[0], jax.device_get(state.meta), one.trial.x, one.trial.y
        )
        y2 = one.trial.query.y2 - np.mean(
            one.curves[0] ** 2
        )  # of the targets within levels
        for name, part in (("mse", e), ("mse_last", e[-1:])):
            errors = [
                np.mean((part @ w - one.curves[0]) ** 2) + y2 for w in (before, after)
            ]
            np.testing.assert_allclose(one.measured[name], errors, rtol=0.02)
        for name, value in expected.items():
            np.testing.assert_allclose(one.measured[name], value, rtol=1e-4)
        outputs = np.stack([np.mean(e, 0) @ w for w in (before, after)])
        np.testing.assert_allclose(
            one.curves[1:], outputs, atol=0.02 * np.abs(outputs).max()
        )
