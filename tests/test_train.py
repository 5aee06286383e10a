"""Closed forms against plain sums and autodiff; the protocol; the outer loop; learning."""

import dataclasses
import functools
import inspect
import socket
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import configured, launch, started, tile_of
from jax.example_libraries import optimizers

import analog
import network
import train

KEY = jax.random.key(3)
def kind_of(cfg, device):
    """train.Kind of a device."""
    return train.Kind(device, train.table_of(cfg, device))


def close(a, b, tolerance=1e-5):
    """Equal to tolerance of the largest component, leaf by leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(y).max()
        assert scale > 0
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0)


def first_state(cfg, devices):
    """Population of devices and the state before training."""
    population = train.population_of(cfg, devices)
    return population, train.start(cfg, population, family_of(cfg))


def family_of(cfg):
    """The family of functions of the settings."""
    return train.families_of(cfg).training


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planes:
    """A family of tasks y = u·A with two inputs and two outputs: of 64 random inputs 8 are seen,
    and the others asked."""

    n_in = n_out = 2
    exchangeable = False
    loss, measures = train.Regression.loss, train.Regression.measures

    def pool(self, key):
        return jax.random.uniform(key, (64, 2), minval=-5.0, maxval=5.0)

    def task(self, key, u):
        matrix_key, seen_key = jax.random.split(key)
        y = u @ jax.random.normal(matrix_key, (2, 2))
        seen = train.shuffled(seen_key, 64) < 8
        return train.Task(*(train.samples_of(part.astype(float), y) for part in (seen, ~seen)))


# ---- closed forms --------------------------------------------------------------------------------


def samples_of_two_outputs(family, x, y):
    """train.Samples of inputs x [N] and targets y [N, 2]."""
    first, second = (family.sum_up(x, column) for column in y.T)
    both = jnp.concatenate([first.y, second.y], 1)
    return train.Samples(first.share, both, first.y2 + second.y2)


@functools.cache
def spiking(cfg):
    """Hidden weights of a network that spikes, its traces [L, H] at the end of the presentations of
    all levels, and samples x [N], y [N, 2] of a task with two outputs."""
    g = network.start(KEY, analog.PCM, train.sizes_of(cfg), 1, 1, cfg.n_rows)
    hidden = tuple(1.7 * analog.weights(analog.PCM, g) + 0.05 for g in g.hidden)
    u = network.level_centres(cfg.dac_bits)[:, None]
    e = jax.jit(network.present, static_argnums=0)(train.dynamics_of(cfg), hidden, u).e[-1]
    x = jax.random.uniform(KEY, (9,), minval=-6.0, maxval=6.0)  # some beyond the converter
    return hidden, e, x, jnp.stack([3 * jnp.sin(x), x], 1)


def test_delta_rule_equals_autodiff_of_the_time_steps(x64):
    cfg, _ = configured()
    hidden, e, x, y = spiking(cfg)
    u = network.level_centres(cfg.dac_bits)[network.level(cfg.dac_bits, x)][:, None]

    @jax.jit
    @jax.value_and_grad
    def error(w):
        return oracle.squared_error(train.dynamics_of(cfg), network.Network(hidden, w), u, y)

    w = jax.random.normal(KEY, (cfg.n_h1, 2))
    expected, gradient = error(w)
    samples = samples_of_two_outputs(family_of(cfg), x, y)
    close(train.squared_error(e @ w, samples), expected, 1e-9)
    close(train.delta_rule(e, e @ w, samples), gradient, 1e-9)


class Plain(NamedTuple):
    """Samples one by one, in place of train.Samples."""

    level: jax.Array  # [N]
    y: jax.Array  # [N]
    y2: jax.Array


def mean_error(y, samples):
    """Mean over the samples of the squared error."""
    return jnp.mean((y[samples.level, 0] - samples.y) ** 2)


def make_plain(patch):
    """Replace closed forms by sums over samples, and autodiff."""

    def apart(family, x, y):
        return Plain(network.level(family.dac_bits, x), y, jnp.mean(y**2))

    def delta_rule(e, y, samples):
        """The gradient by the outputs, through e."""
        return e.T @ jax.grad(mean_error)(y, samples)

    patch.setattr(train.Regression, "sum_up", apart)
    patch.setattr(train, "squared_error", mean_error)
    patch.setattr(train, "delta_rule", delta_rule)


def test_meta_gradient_equals_second_order_autodiff(x64):
    """Through two looks, with a penalty of rates; the scale of classes has no part."""
    cfg, devices = configured(device="perf", lambda_fr=0.1, target_fr=20.0)
    _, state = started(cfg, devices)
    kind = kind_of(cfg, devices["perf"])

    def gradient():
        def loss(meta):
            return train.meta_loss(KEY, meta, cfg, family_of(cfg), kind, 3)[0]

        return jax.jit(jax.grad(loss))(state.meta)[:2]

    fast = gradient()
    with pytest.MonkeyPatch.context() as patch:
        make_plain(patch)
        close(fast, gradient())


# ---- protocol ------------------------------------------------------------------------------------


def test_comparators_count_thresholds_passed():
    cfg, _ = configured(n_bits=3)
    g = jnp.array([[-5.0, -2.5, -1.0], [1.5, 0.2, 7.0]])
    for theta, plus, minus in (
        ([[1.0]], [[3, 2, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 3]]),
        ([[0.5] * 3, [4.0] * 3], [[3, 3, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]),
    ):
        counts = train.comparators(KEY, cfg, g, jnp.array(theta))
        np.testing.assert_array_equal(counts, [plus, minus])


def test_comparators_are_the_same_at_any_scale_of_the_targets():
    """Counts and their derivative by ln θ; that by the gradient falls as the scale grows."""
    cfg, _ = configured(n_bits=3)
    g = jax.random.normal(KEY, (40, 2))
    probe = jax.random.normal(KEY, (2, 40, 2))

    def found(factor):
        def share(g, log_theta):
            counts = train.comparators(KEY, cfg, g, jnp.exp(log_theta))
            return jnp.sum(probe * counts), counts

        log_theta = jnp.full((40, 2), np.log(0.5 * factor), jnp.float32)
        return jax.grad(share, (0, 1), has_aux=True)(factor * g, log_theta)

    (by_g, by_theta), counts = found(1.0)
    (by_scaled, by_log), scaled = found(1000.0)
    assert len(np.unique(counts)) == 4 and np.array_equal(counts, scaled)
    close(by_log, by_theta)
    close(1000 * by_scaled, by_g)


ONE_LOOK = {"device": "perf", "n_inner": 1, "lambda_fr": 0.0}


def test_thresholds_start_at_a_share_of_the_first_looks_gradient():
    """On ideal devices, by a plain mean over 64 tasks; the readout predicts 0."""
    cfg, devices = configured(**ONE_LOOK)
    _, state = first_state(cfg, devices)
    family = family_of(cfg)
    hidden = [np.asarray(analog.weights(devices["perf"], g), float) for g in state.meta.g.hidden]
    _, e = oracle.loop(train.dynamics_of(cfg), hidden, family.pool(KEY))
    keys = jax.random.split(KEY, 2000)
    tasks = jax.jit(jax.vmap(family.task, (0, None)))(keys, None)
    gradients = -2 * np.asarray(tasks.support.y)[..., 0] @ e[-1]  # [tasks, H]
    # The mean square of 64 tasks, within 5 standard errors.
    square = np.mean(gradients**2, 1)
    share = np.exp(2 * np.float64(state.meta.log_theta)) / cfg.grad_thr**2 / square.mean()
    assert np.all(np.abs(share - 1) < 5 * square.std() / square.mean() / 64**0.5)


def test_times_of_an_adaptation():
    cfg, _ = configured(n_inner=3, tlook=20.0, tread=1000.0)
    times = train.times_of(cfg)
    np.testing.assert_array_equal(times.reads, [0.0, 20.0, 40.0])
    np.testing.assert_allclose(times.pulses, [0.25, 20.25, 40.25], rtol=1e-5)  # 5 samples shown


class Met(NamedTuple):
    """What three tasks have done to a readout."""

    device: analog.Device
    times: train.Times
    before: analog.Crossbar
    after: network.Tile  # [tasks, looks, ...]
    pulses: jax.Array  # [tasks, looks, 2, H, 1]


@functools.cache
def met():
    """Tasks that a chip of noisy devices learns in three looks."""
    cfg, devices = configured(device="ibm_history", n_inner=3)
    device = devices["ibm_history"]._replace(t_verify=15.0)
    times, family = train.times_of(cfg), family_of(cfg)
    e = jax.random.uniform(KEY, (3, 2**cfg.dac_bits, cfg.n_h1))
    meta = train.Meta(None, jnp.log(jnp.full((3, 1, 1), 0.5)), None)

    @jax.jit
    def run(keys):
        target = jnp.full((2, cfg.n_h1, 1), 1.0)
        before = tile_of(device, analog.fabricate(KEY, device, target), target)

        def learn(key):
            support = family.task(key, None).support
            return train.adapt(key, meta, cfg, device, before, e, support, times)

        return before.xbar, *jax.vmap(learn)(keys)

    return Met(device, times, *run(jax.random.split(KEY, 3)))


def test_only_pulsed_devices_change_at_the_time_of_their_pulse():
    _, times, start, after, pulses = met()
    before = jax.tree.map(lambda x: np.broadcast_to(x, (3, *x.shape)), start)
    for k in range(3):
        now = jax.tree.map(lambda x: np.asarray(x[:, k]), after.xbar)  # noqa: B023
        fired = np.asarray(pulses[:, k]) > 0
        assert 0 < fired.sum() < fired.size
        assert np.all(now.t_prog[fired] == times.pulses[k])
        assert not np.any(np.all(fired, 1))  # never both devices of a pair
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
            np.testing.assert_array_equal(x[~fired], y[~fired])
        changed = before.g[fired] != now.g[fired]
        assert np.mean(changed) > 0.5  # a noisy pulse may leave a device at g_min
        before = now


def test_a_pulsed_readout_refers_to_a_read_after_its_pulses():
    """A read t_verify after the pulses."""
    device, times, _, after, _ = met()
    readouts = jax.tree.map(lambda x: x[0], after)
    silent = device._replace(law=device.law._replace(read_scale=0.0))
    tiles = train.with_reference(KEY, silent, readouts, times.pulses)
    for k, reference in enumerate(tiles.reference):
        xbar = jax.tree.map(lambda x: x[k], readouts.xbar)  # noqa: B023
        now, later = (
            np.sum(analog.drift(device, xbar, times.pulses[k] + wait))
            for wait in (0.0, device.t_verify)
        )
        assert abs(reference - later) < 0.01 * abs(now - later)


def test_a_look_takes_the_weights_as_drift_has_left_them():
    """So that a drifted readout is pulsed until its output is right at its present weights."""
    cfg, _ = configured()
    drifting = analog.PCM._replace(law=analog.Nandakumar(0.1, 0.0, 0.0, 0.0))
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.uniform(1, 9, (2, 6, 1)), jnp.float32)
    e = jnp.asarray(rng.uniform(0, 1, (16, 6)), jnp.float32)
    y = e @ analog.weights(drifting, g)  # what the weights gave before they drifted
    support = train.Samples(jnp.full(16, 1 / 16), y / 16, jnp.mean(y**2))
    xbar, t = analog.fabricate(KEY, drifting, g), 1e6
    readout = tile_of(drifting, xbar, g)
    look = functools.partial(train.look, KEY, cfg, drifting, readout, e, support)
    _, fired = look(jnp.full((6, 1), -9.0), t, t + 1)
    w = np.asarray(analog.weights(drifting, g)) * (1e6 / 38.6) ** -0.1
    gradient = 2 * np.mean((e @ w - y) * e, 0)
    assert np.abs(gradient).min() > 2 * np.exp(-9.0)
    np.testing.assert_array_equal(fired[..., 0], [gradient < 0, gradient > 0])


def test_the_meta_test_asks_at_ttest_and_a_day_later():
    """In seconds since the first read, which comes at tread: on a device that drifts and has no
    noise, its chip has these errors when it is read again then."""
    cfg, devices = configured(device="ibm", tread=1000.0, ttest=1500.0, compensate=False)
    device = devices["ibm"]._replace(law=analog.Nandakumar(0.05, 0.0, 0.0, 0.0))
    _, state = started(cfg, devices)
    family = family_of(cfg)

    @jax.jit
    def errors(key):
        done = train.episode(key, state.meta, cfg, family, device)

        def error_at(t):
            w = network.read(key, device, done.chip.readout, t, cfg.compensate)
            e = train.observe(key, cfg, device, done.chip, done.u, t).e
            return train.squared_error(e @ w, done.task.query)

        again = jax.lax.map(error_at, jnp.array([500.0, 500.0 + 86400]))
        return [done.measured["mse"][-1], done.measured["mse_day"]], again

    found, expected = errors(KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert abs(found[0] / found[1] - 1) > 1e-3


def test_ages_and_rests_of_meta_training_are_log_uniform(monkeypatch):
    cfg, devices = configured(device="ibm", tread=100.0, max_age=1e5, twait=5.0, max_rest=1e6)
    kind, (_, state) = kind_of(cfg, devices["ibm"]), started(cfg, devices)
    n, found = 2000, {}

    def later(chip, seconds):
        found["age"] = seconds
        return chip

    def query_chip(*arguments):
        found["asked"] = arguments[-1]
        raise StopIteration

    def draw(key):
        with pytest.raises(StopIteration):
            train.meta_loss(key, state.meta, cfg, family_of(cfg), kind, 1)
        return found["age"], found["asked"]

    monkeypatch.setattr(network, "later", later)
    monkeypatch.setattr(train, "query_chip", query_chip)
    ages, asked = jax.jit(jax.vmap(draw))(jax.random.split(KEY, n))
    rests = asked - train.times_of(cfg).pulses[-1]
    shares = np.log(ages / 100) / np.log(1e3), np.log(rests / 5) / np.log(2e5)
    for share in map(np.sort, shares):
        assert -1e-5 <= share[0] and share[-1] <= 1 + 1e-5
        # Kolmogorov and Smirnov, 1 %
        assert np.abs(share - np.linspace(0, 1, n)).max() < 1.63 / n**0.5
    assert abs(np.corrcoef(*shares)[0, 1]) < 4 / n**0.5


# ---- outer loop ----------------------------------------------------------------------------------


def test_adam_equals_that_of_jax():
    start, move, params_of = optimizers.adam(1.0)
    x = {"x": jnp.array([0.3, -2.0])}
    theirs, state = start(x), train.State(None, {"x": jnp.zeros(2)}, {"x": jnp.zeros(2)})
    for step, g in enumerate([1.0, -0.5, 0.25, 1e-3]):
        gradient = {"x": jnp.array([g, 100 * g])}
        theirs = move(step, gradient, theirs)
        direction, state = train.adam(state, gradient, step)
        x = jax.tree.map(jnp.add, x, direction)
        np.testing.assert_allclose(x["x"], params_of(theirs)["x"], rtol=1e-5)


def test_a_steep_gradient_is_shortened_and_a_gentle_one_is_not():
    g = network.Network((jnp.array([3.0, 0.0]),), jnp.array(4.0))
    steep = train.Meta(g, jnp.full((3,), 6.0), jnp.array(6.0))
    found = train.clip_norm(steep)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(found)))
    np.testing.assert_allclose(norm, train.MAX_GRAD_NORM, rtol=1e-5)
    close(found, jax.tree.map(lambda x: x * train.MAX_GRAD_NORM / 13, steep))
    gentle = jax.tree.map(lambda x: x * train.MAX_GRAD_NORM / 26, steep)
    close(train.clip_norm(gentle), gentle)
    nothing = jax.tree.map(jnp.zeros_like, steep)
    assert not any(np.any(x) for x in jax.tree.leaves(train.clip_norm(nothing)))


class Path(NamedTuple):
    """Of an optimizer: what it is given, and where it goes."""

    population: train.Population
    state: train.State
    gradient: train.Meta


def path(factor=1.0):
    """A Path on devices whose conductances are factor times those of PCM."""
    population = train.Population((), 0.1 * factor, 10.0 * factor, 11.9 * factor)
    g = network.Network((jnp.full((2, 3, 4), 5.0 * factor),), jnp.full((2, 4, 1), 5.0 * factor))
    meta = train.Meta(g, jnp.zeros((2, 4, 1)), jnp.zeros(()))
    zero = jax.tree.map(jnp.zeros_like, meta)
    slope = jax.tree.map(lambda x: 0.3 / factor * jnp.ones_like(x), g)
    gradient = train.Meta(slope, 0.1 + zero.log_theta, jnp.array(0.2))
    return Path(population, train.State(meta, zero, zero), gradient)


def moved(cfg, step, factor=1.0):
    """What a step of the optimizer subtracts of the meta-parameters."""
    population, before, gradient = path(factor)
    after = train.update(cfg, population, before, gradient, step)
    return jax.tree.map(lambda a, b: a - b, before.meta, after.meta)


def test_the_first_step_has_the_length_of_its_setting():
    """As Adam's has, whatever the gradient: a share of the range, 0.1 in ln θ and 0.03 in the
    scale of classes; in every unit of conductance."""
    cfg, _ = configured(lr_out=0.01, lr_drop=1)
    for factor in (1.0, 100.0):
        found = moved(cfg, 0, factor)
        for x in jax.tree.leaves(found.g):
            np.testing.assert_allclose(x, 0.01 * 11.9 * factor, rtol=1e-4)
        np.testing.assert_allclose(found.log_theta, 0.1, rtol=1e-4)
        np.testing.assert_allclose(found.log_scale, 0.03, rtol=1e-4)


def test_the_unit_of_conductance_does_not_tell_how_steep_a_gradient_is():
    """What Adam remembers is per range of a conductance, and no longer than MAX_GRAD_NORM."""
    cfg, _ = configured()
    found = []
    for factor in (1.0, 100.0):
        population, before, gradient = path(factor)
        found.append(train.update(cfg, population, before, gradient, 0).mean)
    close(*found)
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(found[0])))
    np.testing.assert_allclose(norm, 0.1 * train.MAX_GRAD_NORM, rtol=1e-5)
    np.testing.assert_allclose(
        found[0].log_theta / found[0].g.readout, 0.1 / (0.3 * 11.9), rtol=1e-5
    )


def test_steps_drop():
    """To a tenth, and from there they fall as 1/iteration."""
    cfg, _ = configured(lr_drop=5)
    for step, factor in ((4, 1.0), (5, 0.1), (10, 0.05), (500, 0.001)):
        never = moved(dataclasses.replace(cfg, lr_drop=1000), step)
        expected = jax.tree.map(lambda x: factor * x, never)  # noqa: B023
        close(moved(cfg, step), expected, 1e-3)


def test_conductances_stay_where_all_devices_can_be_programmed():
    cfg, devices = configured(device="pcm,ibm")
    devices["ibm"] = analog.IBM._replace(g_min=0.5)
    population = train.population_of(cfg, devices)
    g = network.Network((jnp.array([0.0, 5.0, 11.0]),), jnp.array([20.0]))
    meta = train.Meta(g, jnp.array([-3.0]), jnp.array(-4.0))
    found = train.project(meta, population.low, population.high)
    np.testing.assert_array_equal(found.g.hidden[0], np.float32([0.5, 5.0, 10.0]))
    np.testing.assert_array_equal(found.g.readout, [10.0])
    assert found.log_theta == -3 and found.log_scale == -4


def test_the_order_of_devices_does_not_matter():
    """Devices of a family are stacked, in the order of their names."""
    names = "pcm", "ibm_history", "perf", "pcm_history", "ibm"
    cfg, devices = configured(device=",".join(names), batch_train=5)
    population = train.population_of(cfg, devices)
    assert list(devices) == list(names)
    assert Counter(len(kind.device.g_max) for kind in population.kinds) == {2: 2, 1: 1}
    for kind in population.kinds:
        if len(kind.device.g_max) == 2:  # one of the two has a history
            assert kind.device.set_history.tolist() == [0.0, analog.HISTORY["set_history"]]
    other = train.population_of(cfg, dict(reversed(devices.items())))
    assert jax.tree.structure(other) == jax.tree.structure(population)
    for a, b in zip(jax.tree.leaves(population), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_devices_share_the_tasks(monkeypatch):
    """All devices have the same weight, those of one family and those of another."""
    cfg, devices = configured(device="pcm,perf,pcm_history", batch_train=6, n_chips=2)
    devices["pcm_history"] = devices["pcm_history"]._replace(g_prog=11.0)
    population, tasks = train.population_of(cfg, devices), []

    def meta_loss(key, meta, cfg, family, kind, n_tasks):
        tasks.append(n_tasks)
        draw = jax.random.uniform(key)
        return kind.device.g_prog * meta, {"draw": draw, "g_prog": kind.device.g_prog}

    monkeypatch.setattr(train, "meta_loss", meta_loss)
    run = jax.jit(lambda population, meta: train.gradient_of(KEY, cfg, population, None, meta))
    gradient, measured = run(population, jnp.ones(()))
    assert set(tasks) == {2}
    np.testing.assert_allclose(gradient, (10 + 12 + 11) / 3, rtol=1e-6)
    np.testing.assert_allclose(measured["g_prog"], gradient, rtol=1e-6)
    assert measured["draw"] not in (0, 0.5, 1)


def test_each_chip_has_a_draw_of_its_own(monkeypatch):
    cfg, devices = configured(device="pcm,perf,pcm_history", batch_train=3, n_chips=50)
    population = train.population_of(cfg, devices)

    def meta_loss(key, meta, cfg, family, kind, n_tasks):
        draw = jax.random.normal(key)
        return meta, {"draw": draw, "square": draw**2}

    monkeypatch.setattr(train, "meta_loss", meta_loss)
    run = jax.jit(lambda population, meta: train.gradient_of(KEY, cfg, population, None, meta))
    _, measured = run(population, jnp.ones(()))
    # 150 normal draws, within 4 standard errors; shared ones would spread more
    assert 0 < abs(measured["draw"]) < 4 / 150**0.5
    assert abs(measured["square"] - 1) < 4 * (2 / 150) ** 0.5


def test_rates_cost_where_a_layer_is_off_its_target_and_where_neurons_are_silent():
    """The mean of a layer from 50 Hz per 100 Hz, and a neuron below 10 Hz per 10 Hz."""
    cfg, _ = configured(target_fr=50.0)
    rates = jnp.array([0.0, 5.0, 445.0]), jnp.array([20.0, 20.0])
    expected = 1 + train.SILENT * (1 + 0.5**2) / 3 + 0.3**2
    np.testing.assert_allclose(train.rate_penalty(cfg, rates), expected, rtol=1e-6)


PARTS = """
import sys
import jax, numpy as np, train
train.configure_backend()
import test_train
found = test_train.trained_and_tested()
if jax.process_index() == 0:
    assert jax.device_count() == 2
    np.savez(sys.argv[1], *jax.tree.leaves(found))
"""


def drawn(key, meta, cfg, family, device):
    """An experiment: a read of the readout of a chip, and a random number."""
    read_key, other_key = jax.random.split(key)
    xbar = analog.fabricate(key, device, meta.g.readout)
    return analog.read(read_key, device, xbar, 100.0), jax.random.uniform(other_key)


def of_weights(key, meta, cfg, family, kind, n_tasks):
    """In place of train.meta_loss, to compile faster: of the conductances, and of the readout's
    weights on a chip."""
    device, g = kind.device, meta.g.readout
    tile = tile_of(device, analog.fabricate(key, device, g, kind.table), g)
    w = network.read(key, device, tile, 1e4, True)
    loss = jnp.mean(w**2) + sum(jnp.mean(g**2) for g in meta.g.hidden)
    return loss, {"loss": loss}


def trained_and_tested():
    """What two iterations on two devices leave, and a test of four chips."""
    cfg, devices = configured(device="pcm,pcm_history", n_inner=1)
    (population, state), family = started(cfg, devices), family_of(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "meta_loss", of_weights)
        chunk = train.train_chunk(train.stream(cfg, 1), cfg, population, family, state, 0, 2)
    state, measured = jax.device_get(chunk)
    key, device = train.stream(cfg, 2), devices["pcm"]
    found = train.test(key, drawn, cfg, family, device, 4, state.meta)
    return state, measured, jax.device_get(found)


def two_hosts():
    """Environments of two processes that act as one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joint = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [{**joint, "JAX_NUM_CPU_DEVICES": "1", "JAX_PROCESS_ID": str(i)} for i in range(2)]


def test_two_hosts_equal_one(tmp_path):
    """Each has one device."""
    file = str(tmp_path / "found.npz")
    runs = [launch(tmp_path, "-c", PARTS, file, **host) for host in two_hosts()]
    for run in runs:
        _, err = run.communicate(timeout=200)
        assert run.returncode == 0, err
    expected = jax.tree.leaves(trained_and_tested())
    with np.load(file) as found:
        for name, x in zip(found.files, expected, strict=True):
            scale = np.abs(x).max() + 1e-9
            np.testing.assert_allclose(found[name], x, atol=1e-4 * scale, rtol=0)


def test_chips_are_shared_out_evenly(monkeypatch):
    """Over as many devices as all numbers allow; several hosts need all of them."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert [train.places_for(*n) for n in ((8,), (6,), (8, 6), (9, 6), (5,))] == [4, 3, 2, 3, 1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert train.places_for(8, 4) == 4
    with pytest.raises(train.Refused, match="a multiple of 4 chips"):
        train.places_for(6)


# ---- advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rates, words",
    [
        ([0.0, 9.0], "layer 0 is silent; try a larger --drive"),
        ([9.0, 0.0], "layer 1 is silent; try a larger --drive"),
        ([960.0, 9.0], "layer 0 always fires; try a smaller --drive"),
        ([9.0, 999.0], "layer 1 always fires; try a smaller --drive"),
    ],
)
def test_a_network_that_cannot_learn_is_refused_with_advice(rates, words):
    cfg, devices = configured()
    run = train.Run(cfg, devices, None, path().state, 7)
    good = {"loss": 3.0, "rates": np.array([9.0, 900.0])}
    train.assert_sound(run, good, "mine")
    with pytest.raises(train.Refused, match=words) as refused:
        train.assert_sound(run, good | {"rates": np.array(rates)}, "mine")
    assert refused.value.status == 1 and "iteration 7" in str(refused.value)


# ---- learning ------------------------------------------------------------------------------------

LENGTH = 120
TRACES = []  # one entry for each time that JAX has traced counted


def counted(key, meta, cfg, family, device):
    """train.episode."""
    TRACES.append(device)
    return train.episode(key, meta, cfg, family, device)


class Trained(NamedTuple):
    """A run on ideal devices."""

    cfg: train.Config
    device: analog.Device
    population: train.Population
    begun: train.State
    state: train.State
    chunks: list  # means of two chunks
    episodes: train.Episode

    def go(self, state, first, last):
        """State and means after the iterations from first to last − 1."""
        key, family = train.stream(self.cfg, 1), family_of(self.cfg)
        found = train.train_chunk(key, self.cfg, self.population, family, state, first, last)
        return jax.device_get(found)

    def test(self, device):
        """Episodes on 64 chips of a device."""
        key, family = train.stream(self.cfg, 2), family_of(self.cfg)
        found = train.test(key, counted, self.cfg, family, device, 64, self.state.meta)
        return jax.device_get(found)


@functools.cache
def trained():
    """A short run."""
    cfg, devices = configured(
        device="perf",
        n_h0=14,
        n_h1=14,
        batch_train=32,
        task_size=20,
        n_iter=2 * LENGTH,
        lr_drop=2 * LENGTH,
        lr_out=0.025,
        gain_out=0.3,
    )
    population, begun = first_state(cfg, devices)
    run = Trained(cfg, devices["perf"], population, begun, begun, [], None)
    for first in (0, LENGTH):
        state, measured = run.go(run.state, first, first + LENGTH)
        run = run._replace(state=state, chunks=[*run.chunks, measured])
    return run._replace(episodes=run.test(devices["perf"]))


def test_a_stop_does_not_change_a_bit():
    """One iteration rounds as many do."""
    run = trained()
    parts = run.begun
    for first, last in ((0, 1), (1, 3), (3, 8)):
        parts, _ = run.go(parts, first, last)
    whole, _ = run.go(run.begun, 0, 8)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_start_has_the_types_of_later_states():
    """Else XLA compiles for the first chunk, and again for the second."""
    run = trained()
    first, later = jax.tree.leaves(run.begun), jax.tree.leaves(run.state)
    for a, b in zip(first, later, strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False)


def test_a_short_run_learns():
    run = trained()
    assert run.chunks[1]["loss"] < 0.95 * run.chunks[0]["loss"]
    errors = run.episodes.measured["mse"]
    assert np.mean(errors[:, -1]) < 0.75 * np.mean(errors[:, 0])
    gain = errors[:, 0] - errors[:, -1]
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


def test_a_sweep_over_a_constant_compiles_nothing_anew():
    run = trained()
    before, largest = len(TRACES), []
    for offset in (0.4, 0.6, 0.8):
        measured = run.test(run.device._replace(set_offset=offset)).measured
        # a pulse adds less where it meets g_max, or where another one undoes it
        pulses = np.maximum(measured["pulses"], 1)
        largest.append(np.max(measured["dw"] / pulses) * analog.span(run.device))
    assert len(TRACES) == before
    np.testing.assert_allclose(largest, [0.4, 0.6, 0.8], rtol=1e-4)


def plain_error(y, samples):
    """Mean over the samples of the squared error of outputs y [L, n_out]."""
    seen = np.asarray(samples.share) > 0
    share = np.asarray(samples.share, float)[seen]
    means = np.asarray(samples.y)[seen] / share[:, None]
    within = samples.y2 - share @ np.sum(means**2, 1)  # of the targets of an input
    return share @ np.sum((y[seen] - means) ** 2, 1) + within


def plain_episode(cfg, device, meta, u, task):
    """What an episode on ideal devices measures, and its outputs, by a plain loop over neurons,
    time steps, samples and looks."""

    def weights(g):
        return (g[0] - g[1]) / (device.g_max - device.g_min)

    g = jax.tree.map(lambda g: np.asarray(g, float), meta.g)
    _, traces = oracle.loop(train.dynamics_of(cfg), list(map(weights, g.hidden)), u)
    e, theta, readouts, fired = traces[-1], np.exp(meta.log_theta), [g.readout], []
    for k in range(cfg.n_inner):
        gradient = 0
        for share, y, trace in zip(task.support.share, task.support.y, e, strict=True):
            gradient += 2 * np.outer(trace, share * (trace @ weights(readouts[k])) - y)
        fired.append(np.stack([gradient < -theta[k], gradient > theta[k]]))
        readouts.append(np.minimum(readouts[k] + 0.75 * fired[k], device.g_max))
    outputs = [e @ weights(readout) for readout in readouts]
    errors = [plain_error(y, task.query) for y in outputs]
    return {
        "mse": errors,
        "mse_day": errors[-1],
        "pulses": np.sum(fired),
        "touched": 100 * np.mean(np.any(fired, 0)),
        "dw": np.abs(weights(readouts[-1] - readouts[0])).sum(),
    }, [outputs[0], outputs[-1]]


def assert_plain(cfg, device, meta, episodes):
    """Three episodes equal a plain loop; errors to 2 %, as rounding may flip a spike."""
    for i in range(3):
        one = jax.tree.map(lambda x: x[i], episodes)  # noqa: B023
        expected, outputs = plain_episode(cfg, device, meta, one.u, one.task)
        assert expected["pulses"] > 5
        for name, value in expected.items():
            tolerance = 0.02 if name.startswith("mse") else 1e-4
            np.testing.assert_allclose(one.measured[name], value, rtol=tolerance)
        np.testing.assert_allclose(one.outputs, outputs, atol=0.02 * np.abs(outputs).max())


def test_episodes_equal_a_plain_loop():
    run = trained()
    assert_plain(run.cfg, run.device, run.state.meta, run.episodes)


def test_episodes_of_two_inputs_and_outputs_equal_a_plain_loop():
    cfg, devices = configured(device="perf", grad_thr=0.02)
    population, state = started(cfg, devices, Planes())
    first = jax.eval_shape(train.start, cfg, population, Planes()).meta
    shapes = [x.shape for x in jax.tree.leaves(first)]
    assert shapes == [(2, 9, 7), (2, 8, 6), (2, 6, 2), (2, 6, 2), ()]
    given = cfg, Planes(), devices["perf"], 3, state.meta
    episodes = jax.device_get(train.test(KEY, train.reported, *given))
    assert episodes.u.shape == (3, 64, 2) and episodes.outputs.shape == (3, 2, 64, 2)
    assert_plain(cfg, devices["perf"], state.meta, episodes)


def test_activity_is_counted():
    """Mean rates, neurons that are silent, and the spikes of a presentation of 0.05 s."""
    rates = np.array([0.0, 10.0, 50.0, 0.0]), np.array([30.0, 90.0])
    found = train.activity_of(configured()[0], rates)
    np.testing.assert_allclose(found["rates"], [15.0, 60.0], rtol=1e-6)
    np.testing.assert_allclose(found["silent"], [50.0, 0.0], rtol=1e-6)  # %
    np.testing.assert_allclose(found["spikes"], 9.0, rtol=1e-6)


# ---- settings ----------------------------------------------------------------------------------


def test_every_meta_parameter_is_trained():
    """A field of Meta with a default could lack a step size, and be saved as if trained."""
    cfg, devices = configured()
    population, before = started(cfg, devices)
    gradient = jax.tree.map(jnp.ones_like, before.meta)
    after = train.update(cfg, population, before, gradient, 0)
    pairs = zip(jax.tree.leaves(before.meta), jax.tree.leaves(after.meta), strict=True)
    assert all(np.any(a != b) for a, b in pairs)
    assert not train.Meta._field_defaults and not train.State._field_defaults


def test_every_setting_is_used():
    code = inspect.getsource(train)
    assert not [name for name in vars(train.Config()) if f"cfg.{name}" not in code]
