"""The study `baselines` of studies.py: what other ways to learn make of the same samples.

Regression and the delta rule in float have the same chips, tasks, and traces of all looks and of
the query as the network's own adaptation. MAML of a plain ReLU network (Finn, Abbeel, Levine, ICML
2017) has the same tasks, its inputs hardly rounded.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

import analog
import network
import train
from img import figures, parts

SHOTS = 1, 2, 4, 10  # samples of a class; five times as many of a function
RIDGES = np.geomspace(1e-4, 1.0, 9)
STEPS = np.geomspace(0.03, 30.0, 21)  # of the delta rule
MANY = 100  # looks
FAIR = "ridge, written"  # what all errors are compared with
LOOKS = "this network, after each look"
NOT_DRAWN = "ridge, written without correction", "best readout of all inputs", LOOKS


# ---- written to the chip -------------------------------------------------------------------------


def means_of(kind, rest):
    """Mean conductances (µS) of devices programmed to the targets of the table [targets], rest s
    after programming has ended: with the bias that it leaves, and the mean drift."""
    device, table = kind
    left = analog.mean_drift(device, table.target, table.age + rest)
    return (table.target + table.mean) * left


def excess(kind, rest):
    """How far above g_min devices at the lowest target read on average (µS), rest s after
    programming has ended, because the converter clips there."""
    device, table = kind
    g, share = means_of(kind, rest)[0], device.g_min / device.g_max
    std = device.law.read_std(g, share, table.age[0] + rest, device.t0)
    std = jnp.maximum(std, 1e-6)
    z = (g - device.g_min) / std
    return std * (norm.pdf(z) + z * norm.cdf(z))


def corrected(kind, wanted, rest):
    """Targets (µS) [2, rows, cols] whose weights read as those of pairs wanted (µS), on average and
    rest s after programming has ended; and the mean conductances (µS) that they then have."""
    known, means = kind.table.target, means_of(kind, rest)
    lifted = jnp.where(wanted > kind.device.g_min, wanted + excess(kind, rest), wanted)
    target = jnp.interp(lifted, means, known)
    return target, jnp.interp(target, known, means)


def written(key, cfg, kind, readout, w, is_corrected):
    """Weights [H, n_out] as read at ttest from a readout whose programming to weights w ended
    with the last pulse of the meta-test."""
    write_key, read_key = jax.random.split(key)
    device, ended, asked = kind.device, train.times_of(cfg).pulses[-1], train.wait_of(cfg)
    target = expected = parts.writable(device, w)
    if is_corrected:
        target, expected = corrected(kind, target, asked - ended)
    xbar = analog.program(write_key, device, readout.xbar, target, ended).xbar
    reference = network.programmed_total(device, xbar, expected)
    tile = readout._replace(xbar=xbar, reference=reference)
    return network.read(read_key, device, tile, asked, cfg.compensate)


# ---- readouts that were computed -----------------------------------------------------------------


def traces(adapt_key, ask_key, cfg, device, chip, u):
    """Traces of a chip, the same that train.teach and train.query_chip have of these keys: of its
    looks [n_inner, L, H], and at the query [L, H]."""
    hidden_key, _ = jax.random.split(adapt_key)
    query_key, _ = jax.random.split(ask_key)

    def at(inputs):
        key, t = inputs
        return train.observe(key, cfg, device, chip, u, t).e

    keys = jax.random.split(hidden_key, cfg.n_inner)
    seen = jax.lax.map(at, (keys, train.times_of(cfg).reads))
    return seen, at((query_key, train.wait_of(cfg)))


def solve(e, samples, ridge, start):
    """Weights [H, n_out] of ridge regression of samples on traces e [looks, L, H], towards weights
    start."""
    second = jnp.einsum("kli,l,klj->ij", e, samples.share, e) / len(e)
    first = jnp.mean(e, 0).T @ samples.y
    eye = jnp.eye(len(second))
    return jnp.linalg.solve(second + ridge * eye, first + ridge * start)


def descend(e, start, samples, step, n_looks):
    """Weights [H, n_out] after steps of the delta rule in float from weights start, at n_looks
    traces of e [looks, L, H], in turn and again."""

    def one(w, k):
        return w - step * train.delta_rule(e[k % len(e)], e[k % len(e)] @ w, samples), None

    return jax.lax.scan(one, start, jnp.arange(n_looks))[0]


def fitted(ridge, write, seen, start, support):
    """Weights by label of regression, as computed and as written to the chip and read."""
    w = solve(seen, support, ridge, start)
    return {
        "ridge regression": w,
        "ridge, written": write(w, True),
        "ridge, written without correction": write(w, False),
    }


def learned(step, seen, start, support):
    """Weights by label of the delta rule in float: after the chip's looks, and after many."""
    return {
        f"float delta rule, {n} looks": descend(seen, start, support, step, n)
        for n in (len(seen), MANY)
    }


def readouts(key, meta, cfg, family, kind):
    """Errors of readouts of a chip that were computed from the traces of its looks: by regression
    [RIDGES], by the delta rule [STEPS]; and [1] of the best readout for all inputs."""
    device = kind.device
    chip, u, task, key = train.scene(key, meta, cfg, family, device)
    adapt_key, read_key, ask_key, write_key = jax.random.split(
        key, 4
    )  # as learn_and_test does
    chip = network.later(chip, cfg.tread)
    seen, asked = traces(adapt_key, ask_key, cfg, device, chip, u)
    start = network.read(read_key, device, chip.readout, 0.0, False)
    write = partial(written, write_key, cfg, kind, chip.readout)
    given = {"seen": seen, "start": start, "support": task.support}

    def errors(readouts):
        y = {name: train.outputs(cfg, asked, w) for name, w in readouts.items()}
        return {name: parts.error(family, x, task.query) for name, x in y.items()}

    def at_all(strengths, way):
        return jax.lax.map(lambda x: errors(way(x)), jnp.asarray(strengths, float))

    def best(ridge):
        return {"best readout of all inputs": solve(asked[None], task.query, ridge, start)}

    found = at_all(RIDGES, partial(fitted, write=write, **given))
    found |= at_all(STEPS, partial(learned, **given))
    return found | at_all([1e-5], best)


# ---- MAML in float -------------------------------------------------------------------------------

WIDTHS = 1, 40, 40, 1
INNER, OUTER = 0.01, 1e-3  # steps of gradient descent in a task, and of Adam
N_ITER, N_TASKS = 20_000, 25  # iterations, tasks of each
FINE_BITS = 10  # of the inputs in the test, levels 0.01 apart


def begin(key):
    """Weights and biases of each layer: weights of variance 2/inputs."""
    layers = []
    for n, m in zip(WIDTHS, WIDTHS[1:], strict=False):
        key, weight_key = jax.random.split(key)
        w = (2 / n) ** 0.5 * jax.random.normal(weight_key, (n, m))
        layers.append((w, jnp.zeros(m)))
    return layers


def wrong(layers, u, samples):
    """Squared error of a ReLU network on the samples of a pool u [L, 1]."""
    *hidden, (w, b) = layers
    for v, c in hidden:
        u = jax.nn.relu(u @ v + c)
    return train.squared_error(u @ w + b, samples)


def moved(layers, step, direction):
    """The layers, their parameters moved by a step along a direction."""
    return jax.tree.map(lambda x, d: x + step * d, layers, direction)


def adapted(layers, u, support, n_steps):
    """The layers after n_steps of gradient descent on a support."""

    def one(layers, _):
        return moved(layers, -INNER, jax.grad(wrong)(layers, u, support)), None

    return jax.lax.scan(one, layers, length=n_steps)[0]


def after_a_step(layers, key, function, n):
    """Error on n samples of a random function after a step on n others."""
    function_key, x_key = jax.random.split(key)
    low, high = network.X_RANGE
    x = jax.random.uniform(x_key, (2, n, 1), minval=low, maxval=high)
    y = function.draw(function_key).target(x)
    support, query = (train.samples_of(jnp.ones(n), values) for values in y)
    return wrong(adapted(layers, x[0], support, 1), x[1], query)


@jax.jit(static_argnums=(1, 2))
def trained(key, function, n):
    """The layers after meta-training on random functions, n samples of each."""
    start_key, task_key = jax.random.split(key)

    def loss(layers, key):
        of_task = partial(after_a_step, function=function, n=n)
        return jnp.mean(
            jax.vmap(of_task, (None, 0))(layers, jax.random.split(key, N_TASKS))
        )

    def iterate(state, step):
        gradient = jax.grad(loss)(state.meta, jax.random.fold_in(task_key, step))
        direction, state = train.adam(state, gradient, step)
        return state._replace(meta=moved(state.meta, OUTER, direction)), None

    layers = begin(start_key)
    zero = jax.tree.map(jnp.zeros_like, layers)
    return jax.lax.scan(iterate, train.State(layers, zero, zero), jnp.arange(N_ITER))[
        0
    ].meta


def maml(key, meta, cfg, family, given):
    """Errors of a ReLU network on the task of a chip; given are the device and the layers."""
    device, layers = given
    fine = dataclasses.replace(
        family, dac_bits=FINE_BITS
    )  # of the same functions and inputs
    _, u, task, _ = train.scene(key, meta, cfg, fine, device)
    return {
        f"float MAML, inner steps: {n}": wrong(
            adapted(layers, u, task.support, n), u, task.query
        )
        for n in (1, 10)
    }


# ---- the study -----------------------------------------------------------------------------------


def errors_of(n, run):
    """Errors [n, n_inner + 1] of the network after each look, and errors [n] by label of all ways
    to learn, FAIR first."""
    device = next(iter(run.devices.values()))
    looks = parts.error_of(parts.tested(train.reported, n, run).measured)
    found = parts.tuned(readouts, n, run)
    found = {FAIR: found[FAIR], "this network": looks[:, -1], **found}
    if not run.families.about:
        function = train.FUNCTIONS[run.cfg.tasks]
        layers = trained(jax.random.key(0), function, run.cfg.task_size)
        found |= parts.measured(maml, n, run, device, (device, layers))
    return looks, found


def baselines(n, run):
    """The network, regression, delta rule and MAML in float, by the number of samples: {size:
    {label: errors}}."""
    numbers = {}
    for shots in SHOTS:
        size = shots * (run.cfg.n_way if run.families.about else 5)
        print(f"{size} samples: {parts.unit(run)}, ± 95 % interval")
        looks, errors = errors_of(n, parts.resized(run, size))
        found = {label: parts.show(label, x, errors[FAIR]) for label, x in errors.items()}
        numbers[size] = found | {LOOKS: parts.recorded(looks)}
        after = " ".join(f"{x:.3f}" for x in numbers[size][LOOKS]["mean"])
        print(f"  {LOOKS} {after}", flush=True)
    return numbers


def draw(found, unit):
    """Figure of errors by the number of samples."""
    sizes, of_sizes = [int(size) for size in found], list(found.values())
    drawn = {}
    for label in of_sizes[0]:
        if label not in NOT_DRAWN:
            means = [errors[label]["mean"] for errors in of_sizes]
            halves = [errors[label].get("ci95", 0) for errors in of_sizes]
            drawn[label] = {"mean": means, "ci95": halves}
    return figures.lines(sizes, drawn, "samples of a task", unit, "log")
