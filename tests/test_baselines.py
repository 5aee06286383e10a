"""Baselines are as good as they are said to be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, begun, configured, started, tile_of

import analog
import train
from img import baselines, parts, studies

KEY = jax.random.key(7)


def drawn(n_looks):
    """Traces [n_looks, 8, 3], weights [3, 2] and samples of random numbers."""
    e_key, w_key, count_key, y_key = jax.random.split(KEY, 4)
    e = jax.random.normal(e_key, (n_looks, 8, 3))
    w = jax.random.normal(w_key, (3, 2))
    counts = jax.random.poisson(count_key, 2.0, (8,)).astype(float)
    return e, w, train.samples_of(counts, jax.random.normal(y_key, (8, 2)))


def error_of_all(w, e, samples):
    """Squared error, mean over the looks at traces e [looks, L, H]."""
    return jnp.mean(jnp.stack([train.squared_error(x @ w, samples) for x in e]))


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_ridge_regression_is_where_the_gradient_is_zero(x64, ridge):
    e, start, samples = drawn(3)

    def loss(w):
        return error_of_all(w, e, samples) + ridge * jnp.sum((w - start) ** 2)

    w = baselines.solve(e, samples, ridge, start)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(w), 0.0, atol=1e-12)


def test_the_delta_rule_takes_one_look_after_the_other():
    e, start, samples = drawn(3)
    w, gradient = start, jax.jit(jax.grad(error_of_all))
    for k in (0, 1, 2, 0, 1):
        w = w - 0.1 * gradient(w, e[k : k + 1], samples)
    found = baselines.descend(e, start, samples, 0.1, 5)
    np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pcm", "ibm_history"])
def test_what_was_written_with_correction_reads_as_wanted(name):
    """On average at the query. The mean of 2,000 pairs may be off by 4 standard errors, and so may
    the table of programming, which has as many devices of each target."""
    device = analog.DEVICES[name]
    kind = train.Kind(device, analog.program_table(device))
    cfg, _ = configured(device=name)
    wanted = jnp.array([0.15, 0.5, -0.3])

    @jax.jit
    def read(key):
        new_key, write_key = jax.random.split(key)
        w = jnp.broadcast_to(wanted, (2000, 3))
        xbar = analog.blank(new_key, device, (2, *w.shape))
        return baselines.written(write_key, cfg, kind, tile_of(device, xbar, xbar.g), w, True)

    w = read(KEY)
    off = (jnp.mean(w, 0) - wanted) / (jnp.std(w, 0) * (2 / len(w)) ** 0.5)
    assert jnp.abs(off).max() < 4


def test_baselines_have_the_traces_of_the_networks_own_adaptation():
    cfg, devices = configured(device="pcm")
    device, family = devices["pcm"], train.families_of(cfg).testing
    meta = started(cfg, devices)[1].meta

    @jax.jit
    def both(key):
        chip, u, task, key = train.scene(key, meta, cfg, family, device, analog.fabricate)
        learn_key, refer_key, ask_key = jax.random.split(key, 3)
        seen, asked = baselines.traces(learn_key, ask_key, cfg, device, chip, u)
        adapt_key = jax.random.split(jax.random.split(learn_key)[1], 1)[0]
        start, times = chip.readout, train.times_of(cfg)
        mine, _ = train.adapt(adapt_key, meta, cfg, device, start, seen, task.support, times)
        tiles, _ = train.teach(learn_key, refer_key, meta, cfg, device, chip, u, task.support)
        at_query, _ = train.query_chip(ask_key, cfg, device, chip, tiles, u, train.wait_of(cfg))
        return mine.xbar.g, tiles.xbar.g, asked, at_query.e, start.xbar.g

    mine, theirs, asked, at_query, before = both(KEY)
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    np.testing.assert_allclose(asked, at_query, rtol=1e-6)
    assert jnp.any(mine != before)


def test_maml_adapts_by_the_gradient_of_a_plain_loop(monkeypatch):
    """One sample after the other, in a network of four and three hidden neurons."""
    monkeypatch.setattr(baselines, "WIDTHS", (1, 4, 3, 1))
    u, y = jnp.array([[-2.0], [0.5], [3.0]]), jnp.array([[1.0], [-1.0], [0.2]])

    @jax.jit
    @jax.grad
    def gradient_of(layers, u, y):
        (v, b), (w, c), (r, d) = layers
        first = [jnp.maximum(u[0] * v[0, i] + b[i], 0.0) for i in range(4)]
        second = [jnp.maximum(jnp.stack(first) @ w[:, j] + c[j], 0.0) for j in range(3)]
        return (jnp.stack(second) @ r[:, 0] + d[0] - y[0]) ** 2

    wanted = layers = baselines.begin(KEY)
    for _ in range(2):
        gradients = [gradient_of(wanted, *sample) for sample in zip(u, y, strict=True)]
        wanted = jax.tree.map(lambda x, *g: x - 0.01 * sum(g) / 3, wanted, *gradients)
    found = baselines.adapted(layers, u, train.samples_of(jnp.ones(3), y), 2)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_interval_of_a_ratio_is_that_of_leaving_one_out():
    """The jackknife, which agrees to first order in 1/n."""
    random = np.random.default_rng(0)
    y = random.gamma(2.0, size=400)
    x = 1.5 * y * random.uniform(0.5, 1.5, 400)
    left = np.array([np.delete(x, k).mean() / np.delete(y, k).mean() for k in range(400)])
    found = parts.ratio(x, y)
    assert found["mean"] == pytest.approx(x.mean() / y.mean())
    assert found["ci95"] == pytest.approx(1.96 * np.std(left) * 399**0.5, rel=0.02)
    assert parts.ratio(2 * y, y)["ci95"] == pytest.approx(0, abs=1e-9)


def run_study(monkeypatch, here, cfg, devices):
    """What the study finds of an untrained network with few samples and iterations."""
    monkeypatch.setattr(baselines, "SHOTS", (2,))
    monkeypatch.setattr(baselines, "N_ITER", 3)
    monkeypatch.setattr(baselines, "MANY", 3)
    train.save(begun(cfg, devices), here / "mine")
    studies.main(["baselines", "mine", "--n", "2", "--out", "."])
    assert (here / "baselines.png").exists()
    return json.loads((here / "baselines.json").read_text())["found"]


def test_the_study_of_functions(here, monkeypatch, capsys):
    cfg, devices = train.configure(train.parse(TINY + ["--device", "perf"])[0])
    found = run_study(monkeypatch, here, cfg, devices)
    assert found.keys() == {"10"} and "float MAML, inner steps: 10" in found["10"]
    assert found["10"]["ridge, written"]["over"]["mean"] == pytest.approx(1)
    after = found["10"]["this network, after each look"]
    assert np.shape(after["chips"]) == (2, 3)
    assert found["10"]["this network"]["mean"] == pytest.approx(after["mean"][-1])
    assert "10 samples: mean squared error" in capsys.readouterr().out
