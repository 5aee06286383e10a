"""Meta-train a spiking network so that a few noisy pulses teach it a new task, and test it.

    deploy a chip, whose programming ends at its time 0
    at tread and every tlook after, n_inner times:            a look
        show the samples of the task, read all crossbars
        g = gradient of the samples' squared error by the readout's weights (the delta rule)
        fire pulses where g passes thresholds θ
    at ttest: the error over all inputs                       the query

    meta-training: draw devices, tasks, an age and a wait before the query; move the conductances
        that chips are programmed to, and θ, against the gradient of the query's error
        through reads, drift and pulses (MAML: Finn, Abbeel, Levine, ICML 2017), by Adam

Within an adaptation, times count from its first read.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import defaultdict
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import analog
import network
from img import figures

CHUNK = 200  # meta-iterations between two checkpoints and rows of metrics.csv
LR_THETA = 0.1  # step of the optimizer for ln θ
MAX_GRAD_NORM = 0.3  # of the outer loss, per range of a conductance and per ln θ
DAY = 86400.0  # s
TINY = 1e-20  # below any gradient


# ---- settings ------------------------------------------------------------------------------------


def setting(default, help, least=0.0, choices=None):
    """A setting of the command line; least is its lowest value."""
    said = {"help": help, "least": least, "choices": choices}
    return dataclasses.field(default=default, metadata=said)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, and of the command line."""

    seed: int = setting(0, "seed of every random draw")
    n_iter: int = setting(1000, "meta-iterations")
    device: str = setting(
        "pcm,pcm_history",
        f"{', '.join(analog.DEVICES)} or JSON files; several, by commas, are trained together",
    )
    tasks: str = setting("sinusoids", "family of tasks")
    rule: str = setting("comparators", "how a gradient becomes pulses")
    n_inner: int = setting(8, "looks: times that a new task is read and pulsed", 1)
    n_bits: int = setting(
        2,
        "bits of an update: at most 2^(bits−1) − 1 pulses per synapse and look",
        choices=range(2, 9),
    )
    grad_thr: float = setting(
        0.1, "thresholds at the start, share of the rms of the first look's gradient", 1e-6
    )
    shared_thr: bool = setting(False, "one threshold for all synapses of a look")
    task_size: int = setting(20, "support samples of a task", 1)
    batch_train: int = setting(
        128, "tasks per meta-iteration, shared out among devices; each chip of one has them all", 1
    )
    n_chips: int = setting(1, "chips of each device per meta-iteration", 1)
    batch_test: int = setting(512, "tasks of the meta-test, each on a chip of its own", 1)
    n_rows: int = setting(
        16, "rows of layer 0 for each input and for the bias; a weight is their mean", 1
    )
    n_h0: int = setting(64, "neurons of layer 0", 1)
    n_h1: int = setting(128, "neurons of layer 1", 1)
    dac_bits: int = setting(6, "bits of the input converter", choices=range(1, 13))
    drive: float = setting(0.2, "what a weight of 1 adds to a membrane under an input of 1", 1e-6)
    tau_mem: float = setting(0.03, "time constant of the membranes, s", 1e-4)
    tau_out: float = setting(0.1, "time constant of the traces, s", 1e-4)
    gain_out: float = setting(0.03, "what one spike adds to its trace", 1e-6)
    compensate: bool = setting(
        True, "drift compensation of the hidden crossbars, and of the readout at the query"
    )
    lr_out: float = setting(
        0.0063, "step of the optimizer for conductances, share of the device's range", 1e-6
    )
    lr_drop: int = setting(500, "iteration from which steps are divided by 10")
    off_noise: float = setting(
        None,
        "std of the programming error in meta-training, share of g_max "
        "(default: what analog.program leaves)",
    )
    target_fr: float = setting(
        50.0, "target of each layer's mean firing rate, Hz; without effect at lambda_fr 0"
    )
    lambda_fr: float = setting(
        0.15, "weight of Σ_layers ((rate − target_fr)/100 Hz)² in the outer loss"
    )
    tread: float = setting(100.0, "first read of a new task, s since a chip was programmed", 1.0)
    tprog: float = setting(
        None, "its first pulse, s (default: as soon as the samples have been shown)", 1.0
    )
    tlook: float = setting(
        None, "from one look to the next, s (default: 20, or as soon as samples allow)", 1e-3
    )
    twait: float = setting(10.0, "shortest wait from the last pulse to the query, s", 1.0)
    max_rest: float = setting(
        1e6, "longest such wait in meta-training, s: log-uniform, twait to this", 1.0
    )
    max_age: float = setting(
        1e7, "age of a chip at its first read in meta-training, s: log-uniform, tread to this", 1.0
    )
    ttest: float = setting(
        None, "query of the meta-test, s since a chip was programmed (default: after twait)", 1.0
    )


# Settings that belong together; a flag given beside --preset wins.
PRESETS = {
    # the classic single step
    "one_look": {"device": "pcm", "n_inner": 1, "gain_out": 0.06, "n_iter": 1500},
}


# ---- tasks ---------------------------------------------------------------------------------------


class Sinusoid(NamedTuple):
    """The function A sin(x + φ), A ~ U[0.1, 5] and φ ~ U[0, π]."""

    amplitude: jax.Array  # A
    phase: jax.Array  # φ

    @staticmethod
    def draw(key):
        """A task."""
        low, high = np.array([0.1, 0.0]), np.array([5.0, np.pi])
        return Sinusoid(*jax.random.uniform(key, (2,), minval=low, maxval=high))

    def target(self, x):
        """Targets at inputs x, of x's shape."""
        return self.amplitude * jnp.sin(x + self.phase)


# Functions of one input that can be drawn.
FUNCTIONS = {"sinusoids": Sinusoid}


class Samples(NamedTuple):
    """Samples of a task, summed by their input, one of the L of a pool."""

    share: jax.Array  # [L], p_l, share of the samples that have input l
    y: jax.Array  # [L, n_out], p_l ȳ_l, with the mean target ȳ_l of these
    y2: jax.Array  # mean over the samples of y², summed over outputs


class Task(NamedTuple):
    """A task to be learned."""

    support: Samples  # what the chip sees
    query: Samples  # what it is asked
    x: jax.Array  # [task_size], inputs of the support
    y: jax.Array  # [task_size], its targets


class OfOneInput(NamedTuple):
    """A family of tasks y = f(x), x through the input converter. The pool has all its levels, and
    the query the whole range, all levels alike."""

    function: type  # one of FUNCTIONS
    dac_bits: int
    task_size: int
    n_in = n_out = 1

    def pool(self, key):
        """Inputs [L, n_in] of a pool."""
        return network.level_centres(self.dac_bits)[:, None]

    def task(self, key):
        """A task, its support uniform over the converter's span."""
        function_key, x_key = jax.random.split(key)
        function = self.function.draw(function_key)
        low, high = network.X_RANGE
        x = jax.random.uniform(x_key, (self.task_size,), minval=low, maxval=high)
        # Several inputs in each level's cell, so that the converter's own error counts.
        asked = network.level_centres(max(self.dac_bits + 1, 8))
        y = function.target(x)
        return Task(self.sum_up(x, y), self.sum_up(asked, function.target(asked)), x, y)

    def sum_up(self, x, y):
        """Samples of the inputs x and targets y [N]."""
        level = network.level(self.dac_bits, x)
        at_level = jax.nn.one_hot(level, 2**self.dac_bits) / len(x)  # [N, L]
        return Samples(jnp.sum(at_level, 0), (y @ at_level)[:, None], jnp.mean(y**2))


def family_of(cfg):
    """The family of tasks of the settings."""
    return OfOneInput(FUNCTIONS[cfg.tasks], cfg.dac_bits, cfg.task_size)


# ---- a look --------------------------------------------------------------------------------------


def delta_rule(e, w, samples):
    """Gradient [H, n_out] of the samples' squared error by the weights w [H, n_out], of traces
    e [L, H]."""
    y = e @ w  # [L, n_out]
    return 2 * e.T @ (samples.share[:, None] * y - samples.y)


def squared_error(e, w, samples):
    """Squared error, mean over the samples and summed over outputs, of weights w [H, n_out] and
    traces e [L, H]."""
    y = e @ w  # [L, n_out]
    return jnp.sum(samples.share[:, None] * y**2 - 2 * samples.y * y) + samples.y2


def max_pulses(cfg):
    """The largest number of pulses of one device in one look."""
    return 2 ** (cfg.n_bits - 1) - 1


def comparators(key, cfg, gradient, theta):
    """Pulses [2, H, n_out] on G+ and G−, Σ_j H(∓g − jθ), for the gradient g [H, n_out] and
    thresholds θ, one for each synapse or for all. The surrogate of H is as wide as the rms of g, so
    that targets of any scale learn alike."""
    width = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(gradient**2)))
    wanted = jnp.stack([-gradient, gradient])
    j = jnp.arange(1.0, max_pulses(cfg) + 1)[:, None, None, None]
    return jnp.sum(network.spike((wanted - j * theta) / jnp.maximum(width, TINY)), 0)


# Functions of (key, cfg, gradient, theta), to pulses [2, H, n_out].
RULES = {"comparators": comparators}


# ---- parallelism: chips over cores, accelerators and hosts ---------------------------------------

P = jax.sharding.PartitionSpec
BATCH = 64  # chips that an accelerator takes at a time


def in_turn(f, x):
    """f of every x, stacked: one at a time on a core, whose caches hold one, else BATCH at a
    time."""
    batch_size = None if jax.default_backend() == "cpu" else BATCH
    return jax.lax.map(f, x, batch_size=batch_size)


def places_for(*numbers):
    """The largest number of JAX's devices that each of these numbers of chips can be shared out to
    evenly. All that one compiled program runs has to use the same, and several hosts use all."""
    n_all = jax.device_count()
    found = next(k for k in range(n_all, 0, -1) if not any(n % k for n in numbers))
    if jax.process_count() > 1 and found < n_all:
        what = f"several hosts need a multiple of {n_all} chips: --n_chips, --batch_test"
        raise Refused(what)
    return found


def on_chips(f, xs, meta, n_places):
    """f(x, meta) of every x of xs [chips, ...], stacked, on so many of JAX's devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n_places]), ("chips",))

    def here(xs, meta):
        return in_turn(lambda x: f(x, meta), xs)

    stacked = jax.shard_map(
        here, mesh=mesh, in_specs=(P("chips"), P()), out_specs=P("chips"), check_vma=False
    )(xs, meta)
    everywhere = jax.sharding.NamedSharding(mesh, P())  # as every host needs all
    return jax.lax.with_sharding_constraint(stacked, everywhere)


# ---- inner loop: a chip adapts to a task ---------------------------------------------------------


class Meta(NamedTuple):
    """The meta-parameters."""

    g: network.Network  # µS, the conductances that chips are programmed to
    # [n_inner, H, n_out], ln of the thresholds; [n_inner, 1, 1] where synapses share one
    log_theta: jax.Array


class Times(NamedTuple):
    """When things happen in an adaptation, in s since its first read."""

    reads: jax.Array  # [n_inner], of all crossbars
    pulses: jax.Array  # [n_inner]


def times_of(cfg):
    """Times of an adaptation."""
    reads = cfg.tlook * jnp.arange(float(cfg.n_inner))
    return Times(reads, reads + (cfg.tprog - cfg.tread))


def wait_of(cfg):
    """s from the first read of the meta-test to its query."""
    return cfg.ttest - cfg.tread


def sizes_of(cfg):
    """Neurons of each hidden layer."""
    return cfg.n_h0, cfg.n_h1


def dynamics_of(cfg):
    """Constants of the neurons."""
    lif = network.Lif(math.exp(-network.DT / cfg.tau_mem))
    kappa = math.exp(-network.DT / cfg.tau_out)
    layers = (lif,) * len(sizes_of(cfg))
    return network.Dynamics(cfg.drive, layers, kappa, cfg.gain_out)


class Seen(NamedTuple):
    """What a presentation of a pool of inputs shows."""

    e: jax.Array  # [L, H], traces at its end
    rates: tuple  # Hz, of the neurons of each layer


def observe(key, cfg, device, chip, u, t):
    """Seen of a chip that is read at time t (s), under the inputs u [L, n_in]."""
    w = network.each(network.read, key, device, chip, t, cfg.compensate)
    activity = network.present(dynamics_of(cfg), w.hidden, u)
    return Seen(activity.e[-1], network.rates(activity))


def look(key, cfg, device, readout, e, support, log_theta, read_at, pulse_at):
    """The readout, a crossbar, after one look at traces e [L, H], read and pulsed at these times
    (s); and the pulses [2, H, n_out]. What drift has left of the weights counts here, so they are
    read as they are."""
    read_key, rule_key, pulse_key = jax.random.split(key, 3)
    w = analog.weights(device, analog.read(read_key, device, readout, read_at))
    gradient = delta_rule(e, w, support)
    counts = RULES[cfg.rule](rule_key, cfg, gradient, jnp.exp(log_theta))
    return analog.fire(pulse_key, device, readout, counts, max_pulses(cfg), pulse_at)


def adapt(key, meta, cfg, device, readout, e, support, times):
    """The readout, a crossbar, after each look [n_inner, ...], and the pulses [n_inner, 2, H,
    n_out], as it learns a task from traces e [n_inner, L, H]."""

    def one(readout, inputs):
        key, e, *rest = inputs
        readout, fired = look(key, cfg, device, readout, e, support, *rest)
        return readout, (readout, fired)

    keys = jax.random.split(key, cfg.n_inner)
    return jax.lax.scan(one, readout, (keys, e, meta.log_theta, *times))[1]


def adapt_chip(key, meta, cfg, device, chip, u, supports, times, reads):
    """adapt for each of the supports [tasks, ...], by a copy of the chip's readout; the hidden
    crossbars are read at times reads (s), [n_inner], or [1] where one read serves all looks."""
    hidden_key, adapt_key = jax.random.split(key)

    def traces_at(inputs):
        key, t = inputs
        return observe(key, cfg, device, chip, u, t).e

    e = in_turn(traces_at, (jax.random.split(hidden_key, len(reads)), reads))
    e = jnp.broadcast_to(e, (cfg.n_inner, *e.shape[1:]))
    keys = jax.random.split(adapt_key, len(supports.y2))

    def learn(key, support):
        return adapt(key, meta, cfg, device, chip.readout.xbar, e, support, times)

    return jax.vmap(learn)(keys, supports)


def refer(key, device, xbars, times):
    """Tiles of readouts xbars [n, ...] that were last pulsed at times [n] (s)."""

    def one(key, xbar, t):
        return network.refer(key, device, xbar, t + device.t_verify)

    return jax.vmap(one)(jax.random.split(key, len(times)), xbars, times)


def query_chip(key, cfg, device, chip, readouts, u, t):
    """Seen at time t (s) of a chip, and weights [n, H, n_out] of readouts, tiles [n, ...]."""
    hidden_key, readout_key = jax.random.split(key)

    def read(key, readout):
        return network.read(key, device, readout, t, cfg.compensate)

    keys = jax.random.split(readout_key, len(readouts.reference))
    return observe(hidden_key, cfg, device, chip, u, t), jax.vmap(read)(keys, readouts)


# ---- outer loop ----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What meta-training knows of a device; stacked, every number is [devices]."""

    device: analog.Device
    table: analog.ProgramTable


class Lot(NamedTuple):
    """The devices that meta-training draws its chips from."""

    kinds: tuple  # of Kind, stacked, one for each family of devices
    low: float  # µS, the lowest conductance that all of them can be programmed to
    high: float  # µS, the highest
    span: float  # µS, the range of a weight


class State(NamedTuple):
    """What meta-training carries from one iteration to the next."""

    meta: Meta
    mean: Meta  # of the gradients, for Adam
    square: Meta  # mean of their squares


def log_uniform(key, low, high):
    """A number from low to high whose logarithm is uniform."""
    return low * (high / low) ** jax.random.uniform(key)


def rate_penalty(cfg, rates):
    """Σ_layers ((mean rate − target_fr)/100 Hz)², of the rates (Hz) of each layer's neurons."""
    return sum(((jnp.mean(x) - cfg.target_fr) / 100) ** 2 for x in rates)


def activity_of(rates):
    """What is reported of the rates (Hz) of the neurons of each layer."""
    return {
        "rates": jnp.stack([jnp.mean(x) for x in rates]),
        "silent": jnp.stack([100 * jnp.mean(x == 0) for x in rates]),
        "spikes": sum(jnp.sum(x) for x in rates) * network.N_STEPS * network.DT,
    }


def meta_loss(key, meta, cfg, kind, n_tasks):
    """Outer loss of one chip and n_tasks tasks, and means of what is measured on the way: the
    query's squared error, as a share of that of predicting 0, and the penalty of rates."""
    keys = iter(jax.random.split(key, 8))
    device, table = kind
    make = partial(analog.fabricate, table=table)
    chip = network.assemble(next(keys), device, make, meta.g)
    chip = network.later(chip, log_uniform(next(keys), cfg.tread, cfg.max_age))
    family, times = family_of(cfg), times_of(cfg)
    u = family.pool(next(keys))
    tasks = jax.vmap(family.task)(jax.random.split(next(keys), n_tasks))
    # One read of the hidden crossbars serves all looks: their reads differ in noise alone, and
    # eight looks take half the time.
    xbars, pulses = adapt_chip(
        next(keys), meta, cfg, device, chip, u, tasks.support, times, times.reads[:1]
    )
    last = jax.tree.map(lambda x: x[:, -1], xbars)
    readouts = refer(next(keys), device, last, jnp.repeat(times.pulses[-1], n_tasks))
    asked = times.pulses[-1] + log_uniform(next(keys), cfg.twait, cfg.max_rest)
    seen, w = query_chip(next(keys), cfg, device, chip, readouts, u, asked)
    error = jnp.mean(jax.vmap(squared_error, (None, 0, 0))(seen.e, w, tasks.query))
    measured = {"loss": error, "pulses": jnp.sum(pulses) / n_tasks, **activity_of(seen.rates)}
    share = error / jnp.mean(tasks.query.y2)
    return share + cfg.lambda_fr * rate_penalty(cfg, seen.rates), measured


def scale(sizes, tree):
    """The tree, each of its fields times that of sizes."""

    def field(size, part):
        return jax.tree.map(lambda x: size * x, part)

    return jax.tree.map(field, sizes, tree)


def shorten(gradient):
    """The gradient, no longer than MAX_GRAD_NORM. Through several looks it explodes in the first
    iterations, and Adam would remember that for a thousand more."""
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient)))
    factor = jnp.minimum(1.0, MAX_GRAD_NORM / jnp.maximum(norm, TINY))
    return jax.tree.map(lambda x: factor * x, gradient)


def adam(state, gradient, step):
    """Direction like meta, and the state with what Adam remembers (Kingma and Ba, ICLR 2015)."""
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.square, gradient)
    n = jnp.float32(step) + 1

    def direction(m, v):
        return -m / (1 - 0.9**n) / (jnp.sqrt(v / (1 - 0.999**n)) + 1e-8)

    return jax.tree.map(direction, mean, square), State(state.meta, mean, square)


def common_range(devices):
    """The lowest and the highest conductance (µS) that all devices can be programmed to."""
    return max(x.g_min for x in devices), min(x.g_prog for x in devices)


def project(meta, low, high):
    """Meta-parameters whose conductances are from low to high (µS)."""
    return meta._replace(g=jax.tree.map(lambda g: jnp.clip(g, low, high), meta.g))


def schedule(cfg, step):
    """Factor of the step sizes: a tenth from lr_drop on."""
    return jnp.where(step < cfg.lr_drop, 1.0, 0.1)


def update(cfg, lot, state, gradient, step):
    """State after one step of the optimizer: lr_out of the range, LR_THETA of ln θ, times the
    schedule's factor."""
    units = Meta(g=lot.span, log_theta=1.0)
    rates = Meta(g=cfg.lr_out * lot.span, log_theta=LR_THETA)
    direction, state = adam(state, shorten(scale(units, gradient)), step)
    factor = schedule(cfg, step)
    moved = jax.tree.map(lambda x, d: x + factor * d, state.meta, scale(rates, direction))
    return state._replace(meta=project(moved, lot.low, lot.high))


def lot_of(cfg, devices):
    """The Lot of devices, a dictionary by name, in the order of their names."""
    ordered = [devices[name] for name in sorted(devices)]
    families = defaultdict(list)
    for device in ordered:
        kind = Kind(device, table_of(cfg, device))
        families[jax.tree.structure(kind)].append(kind)
    kinds = tuple(jax.tree.map(stack, *family) for family in families.values())
    low, high = common_range(ordered)
    return Lot(kinds, low, high, ordered[0].g_max - low)


def stack(*numbers):
    """An array of them, along a first axis."""
    return np.stack(numbers).astype(float)


def table_of(cfg, device):
    """What meta-training takes for the error of programming a device."""
    if cfg.off_noise is None:
        return analog.program_table(device)
    return analog.EXACT._replace(std=analog.EXACT.std + cfg.off_noise * device.g_max)


def stream(cfg, index):
    """Key of the start (0), of meta-training (1), of the meta-test (2); studies go on from
    3."""
    return jax.random.fold_in(jax.random.key(cfg.seed), index)


@jax.jit(static_argnums=0)
def start(cfg, lot):
    """State before training: the thresholds are a share of the rms of the gradients that the first
    look at a new chip finds."""
    keys = iter(jax.random.split(stream(cfg, 0), 6))
    family = family_of(cfg)
    kind = jax.tree.map(lambda x: x[0], lot.kinds[0])
    device = kind.device._replace(g_min=lot.low)
    sizes = sizes_of(cfg)
    g = network.start(next(keys), device, sizes, family.n_in, family.n_out, cfg.n_rows)
    g = project(Meta(g, None), lot.low, lot.high).g
    chip = network.assemble(next(keys), kind.device, analog.fabricate, g)
    u = family.pool(next(keys))
    seen = observe(next(keys), cfg, kind.device, chip, u, cfg.tread)
    w = network.read(next(keys), kind.device, chip.readout, cfg.tread, cfg.compensate)
    tasks = jax.vmap(family.task)(jax.random.split(next(keys), 64))
    gradients = jax.vmap(delta_rule, (None, None, 0))(seen.e, w, tasks.support)
    rms = jnp.sqrt(jnp.mean(gradients**2))
    shape = (1, 1) if cfg.shared_thr else w.shape
    theta = jnp.full((cfg.n_inner, *shape), cfg.grad_thr * jnp.maximum(rms, TINY))
    meta = Meta(g, jnp.log(theta))
    zero = jax.tree.map(jnp.zeros_like, meta)
    return State(meta, zero, zero)


def gradient_of(cfg, lot, meta, key):
    """Gradient of the outer loss and what is measured, means over n_chips chips of each
    device."""
    numbers = [len(kind.device.g_max) for kind in lot.kinds]  # of devices of each family
    n_places = places_for(*(n * cfg.n_chips for n in numbers))
    n_tasks = cfg.batch_train // sum(numbers)
    keys = jax.random.split(key, len(lot.kinds))

    def chip(x, meta):
        key, kind = x
        loss = partial(meta_loss, cfg=cfg, kind=kind, n_tasks=n_tasks)
        return jax.grad(loss, 1, has_aux=True)(key, meta)

    found = []
    for key, kind in zip(keys, lot.kinds, strict=True):
        kinds = jax.tree.map(lambda x: jnp.repeat(x, cfg.n_chips, 0), kind)
        chip_keys = jax.random.split(key, len(kinds.device.g_max))
        found.append(on_chips(chip, (chip_keys, kinds), meta, n_places))
    return jax.tree.map(lambda *x: jnp.mean(jnp.concatenate(x), 0), *found)


@jax.jit(static_argnums=0)
def train_chunk(cfg, lot, state, key, steps):
    """State after the meta-iterations steps [n], and means of what was measured in them."""

    def iterate(state, step):
        step_key = jax.random.fold_in(key, step)
        gradient, measured = gradient_of(cfg, lot, state.meta, step_key)
        return update(cfg, lot, state, gradient, step), measured

    state, measured = jax.lax.scan(iterate, state, steps)
    return state, jax.tree.map(lambda x: jnp.mean(x, 0), measured)


# ---- meta-test -----------------------------------------------------------------------------------

# What a meta-test measures: name, and label with the unit and the number of an entry.
MEASURED = {
    "mse": "squared error after look {}",
    "mse_day": "squared error a day later",
    "pulses": "pulses of an adaptation",
    "touched": "readout devices touched (%)",
    "dw": "Σ|ΔW| over the synapses",
    "rates": "firing rate (Hz) of layer {}",
    "silent": "neurons of layer {} silent for all inputs (%)",
    "spikes": "spikes per presentation",
}


class Episode(NamedTuple):
    """One task on one chip."""

    measured: dict  # by the names of MEASURED
    task: Task
    # [2, L, n_out], outputs for the pool before and after adaptation
    outputs: jax.Array
    chip: network.Network  # of tiles; its times count from the episode's first read


def scene(key, meta, cfg, device, make=analog.deploy):
    """A new chip whose programming ended at its time 0, its crossbars made by make; a pool of
    inputs, a task, and a key."""
    chip_key, pool_key, task_key, key = jax.random.split(key, 4)
    chip = network.assemble(chip_key, device, make, meta.g)
    family = family_of(cfg)
    return chip, family.pool(pool_key), family.task(task_key), key


def learn(adapt_key, refer_key, meta, cfg, device, chip, u, task):
    """The readouts of a chip after each look at a task, tiles [n_inner, ...], and the pulses
    [n_inner, 2, H, n_out]."""
    times, supports = times_of(cfg), jax.tree.map(lambda x: x[None], task.support)
    found = adapt_chip(adapt_key, meta, cfg, device, chip, u, supports, times, times.reads)
    xbars, pulses = jax.tree.map(lambda x: x[0], found)
    return refer(refer_key, device, xbars, times.pulses), pulses


def episode(key, meta, cfg, device, make=analog.deploy):
    """Episode of a task that a new chip, its crossbars made by make, meets at tread."""
    chip, u, task, key = scene(key, meta, cfg, device, make)
    chip = network.later(chip, cfg.tread)
    return learn_and_test(key, meta, cfg, device, chip, u, task)


def learn_and_test(key, meta, cfg, device, chip, u, task):
    """Episode of a chip that meets a task at its time 0, with a pool of inputs u [L, n_in]."""
    adapt_key, refer_key, ask_key, day_key = jax.random.split(key, 4)
    after, pulses = learn(adapt_key, refer_key, meta, cfg, device, chip, u, task)
    asked = wait_of(cfg)
    readouts = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), chip.readout, after)
    seen, w = query_chip(ask_key, cfg, device, chip, readouts, u, asked)
    late, w_late = query_chip(day_key, cfg, device, chip, readouts, u, asked + DAY)
    last = jax.tree.map(lambda x: x[-1], readouts)
    measured = {
        "mse": jax.vmap(squared_error, (None, 0, None))(seen.e, w, task.query),
        "mse_day": squared_error(late.e, w_late[-1], task.query),
        "pulses": jnp.sum(pulses),
        **changes(device, chip.readout.xbar, last.xbar),
        **activity_of(seen.rates),
    }
    outputs = seen.e @ w[jnp.array([0, -1])]
    return Episode(measured, task, outputs, chip._replace(readout=last))


def changes(device, before, after):
    """What pulses have done to a readout."""
    moved = analog.weights(device, after.g - before.g)
    return {
        "touched": 100 * jnp.mean(after.t_prog > before.t_prog),
        "dw": jnp.sum(jnp.abs(moved)),
    }


def reported(key, meta, cfg, device):
    """episode without its chip, which would fill the memory of many."""
    return episode(key, meta, cfg, device)._replace(chip=None)


@jax.jit(static_argnums=(0, 1, 3))
def test(experiment, cfg, device, n, key, meta):
    """experiment(key, meta, cfg, device) of n chips, arrays [n, ...]."""

    def one(key, given):
        device, meta = given
        return experiment(key, meta, cfg, device)

    return on_chips(one, jax.random.split(key, n), (device, meta), places_for(n))


def summary(x):
    """Mean of x [n, ...] over axis 0, n, and from 64 on the half-width of its 95 %
    confidence interval."""
    found = {"mean": np.mean(x, 0).tolist(), "n": len(x)}
    if len(x) >= 64:
        found["ci95"] = (1.96 * np.std(x, 0, ddof=1) / len(x) ** 0.5).tolist()
    return found


def baselines(cfg):
    """Squared errors of predicting 0 and of the best function that ignores the task, over
    2¹⁴ tasks."""
    keys = jax.random.split(jax.random.key(0), 2**14)
    queries = jax.jit(jax.vmap(family_of(cfg).task))(keys).query
    zero, best = float(np.mean(queries.y2)), np.mean(queries.y, 0)
    gain = float(np.sum(best**2 / np.maximum(np.mean(queries.share, 0), TINY)[:, None]))
    return {"predicting 0": zero, "best function that ignores the task": zero - gain}


# ---- run folder ----------------------------------------------------------------------------------


class Refused(Exception):
    """What a user can mend, in one line."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(str(message).split()))
        self.status = status  # of the process: 1 where a run has failed


class Run(NamedTuple):
    """A run at one moment, all that it needs to go on."""

    cfg: Config
    devices: dict  # analog.Device by name, in the order of a report
    state: State
    step: int = 0
    rows: tuple = ()  # of metrics.csv, dictionaries
    versions: dict | None = None  # provenance() when what was loaded was saved


def replace(path, data):
    """Put data into the file, which is replaced as a whole: a reader, or a run killed at
    any moment, finds the old or the new. OSError if it cannot be written."""
    if jax.process_index():  # of several hosts the first alone writes
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def write(path, data):
    """Put data into a file that a run cannot do without."""
    try:
        replace(path, data)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror}; the last checkpoint stands"
        raise Refused(what, 1) from None


def write_json(path, content):
    """Write content as JSON."""
    write(path, json.dumps(content, indent=1).encode())


def write_arrays(path, arrays):
    """Write arrays by name."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write(path, file.getvalue())


@cache
def provenance():
    """What a result depends on beside its settings."""
    commit = None
    with suppress(OSError):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("jax", "jaxlib", "numpy", "matplotlib")
    return {
        **{name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "x64": jax.config.jax_enable_x64,
    }


def by_name(state):
    """The arrays of a state by name: hidden0, readout, log_theta, mean_hidden0, …"""
    arrays = {}
    for path, array in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="_")
        arrays[re.sub("meta_|(?<=_)g_|(?<=hidden)_", "", name)] = array
    return arrays


def csv_of(rows):
    """The bytes of a table of dictionaries by column, empty where a row lacks a value."""
    table = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def save(run, folder):
    """config.json, metrics.csv and checkpoint.npz."""
    device, *others = (analog.describe(*item) for item in run.devices.items())
    config = {
        "config": vars(run.cfg),
        "device": [device, *others] if others else device,
        "versions": provenance(),
    }
    write_json(folder / "config.json", config)
    if run.rows:
        write(folder / "metrics.csv", csv_of(run.rows))
    arrays = by_name(run.state) | {"step": run.step, "rows": json.dumps(run.rows)}
    arrays["theta"] = np.exp(arrays["log_theta"])
    write_arrays(folder / "checkpoint.npz", arrays)


def load(folder):
    """The Run in a folder; Refused where it holds none. What it lacks is refused by name, never
    filled in."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described = saved["device"]
        if isinstance(described, dict):
            described = [described]
        devices = dict(map(analog.from_constants, described))
        cfg = Config(**{name: saved["config"][name] for name in vars(Config())})
        exact = dataclasses.replace(cfg, off_noise=0.0)  # shapes need no table of programming
        like = jax.eval_shape(start, exact, lot_of(exact, devices))
        with np.load(folder / "checkpoint.npz") as file:
            leaves = [file[name].reshape(x.shape) for name, x in by_name(like).items()]
            step, rows = int(file["step"]), json.loads(str(file["rows"]))
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Run(cfg, devices, state, step, tuple(rows), saved["versions"])
    except Exception as error:  # a damaged archive fails in many ways
        what = f"{folder} holds no run, a damaged one, or one of other code: {error}"
        raise Refused(what) from None


def runs():
    """The run folders run/1, run/2, … by their number."""
    folders = [x for x in Path("run").glob("*") if x.name.isdecimal()]
    return {int(folder.name): folder for folder in folders}


def latest():
    """The last run folder that holds a run."""
    for _, folder in sorted(runs().items(), reverse=True):
        if (folder / "checkpoint.npz").exists():
            return folder
    raise Refused("there is no run in run/ to resume; name its folder with --run_dir")


def new_folder(run_dir):
    """The folder of a new run: run_dir, or the next of run/1, run/2, …"""
    folder = Path(run_dir or f"run/{max(runs(), default=0) + 1}")
    if (folder / "checkpoint.npz").exists() and not jax.process_index():
        raise Refused(f"{folder} holds a run: go on with --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=bool(run_dir))
    except FileExistsError:  # another run took it a moment ago
        return new_folder(run_dir)
    except OSError as error:
        what = f"cannot make the run folder {folder}: {error.strerror}; try --run_dir"
        raise Refused(what) from None
    return folder


# ---- command line --------------------------------------------------------------------------------

CHOICES = {"tasks": FUNCTIONS, "rule": RULES}
# Settings that may change between a checkpoint and its --resume.
MAY_CHANGE = {"n_iter", "lr_drop", "batch_test", "ttest"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        raise Refused(message)


def add_settings(parser):
    """Give the parser a flag for every setting, and --perf."""
    for field in dataclasses.fields(Config):
        default = "" if field.default is None else f" (default: {field.default})"
        choices = CHOICES.get(field.name, field.metadata["choices"])
        kind = {"type": field.type, "choices": choices}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = field.metadata["help"] + default
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument(
        "--perf",
        dest="device",
        action="store_const",
        const="perf",
        default=argparse.SUPPRESS,
        help="ideal devices: --device perf",
    )


def build_parser():
    """The parser of the command line."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = Parser(allow_abbrev=False, description=about)
    add_settings(parser)
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings that belong together; flags beside it win"
    )
    parser.add_argument("--run_dir", help="folder of the run (default: the next of run/1, …)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the latest run in run/, or that in --run_dir; "
        "once n_iter is reached, only test",
    )
    return parser


def parse(argv):
    """The settings given on a command line, a preset's among them; its --run_dir and --resume."""
    flags = vars(build_parser().parse_args(argv))
    preset, run_dir, resume = map(flags.pop, ("preset", "run_dir", "resume"))
    given = PRESETS.get(preset, {})
    if resume:  # what may change keeps what the run has
        given = {name: x for name, x in given.items() if name not in MAY_CHANGE}
    return given | flags, run_dir, resume


def devices_of(names):
    """The devices, by name, that --device names: a file, or names and files separated by
    commas."""
    parts = [names] if os.path.isfile(names) else [name.strip() for name in names.split(",")]
    try:
        found = [analog.load_device(part) for part in parts]
    except ValueError as error:
        raise Refused(f"--device: {error}") from None
    devices = dict(found)
    if len(devices) < len(found):
        raise Refused("--device: a name stands twice")
    return devices


def with_times(cfg, devices):
    """The settings with the times that were not given: as soon as the samples allow."""
    shown = cfg.task_size * network.N_STEPS * network.DT
    tprog = cfg.tread + shown if cfg.tprog is None else cfg.tprog
    verified = max(device.t_verify for device in devices.values())
    soonest = tprog - cfg.tread + verified
    tlook = max(20.0, soonest) if cfg.tlook is None else cfg.tlook
    last = tprog + (cfg.n_inner - 1) * tlook
    ttest = last + cfg.twait if cfg.ttest is None else cfg.ttest
    needs = {
        f"--tprog must be {cfg.tread + shown:g} s or more, after the samples": (
            tprog >= cfg.tread + shown
        ),
        f"--tlook must be {soonest:g} s or more, after pulses and their read": tlook >= soonest,
        f"--twait must be t_verify, {verified:g} s, or more": cfg.twait >= verified,
        f"--ttest must be {last + verified:g} s or more, after the pulses": (
            ttest >= last + verified
        ),
    }
    refuse(needs)
    return dataclasses.replace(cfg, tprog=tprog, tlook=tlook, ttest=ttest)


def refuse(needs):
    """Refused for the first of the needs {message: whether it is met} that is not met."""
    for message, is_met in needs.items():
        if not is_met:
            raise Refused(message)


def check(cfg, devices):
    """Refuse settings that make no sense."""
    for field in dataclasses.fields(Config):
        value, least = getattr(cfg, field.name), field.metadata["least"]
        if type(value) in (int, float) and not least <= value < 2**31:
            raise Refused(f"--{field.name} must be from {least:g} to 2³¹, not {value}")
    n = len(devices)
    low, high = common_range(devices.values())
    ranges = {name: device.g_max for name, device in devices.items()}
    said = ", ".join(f"{name} has {g_max:g} µS" for name, g_max in ranges.items())
    refuse(
        {
            f"--device: all must agree in g_max, but {said}": len(set(ranges.values())) == 1,
            "--device: no conductance can be programmed on all of them": low < high,
            f"--batch_train must be a multiple of {n} devices": cfg.batch_train % n == 0,
            f"--max_age must be at least tread, {cfg.tread:g} s": cfg.max_age >= cfg.tread,
            f"--max_rest must be at least twait, {cfg.twait:g} s": cfg.max_rest >= cfg.twait,
        }
    )


def configure(flags):
    """Config and devices of a new run."""
    given = Config(**flags)
    devices = devices_of(given.device)
    check(given, devices)
    cfg = with_times(given, devices)
    return dataclasses.replace(cfg, device=",".join(devices)), devices


def resumed(flags, folder):
    """The Run in a folder with the flags that may change; others must be as they were."""
    run = load(folder)
    named = flags.pop("device", None)
    other = {name for name, x in flags.items() if x != getattr(run.cfg, name)}
    if named and devices_of(named) != run.devices:
        other.add("device")
    for name in sorted(other - MAY_CHANGE):
        before = getattr(run.cfg, name)
        raise Refused(
            f"{folder} holds a run with --{name} {before}: leave out that flag or --resume"
        )
    cfg = dataclasses.replace(run.cfg, **flags)
    check(cfg, run.devices)
    cfg = with_times(cfg, run.devices)
    if cfg.n_iter < run.step:
        raise Refused(f"{folder} is past --n_iter {cfg.n_iter}: it is at iteration {run.step}")
    print(f"resuming {folder} after iteration {run.step}")
    now = provenance().items()
    changed = [name for name, x in now if run.versions.get(name) != x]
    if changed:
        print(f"changed since {folder} was saved: {', '.join(changed)}")
    return run._replace(cfg=cfg)


def prepare(argv):
    """The Run to go on from, and its folder."""
    flags, run_dir, resume = parse(argv)
    if resume:
        folder = Path(run_dir or latest())
        return resumed(flags, folder), folder
    cfg, devices = configure(flags)
    run = Run(cfg, devices, start(cfg, lot_of(cfg, devices)))
    return run, new_folder(run_dir)


# ---- main ----------------------------------------------------------------------------------------


def assert_sound(run, measured, folder):
    """Refuse to go on with a run that has diverged; the last checkpoint stands."""
    problem = ""
    for i, rate in enumerate(measured["rates"]):
        if rate == 0:
            problem = f"layer {i} is silent; try a larger --drive"
        if rate * network.DT > 0.95:  # share of the time steps with a spike
            problem = f"layer {i} always fires; try a smaller --drive or a larger --lambda_fr"
    numbers = jax.tree.leaves((measured, run.state))
    if not all(np.isfinite(x).all() for x in numbers):
        problem = "the loss is not finite; try a smaller --lr_out"
    if problem:
        what = f"iteration {run.step}: {problem}; the checkpoint in {folder} is good"
        raise Refused(what, 1)


def row_of(step, meta, measured):
    """The row of metrics.csv for a chunk whose means are measured, its values by column."""
    thresholds = np.exp(np.median(meta.log_theta, (1, 2)))
    return {
        "step": step,
        "loss": float(measured["loss"]),
        "pulses": float(measured["pulses"]),
        "spikes": float(measured["spikes"]),
        **{f"rate{i}_hz": float(x) for i, x in enumerate(measured["rates"])},
        **{f"silent{i}": float(x) for i, x in enumerate(measured["silent"])},
        **{f"theta_{k}": float(x) for k, x in enumerate(thresholds)},
    }


def train(run, folder):
    """The Run after meta-training up to n_iter, saved every CHUNK iterations."""
    cfg, lot = run.cfg, lot_of(run.cfg, run.devices)
    bar = tqdm(total=cfg.n_iter, initial=run.step, unit="it", file=sys.stdout)
    with bar:
        while run.step < cfg.n_iter:
            last = min((run.step // CHUNK + 1) * CHUNK, cfg.n_iter)
            steps = np.arange(run.step, last)
            state, measured = jax.device_get(
                train_chunk(cfg, lot, run.state, stream(cfg, 1), steps)
            )
            row = row_of(last, state.meta, measured)
            run = run._replace(state=state, step=last, rows=(*run.rows, row))
            assert_sound(run, measured, folder)
            save(run, folder)
            bar.set_postfix(loss=row["loss"], refresh=False)
            bar.update(len(steps))
    return run


def meta_test(run):
    """Episodes on each device by its name, and what results.json holds."""
    cfg, meta, key = run.cfg, run.state.meta, stream(run.cfg, 2)
    episodes = {
        name: jax.device_get(test(reported, cfg, device, cfg.batch_test, key, meta))
        for name, device in run.devices.items()
    }
    found = {name: jax.tree.map(summary, x.measured) for name, x in episodes.items()}
    return episodes, {
        "step": run.step,
        "theta": np.exp(meta.log_theta).tolist(),
        "baselines": baselines(cfg),
        "devices": found,
        **next(iter(found.values())),
    }


def report(results):
    """Say the table of results."""
    for what, error in results["baselines"].items():
        print(f"  {'squared error of ' + what:<52}{error:9.3f}")
    for name, found in results["devices"].items():
        n = found["mse"]["n"]
        print(f"{n} tasks, each on its own chip of {name}; mean ± 95 % interval")
        for key, label in MEASURED.items():
            halves = np.ravel(found[key].get("ci95", []))
            for i, mean in enumerate(np.ravel(found[key]["mean"])):
                interval = f" ± {halves[i]:.3f}" if len(halves) else ""
                print(f"  {label.format(i):<52}{mean:9.3f}{interval}")


def suffix_of(name):
    """What the names of a device's figures in img/ end with: nothing for pcm."""
    return "" if name == "pcm" else f"_{name}"


def draw(run, episodes, results, folder):
    """Draw the run's figures into its folder and copy them to img/."""
    first = next(iter(run.devices))
    suffix = suffix_of(first)
    edges = np.linspace(*network.X_RANGE, 2**run.cfg.dac_bits + 1)
    drawn = {"meta_testing": figures.testing(edges, episodes[first], results)}
    if run.rows:
        drawn["meta_training"] = figures.training(run.rows, results["baselines"])
    else:  # that of an earlier run must not stand beside this one's
        Path("img", f"meta_training{suffix}.png").unlink(missing_ok=True)
    note = f"{folder}, iteration {run.step}, seed {run.cfg.seed}, {settings_of(run)}"
    for title, figure in drawn.items():
        image = figures.png(figure, note)
        copy = Path("img", f"{title}{suffix}.png")
        write(folder / f"{title}.png", image)
        try:
            replace(copy, image)
            print(f"figure in {copy}")
        except OSError as error:
            print(f"warning: no copy in {copy}: {error.strerror}")


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def settings_of(run):
    """The settings of a run that are not the default, in words."""
    settings = vars(run.cfg).items()
    return ", ".join(f"{name} {x}" for name, x in settings if x != getattr(Config, name))


def announce(run, folder):
    """Say what is about to run."""
    where = f"{jax.default_backend()} ({jax.device_count()} of JAX's devices"
    print(f"meta-analog on {where}, {cores()} cores)")
    print(f"run folder {folder}, settings: {settings_of(run)}")
    print("Ctrl-C is safe: what was saved stands, and --resume goes on from it")
    print("compiling, which takes up to a minute, comes first")


def execute(run, folder):
    """Meta-train, meta-test, draw and report."""
    announce(run, folder)
    save(run, folder)
    places_for(run.cfg.batch_test)  # a fault of the test must not wait for training
    tested = partial(reported, cfg=run.cfg)
    for device in run.devices.values():
        jax.eval_shape(tested, stream(run.cfg, 2), run.state.meta, device=device)
    began = time.monotonic()
    run = train(run, folder)
    trained = time.monotonic()
    print(f"training took {trained - began:.0f} s; testing {run.cfg.batch_test} chips")
    episodes, results = meta_test(run)
    print(f"testing took {time.monotonic() - trained:.0f} s")
    write_json(folder / "results.json", results)
    for name, found in episodes.items():
        write_arrays(folder / f"chips_{name}.npz", found.measured)
    report(results)
    draw(run, episodes, results, folder)
    print(f"results and figures in {folder}/")


def join_hosts():
    """Join the other hosts, if their coordinator is named."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not jax.distributed.is_initialized():
        print(f"joining the hosts at {address}; without an answer JAX aborts in 300 s")
        # a cluster's manager may know them
        given = map(os.environ.get, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        n_hosts, host = [int(x) if x else None for x in given]
        jax.distributed.initialize(None, n_hosts, host)


def configure_backend():
    """JAX's devices, one per core; compiled programs kept for later runs; other hosts."""
    # a core each: threads of a product would be in each other's way
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    with suppress(RuntimeError):  # already set up by whoever called main
        if "JAX_NUM_CPU_DEVICES" not in os.environ:
            jax.config.update("jax_num_cpu_devices", cores())
    if not jax.config.jax_compilation_cache_dir:
        # by machine, as another may have another processor
        cache = Path(__file__).parent / "__pycache__" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    warnings.filterwarnings("ignore", ".*persistent compilation cache")
    try:
        join_hosts()
        jax.devices()
    except (RuntimeError, ValueError) as error:
        raise Refused(f"JAX cannot start: {error}") from None
    if jax.process_index():  # of several hosts the first alone speaks
        sys.stdout = open(os.devnull, "w")


@contextmanager
def one_line_errors():
    """Ends the process with one line where what is done in it is Refused."""
    try:
        yield
    except Refused as refused:
        print("error:", refused, file=sys.stderr)
        raise SystemExit(refused.status) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = "error: out of memory; try fewer tasks (--batch_train), chips or neurons"
        print(what, file=sys.stderr)
        raise SystemExit(1) from None


def main(argv=None):
    """Run the command line."""
    with one_line_errors():
        configure_backend()
        execute(*prepare(argv))


def end_at_once():
    """Let Ctrl-C, or a reader that has gone, end even a long computation at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True, errors="replace")


if __name__ == "__main__":
    end_at_once()
    main()
