"""Closed forms against autodiff of the time-step network; the second-order gradient; protocol, checkpoints and flags."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analog
import benchmark
import network
import train

KEY = jax.random.key(3)
SMALL = dict(n_h0=9, n_h1=8, batch_train=5, task_size=6, dac_bits=4, batch_test=4, n_iter=4)


def configured(**flags):
    return train.configure({**SMALL, **flags})


def on_one(f, *arguments):
    """f of arrays, compiled, as on a single device that holds the whole chip."""
    run = jax.jit(lambda *arguments: train.on_chips(lambda key, *arguments: f(*arguments), KEY[None], *arguments))
    return jax.tree.map(lambda x: x[0], run(*arguments))


def loss_and_gradient(cfg, device, meta):
    return on_one(jax.value_and_grad(lambda meta: train.meta_loss(meta, KEY, cfg, device)[0]), meta)


def ingredients(cfg, device):
    """Meta-parameters, chip, tasks and trials of a batch."""
    @jax.jit
    def make():
        meta = train.meta_of(train.start(cfg, device))
        meta = meta._replace(g=meta.g._replace(readout=meta.g.readout + jax.random.uniform(KEY, meta.g.readout.shape)))
        keys = jax.random.split(KEY, cfg.batch_train)
        tasks = jax.vmap(lambda key: train.draw_task(jax.random.split(key)[0]))(keys)
        return meta, network.fabricate(KEY, device, meta.g), tasks, jax.vmap(lambda key: train.draw_trial(key, cfg))(keys)

    return make()


def hidden(cfg, device, chip):
    """Weights and traces of one read at 100 s."""
    def read(chip):
        w = network.read(KEY, device, chip, 100.0)
        return w, network.simulate(train.decays(cfg), w, network.level_centres(cfg.dac_bits)).trace

    return jax.jit(read)(chip)


def close(a, b, tolerance=1e-5):
    """Equal to tolerance of the largest component, leaf by leaf."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(y).max()
        assert scale > 0
        np.testing.assert_allclose(x, y, atol=tolerance*scale, rtol=0)


@pytest.mark.parametrize("moments", [True, False])
def test_delta_rule_equals_autodiff_of_the_time_steps(x64, moments):
    cfg, device = configured()
    _, chip, _, trials = ingredients(cfg, device)
    w, e = hidden(cfg, device, chip)
    readouts = jax.random.normal(KEY, (cfg.batch_train, cfg.n_h1))
    autodiff = jax.jit(jax.grad(lambda w, u, y: benchmark.squared_error(train.decays(cfg), w, u, y)))
    for readout, trial in zip(readouts, [jax.tree.map(lambda x: x[i], trials) for i in range(cfg.batch_train)]):
        closed = on_one(lambda e, w, support: train.delta_rule(e, w, support, moments), e, readout, trial.support)
        u = network.level_centres(cfg.dac_bits)[network.level(cfg.dac_bits, trial.x)]
        close(closed, autodiff(w._replace(readout=readout[:, None]), u, trial.y).readout[:, 0])


def mse_of_one(e, w, query):
    """train.mse of one task whose readout has no noise."""
    return train.mse(e, w[None], 0*w[None], jax.tree.map(lambda x: x[None], query))


@pytest.mark.parametrize("mse", [mse_of_one, train.mse_alone])
def test_query_loss_equals_the_mean_over_a_fine_grid(x64, mse):
    cfg, device = configured()
    _, chip, tasks, trials = ingredients(cfg, device)
    _, e = hidden(cfg, device, chip)
    w, task, query = jax.random.normal(KEY, (cfg.n_h1,)), *jax.tree.map(lambda x: x[1], (tasks, trials.query))
    x = jnp.linspace(-5.0, 5.0, 16*2000 + 1)[:-1] + 5/16/2000    # midpoints, 2,000 a level
    y, at = train.target(task, x), network.level(cfg.dac_bits, x)
    close(on_one(mse, e, w, query), jnp.mean(((e @ w)[:, at] - y)**2), 1e-6)
    close(on_one(mse, e[-1:], w, query), jnp.mean(((e[-1] @ w)[at] - y)**2), 1e-6)


@pytest.mark.parametrize("flags", [{}, {"n_bits": 3}, {"n_inner": 2}, {"device": "pcm_history", "n_bits": 4}], ids=str)
def test_expected_loss_equals_the_mean_over_fired_and_read_readouts(flags, monkeypatch):
    """One task's last step, fired and read n times over, within 4 standard errors; both sides are samples."""
    cfg, device = configured(grad_thr=0.3, **flags)
    _, chip, _, trials = ingredients(cfg, device)
    _, e = hidden(cfg, device, chip)
    query, n = jax.tree.map(lambda x: x[1], trials.query), 4000
    monkeypatch.setattr(train, "NOISE_DRAWS", n)
    masks = train.comparators(cfg, jnp.linspace(-1.0, 1.0, cfg.n_h1), jnp.full(1, 0.3))
    assert 0 < masks.sum() < masks.size/2

    def step(key):
        return train.Step(key, chip.readout, masks, 101.0)

    def drawn(key):
        pulse_key, read_key = jax.random.split(key)
        return train.mse_alone(e, train.read_weights(read_key, device, train.fire(device, step(pulse_key)), 151.0), query)

    def expected(key):
        w, w_var = train.expected_weights(key, cfg, device, step(key), 151.0)
        return train.mse(e, w[None], w_var[None], jax.tree.map(lambda x: x[None], query))

    keys = jax.random.split(KEY, 2*n).reshape(2, n)
    losses, closed = on_one(lambda keys: (jax.vmap(drawn)(keys[0]), jax.vmap(expected)(keys[1][:n if "n_inner" in flags else 20])), keys)
    error = 4*(np.var(losses)/n*(2 if "n_inner" in flags else 1.1))**0.5
    assert np.var(losses) > 0 and abs(np.mean(losses) - np.mean(closed)) < error


def plainly(patch, cfg):
    """Replace the closed forms and the custom derivative by autodiff of explicit squared errors."""
    def delta_rule(e, w, samples, moments):
        x, y = samples
        at = network.level(cfg.dac_bits, x)
        return jax.grad(lambda w: jnp.mean((e[:, at] @ w - y)**2))(w)

    def mse_of_one(e, w, w_var, task):
        node, weight = np.polynomial.legendre.leggauss(12)
        x = network.level_centres(cfg.dac_bits) + node[:, None]*10/2**(cfg.dac_bits + 1)
        noise = jnp.mean(e**2 @ w_var)    # its square, of weights that vary independently
        return noise + jnp.array(weight)/2 @ jnp.mean(((e @ w)[:, None] - train.target(task, jnp.array(x)))**2, (0, 2))

    def mse(e, *tasks):
        return jax.vmap(lambda *task: mse_of_one(e, *task))(*tasks).mean()

    patch.setattr(train, "by_level", lambda cfg, x, y: (x, y))
    patch.setattr(train, "query_targets", lambda cfg, task: task)
    patch.setattr(train, "delta_rule", delta_rule)
    patch.setattr(train, "mse", mse)
    patch.setattr(network, "lif_trace", lambda *inputs: network.lif(*inputs)[1])


@pytest.mark.parametrize("flags", [{}, {"n_inner": 3}, {"n_bits": 4}, {"device": "perf"}, {"shared_thr": True}, {"lambda_fr": 0.1, "n_inner": 2},
                                   {"device": "pcm_history"}], ids=str)
def test_meta_gradient_equals_second_order_autodiff(x64, flags):
    cfg, device = configured(grad_thr=0.3, **flags)
    meta = ingredients(cfg, device)[0]
    fast = loss_and_gradient(cfg, device, meta)
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch, cfg)
        plain = loss_and_gradient(cfg, device, meta)
    close(fast, plain)


@pytest.mark.parametrize("n_inner", [1, 2])
def test_meta_gradient_equals_finite_differences_where_smooth(x64, n_inner):
    """With each step function replaced by its primitive, no clip active and no noise whose size depends on a maximum."""
    cfg, device = configured(n_inner=n_inner, off_noise=0.0, grad_thr=0.5)
    meta = ingredients(cfg, device)[0]    # mid-range, 9 standard deviations of read noise and more from either clip
    meta = meta._replace(g=jax.tree.map(lambda g: 3 + 4*jax.random.uniform(KEY, g.shape), meta.g))
    direction = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), meta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "spike", lambda u: u/(1 + jnp.abs(u)))
        def loss(step):
            return train.meta_loss(jax.tree.map(lambda x, d: x + step*d, meta, direction), KEY, cfg, device)[0]

        slope, eps = on_one(jax.grad(loss), 0.0), 1e-6
        loss = functools.partial(on_one, loss)
        np.testing.assert_allclose(slope, (loss(eps) - loss(-eps))/2/eps, rtol=1e-5)


def test_fired_pulses_follow_the_comparator():
    cfg, device = configured(n_bits=3, device="perf")
    g = jnp.array([-5.0, -2.5, -1.0, 1.5, 0.2, 7.0])
    readout = analog.fabricate(KEY, device, jnp.full((2, 6, 1), 1.0))
    for thresholds, plus, minus in (([1.0], [3, 2, 0, 0, 0, 0], [0, 0, 0, 1, 0, 3]),
                                    ([0.5, 0.5, 0.5, 4.0, 4.0, 4.0], [3, 3, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1])):
        masks = train.comparators(cfg, g, jnp.array(thresholds))
        pulses = masks.sum(0)
        np.testing.assert_array_equal(pulses[..., 0], [plus, minus])
        after = train.fire(device, train.Step(KEY, readout, masks, 101.0))
        np.testing.assert_allclose(after.g, 1 + 0.75*pulses, rtol=1e-6)
        assert np.array_equal(after.t_prog > 0, pulses > 0)


def test_only_the_readout_adapts_and_steps_follow_the_protocol():
    cfg, device = configured(n_inner=3, grad_thr=0.05)
    meta, chip, _, trials = ingredients(cfg, device)
    def fired(key, chip, theta, support):
        steps = train.adapt(KEY, key, cfg, device, chip, theta, support, train.Times(100.0, 101.0, 251.0), alone=False)
        return [(step.masks.sum(0), train.fire(device, step)) for step in steps]

    steps = on_one(lambda chip, theta, support: jax.vmap(fired, (0, None, None, 0))(
        jax.random.split(KEY, cfg.batch_train), chip, theta, support), chip, jnp.exp(meta.log_theta), trials.support)
    for k, (pulses, readout) in enumerate(steps):
        assert np.any(pulses > 0) and np.all(readout.t_prog[pulses > 0] == 101.0 + k)
    untouched = sum(pulses for pulses, _ in steps) == 0
    start = np.broadcast_to(chip.readout.g, untouched.shape)
    assert np.array_equal(steps[-1][1].g[untouched], start[untouched])
    assert not np.any(np.all(steps[0][0] > 0, 1))    # never both devices of a pair at once


def test_a_sum_over_levels_keeps_every_sample():
    cfg, _ = configured(task_size=50)
    trial = train.draw_trial(KEY, cfg)
    share, y = trial.support.T
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(y.sum(), trial.y.mean(), atol=1e-5)


def test_task_distribution():
    tasks = jax.jit(jax.vmap(train.draw_task))(jax.random.split(KEY, 100_000))
    cosine, sine = tasks.coefficients.T    # A cos φ, A sin φ
    amplitude, phase = np.hypot(cosine, sine), np.arctan2(sine, cosine)
    assert abs(amplitude.mean() - 2.55) < 3*4.9/12**0.5/100_000**0.5
    assert abs(phase.mean() - np.pi/2) < 3*np.pi/12**0.5/100_000**0.5
    targets = jax.vmap(train.target, (0, None))
    x = np.linspace(-5, 5, 7)
    np.testing.assert_allclose(targets(tasks, x), amplitude[:, None]*np.sin(x + phase[:, None]), atol=1e-4)
    cfg, _ = configured(dac_bits=7)
    y2 = jax.vmap(lambda task: train.query_targets(cfg, task).y2)(tasks)
    assert abs(np.mean(y2) - train.YARDSTICKS["predicting 0"]) < 3*np.std(y2)/len(y2)**0.5
    mean = 2.55*2/np.pi*np.cos(x := np.linspace(-5, 5, 2001))
    few = jax.tree.map(lambda p: p[:4000], tasks)
    errors = np.mean((targets(few, x) - mean)**2, 1)
    assert abs(np.mean(errors) - train.YARDSTICKS["best function that ignores the task"]) < 3*np.std(errors)/4000**0.5


def test_chunks_do_not_change_the_run_and_the_range_is_kept():
    cfg, device = configured(lr_out=3.0, n_chips=2)
    whole, _ = train.train_chunk(cfg, device, train.start(cfg, device), 0, 4)
    half, _ = train.train_chunk(cfg, device, train.start(cfg, device), 0, 2)
    half, _ = train.train_chunk(cfg, device, half, 2, 4)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(half)))
    g = np.concatenate([np.ravel(g) for g in train.meta_of(whole).g])
    assert g.min() == np.float32(0.1) and g.max() == np.float32(12.0)


BASE = {"lambda_fr": 0.01, "grad_thr": 0.05, "lr_drop": 3}


@functools.cache
def programs(**flags):
    """The computations of a meta-iteration and of the meta-test, as text: equal text, equal results."""
    cfg, device = configured(**{**BASE, **flags})
    state = train.start(cfg, device)
    keys = jax.random.split(train.stream(cfg, 2), cfg.batch_test)
    chunk = jax.make_jaxpr(lambda state: train.train_chunk(cfg, device, state, 0, 1))(state)
    tested = jax.make_jaxpr(lambda meta: train.test_batch(train.episode, cfg, device, keys, meta, train.Times(
        cfg.tread, cfg.tprog, cfg.ttest)))(train.meta_of(state))
    values = [np.asarray(x).tobytes() for x in (*jax.tree.leaves(state), jax.random.key_data(keys))]
    return (str(chunk), *values[:-1]), (str(tested), *values)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(train.Config)
                                  if field.name not in ("n_iter", "device")])
def test_every_flag_changes_what_it_should_and_nothing_else(name):
    other = {"seed": 1, "n_inner": 2, "n_bits": 3, "grad_thr": 0.2, "shared_thr": True, "task_size": 9, "batch_train": 6, "n_chips": 2,
             "batch_test": 5, "n_h0": 10, "n_h1": 11, "dac_bits": 5, "tau_mem": 0.02, "tau_out": 0.003, "gain_out": 0.5, "lr_out": 0.2,
             "lr_drop": 0, "off_noise": 0.2, "target_fr": 5.0, "lambda_fr": 0.1, "tread": 3.0, "tprog": 150.0,
             "twait": 5000.0, "ttest": 1e6, "max_age": 1e3}[name]
    (training, test), (training_other, test_other) = programs(), programs(**{name: other})
    assert (training != training_other) == (name not in ("batch_test", "ttest"))
    assert (test != test_other) == (name not in ("batch_train", "n_chips", "lr_out", "lr_drop", "off_noise", "target_fr",
                                                 "lambda_fr", "twait", "max_age"))


def test_checkpoint_round_trip(tmp_path):
    cfg, device = configured(n_inner=2)
    state, _ = train.train_chunk(cfg, device, train.start(cfg, device), 0, 3)
    saved = train.Run(cfg, device, state, 3, [[3.0]*10])
    train.save(saved, tmp_path)
    loaded = train.load(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(loaded.state), strict=True))
    assert (loaded.cfg, loaded.device, loaded.step, loaded.rows) == (cfg, device, 3, saved.rows)
    with np.load(tmp_path/"checkpoint.npz") as file:
        assert file["hidden0"].shape == (2, 2, 9) and file["theta"].shape == (2, 8) and file["step"] == 3
        assert file["hidden1"].dtype == np.float32
