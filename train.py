"""Meta-train a spiking network so that a few noisy pulses teach it a new task, and test it.

    deploy        look: read        pulse(s)            meta-training query     meta-test
    t = 0 s       tread = 100 s     tprog = 101 s       tprog + twait = 151 s   ttest = 251 s
                                    (+ tlook per further look)

Inner loop, on the chip: the delta rule on the readout. Each synapse is pulsed up, down or not at
all, as its gradient passes the synapse's threshold θ. Outer loop, offline: Adam on the conductances
that chips are programmed to and on the thresholds, through reads, drift and pulses (MAML: Finn,
Abbeel, Levine, ICML 2017).

The readout is linear in the traces e [T, L, H] of a read, so the squared error of weights w is

    wᵀ S w − 2 b·w + c,    S = Σ_l p_l mean_t e eᵀ,    b = Σ_l p_l ȳ_l mean_t e,    c = mean of y²,

with the share p_l of the samples whose input has level l, and their mean target ȳ_l. For the
support, the samples that the chip sees, the gradient of this quadratic is the delta rule. With all
levels alike it is the loss of the query.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
MOST_NORM = 3.0  # of an outer gradient, squared error per range of a conductance


# ---- settings ------------------------------------------------------------------------------------

COUNT = 0, 2**31 - 1
SIZE = 1, 2**20
NEURONS = 1, 2**12
DECAY = 1e-4, 1.0  # s
TIME = 1e-3, 1e7  # s; beyond, float32 loses whole seconds


def setting(default, help, bounds=None):
    """A setting of the command line; bounds are its lowest and its highest value."""
    return dataclasses.field(default=default, metadata={"bounds": bounds, "help": help})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, and of the command line."""

    seed: int = setting(0, "seed of every random draw", (0, 2**32 - 1))
    n_iter: int = setting(4000, "meta-iterations", COUNT)
    device: str = setting(
        "pcm",
        f"{', '.join(analog.DEVICES)} or a JSON file; several, by commas, are trained together",
    )
    tasks: str = setting("sinusoids", "family of tasks")
    rule: str = setting("comparators", "how a gradient becomes pulses")
    optimizer: str = setting("adam", "optimizer of the outer loop")
    n_inner: int = setting(
        1, "looks: times that a new task is read and pulsed", (1, 16)
    )
    n_bits: int = setting(
        2,
        "bits of an update: at most 2^(bits−1) − 1 pulses per synapse and look",
        (2, 8),
    )
    grad_thr: float = setting(
        1.0, "thresholds at the start, squared error per unit of weight", (1e-6, 1e6)
    )
    shared_thr: bool = setting(False, "one threshold for all synapses of a look")
    task_size: int = setting(20, "support samples of a task", SIZE)
    batch_train: int = setting(
        256, "tasks per chip and meta-iteration; several devices share them", SIZE
    )
    n_chips: int = setting(1, "chips of each device per meta-iteration", SIZE)
    batch_test: int = setting(
        1024, "tasks of the meta-test, each on a chip of its own", (4, 2**20)
    )
    n_rows: int = setting(
        16,
        "rows of layer 0 for the input, and as many for the bias; a weight is their mean",
        NEURONS,
    )
    n_h0: int = setting(40, "neurons of layer 0", NEURONS)
    n_h1: int = setting(40, "neurons of layer 1", NEURONS)
    dac_bits: int = setting(6, "bits of the input converter", (1, 12))
    tau_mem: float = setting(0.01, "time constant of the membranes, s", DECAY)
    tau_out: float = setting(0.002, "time constant of the readout, s", DECAY)
    gain_out: float = setting(1.0, "what one spike adds to its trace", (1e-3, 1e3))
    compensate: bool = setting(True, "drift compensation of the hidden neurons")
    lr_out: float = setting(
        0.0084,
        "step of the optimizer for conductances, share of the device's range",
        (1e-6, 1.0),
    )
    lr_drop: int = setting(
        None,
        "iteration from which steps are divided by 10 (default: 60 %% of the n_iter at the start)",
        COUNT,
    )
    off_noise: float = setting(
        None,
        "programming error in meta-training, share of g_max "
        "(default: what analog.program leaves)",
        (0, 1),
    )
    target_fr: float = setting(
        200.0, "target firing rate, Hz; without effect at lambda_fr 0", (0, 1000)
    )
    lambda_fr: float = setting(
        0.0,
        "weight of Σ_layers ((target_fr − rate)/100 Hz)² in the outer loss",
        (0, 1e38),
    )
    tread: float = setting(100.0, "first read of a new task, s since deployment", TIME)
    tprog: float = setting(101.0, "its first pulse, s", TIME)
    tlook: float = setting(1.0, "from one look to the next, s", TIME)
    twait: float = setting(50.0, "from tprog to the query in meta-training, s", TIME)
    max_age: float = setting(
        1e5,
        "age of a chip at its first read in meta-training, s: log-uniform, tread to this",
        TIME,
    )
    ttest: float = setting(251.0, "query of the meta-test, s since deployment", TIME)


# Settings that belong together; a flag given beside --preset wins.
WIDE = {"n_h1": 128, "twait": 150.0, "batch_train": 128}
CHIP = {
    "device": "pcm,pcm_history",
    "n_inner": 8,
    "tlook": 20.0,  # a fresh pulse drifts most in its first seconds
    "batch_train": 128,
    "twait": 150.0,
    "max_age": 1e7,
}
PRESETS = {
    # more synapses at the readout, one look
    "wide": {**WIDE, "gain_out": 0.5, "n_iter": 1500},
    # four looks at the error instead of one
    "four_looks": {"n_inner": 4, "gain_out": 0.7, "twait": 150.0},
    # what one would put on a real chip: eight looks, trained on two pulse laws
    "chip": {**CHIP, "gain_out": 0.35, "n_iter": 2000},
    # less error with more neurons and 3 bits
    "chip_wide": {
        **CHIP,
        **WIDE,
        "n_bits": 3,
        "n_h0": 64,
        "gain_out": 0.15,
        "lr_out": 0.0042,
        "n_iter": 1600,
    },
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


# Families of tasks: any function of one input that can be drawn.
TASKS = {"sinusoids": Sinusoid}


class Support(NamedTuple):
    """The samples of a task that the chip sees, summed by the level of their input."""

    share: jax.Array  # [L], p_l
    y: jax.Array  # [L], p_l ȳ_l, which is weighted by the share; that of a query is not


class Query(NamedTuple):
    """A task over the whole input range, all levels alike."""

    y: jax.Array  # [L], ȳ_l
    y2: jax.Array  # mean of y²


class Trial(NamedTuple):
    """A task to be learned."""

    x: jax.Array  # [task_size], inputs of the support
    y: jax.Array  # [task_size], its targets
    support: Support
    query: Query


def support_of(cfg, x, y):
    """Support of the samples x, y [N]."""
    level = network.level(cfg.dac_bits, x)
    at_level = jax.nn.one_hot(level, 2**cfg.dac_bits) / len(x)  # [N, L]
    return Support(jnp.sum(at_level, 0), y @ at_level)


def query_of(cfg, task):
    """Query of a task: several inputs in each level's cell, so that the converter's own
    error counts."""
    x = network.level_centres(max(cfg.dac_bits + 1, 8))
    y = task.target(x).reshape(2**cfg.dac_bits, -1)
    return Query(jnp.mean(y, 1), jnp.mean(y**2))


def draw_trial(key, cfg):
    """Trial of a new task, its support uniform over the converter's span."""
    task_key, x_key = jax.random.split(key)
    task = TASKS[cfg.tasks].draw(task_key)
    low, high = network.X_RANGE
    x = jax.random.uniform(x_key, (cfg.task_size,), minval=low, maxval=high)
    y = task.target(x)
    return Trial(x, y, support_of(cfg, x, y), query_of(cfg, task))


# ---- the quadratic -------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Means over time of the traces of one read."""

    second: jax.Array  # [L, H, H], of e eᵀ
    first: jax.Array  # [L, H], of e


def moments_of(e):
    """Moments of traces e [T, L, H]."""
    second = jnp.einsum("tlh,tlk->lhk", e, e) / len(e)
    return Moments(second, jnp.mean(e, 0))


def residual(moments, support, w):
    """S w − b [H] of weights w [H]: half the gradient of the support's squared error. The
    product with w comes first, which tasks share as long as they share w."""
    s_w = support.share @ (moments.second @ w)
    return s_w - support.y @ moments.first


def squared_error(moments, query, w):
    """wᵀ S w − 2 b·w + c of weights w [H] over the whole range, whose S all tasks share."""
    s_w = jnp.mean(moments.second, 0) @ w
    b = query.y @ moments.first / len(query.y)
    return w @ (s_w - 2 * b) + query.y2


# ---- parallelism: chips over cores, accelerators and hosts; levels over those that share a chip --

P = jax.sharding.PartitionSpec
BATCH = 64  # chips or looks that an accelerator takes at a time


def on_levels(f, w, u):
    """f(w, u) of the levels u [L], whose results all have an axis of levels first. The
    levels are shared out over those of JAX's devices that share a chip, if they can be."""
    mesh = jax.sharding.get_abstract_mesh()
    shared = "levels" in mesh.auto_axes
    if not shared or len(u) % mesh.shape["levels"]:
        return f(w, u)
    return jax.shard_map(
        f,
        in_specs=(P(), P("levels")),
        out_specs=P("levels"),
        axis_names={"levels"},
        check_vma=False,
    )(w, u)


def in_turn(f, x):
    """f of every x, stacked: one at a time on a core, whose caches hold one, else BATCH at a
    time."""
    batch_size = None if jax.default_backend() == "cpu" else BATCH
    return jax.lax.map(f, x, batch_size=batch_size)


def on_chips(f, keys, meta):
    """f(key, meta) of every key's own chip, stacked."""

    def here(keys, meta):
        return in_turn(lambda key: f(key, meta), keys)

    n_chips = math.gcd(len(keys), jax.device_count())
    places = np.array(jax.devices()).reshape(n_chips, -1)
    mesh = jax.sharding.Mesh(places, ("chips", "levels"))
    # Where several devices have chips of their own, no levels are shared. XLA compiles
    # faster when it knows.
    apart = 1 < n_chips == jax.device_count()
    stacked = jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(P("chips"), P()),
        out_specs=P("chips"),
        axis_names={"chips", "levels"} if apart else {"chips"},
        check_vma=False,
    )(keys, meta)
    everywhere = jax.sharding.NamedSharding(mesh, P())
    return jax.lax.with_sharding_constraint(stacked, everywhere)


# ---- reads of a chip -----------------------------------------------------------------------------


def sizes_of(cfg):
    """Neurons of each hidden layer."""
    return cfg.n_h0, cfg.n_h1


def dynamics_of(cfg):
    """Constants of the neurons."""
    lif = network.Lif(math.exp(-network.DT / cfg.tau_mem))
    kappa = math.exp(-network.DT / cfg.tau_out)
    return network.Dynamics((lif,) * len(sizes_of(cfg)), kappa, cfg.gain_out)


class Seen(NamedTuple):
    """What a read of the hidden crossbars shows."""

    moments: Moments
    last: Moments  # of the last time step alone
    rates: jax.Array  # Hz, of each layer


def observe(key, cfg, device, chip, t):
    """Seen of one read of a chip at time t (s)."""
    w = network.read_hidden(key, device, chip, t, cfg.compensate)

    def simulate(w, u):
        activity = network.simulate(dynamics_of(cfg), w, u)
        e = activity.e
        return moments_of(e), moments_of(e[-1:]), network.rates(activity)

    u = network.level_centres(cfg.dac_bits)
    moments, last, rates = on_levels(simulate, w, u)
    return Seen(moments, last, jnp.mean(rates, 0))


# ---- inner loop: a chip adapts to a task ---------------------------------------------------------


class Times(NamedTuple):
    """When things happen, in s since deployment."""

    # [n_inner], of the hidden crossbars; [1] where one read serves all looks. The first is
    # also that of the readout in the first look.
    reads: jax.Array
    pulses: jax.Array  # [n_inner], of the looks
    query: jax.Array


def times_of(cfg, age, wait):
    """Times of an adaptation that starts at age (s), with the query wait (s) after its
    first pulse."""
    first = age + (cfg.tprog - cfg.tread)
    pulses = first + cfg.tlook * jnp.arange(float(cfg.n_inner))
    # the first look reads at age and pulses later; further looks do both at once
    reads = pulses.at[0].set(age)
    return Times(reads, pulses, first + wait)


def times_of_test(cfg, age):
    """Times of an adaptation that starts at age (s), its query as late as in the meta-test."""
    return times_of(cfg, age, cfg.ttest - cfg.tprog)


def most_pulses(cfg):
    """The largest number of pulses of one device in one look."""
    return 2 ** (cfg.n_bits - 1) - 1


def comparators(key, cfg, gradient, theta):
    """Pulses [2, H, 1] on G+ and G−, Σ_j H(∓g − jθ), for the gradient g [H] and thresholds
    θ [H] or [1]."""
    wanted = jnp.stack([-gradient, gradient])
    j = jnp.arange(1.0, most_pulses(cfg) + 1)[:, None, None]
    return jnp.sum(network.spike(wanted - j * theta), 0)[..., None]


# Functions of (key, cfg, gradient, theta), to pulses [2, H, 1].
RULES = {"comparators": comparators}


class Looks(NamedTuple):
    """What the tasks of a chip share: hidden crossbars never change, the readout not before
    a pulse."""

    # of each read of the hidden crossbars, one or n_inner, stacked along axis 0
    moments: Moments
    readout: jax.Array  # [H], weights of the readout in the first look

    def moments_at(self, k):
        """Moments that look k uses; a single read serves all looks."""
        return jax.tree.map(lambda x: x[k % len(x)], self.moments)


def look_at(key, cfg, device, chip, times):
    """Looks of a chip."""
    hidden_key, readout_key = jax.random.split(key)

    def look(inputs):
        key, t = inputs
        return observe(key, cfg, device, chip, t).moments

    keys = jax.random.split(hidden_key, len(times.reads))
    moments = in_turn(look, (keys, times.reads))
    first = network.read_readout(
        readout_key, device, chip.xbars.readout, times.reads[0]
    )
    return Looks(moments, first)


def adapt(key, meta, cfg, device, chip, looks, support, times):
    """The readouts of a chip after 0, 1, … n_inner looks, a list of crossbars, and the
    pulses [2, H, 1] of each."""
    readouts, pulses, w = [chip.xbars.readout], [], looks.readout
    for k, look_key in enumerate(jax.random.split(key, cfg.n_inner)):
        read_key, rule_key, pulse_key = jax.random.split(look_key, 3)
        if k > 0:
            w = network.read_readout(read_key, device, readouts[k], times.pulses[k])
        gradient = 2 * residual(looks.moments_at(k), support, w)
        theta = jnp.exp(meta.log_theta[k])
        counts = RULES[cfg.rule](rule_key, cfg, gradient, theta)
        readout, fired = analog.fire(
            pulse_key, device, readouts[k], counts, most_pulses(cfg), times.pulses[k]
        )
        readouts.append(readout)
        pulses.append(fired)
    return readouts, pulses


class Learned(NamedTuple):
    """What tasks have done to a chip's readout."""

    trial: Trial
    readouts: list  # crossbars [2, H, 1] after 0, 1, … n_inner looks
    pulses: list  # [2, H, 1], of each look
    w: list  # [H], weights of the readouts in a read at the time of the query


def meet(key, meta, cfg, device, make, times, n_tasks):
    """A new chip, whose crossbars are made by make(key, device, conductances), meets
    n_tasks new tasks: Seen at the time of the query, and Learned, the tasks along axis 0."""
    chip_key, look_key, query_key, tasks_key = jax.random.split(key, 4)
    chip = network.assemble(chip_key, device, make, meta.g)
    looks = look_at(look_key, cfg, device, chip, times)

    def task(key):
        trial_key, adapt_key, read_key = jax.random.split(key, 3)
        trial = draw_trial(trial_key, cfg)
        readouts, pulses = adapt(
            adapt_key, meta, cfg, device, chip, looks, trial.support, times
        )
        read = network.read_readout
        w = network.each(read, read_key, device, readouts, times.query)
        return Learned(trial, readouts, pulses, w)

    seen = observe(query_key, cfg, device, chip, times.query)
    return seen, jax.vmap(task)(jax.random.split(tasks_key, n_tasks))


# ---- outer loop ----------------------------------------------------------------------------------


class Meta(NamedTuple):
    """The meta-parameters."""

    g: network.Network  # µS, the conductances that chips are programmed to
    # [n_inner, H], ln of the thresholds; [n_inner, 1] where synapses share one
    log_theta: jax.Array


class State(NamedTuple):
    """What meta-training carries from one iteration to the next."""

    meta: Meta
    memory: NamedTuple  # of the optimizer, one of OPTIMIZERS


def injected(cfg, key, device, g):
    """Crossbar of conductances g (µS) as meta-training makes it: with the error that
    programming leaves, as a normal draw."""
    if cfg.off_noise is None:
        error_std = analog.error_of_programming(device, g)
    else:
        error_std = cfg.off_noise * device.g_max
    return analog.fabricate(key, device, g, error_std)


def meta_loss(key, meta, cfg, device, n_tasks):
    """Outer loss of one chip and n_tasks tasks, and means of what is measured on the
    way."""
    age_key, meet_key = jax.random.split(key)
    age = cfg.tread * (cfg.max_age / cfg.tread) ** jax.random.uniform(age_key)
    times = times_of(cfg, age, cfg.twait)
    # One read of the hidden crossbars serves all looks: their reads differ in noise and a
    # little drift, and eight looks take half the time.
    times = times._replace(reads=times.reads[:1])
    make = partial(injected, cfg)
    seen, learned = meet(meet_key, meta, cfg, device, make, times, n_tasks)
    error = jax.vmap(squared_error, (None, 0, 0))
    loss = jnp.mean(error(seen.moments, learned.trial.query, learned.w[-1]))
    measured = {
        "loss": loss,
        "rates": seen.rates,
        "pulses": jnp.sum(jnp.stack(learned.pulses)) / n_tasks,
    }
    penalty = jnp.sum(((cfg.target_fr - seen.rates) / 100) ** 2)
    return loss + cfg.lambda_fr * penalty, measured


def clipped(gradient, device):
    """The gradient, given per µS and per ln θ, as one per range of the device and per ln θ,
    shortened to MOST_NORM. Through several looks it explodes in the first iterations, and
    Adam would remember that for a thousand more."""
    g = jax.tree.map(lambda x: x * analog.span(device), gradient.g)
    gradient = gradient._replace(g=g)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda x: x * jnp.minimum(1.0, MOST_NORM / norm), gradient)


class Adam(NamedTuple):
    """The optimizer of Kingma and Ba, ICLR 2015: its memory, trees like the
    meta-parameters."""

    mean: Meta  # of the gradients
    square: Meta  # mean of their squares

    @staticmethod
    def start(meta):
        """The memory before the first step."""
        zero = jax.tree.map(jnp.zeros_like, meta)
        return Adam(zero, zero)

    def move(self, step, gradient):
        """Direction like meta, and the memory after this step. A direction of 1 is a step
        of lr_out of the range, or of LR_THETA of ln θ."""
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.mean, gradient)
        square = jax.tree.map(
            lambda v, g: 0.999 * v + 0.001 * g**2, self.square, gradient
        )
        n = jnp.float32(step) + 1

        def direction(m, v):
            return -m / (1 - 0.9**n) / (jnp.sqrt(v / (1 - 0.999**n)) + 1e-8)

        return jax.tree.map(direction, mean, square), Adam(mean, square)

    @staticmethod
    def schedule(cfg, step):
        """Factor of the step sizes: a tenth from lr_drop on."""
        return jnp.where(step < cfg.lr_drop, 1.0, 0.1)


OPTIMIZERS = {"adam": Adam}


def common_range(devices):
    """The lowest and the highest conductance (µS) that all devices can be programmed to."""
    low = max(device.g_min for device in devices)
    high = min(device.g_prog for device in devices)
    return low, high


def project(devices, meta):
    """Meta-parameters whose conductances all of the devices can be programmed to."""
    low, high = common_range(devices)
    return meta._replace(g=jax.tree.map(lambda g: jnp.clip(g, low, high), meta.g))


@jax.jit(static_argnums=(0, 1))
def start(cfg, devices):
    """State before training."""
    sizes = sizes_of(cfg)
    shape = cfg.n_inner, 1 if cfg.shared_thr else sizes[-1]
    log_theta = jnp.full(shape, math.log(cfg.grad_thr), float)
    g = network.start(stream(cfg, 0), devices[0], sizes, cfg.n_rows)
    meta = project(devices, Meta(g, log_theta))
    return State(meta, OPTIMIZERS[cfg.optimizer].start(meta))


def gradient_of(cfg, devices, meta, key):
    """Gradient of the outer loss and what is measured, means over n_chips chips of each
    device."""
    found = []
    for device, device_key in zip(
        devices, jax.random.split(key, len(devices)), strict=True
    ):
        loss = partial(
            meta_loss, cfg=cfg, device=device, n_tasks=cfg.batch_train // len(devices)
        )
        chip_keys = jax.random.split(device_key, cfg.n_chips)
        found.append(on_chips(jax.grad(loss, 1, has_aux=True), chip_keys, meta))
    return jax.tree.map(lambda *x: jnp.mean(jnp.concatenate(x), 0), *found)


def update(cfg, devices, state, gradient, step):
    """State after one step of the optimizer."""
    gradient = clipped(gradient, devices[0])
    direction, memory = state.memory.move(step, gradient)
    factor = memory.schedule(cfg, step)
    size = factor * cfg.lr_out * analog.span(devices[0])
    g = jax.tree.map(lambda g, d: g + size * d, state.meta.g, direction.g)
    log_theta = state.meta.log_theta + factor * LR_THETA * direction.log_theta
    return State(project(devices, Meta(g, log_theta)), memory)


@jax.jit(static_argnums=(0, 1))
def train_chunk(cfg, devices, state, key, steps):
    """State after the meta-iterations steps [n], and means of what was measured in them."""

    def iterate(state, step):
        step_key = jax.random.fold_in(key, step)
        gradient, measured = gradient_of(cfg, devices, state.meta, step_key)
        return update(cfg, devices, state, gradient, step), measured

    state, measured = jax.lax.scan(iterate, state, steps)
    return state, jax.tree.map(lambda x: jnp.mean(x, 0), measured)


# ---- meta-test -----------------------------------------------------------------------------------


# What a meta-test measures: name, and label with the unit and the number of an entry.
MEASURED = {
    "mse": "squared error after look {}",
    "mse_last": "squared error at the last time step after look {}",
    "pulses": "pulses of an adaptation",
    "touched": "readout devices touched (%)",
    "dw": "Σ|ΔW| over the synapses",
    "rates": "firing rate (Hz) of layer {}",
}


class Episode(NamedTuple):
    """One task on one freshly deployed chip."""

    measured: dict  # by the names of MEASURED
    trial: Trial
    # [3, L], over the levels: task, mean output before and after adaptation
    curves: jax.Array


def episode(key, meta, cfg, device, make=analog.deploy):
    """Episode of a task that a new chip, its crossbars made by make, meets at tread."""
    times = times_of_test(cfg, cfg.tread)
    seen, learned = meet(key, meta, cfg, device, make, times, 1)
    trial, readouts, pulses, w = jax.tree.map(lambda x: x[0], learned)
    error = jax.vmap(squared_error, (None, None, 0))
    moved = analog.weights(device, readouts[-1].g - readouts[0].g)
    measured = {
        "mse": error(seen.moments, trial.query, jnp.stack(w)),
        "mse_last": error(seen.last, trial.query, jnp.stack(w)),
        "pulses": jnp.sum(jnp.stack(pulses)),
        "touched": 100 * jnp.mean(readouts[-1].t_prog > readouts[0].t_prog),
        "dw": jnp.sum(jnp.abs(moved)),
        "rates": seen.rates,
    }
    before, after = seen.moments.first @ w[0], seen.moments.first @ w[-1]
    return Episode(measured, trial, jnp.stack([trial.query.y, before, after]))


@jax.jit(static_argnums=(0, 1, 2, 3))
def test(experiment, cfg, device, n, key, meta):
    """experiment(key, meta, cfg, device) of n chips, arrays [n, ...]."""
    one = partial(experiment, cfg=cfg, device=device)
    return on_chips(one, jax.random.split(key, n), meta)


def summary(x):
    """Mean of x [n, ...] over axis 0, n, and from 64 on the half-width of its 95 %
    confidence interval."""
    found = {"mean": np.mean(x, 0).tolist(), "n": len(x)}
    if len(x) >= 64:
        found["ci95"] = (1.96 * np.std(x, 0, ddof=1) / len(x) ** 0.5).tolist()
    return found


def yardsticks(cfg):
    """Squared errors of predicting 0 and of the best function that ignores the task, over
    2¹⁴ tasks."""

    def draw(key):
        return query_of(cfg, TASKS[cfg.tasks].draw(key))

    keys = jax.random.split(jax.random.key(0), 2**14)
    queries = jax.jit(jax.vmap(draw))(keys)
    zero = float(np.mean(queries.y2))
    best = np.mean(queries.y, 0)
    gain = float(np.mean(best**2))
    return {"predicting 0": zero, "best function that ignores the task": zero - gain}


# ---- run folder ----------------------------------------------------------------------------------


def stop(message, status=2):
    """End the process with one line that says what the user can mend."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


class Run(NamedTuple):
    """A run at one moment, all that it needs to go on."""

    cfg: Config
    devices: tuple  # of analog.Device
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
        stop(f"cannot write {path}: {error.strerror}; the last checkpoint stands", 1)


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
    """The arrays of a state by name: hidden0, readout, log_theta, memory_mean_hidden0, …"""
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
    device, *others = map(analog.describe, run.devices)
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
    """The Run in a folder. What it lacks is refused by name, never filled in."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described = saved["device"]
        if isinstance(described, dict):
            described = [described]
        devices = tuple(map(analog.from_constants, described))
        cfg = Config(**{name: saved["config"][name] for name in vars(Config())})
        like = jax.eval_shape(lambda: start(cfg, devices))
        with np.load(folder / "checkpoint.npz") as file:
            leaves = [file[name].reshape(x.shape) for name, x in by_name(like).items()]
            step, rows = int(file["step"]), json.loads(str(file["rows"]))
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Run(cfg, devices, state, step, tuple(rows), saved["versions"])
    except Exception as error:  # a damaged archive fails in many ways
        stop(f"{folder} holds no run, a damaged one, or one of other code: {error}")


def runs_of(name):
    """The run folders NAME, NAME.1, NAME.2, … by their number."""
    pattern = re.escape(name) + r"(\.\d+)?"
    folders = [x for x in Path("run").glob("*") if re.fullmatch(pattern, x.name)]
    return {int(folder.suffix[1:] or 0): folder for folder in folders}


def latest(name):
    """The last run folder of that name that holds a run."""
    for _, folder in sorted(runs_of(name).items(), reverse=True):
        if (folder / "checkpoint.npz").exists():
            return folder
    stop(f"there is no run folder run/{name} to resume; name it with --run_dir")


def new_folder(name, run_dir):
    """The folder of a new run: run_dir, or the next free one of NAME, NAME.1, NAME.2, …"""
    number = max(runs_of(name), default=-1) + 1
    folder = Path(run_dir or f"run/{name}.{number}".removesuffix(".0"))
    if (folder / "checkpoint.npz").exists() and not jax.process_index():
        stop(f"{folder} holds a run: go on with --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=bool(run_dir))
    except OSError as error:
        stop(f"cannot make the run folder {folder}: {error.strerror}; try --run_dir")
    return folder


# ---- command line --------------------------------------------------------------------------------

CHOICES = {"tasks": TASKS, "rule": RULES, "optimizer": OPTIMIZERS}
# Settings that may change between a checkpoint and its --resume.
MAY_CHANGE = {"n_iter", "lr_drop", "batch_test", "ttest"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        stop(message)


def add_settings(parser):
    """Give the parser a flag for every setting, and --perf."""
    for field in dataclasses.fields(Config):
        default = "" if field.default is None else f" (default: {field.default})"
        kind = {"type": field.type, "choices": CHOICES.get(field.name)}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = field.metadata["help"] + default
        parser.add_argument(
            f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind
        )
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
        "--preset",
        choices=PRESETS,
        help="settings that belong together; flags beside it win",
    )
    parser.add_argument(
        "--run_dir", help="folder of the run (default: the next run/NAME.N)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the latest run of this name, or that in --run_dir; "
        "once n_iter is reached, only test",
    )
    return parser


def parse(argv):
    """The settings given on a command line, a preset's among them; and its --preset,
    --run_dir and --resume."""
    flags = vars(build_parser().parse_args(argv))
    preset, run_dir, resume = map(flags.pop, ("preset", "run_dir", "resume"))
    if preset and not resume:
        flags = PRESETS[preset] | flags
    return flags, preset, run_dir, resume


def devices_of(names):
    """The devices that --device names, by commas."""
    try:
        return tuple(analog.load_device(name.strip()) for name in names.split(","))
    except ValueError as error:
        stop(f"--device: {error}")


def check(cfg, devices):
    """Refuse settings that make no sense."""
    for field in dataclasses.fields(Config):
        value, bounds = getattr(cfg, field.name), field.metadata["bounds"]
        if bounds and value is not None and not bounds[0] <= value <= bounds[1]:
            stop(f"--{field.name} must be from {bounds[0]} to {bounds[1]}, not {value}")
    n, learning = len(devices), (cfg.n_inner - 1) * cfg.tlook
    last, soonest = cfg.tprog + learning, learning + analog.MIN_AGE
    low, high = common_range(devices)
    g_max = ", ".join(f"{x.name} has {x.g_max:g} µS" for x in devices)
    needs = {
        "--device: a name stands twice": len({x.name for x in devices}) == n,
        f"--device: all must agree in g_max, but {g_max}": len({x.g_max for x in devices}) == 1,
        "--device: no conductance can be programmed on all of them": low < high,
        f"--batch_train must be a multiple of {n} devices": cfg.batch_train % n == 0,
        f"--max_age must be at least tread, {cfg.tread:g} s": cfg.max_age >= cfg.tread,
        f"--tprog must be after tread, {cfg.tread:g} s": cfg.tprog > cfg.tread,
        f"--twait must be {soonest:g} s, tlook a look, or more": cfg.twait >= soonest,
        f"--ttest must be after the last pulse, {last:g} s": cfg.ttest > last,
    }
    for message, is_met in needs.items():
        if not is_met:
            stop(message)


def configure(flags):
    """Config and devices of a new run."""
    given = Config(**flags)
    devices = devices_of(given.device)
    names = ",".join(device.name for device in devices)
    lr_drop = given.n_iter * 6 // 10
    cfg = Config(**{"lr_drop": lr_drop, **flags, "device": names})
    check(cfg, devices)
    return cfg, devices


def resumed(flags, folder):
    """The Run in a folder with the flags that may change; others must be as they were."""
    run = load(folder)
    named = flags.pop("device", None)
    other = {name for name, x in flags.items() if x != getattr(run.cfg, name)}
    if named and devices_of(named) != run.devices:
        other.add("device")
    for name in sorted(other - MAY_CHANGE):
        before = getattr(run.cfg, name)
        stop(
            f"{folder} holds a run with --{name} {before}: leave out that flag or --resume"
        )
    cfg = dataclasses.replace(run.cfg, **flags)
    check(cfg, run.devices)
    if cfg.n_iter < run.step:
        stop(f"{folder} is past --n_iter {cfg.n_iter}: it is at iteration {run.step}")
    print(f"resuming {folder} after iteration {run.step}")
    now = provenance().items()
    changed = [name for name, x in now if run.versions.get(name) != x]
    if changed:
        print(f"changed since {folder} was saved: {', '.join(changed)}")
    return run._replace(cfg=cfg)


def prepare(argv):
    """The Run to go on from, and its folder."""
    flags, preset, run_dir, resume = parse(argv)
    devices = devices_of(Config(**flags).device)
    name = preset or "+".join(device.name for device in devices)
    if resume:
        folder = Path(run_dir or latest(name))
        return resumed(flags, folder), folder
    cfg, devices = configure(flags)
    run = Run(cfg, devices, start(cfg, devices))
    return run, new_folder(name, run_dir)


# ---- main ----------------------------------------------------------------------------------------


def stream(cfg, index):
    """Key of the start (0), of meta-training (1), of the meta-test (2); studies go on from
    3."""
    return jax.random.fold_in(jax.random.key(cfg.seed), index)


def assert_sound(run, measured, folder):
    """Stop a run that has diverged; the last checkpoint stands."""
    problem = ""
    for i, rate in enumerate(measured["rates"]):
        if not 0 < rate * network.DT < 0.95:  # share of the time steps with a spike
            problem = f"layer {i} is silent or always fires; try --lambda_fr 0.01"
    numbers = jax.tree.leaves((measured, run.state))
    if not all(np.isfinite(x).all() for x in numbers):
        problem = "the loss is not finite; try a smaller --lr_out"
    if problem:
        stop(f"iteration {run.step}: {problem}; the checkpoint in {folder} is good", 1)


def row_of(step, meta, measured):
    """The row of metrics.csv for a chunk whose means are measured, its values by column."""
    thresholds = np.exp(np.median(meta.log_theta, 1))
    return {
        "step": step,
        "loss": float(measured["loss"]),
        "pulses": float(measured["pulses"]),
        **{f"rate{i}_hz": float(x) for i, x in enumerate(measured["rates"])},
        **{f"theta_{k}": float(x) for k, x in enumerate(thresholds)},
    }


def train(run, folder):
    """The Run after meta-training up to n_iter, saved every CHUNK iterations."""
    cfg = run.cfg
    bar = tqdm(total=cfg.n_iter, initial=run.step, unit="it", file=sys.stdout)
    with bar:
        while run.step < cfg.n_iter:
            last = min((run.step // CHUNK + 1) * CHUNK, cfg.n_iter)
            steps = np.arange(run.step, last)
            state, measured = jax.device_get(
                train_chunk(cfg, run.devices, run.state, stream(cfg, 1), steps)
            )
            row = row_of(last, state.meta, measured)
            run = run._replace(state=state, step=last, rows=(*run.rows, row))
            assert_sound(run, measured, folder)
            save(run, folder)
            bar.set_postfix(loss=row["loss"], refresh=False)
            bar.update(len(steps))
    return run


def compile_tests(run):
    """The meta-tests of the devices by name, compiled functions of (key, meta)."""
    cfg, meta, key = run.cfg, run.state.meta, stream(run.cfg, 2)
    tests = {}
    for device in run.devices:
        lowered = test.lower(episode, cfg, device, cfg.batch_test, key, meta)
        tests[device.name] = lowered.compile()
    return tests


def meta_test(run, tests):
    """Episodes on each device by its name, and what results.json holds; tests are those
    of compile_tests."""
    meta, key = run.state.meta, stream(run.cfg, 2)
    episodes = {name: jax.device_get(test(key, meta)) for name, test in tests.items()}
    found = {name: jax.tree.map(summary, x.measured) for name, x in episodes.items()}
    return episodes, {
        "step": run.step,
        "theta": np.exp(meta.log_theta).tolist(),
        "yardsticks": yardsticks(run.cfg),
        "devices": found,
        **found[run.devices[0].name],
    }


def report(results):
    """Say the table of results."""
    for what, error in results["yardsticks"].items():
        print(f"  {'squared error of ' + what:<52}{error:9.3f}")
    for name, found in results["devices"].items():
        n = found["mse"]["n"]
        print(f"{n} tasks, each on its own chip of {name}; mean ± 95 % interval")
        for key, label in MEASURED.items():
            halves = np.ravel(found[key].get("ci95", []))
            for i, mean in enumerate(np.ravel(found[key]["mean"])):
                interval = f" ± {halves[i]:.3f}" if len(halves) else ""
                print(f"  {label.format(i):<52}{mean:9.3f}{interval}")


def suffix_of(device):
    """What the names of a device's figures in img/ end with: nothing for pcm."""
    return "" if device.name == "pcm" else f"_{device.name}"


def draw(run, episodes, results, folder):
    """Draw the run's figures into its folder and copy them to img/."""
    device = run.devices[0]
    suffix = suffix_of(device)
    edges = np.linspace(*network.X_RANGE, 2**run.cfg.dac_bits + 1)
    drawn = {"meta_testing": figures.testing(edges, episodes[device.name], results)}
    if run.rows:
        drawn["meta_training"] = figures.training(run.rows, results["yardsticks"])
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
    return ", ".join(
        f"{name} {x}" for name, x in settings if x != getattr(Config, name)
    )


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
    began = time.monotonic()
    # while training compiles and runs, as one core has time to spare
    compiled = ThreadPoolExecutor().submit(compile_tests, run)
    run = train(run, folder)
    trained = time.monotonic()
    print(f"training took {trained - began:.0f} s; testing {run.cfg.batch_test} chips")
    episodes, results = meta_test(run, compiled.result())
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
    """JAX's devices, one per core, 2, 4, 8, … of them so that they share levels out; compiled
    programs kept for later runs; other hosts."""
    # a core each: threads of a product would be in each other's way
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    with suppress(RuntimeError):  # already set up by whoever called main
        if "JAX_NUM_CPU_DEVICES" not in os.environ:
            jax.config.update("jax_num_cpu_devices", 2 ** int(math.log2(cores())))
    if not jax.config.jax_compilation_cache_dir:
        # by machine, as another may have another processor
        cache = Path(__file__).parent / "__pycache__" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    warnings.filterwarnings("ignore", ".*persistent compilation cache")
    try:
        join_hosts()
        jax.devices()
    except (RuntimeError, ValueError) as error:
        stop(f"JAX cannot start: {error}")
    if jax.process_index():  # of several hosts the first alone speaks
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    """Run the command line."""
    try:
        configure_backend()
        execute(*prepare(argv))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        stop("out of memory; try fewer tasks (--batch_train), chips or neurons", 1)


def end_at_once():
    """Let Ctrl-C, or a reader that has gone, end even a long computation at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True, errors="replace")


if __name__ == "__main__":
    end_at_once()
    main()
