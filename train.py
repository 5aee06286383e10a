"""Meta-train a spiking network so that a few noisy pulses teach it a new task, and test it.

    deploy a chip, whose programming ends at its time 0
    at tread and every tlook after, n_inner times:            a look
        show the samples of the task, read all crossbars
        g = gradient of the samples' squared error by the readout's weights (the delta rule)
        fire pulses where g passes thresholds θ
    at ttest: the error over all inputs                       the query

    meta-training: draw chips, tasks, an age and a wait before the query; move the conductances
        that chips are programmed to, and θ, against the gradient of the query's error
        through reads, drift and pulses (MAML: Finn, Abbeel, Levine, ICML 2017), by Adam

Within an adaptation, times count from its first read.
"""

import argparse
import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable
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
from img import energy, figures

HERE = Path(__file__).resolve().parent
CHUNK = 200  # meta-iterations between two checkpoints and rows of metrics.csv
LR_THETA = 0.1  # step of the optimizer for ln θ
LR_SCALE = 0.03  # the same for log_scale
MAX_GRAD_NORM = 0.3  # largest norm of the outer gradient, with G in units of its range
MIN_RATE = 10.0  # Hz, mean over the inputs: neurons below it are penalised
SILENT = 0.1  # weight of that penalty
DAY = 86400.0  # s
TINY = 1e-20  # below any gradient


# ---- errors that a user can fix ------------------------------------------------------------------


class Refused(Exception):
    """An error that the user can fix; its message is one line."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(str(message).split()))
        self.status = status  # of the process: 1 where a run has failed


def require(is_met, message, status=2):
    """Refused with the message unless is_met."""
    if not is_met:
        raise Refused(message, status)


# ---- settings ------------------------------------------------------------------------------------


def setting(default, help, least=0.0, most=2.0**31):
    """A setting of the command line; least and most are its lowest and highest value."""
    return dataclasses.field(
        default=default, metadata={"help": help, "range": (least, most)}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, and of the command line."""

    seed: int = setting(0, "seed of every random draw")
    n_iter: int = setting(1000, "meta-iterations")
    device: str = setting(
        "pcm,pcm_history",
        f"{', '.join(analog.DEVICES)} or JSON files; several, by commas, are trained together",
    )
    tasks: str = setting(
        "sinusoids",
        "sinusoids, lines, or an .npz file of samples x [N, …] of classes y [N] to tell apart",
    )
    rule: str = setting("comparators", "how a gradient becomes pulses, one of RULES")
    circuit: str = setting("ideal", "what circuits around the devices do, one of CIRCUITS")
    n_inner: int = setting(8, "looks: times that a new task is read and pulsed", 1)
    n_bits: int = setting(
        2,
        "bits of an update, 2 to 8: at most 2^(bits−1) − 1 pulses per device and look",
        2,
        8,
    )
    grad_thr: float = setting(
        0.1, "thresholds at the start, share of the rms of the first look's gradient", 1e-6
    )
    shared_thr: bool = setting(False, "one threshold for all synapses of a look")
    task_size: int = setting(20, "support samples of a task", 1)
    n_way: int = setting(5, "classes of a task, task_size / n_way samples of each", 2)
    batch_train: int = setting(
        128,
        "tasks per meta-iteration (times n_chips), divided evenly among devices",
        1,
    )
    n_chips: int = setting(1, "chips of each device per meta-iteration", 1)
    batch_test: int = setting(512, "tasks of the meta-test, each on a chip of its own", 1)
    n_rows: int = setting(
        None,
        "rows of layer 0 for each input and for the bias; a weight is their mean "
        "(default: 16, or 1 where there are more than 4 inputs)",
        1,
    )
    n_h0: int = setting(64, "neurons of layer 0", 1)
    n_h1: int = setting(128, "neurons of layer 1", 1)
    dac_bits: int = setting(6, "bits of the input converter, 1 to 12", 1, 12)
    drive: float = setting(
        0.2, "what a weight of 1 adds to a membrane in a step, at an input of 1", 1e-6
    )
    n_steps: int = setting(50, "time steps T of a presentation, 1 ms each", 1)
    tau_mem: float = setting(0.03, "time constant of the membranes, s", 1e-4)
    tau_out: float = setting(0.1, "time constant of the traces, s", 1e-4)
    gain_out: float = setting(0.06, "what one spike adds to its trace", 1e-6)
    compensate: bool = setting(
        True, "drift compensation of the hidden crossbars, and of the readout at the query"
    )
    lr_out: float = setting(
        0.0063, "step of the optimizer for conductances, share of the device's range", 1e-6
    )
    lr_drop: int = setting(
        500,
        "iteration at which steps are divided by 10; from there they fall as 1/iteration",
        1,
    )
    off_noise: float = setting(
        None,
        "std of the programming error in meta-training, share of g_max "
        "(default: what analog.program leaves)",
    )
    target_fr: float = setting(
        50.0, "target of each layer's mean firing rate, Hz; without effect at lambda_fr 0"
    )
    lambda_fr: float = setting(0.15, "weight of the penalty of rates in the outer loss")
    tread: float = setting(
        100.0, "first read of a new task, s since a chip was programmed", 1.0
    )
    tprog: float = setting(
        None,
        "first pulse of a new task, s since a chip was programmed "
        "(default: as soon as the samples have been shown)",
        1.0,
    )
    tlook: float = setting(
        None,
        "from one look to the next, s (default: 20, or longer if the samples take longer)",
        1e-3,
    )
    twait: float = setting(10.0, "shortest wait from the last pulse to the query, s", 1.0)
    max_rest: float = setting(
        1e6, "longest wait to the query in meta-training, s: log-uniform from twait", 1.0
    )
    max_age: float = setting(
        1e7,
        "greatest age at the first read in meta-training, s: log-uniform from tread",
        1.0,
    )
    ttest: float = setting(
        None,
        "query of the meta-test, s since a chip was programmed (default: after twait)",
        1.0,
    )


# Settings that belong together; a flag given beside --preset wins.
PRESETS = {
    # the classic single step
    "one_look": {"device": "pcm", "n_inner": 1, "gain_out": 0.12, "n_iter": 1500},
    # the least error of ten minutes on one core
    "wide": {"n_inner": 12, "dac_bits": 7, "n_iter": 3000, "lr_drop": 700},
    # few-shot classification of the samples of a file
    "few_shot": {
        "tasks": "tests/omniglot_small.npz",
        "task_size": 25,
        "n_inner": 4,
        "n_h0": 128,
        "drive": 0.4,
        "n_steps": 100,
        "gain_out": 0.01,
        "grad_thr": 0.05,
        "n_iter": 4000,
        "lr_drop": 2000,
    },
}


# ---- tasks ---------------------------------------------------------------------------------------

# A family of tasks has n_in inputs and n_out outputs, and
#   exchangeable       whether its outputs stand for classes that are drawn at random
#   side               of the square images that its inputs are, else 0
#   pool(key)          inputs [L, n_in] that a chip is shown in an episode, once for all tasks
#   task(key, u)       a Task on such a pool
#   loss(y, query, s)  the outer loss of outputs y [tasks, L, n_out]; s is Meta's log_scale
#   measures(y, query) what is reported of outputs y [L, n_out], by name
#   baselines()        errors or accuracies that need no chip, by label
#   encode(x), targets(y)  a user's samples as inputs [N, n_in] and targets [N, n_out]


class Samples(NamedTuple):
    """Samples of a task, summed over those with the same input; a pool has L inputs."""

    share: jax.Array  # [L], p_l, share of the samples that have input l
    y: jax.Array  # [L, n_out], p_l ȳ_l, with the mean target ȳ_l of these
    y2: jax.Array  # mean over the samples of y², summed over outputs


class Task(NamedTuple):
    """A task to be learned."""

    support: Samples  # what the chip sees
    query: Samples  # what it is asked


def samples_of(counts, y):
    """Samples of a task with counts [L] of them at each input of a pool, whose targets are
    y [L, n_out]."""
    share = counts / jnp.sum(counts)
    weighted = share[:, None] * y
    return Samples(share, weighted, jnp.sum(weighted * y))


def squared_error(y, samples):
    """Squared error of outputs y [L, n_out], mean over the samples and summed over outputs."""
    return jnp.sum(samples.share[:, None] * y**2 - 2 * samples.y * y) + samples.y2


def finite(name, values, shape):
    """The values as an array [N, *shape] of finite numbers; Refused where they are not."""
    values = np.asarray(values)
    is_finite = values.dtype.kind in "buif" and np.isfinite(values).all()
    require(is_finite, f"{name} must hold finite numbers")
    is_shaped = values.ndim and values.shape[1:] == shape and values.size
    require(is_shaped, f"{name} must have the shape [N{''.join(f', {n}' for n in shape)}]")
    return values


def static():
    """A field of a family that is part of what is compiled."""
    return dataclasses.field(metadata={"static": True})


class Sinusoid(NamedTuple):
    """The function A sin(x + φ), A ~ U[0.1, 5] and φ ~ U[0, π]."""

    amplitude: jax.Array  # A
    phase: jax.Array  # φ

    @staticmethod
    def draw(key):
        """A function."""
        low, high = np.array([0.1, 0.0]), np.array([5.0, np.pi])
        return Sinusoid(*jax.random.uniform(key, (2,), minval=low, maxval=high))

    def target(self, x):
        """Targets at inputs x, of x's shape."""
        return self.amplitude * jnp.sin(x + self.phase)


class Line(NamedTuple):
    """The function a x + b, clipped to [−3, 3], a ~ U[−1, 1] and b ~ U[−2, 2]."""

    slope: jax.Array  # a
    offset: jax.Array  # b

    @staticmethod
    def draw(key):
        """A function."""
        high = np.array([1.0, 2.0])
        return Line(*jax.random.uniform(key, (2,), minval=-high, maxval=high))

    def target(self, x):
        """Targets at inputs x, of x's shape."""
        return jnp.clip(self.slope * x + self.offset, -3.0, 3.0)


# Functions of one input that can be drawn.
FUNCTIONS = {"sinusoids": Sinusoid, "lines": Line}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regression:
    """A family of tasks y = f(x), x through the input converter. The pool has all its levels, and
    the query the whole range, all levels alike."""

    function: type = static()  # one of FUNCTIONS
    dac_bits: int = static()
    task_size: int = static()
    n_in = n_out = 1
    exchangeable = False
    side = 0  # no images

    def pool(self, key):
        return network.level_centres(self.dac_bits)[:, None]

    def task(self, key, u):
        function_key, x_key = jax.random.split(key)
        function = self.function.draw(function_key)
        low, high = network.X_RANGE
        x = jax.random.uniform(x_key, (self.task_size,), minval=low, maxval=high)
        # Several inputs in each level's cell, so that the converter's own error counts.
        asked = network.level_centres(max(self.dac_bits + 1, 8))
        return Task(*(self.sum_up(x, function.target(x)) for x in (x, asked)))

    def sum_up(self, x, y):
        """Samples of the inputs x and targets y [N]."""
        level = network.level(self.dac_bits, x)
        at_level = jax.nn.one_hot(level, 2**self.dac_bits) / len(x)  # [N, L]
        return Samples(jnp.sum(at_level, 0), (y @ at_level)[:, None], jnp.mean(y**2))

    def loss(self, y, query, log_scale):
        """The squared error, as a share of that of predicting 0."""
        return jnp.mean(jax.vmap(squared_error)(y, query)) / jnp.mean(query.y2)

    def measures(self, y, query):
        return {"mse": squared_error(y, query)}

    def baselines(self):
        """Squared errors of predicting 0 and of the best function that ignores the task, over
        2¹⁴ tasks."""
        keys = jax.random.split(jax.random.key(0), 2**14)
        queries = jax.jit(jax.vmap(lambda key: self.task(key, None).query))(keys)
        zero, best = float(np.mean(queries.y2)), np.mean(queries.y, 0)
        gain = float(np.sum(best**2 / np.maximum(np.mean(queries.share, 0), TINY)[:, None]))
        return {
            "squared error of predicting 0": zero,
            "squared error of the best function that ignores the task": zero - gain,
        }

    def encode(self, x):
        x = finite("x", x, ())[:, None]
        low, high = network.X_RANGE
        require(low <= x.min() and x.max() <= high, f"x must be from {low:g} to {high:g}")
        return network.level_centres(self.dac_bits)[network.level(self.dac_bits, x)]

    def targets(self, y):
        return jnp.asarray(finite("y", y, ())[:, None], float)


def shuffled(key, n):
    """The numbers below n in random order, [n]."""
    return jnp.argsort(jax.random.uniform(key, (n,)))


WARP = 0.2  # of an image: rotation, scale and shear
WARP_SHIFT = 0.09  # share of its side
N_QUERY_TRAIN, N_QUERY_TEST = 3, 15  # samples of a class that a pool has beside the shots


def warp(key, image):
    """The image [side, side] shifted, rotated, scaled and sheared at random."""
    matrix_key, shift_key = jax.random.split(key)
    side = len(image)
    middle = (side - 1) / 2
    offset = jnp.indices((side, side)).astype(float) - middle
    matrix = jnp.eye(2) + jax.random.uniform(matrix_key, (2, 2), minval=-WARP, maxval=WARP)
    shift = side * jax.random.uniform(
        shift_key, (2,), minval=-WARP_SHIFT, maxval=WARP_SHIFT
    )
    places = jnp.tensordot(matrix, offset, 1) + middle + shift[:, None, None]
    return jax.scipy.ndimage.map_coordinates(image, [*places], order=1, mode="nearest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classification:
    """A family of few-shot classification. A task has n_way random classes, labelled at random. A
    pool has n_each samples of each of n_classes. Of each class of a task, shots samples of the pool
    are its support, and the others its query."""

    x: jax.Array  # [N, n_in], samples from 0 to 1, class by class
    first: jax.Array  # [classes], index of the first sample of each
    n_members: jax.Array  # [classes], samples of each
    most: int = static()  # samples of the largest class
    n_out: int = static()  # n_way
    shots: int = static()
    n_classes: int = static()
    n_each: int = static()
    side: int = static()  # of square images, else 0
    is_warped: bool = static()
    exchangeable = True

    @property
    def n_in(self):
        return self.x.shape[1]

    def pool(self, key):
        class_key, sample_key, warp_key = jax.random.split(key, 3)
        classes = shuffled(class_key, len(self.first))[: self.n_classes, None]
        draws = jax.random.uniform(sample_key, (self.n_classes, self.most))
        is_member = jnp.arange(self.most) < self.n_members[classes]
        order = jnp.argsort(jnp.where(is_member, draws, 2.0), 1)
        chosen = self.first[classes] + order[:, : self.n_each]
        u = self.x[chosen.ravel()]
        if not self.is_warped:
            return u
        images = u.reshape(-1, self.side, self.side)
        keys = jax.random.split(warp_key, len(images))
        return jax.vmap(warp)(keys, images).reshape(u.shape)

    def task(self, key, u):
        class_key, sample_key = jax.random.split(key)
        label = shuffled(class_key, self.n_classes)  # from n_way on: no class of the task
        y = jnp.repeat(jax.nn.one_hot(label, self.n_out), self.n_each, 0)  # [L, n_way]
        draws = jax.random.uniform(sample_key, (self.n_classes, self.n_each))
        is_support = (jnp.argsort(draws, 1) < self.shots).ravel()
        in_task = jnp.sum(y, 1)
        support = samples_of(jnp.where(is_support, in_task, 0.0), y)
        return Task(support, samples_of(jnp.where(is_support, 0.0, in_task), y))

    def loss(self, y, query, log_scale):
        """The cross-entropy of exp(log_scale)·ŷ."""
        log_p = jax.nn.log_softmax(jnp.exp(log_scale) * y)
        return -jnp.mean(jnp.sum(query.y * log_p, (1, 2)))

    def measures(self, y, query):
        right = jnp.argmax(y, 1) == jnp.argmax(query.y, 1)
        accuracy = 100 * jnp.sum(jnp.where(right, query.share, 0.0))
        return {"accuracy": accuracy, "mse": squared_error(y, query)}

    def baselines(self):
        return {"accuracy (%) of chance": 100 / self.n_out}

    def encode(self, x):
        x = np.atleast_1d(x)
        x = finite("x", x.reshape(len(x), math.prod(x.shape[1:])), (self.n_in,))
        in_range = 0 <= x.min() and x.max() <= 1
        require(in_range, "x must be from 0 to 1: scale it as config.json says")
        return jnp.asarray(x, float)

    def targets(self, y):
        y = finite("y", y, ())
        are_classes = np.isin(y, range(self.n_out)).all()
        require(are_classes, f"y must hold classes from 0 to {self.n_out - 1}")
        return jax.nn.one_hot(y.astype(int), self.n_out)


def draw_tasks(key, family, u, n):
    """n tasks on a pool of inputs u [L, n_in], a Task of arrays [n, ...]."""
    return jax.vmap(family.task, (0, None))(jax.random.split(key, n), u)


# ---- a look --------------------------------------------------------------------------------------


def delta_rule(e, y, samples):
    """Gradient [H, n_out] of the samples' squared error with respect to the readout's weights, at
    the outputs y [L, n_out] of traces e [L, H]."""
    return 2 * e.T @ (samples.share[:, None] * y - samples.y)


def max_pulses(cfg):
    """The largest number of pulses of one device in one look."""
    return 2 ** (cfg.n_bits - 1) - 1


def comparators(key, cfg, gradient, theta):
    """Pulses [2, H, n_out] on G+ and G−, Σ_j H(∓g − jθ) over j from 1 to max_pulses, for the
    gradient g [H, n_out] and thresholds θ, one for each synapse or for all. The surrogate of H is
    as wide as the rms of g, so that targets of any scale are learned alike."""
    width = jax.lax.stop_gradient(jnp.sqrt(jnp.mean(gradient**2)))
    wanted = jnp.stack([-gradient, gradient])
    j = jnp.arange(1.0, max_pulses(cfg) + 1)[:, None, None, None]
    return jnp.sum(network.spike((wanted - j * theta) / jnp.maximum(width, TINY)), 0)


# Functions of (key, cfg, gradient, theta), to pulses [2, H, n_out].
RULES = {"comparators": comparators}

# What circuits around the devices do.
CIRCUITS = {"ideal": network.Circuit()}


def circuit_of(cfg):
    """The network.Circuit of the settings."""
    known = f"{', '.join(CIRCUITS)}; img/circuits.py adds and trains others"
    require(cfg.circuit in CIRCUITS, f"--circuit {cfg.circuit} must be one of {known}")
    return CIRCUITS[cfg.circuit]


def outputs(cfg, e, w):
    """Outputs [..., L, n_out] of traces e [L, H] through weights w [..., H, n_out] of a readout."""
    return circuit_of(cfg).current(len(sizes_of(cfg)), e @ w)


# ---- inner loop: a chip adapts to a task ---------------------------------------------------------


class Meta(NamedTuple):
    """The meta-parameters."""

    # µS, the conductances that chips are programmed to; where outputs are exchangeable, the
    # readout and the thresholds have one column for all
    g: network.Network
    # [n_inner, H, n_out], ln of the thresholds; [n_inner, 1, 1] where synapses share one
    log_theta: jax.Array
    # ln of the factor of outputs ŷ in the cross-entropy of classes; else without effect
    log_scale: jax.Array


def entry(tree, index):
    """The tree with that entry of each of its arrays; with None, each gets a first axis."""
    return jax.tree.map(lambda x: x[index], tree)


def targets_of(meta, family):
    """Conductances (µS), a Network, that a chip is programmed to."""
    shape = (*meta.g.readout.shape[:2], family.n_out)
    return meta.g._replace(readout=jnp.broadcast_to(meta.g.readout, shape))


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


def rows_of(cfg, family):
    """Rows of layer 0 for each input and for the bias."""
    if cfg.n_rows is None:
        return 16 if family.n_in <= 4 else 1
    return cfg.n_rows


def sizes_of(cfg):
    """Neurons of each hidden layer."""
    return cfg.n_h0, cfg.n_h1


def dynamics_of(cfg):
    """Constants of the neurons."""
    lif = network.Lif(math.exp(-network.DT / cfg.tau_mem))
    kappa = math.exp(-network.DT / cfg.tau_out)
    layers = (lif,) * len(sizes_of(cfg))
    shared = kappa, cfg.gain_out, cfg.n_steps, circuit_of(cfg)
    return network.Dynamics(cfg.drive, layers, *shared)


class Seen(NamedTuple):
    """What a presentation of a pool of inputs shows."""

    e: jax.Array  # [L, H], traces at its end
    rates: tuple  # Hz, of the neurons of each layer


def observe(key, cfg, device, chip, u, t):
    """Seen of a chip that is read at time t (s), under the inputs u [L, n_in]. The readout's read
    is not used: looks and queries draw their own."""
    w = network.each(network.read, key, device, chip, t, cfg.compensate)
    activity = network.present(dynamics_of(cfg), w.hidden, u)
    return Seen(circuit_of(cfg).traces(activity.e[-1]), network.rates(activity))


def look(key, cfg, device, readout, e, support, log_theta, read_at, pulse_at):
    """The readout, a tile, after one look at traces e [L, H], read and pulsed at these times (s);
    and the pulses [2, H, n_out]. The readout is read without drift compensation."""
    read_key, rule_key, pulse_key = jax.random.split(key, 3)
    w = network.read(read_key, device, readout, read_at, False)
    gradient = circuit_of(cfg).gradient(delta_rule(e, outputs(cfg, e, w), support))
    counts = RULES[cfg.rule](rule_key, cfg, gradient, jnp.exp(log_theta))
    most = max_pulses(cfg)
    xbar, fired = analog.fire(pulse_key, device, readout.xbar, counts, most, pulse_at)
    return readout._replace(xbar=xbar), fired


def adapt(key, meta, cfg, device, readout, e, support, times):
    """The readout, a tile, after each look [n_inner, ...], and the pulses [n_inner, 2, H, n_out],
    as it learns a task from traces e [n_inner, L, H]."""

    def one(readout, inputs):
        key, e, *rest = inputs
        readout, fired = look(key, cfg, device, readout, e, support, *rest)
        return readout, (readout, fired)

    keys = jax.random.split(key, cfg.n_inner)
    return jax.lax.scan(one, readout, (keys, e, meta.log_theta, *times))[1]


def adapt_chip(key, meta, cfg, device, chip, u, supports, times, reads):
    """Results of adapt for each of the supports [tasks, ...] on its own copy of the readout. Hidden
    crossbars are read at times reads (s), [n_inner], or [1] where one read serves all looks."""
    hidden_key, adapt_key = jax.random.split(key)

    def traces_at(inputs):
        key, t = inputs
        return observe(key, cfg, device, chip, u, t).e

    e = in_turn(traces_at, (jax.random.split(hidden_key, len(reads)), reads))
    e = jnp.broadcast_to(e, (cfg.n_inner, *e.shape[1:]))
    keys = jax.random.split(adapt_key, len(supports.y2))

    def learn(key, support):
        return adapt(key, meta, cfg, device, chip.readout, e, support, times)

    return jax.vmap(learn)(keys, supports)


def with_reference(key, device, readouts, times):
    """Readouts, tiles [n, ...] that were last pulsed at times [n] (s), with their references."""

    def one(key, readout, t):
        return network.with_reference(key, device, readout, t + device.t_verify)

    return jax.vmap(one)(jax.random.split(key, len(times)), readouts, times)


@jax.jit(static_argnums=1)
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


class Population(NamedTuple):
    """The devices that meta-training draws its chips from."""

    kinds: tuple  # of Kind, stacked: one for each law and way of programming
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
    """Σ_layers ((mean rate − target_fr)/100 Hz)² + SILENT·mean(max(0, 1 − rate/MIN_RATE)²), of the
    rates (Hz) of each layer's neurons. Without its second part ever more neurons fall silent, and
    longer training raises the error."""

    def of_layer(x):
        mean = ((jnp.mean(x) - cfg.target_fr) / 100) ** 2
        return mean + SILENT * jnp.mean(jnp.maximum(0.0, 1 - x / MIN_RATE) ** 2)

    return sum(of_layer(x) for x in rates)


def activity_of(cfg, rates):
    """What is reported of the rates (Hz) of the neurons of each layer."""
    return {
        "rates": jnp.stack([jnp.mean(x) for x in rates]),
        "silent": jnp.stack([100 * jnp.mean(x == 0) for x in rates]),
        "spikes": sum(jnp.sum(x) for x in rates) * cfg.n_steps * network.DT,
    }


def meta_loss(key, meta, cfg, family, kind, n_tasks):
    """Outer loss of one chip and n_tasks tasks, that of the family plus the penalty on rates; and
    means of what is measured on the way. All looks share one read of the hidden crossbars, which
    halves the time. On a chip each look has its own read: other noise, and a little more drift."""
    keys = iter(jax.random.split(key, 8))
    device, table = kind
    make = partial(analog.fabricate, table=table)
    targets = targets_of(meta, family)
    chip = network.assemble(next(keys), device, make, targets, circuit_of(cfg))
    chip = network.later(chip, log_uniform(next(keys), cfg.tread, cfg.max_age))
    times, u = times_of(cfg), family.pool(next(keys))
    tasks = draw_tasks(next(keys), family, u, n_tasks)
    after, pulses = adapt_chip(
        next(keys), meta, cfg, device, chip, u, tasks.support, times, times.reads[:1]
    )
    last, ended = entry(after, (slice(None), -1)), jnp.repeat(times.pulses[-1], n_tasks)
    readouts = with_reference(next(keys), device, last, ended)
    asked = times.pulses[-1] + log_uniform(next(keys), cfg.twait, cfg.max_rest)
    seen, w = query_chip(next(keys), cfg, device, chip, readouts, u, asked)
    y = outputs(cfg, seen.e, w)  # [tasks, L, n_out]
    loss = family.loss(y, tasks.query, meta.log_scale)
    measured = {
        "loss": loss,
        **jax.tree.map(jnp.mean, jax.vmap(family.measures)(y, tasks.query)),
        "pulses": jnp.sum(pulses) / n_tasks,
        **activity_of(cfg, seen.rates),
    }
    return loss + cfg.lambda_fr * rate_penalty(cfg, seen.rates), measured


def scale(sizes, tree):
    """The tree, each of its fields times that of sizes."""

    def field(size, part):
        return jax.tree.map(lambda x: size * x, part)

    return jax.tree.map(field, sizes, tree)


def clip_norm(gradient):
    """The gradient, its norm clipped to MAX_GRAD_NORM. Through several looks it explodes in the
    first iterations, and Adam would remember that for a thousand more."""
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
    """Factor of the step sizes: a tenth at lr_drop, and from there as 1/step."""
    return jnp.where(step < cfg.lr_drop, 1.0, 0.1 * cfg.lr_drop / jnp.maximum(step, 1))


def update(cfg, population, state, gradient, step):
    """State after one step of the optimizer, of size lr_out times the range of G, LR_THETA for ln θ
    and LR_SCALE for log_scale, times the schedule's factor."""
    units = Meta(g=population.span, log_theta=1.0, log_scale=1.0)
    rates = Meta(g=cfg.lr_out * population.span, log_theta=LR_THETA, log_scale=LR_SCALE)
    direction, state = adam(state, clip_norm(scale(units, gradient)), step)
    factor = schedule(cfg, step)
    moved = jax.tree.map(lambda x, d: x + factor * d, state.meta, scale(rates, direction))
    return state._replace(meta=project(moved, population.low, population.high))


def stream(cfg, index):
    """Key of the start (0), of meta-training (1), of the meta-test (2); studies go on from
    3."""
    return jax.random.fold_in(jax.random.key(cfg.seed), index)


@jax.jit(static_argnums=0)
def start(cfg, population, family):
    """State before training; thresholds are a share of the rms of the gradients on a new chip of
    the alphabetically first device: programmed exactly, its readout compensated for drift, its
    gradients not passed through the circuit."""
    keys = iter(jax.random.split(stream(cfg, 0), 6))
    kind = entry(population.kinds[0], 0)
    device = kind.device._replace(g_min=population.low)
    sizes = sizes_of(cfg)
    columns = 1 if family.exchangeable else family.n_out
    g = network.start(next(keys), device, sizes, family.n_in, columns, rows_of(cfg, family))
    meta = project(Meta(g, None, jnp.zeros(())), population.low, population.high)
    make, targets = analog.fabricate, targets_of(meta, family)
    chip = network.assemble(next(keys), kind.device, make, targets, circuit_of(cfg))
    u = family.pool(next(keys))
    seen = observe(next(keys), cfg, kind.device, chip, u, cfg.tread)
    w = network.read(next(keys), kind.device, chip.readout, cfg.tread, cfg.compensate)
    tasks = draw_tasks(next(keys), family, u, 64)
    y = outputs(cfg, seen.e, w)
    gradients = jax.vmap(delta_rule, (None, None, 0))(seen.e, y, tasks.support)
    rms = jnp.sqrt(jnp.mean(gradients**2))
    shape = (1, 1) if cfg.shared_thr else (len(w), columns)
    theta = jnp.full((cfg.n_inner, *shape), cfg.grad_thr * jnp.maximum(rms, TINY))
    meta = meta._replace(log_theta=jnp.log(theta))
    zero = jax.tree.map(jnp.zeros_like, meta)
    return State(meta, zero, zero)


# ---- meta-test -----------------------------------------------------------------------------------


class Episode(NamedTuple):
    """One task on one chip."""

    measured: dict  # by names of figures.MEASURED
    task: Task
    u: jax.Array  # [L, n_in], the pool
    # [2, L, n_out], outputs for the pool before and after adaptation
    outputs: jax.Array
    chip: network.Network  # of tiles; its times count from the episode's first read


def scene(key, meta, cfg, family, device, make=analog.deploy):
    """A new chip whose programming ended at its time 0, its crossbars made by make; a pool of
    inputs, a task, and a key."""
    chip_key, pool_key, task_key, key = jax.random.split(key, 4)
    chip = network.assemble(
        chip_key, device, make, targets_of(meta, family), circuit_of(cfg)
    )
    u = family.pool(pool_key)
    return chip, u, family.task(task_key, u), key


@jax.jit(static_argnums=3)
def teach(adapt_key, refer_key, meta, cfg, device, chip, u, support):
    """The readouts of a chip after each look at a support, tiles [n_inner, ...], and the pulses
    [n_inner, 2, H, n_out]."""
    times = times_of(cfg)
    supports = entry(support, None)
    found = adapt_chip(adapt_key, meta, cfg, device, chip, u, supports, times, times.reads)
    readouts, pulses = entry(found, 0)
    return with_reference(refer_key, device, readouts, times.pulses), pulses


def with_last(chip, readouts):
    """The chip with the last of its readouts, tiles [n, ...]."""
    return chip._replace(readout=entry(readouts, -1))


def episode(key, meta, cfg, family, device, make=analog.deploy):
    """Episode of a task that a new chip, its crossbars made by make, meets at tread."""
    chip, u, task, key = scene(key, meta, cfg, family, device, make)
    chip = network.later(chip, cfg.tread)
    return learn_and_test(key, meta, cfg, family, device, chip, u, task)


def learn_and_test(key, meta, cfg, family, device, chip, u, task):
    """Episode of a chip that meets a task at its time 0, with a pool of inputs u [L, n_in]."""
    adapt_key, refer_key, ask_key, day_key = jax.random.split(key, 4)
    after, pulses = teach(adapt_key, refer_key, meta, cfg, device, chip, u, task.support)
    asked = wait_of(cfg)
    before = entry(chip.readout, None)
    readouts = jax.tree.map(lambda *x: jnp.concatenate(x), before, after)
    seen, w = query_chip(ask_key, cfg, device, chip, readouts, u, asked)
    late, w_late = query_chip(day_key, cfg, device, chip, readouts, u, asked + DAY)
    used = with_last(chip, readouts)
    y, y_late = outputs(cfg, seen.e, w), outputs(cfg, late.e, w_late[-1])
    of_a_day_later = family.measures(y_late, task.query).items()
    measured = {
        **jax.vmap(family.measures, (0, None))(y, task.query),
        **{f"{name}_day": x for name, x in of_a_day_later},
        "pulses": jnp.sum(pulses),
        **changes(device, chip.readout.xbar, used.readout.xbar),
        **activity_of(cfg, seen.rates),
    }
    return Episode(measured, task, u, y[jnp.array([0, -1])], used)


def changes(device, before, after):
    """What pulses have done to a readout."""
    moved = analog.weights(device, after.g - before.g)
    return {
        "touched": 100 * jnp.mean(after.t_prog > before.t_prog),
        "dw": jnp.sum(jnp.abs(moved)),
    }


def reported(key, meta, cfg, family, device):
    """episode without its chip, which would fill the memory of many."""
    return episode(key, meta, cfg, family, device)._replace(chip=None)


class Learned(NamedTuple):
    """A chip that has learned a user's task."""

    chip: network.Network  # of tiles; its times count from the first read of the adaptation
    pulses: jax.Array  # [n_inner, 2, H, n_out]
    predict: Callable  # of a key, inputs x and a time t (s since that read), to outputs [N, n_out]


def check_chip(chip, targets, circuit, device, age):
    """Refuse a chip whose crossbars are not those of the targets, a Network in µS, whose circuit is
    another, or that would be read at an age (s) less than t_verify after its last pulse."""
    tiles = *chip.hidden, chip.readout
    for tile, target in zip(tiles, jax.tree.leaves(targets), strict=True):
        finite("each crossbar of the chip", tile.xbar.g, target.shape[1:])
        is_same = tile.circuit == circuit
        require(is_same, "the chip's circuit must be train.circuit_of(run.cfg)")
        soonest = float(jnp.max(tile.xbar.t_prog)) + device.t_verify
        require(
            age >= soonest, f"age must be {soonest} s or more, after the chip's last pulse"
        )


def accept(run, device, x, y):
    """Settings, inputs [N, n_in] and targets [N, n_out] for samples of a user; Refused where these
    or the device do not fit the network."""
    cfg, family = run.cfg, run.families.testing
    is_device = isinstance(device, analog.Device)
    require(is_device, "device must be an analog.Device, such as analog.IBM")
    g_max = next(iter(run.devices.values())).g_max
    other = f"the network needs devices of g_max {g_max:g} µS, not {device.g_max:g}"
    require(device.g_max == g_max, other)
    u, y = family.encode(x), family.targets(y)
    require(len(u) == len(y), f"x has {len(u)} samples, y {len(y)}")
    if len(u) > cfg.task_size:  # they need more time before each pulse
        cfg = resize(cfg, len(u), {"its device": device})
    check_times(cfg, device.t_verify)
    return cfg, u, y


@jax.jit(static_argnums=1)
def new_chip(key, cfg, device, targets):
    """A chip whose programming to targets, a Network in µS, has ended at its time 0."""
    return network.assemble(key, device, analog.deploy, targets, circuit_of(cfg))


def learn(key, run, device, x, y, chip=None, age=None):
    """Learned of samples x and y of a user: inputs and targets [N] of a function, or samples [N, …]
    from 0 to 1 and their classes. The chip, a new one by default, has its first read at that age
    (s since its time 0; default: tread). Refused where they do not fit the network."""
    cfg, u, y = accept(run, device, x, y)
    family = run.families.testing
    meta = project(run.state.meta, *common_range([device]))
    chip_key, adapt_key, refer_key = jax.random.split(key, 3)
    targets = targets_of(meta, family)
    age = cfg.tread if age is None else age
    if chip is None:
        chip = new_chip(chip_key, cfg, device, targets)
    check_chip(chip, targets, circuit_of(cfg), device, age)
    chip = network.later(chip, age)
    support = samples_of(jnp.ones(len(u)), y)
    after, pulses = teach(adapt_key, refer_key, meta, cfg, device, chip, u, support)
    chip = with_last(chip, after)
    soonest = times_of(cfg).pulses[-1] + device.t_verify

    def predict(key, x, t=None):
        t = wait_of(cfg) if t is None else t
        is_after = t >= soonest * (1 - 1e-6)
        require(is_after, f"t must be {soonest:g} s or more, after the pulses")
        readouts = entry(chip.readout, None)
        seen, w = query_chip(key, cfg, device, chip, readouts, family.encode(x), t)
        return outputs(cfg, seen.e, w[0])

    return Learned(chip, pulses, predict)


def summary(x):
    """The mean of x [n, ...] over axis 0, and n; if some of the n are not finite, how many; from
    n = 64 on the half-width of the mean's 95 % confidence interval."""
    x = np.asarray(x, float)  # as a sum of many loses digits in float32
    found = {"mean": np.mean(x, 0).tolist(), "n": len(x)}
    n_bad = int(np.sum(~np.isfinite(x.reshape(len(x), -1)).all(1)))
    if n_bad:
        found["not_finite"] = n_bad
    if len(x) >= 64:
        found["ci95"] = (1.96 * np.std(x, 0, ddof=1) / len(x) ** 0.5).tolist()
    return found


# ---- many chips: over cores, accelerators and hosts ----------------------------------------------

P = jax.sharding.PartitionSpec
BATCH = 64  # chips that an accelerator takes at a time


def in_turn(f, x):
    """f of every x, stacked: one at a time on a core, whose caches hold one, else BATCH at a
    time."""
    batch_size = None if jax.default_backend() == "cpu" else BATCH
    return jax.lax.map(f, x, batch_size=batch_size)


def places_for(*numbers):
    """The largest number of JAX's devices that each of these numbers of chips can be divided among
    evenly. All chips of a compiled program use the same devices, and several hosts use all."""
    n_all = jax.device_count()
    found = next(k for k in range(n_all, 0, -1) if not any(n % k for n in numbers))
    needed = f"several hosts need a multiple of {n_all} chips: --n_chips, --batch_test"
    require(jax.process_count() == 1 or found == n_all, needed)
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


def population_of(cfg, devices):
    """The Population of devices, a dictionary by name, in the order of their names."""
    ordered = [devices[name] for name in sorted(devices)]
    groups = defaultdict(list)
    for device in ordered:
        kind = Kind(device, table_of(cfg, device))
        groups[jax.tree.structure(kind)].append(kind)
    kinds = tuple(jax.tree.map(stack, *group) for group in groups.values())
    low, high = common_range(ordered)
    return Population(kinds, low, high, ordered[0].g_max - low)


def stack(*numbers):
    """An array of them, along a first axis."""
    return np.stack(numbers).astype(float)


def table_of(cfg, device):
    """What meta-training takes for the error of programming a device."""
    if cfg.off_noise is None:
        return analog.program_table(device)
    return analog.EXACT._replace(std=analog.EXACT.std + cfg.off_noise * device.g_max)


def gradient_of(key, cfg, population, family, meta):
    """Gradient of the outer loss and what is measured, means over n_chips chips of each
    device."""
    numbers = [len(kind.device.g_max) for kind in population.kinds]  # devices of each group
    n_places = places_for(*(n * cfg.n_chips for n in numbers))
    n_tasks = cfg.batch_train // sum(numbers)
    keys = jax.random.split(key, len(population.kinds))

    def chip(x, meta):
        key, kind = x
        loss = partial(meta_loss, cfg=cfg, family=family, kind=kind, n_tasks=n_tasks)
        return jax.grad(loss, 1, has_aux=True)(key, meta)

    found = []
    for key, kind in zip(keys, population.kinds, strict=True):
        kinds = jax.tree.map(lambda x: jnp.repeat(x, cfg.n_chips, 0), kind)
        chip_keys = jax.random.split(key, len(kinds.device.g_max))
        found.append(on_chips(chip, (chip_keys, kinds), meta, n_places))
    return jax.tree.map(lambda *x: jnp.mean(jnp.concatenate(x), 0), *found)


@jax.jit(static_argnums=1)
def train_chunk(key, cfg, population, family, state, first, last):
    """State after the meta-iterations from first to last − 1, and means of what was measured in
    them. A loop of any length is one compiled program, so that a stop does not change a bit."""
    gradient = partial(gradient_of, cfg=cfg, population=population, family=family)
    like = jax.eval_shape(gradient, key, meta=state.meta)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def iterate(step, carried):
        state, total = carried
        step_key = jax.random.fold_in(key, step)
        found, measured = gradient(step_key, meta=state.meta)
        state = update(cfg, population, state, found, step)
        return state, jax.tree.map(jnp.add, total, measured)

    state, total = jax.lax.fori_loop(first, last, iterate, (state, nothing))
    n = jnp.maximum(last - first, 1)
    return state, jax.tree.map(lambda x: x / n, total)


@jax.jit(static_argnums=(1, 2, 5))
def test(key, experiment, cfg, family, device, n, meta):
    """experiment(key, meta, cfg, family, device) of n chips, arrays [n, ...]."""

    def one(key, given):
        meta, family, device = given
        return experiment(key, meta, cfg, family, device)

    return on_chips(one, jax.random.split(key, n), (meta, family, device), places_for(n))


# ---- a file of samples ---------------------------------------------------------------------------


def read_samples(path):
    """Arrays x, y and test (None where it has none) of a file, and its SHA-256; Refused where it
    cannot be read."""
    try:
        content = (Path(path) if os.path.exists(path) else HERE / path).read_bytes()
        with np.load(io.BytesIO(content)) as file:
            arrays = dict(file)
    except Exception as error:  # a damaged archive fails in many ways
        what = f"neither one of {', '.join(FUNCTIONS)} nor a file of arrays x and y"
        raise Refused(f"--tasks: {path} is {what}: {error}") from None
    has_both = {"x", "y"} <= arrays.keys()
    require(has_both, f"--tasks: {path} has arrays {list(arrays)}, but needs x and y")
    sha256 = hashlib.sha256(content).hexdigest()
    return arrays["x"], arrays["y"], arrays.get("test"), sha256


class Data(NamedTuple):
    """Samples of a user's file."""

    x: np.ndarray  # [N, n_in], scaled to [0, 1] by the range of the training part
    y: np.ndarray  # [N], classes
    test: np.ndarray  # [N] bool, the samples of the meta-test
    side: int  # of square images, else 0
    about: dict  # the file's sha256, that range, and how many numbers were clipped to it


def load_data(path):
    """Data of a file of arrays x [N, ...], y [N] and perhaps test [N]; Refused where they make no
    sense."""
    x, y, test, sha256 = read_samples(path)
    require(y.dtype.kind in "bui", f"{path}: y must hold integers: number your classes")
    x, y = finite(f"x of {path}", x, x.shape[1:]), finite(f"y of {path}", y, ())
    classes = np.unique(y)
    last_fifth = classes[len(classes) - len(classes) // 5 :]
    if test is None:
        test = np.isin(y, last_fifth)
    require(test.dtype == bool, f"{path}: test must hold true and false")
    require(len(x) == len(y) == test.size, f"{path}: x, y and test differ in length")
    require(not np.all(test), f"{path}: the training part is empty")
    shared = np.intersect1d(y[test], y[~test]).size
    if shared:
        print(f"warning: {shared} classes of {path} are in its test and its training part")
    low, high = float(x[~test].min()), float(x[~test].max())
    share = (x.reshape(len(x), -1) - low) / max(high - low, TINY)
    is_square = x.ndim == 3 and x.shape[1] == x.shape[2]
    about = {
        "sha256": sha256,
        "low": low,
        "high": high,
        "clipped": int(np.sum((share < 0) | (share > 1))),
    }
    side = x.shape[1] if is_square else 0
    return Data(np.clip(share, 0, 1).astype(np.float32), y, test, side, about)


def classes_of(cfg, data, is_testing):
    """Classification of the classes of one part of the data."""
    part = data.test == is_testing
    names, y, n_members = np.unique(data.y[part], return_inverse=True, return_counts=True)
    shots, left_over = divmod(cfg.task_size, cfg.n_way)
    n_all, fewest = len(names), int(min(n_members, default=0))
    where = f"{'test' if is_testing else 'training'} part of {cfg.tasks}"
    few = f"{where}: {n_all} classes are fewer than --n_way {cfg.n_way}"
    few += "; lower it, or choose the samples of the test in an array test"
    small = f"{where}: a class has {fewest} samples, but a task needs {shots} and a query"
    require(left_over == 0, f"--task_size must be a multiple of --n_way, {cfg.n_way}")
    require(n_all >= cfg.n_way, few)
    require(fewest > shots, small)
    n_query = N_QUERY_TEST if is_testing else N_QUERY_TRAIN
    return Classification(
        x=jnp.asarray(data.x[part][np.argsort(y)]),
        first=jnp.asarray(np.cumsum(n_members) - n_members),
        n_members=jnp.asarray(n_members),
        most=int(max(n_members)),
        n_out=cfg.n_way,
        shots=shots,
        n_classes=cfg.n_way if is_testing else min(4 * cfg.n_way, n_all),
        n_each=min(shots + n_query, fewest),
        side=data.side,
        is_warped=not is_testing and data.side > 0,
    )


class Families(NamedTuple):
    """The families of tasks of a run."""

    training: Regression | Classification
    testing: Regression | Classification
    about: dict | None  # Data.about of their file, if they have one


def families_of(cfg):
    """Families that the settings name: of a function, or of a file of samples."""
    if cfg.tasks in FUNCTIONS:
        family = Regression(FUNCTIONS[cfg.tasks], cfg.dac_bits, cfg.task_size)
        return Families(family, family, None)
    data = load_data(cfg.tasks)
    training, testing = (classes_of(cfg, data, is_testing) for is_testing in (False, True))
    return Families(training, testing, data.about)


# ---- run folder ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run at one moment, all that it needs to go on."""

    cfg: Config
    devices: dict  # analog.Device by name, in the order of a report
    families: Families
    state: State
    step: int = 0
    rows: tuple = ()  # of metrics.csv, dictionaries
    versions: dict | None = None  # provenance() of the last iteration


def write(path, data):
    """Put data into the file, which is replaced as a whole: a reader, or a run killed at any
    moment, finds the old or the new. Refused where it cannot be written. What a killed run leaves
    of it is removed when its folder is held again."""
    if jax.process_index():  # of several hosts the first alone writes
        return
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise Refused(f"cannot write {path}: {error.strerror}", 1) from None


def write_json(path, content, indent=1):
    """Write content as JSON, null for what is not finite."""
    clean = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write(path, json.dumps(clean, indent=indent).encode())


def write_arrays(path, arrays):
    """Write arrays by name."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write(path, file.getvalue())


# Settings of JAX on which random draws and sums depend.
OF_DRAWS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_enable_x64",
    "jax_default_matmul_precision",
)


@cache
def provenance():
    """What a result depends on beside its settings; the commit is marked where files were
    edited."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"]
    ours = os.environ | {"GIT_DIR": str(HERE / ".git"), "GIT_WORK_TREE": str(HERE)}
    try:
        found = subprocess.run(git, capture_output=True, text=True, env=ours)
        commit = found.stdout.strip()
    except OSError:
        commit = None
    packages = ("jax", "jaxlib", "numpy")
    return {
        **{name: metadata.version(name) for name in packages},
        **{name: getattr(jax.config, name) for name in OF_DRAWS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
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
        "data": run.families.about,
        "versions": run.versions,
    }
    write_json(folder / "config.json", config)
    if run.rows:
        write(folder / "metrics.csv", csv_of(run.rows))
    arrays = by_name(run.state) | {"step": run.step, "rows": json.dumps(run.rows)}
    arrays["theta"] = np.exp(arrays["log_theta"])
    write_arrays(folder / "checkpoint.npz", arrays)


def read_config(folder):
    """Config, devices by name, and all else that config.json holds. No setting may be missing."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    given = saved["config"]
    described = saved["device"]
    if isinstance(described, dict):
        described = [described]
    devices = dict(map(analog.from_constants, described))
    required = {name: given[name] for name in vars(Config())}
    return config_of(given | required), devices, saved


def read_checkpoint(folder, like):
    """State of the shapes of like, step, and rows of metrics.csv."""
    with np.load(folder / "checkpoint.npz") as file:
        leaves = [file[name].reshape(x.shape) for name, x in by_name(like).items()]
        step, rows = int(file["step"]), json.loads(str(file["rows"]))
    return jax.tree.unflatten(jax.tree.structure(like), leaves), step, tuple(rows)


def load(folder):
    """The Run in a folder; Refused where it holds none. A setting or array that it lacks is
    refused by name, never filled in; a device's constant is, if it has a default."""
    folder = Path(folder)
    try:
        cfg, devices, saved = read_config(folder)
        families = families_of(cfg)
        versions = dict(saved["versions"])
        require(families.about == saved["data"], f"{cfg.tasks} is not the file that it was")
        # shapes need no table of programming
        exact = dataclasses.replace(cfg, off_noise=0.0)
        population = population_of(exact, devices)
        like = jax.eval_shape(start, exact, population, families.training)
        return Run(cfg, devices, families, *read_checkpoint(folder, like), versions)
    except Exception as error:  # a damaged archive fails in many ways
        what = f"{folder} holds no run, a damaged one, or one of other code: {error}"
        raise Refused(what) from None


def numbered():
    """The run folders run/1, run/2, … in this order."""
    found = [folder for folder in Path("run").glob("*") if folder.name.isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name))


def latest():
    """The last run folder that holds a run."""
    for folder in reversed(numbered()):
        if (folder / "checkpoint.npz").exists():
            return folder
    raise Refused("there is no run in run/ to resume; name its folder with --run_dir")


def new_folder(run_dir):
    """The folder of a new run: run_dir, or the next of run/1, run/2, …"""
    last = int(numbered()[-1].name) if numbered() else 0
    folder = Path(run_dir or f"run/{last + 1}")
    if (folder / "checkpoint.npz").exists() and not jax.process_index():
        raise Refused(f"{folder} holds a run: go on with --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=bool(run_dir))
    except OSError as error:
        if not run_dir and folder.exists():  # another run took it a moment ago
            return new_folder(run_dir)
        what = f"cannot make the run folder {folder}: {error.strerror}; try --run_dir"
        raise Refused(what) from None
    return folder


@contextmanager
def held(folder):
    """Keeps other processes out of a run folder, and removes what a killed one has left of files
    that it was writing. Refused where another one holds it."""
    if jax.process_index():  # of several hosts the first alone writes
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Refused(f"{folder} is in use by another run") from None
    except OSError:
        pass  # a file system without locks
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    try:
        yield
    finally:
        os.close(handle)


# ---- command line --------------------------------------------------------------------------------

# Settings that may change between a checkpoint and its --resume.
MAY_CHANGE = {"n_iter", "lr_drop", "batch_test", "ttest"}


def problem_of(field, x):
    """Why the setting of a field of Config cannot be x; nothing where it can."""
    least, most = field.metadata["range"]
    kinds = (int, float) if field.type is float else (field.type,)
    if x is None and field.default is None:
        return ""
    if type(x) not in kinds:
        return f"must be of type {field.type.__name__}"
    if field.type in (int, float) and not least <= x <= most:
        return f"must be from {least:g} to {most:g}"
    return ""


def config_of(values):
    """Config of settings by name; Refused where one is unknown or cannot have its value."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name, x in values.items():
        problem = problem_of(fields[name], x) if name in fields else "is not a setting"
        require(not problem, f"--{name} {problem}: {x!r:.40}")
    return Config(**values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        raise Refused(message)


def add_settings(parser):
    """Give the parser a flag for every setting, and --perf."""
    for field in dataclasses.fields(Config):
        default = "" if field.default is None else f" (default: {field.default})"
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = field.metadata["help"] + default
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    perf = {"dest": "device", "action": "store_const", "const": "perf"}
    text = "ideal devices: --device perf"
    parser.add_argument("--perf", default=argparse.SUPPRESS, help=text, **perf)


def parse(argv):
    """The settings given on a command line, a preset's among them; its --run_dir and --resume."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = Parser(allow_abbrev=False, description=about)
    add_settings(parser)
    text = "settings that belong together; other flags override them"
    parser.add_argument("--preset", choices=PRESETS, help=text)
    parser.add_argument(
        "--run_dir", help="folder of the run (default: the next of run/1, …)"
    )
    text = "go on with the latest run in run/, or that in --run_dir; only "
    text += f"{', '.join(sorted(MAY_CHANGE))} may change"
    parser.add_argument("--resume", action="store_true", help=text)
    flags = vars(parser.parse_args(argv))
    preset, run_dir, resume = map(flags.pop, ("preset", "run_dir", "resume"))
    given = PRESETS.get(preset, {})
    if resume:  # what may change keeps what the run has
        given = {name: x for name, x in given.items() if name not in MAY_CHANGE}
    return given | flags, run_dir, resume


def devices_of(names):
    """The devices, by name, that --device names: a file, or names and files separated by
    commas."""
    parts = (
        [names] if os.path.isfile(names) else [name.strip() for name in names.split(",")]
    )
    devices = {}
    for part in parts:
        try:
            name, device = analog.load_device(part)
        except ValueError as error:
            raise Refused(f"--device {part}: {error}") from None
        require(name not in devices, f"--device: {name} stands twice")
        devices[name] = device
    return devices


def complete(cfg, devices):
    """The settings, with the times that follow from others; Refused where they, or devices by name,
    contradict each other."""
    tprog = cfg.tprog or soonest_pulse(cfg)
    t_verify = max(device.t_verify for device in devices.values())
    tlook = cfg.tlook or max(20.0, tprog - cfg.tread + t_verify)
    ttest = cfg.ttest or tprog + (cfg.n_inner - 1) * tlook + cfg.twait
    names = ",".join(devices)
    cfg = dataclasses.replace(cfg, device=names, tprog=tprog, tlook=tlook, ttest=ttest)
    check_times(cfg, t_verify)
    check_devices(cfg, devices)
    return cfg


def soonest_pulse(cfg):
    """The time (s) at which the samples of a task have been shown."""
    return cfg.tread + cfg.task_size * cfg.n_steps * network.DT


def check_times(cfg, t_verify):
    """Refuse times of which one comes before what it waits for."""
    shown, look = soonest_pulse(cfg), cfg.tprog - cfg.tread + t_verify
    read = cfg.tprog + (cfg.n_inner - 1) * cfg.tlook + t_verify
    require(cfg.tprog >= shown, f"--tprog must be {shown} s or more, after the samples")
    require(
        cfg.tlook >= look, f"--tlook must be {look} s or more, after pulses and their read"
    )
    require(cfg.twait >= t_verify, f"--twait must be t_verify, {t_verify} s, or more")
    require(cfg.ttest >= read, f"--ttest must be {read} s or more, after the pulses")
    require(cfg.max_age >= cfg.tread, f"--max_age must be at least tread, {cfg.tread} s")
    require(cfg.max_rest >= cfg.twait, f"--max_rest must be at least twait, {cfg.twait} s")


def check_devices(cfg, devices):
    """Refuse devices, a dictionary by name, that the settings or each other rule out."""
    n = len(devices)
    low, high = common_range(devices.values())
    g_max = {name: device.g_max for name, device in devices.items()}
    agree = len(set(g_max.values())) == 1
    require(cfg.rule in RULES, f"--rule must be one of {', '.join(RULES)}")
    circuit_of(cfg)  # refuses an unknown one
    require(cfg.batch_train % n == 0, f"--batch_train must be a multiple of {n} devices")
    differ = f"--device: all must agree in g_max (µS), but have {g_max}"
    require(agree, f"{differ}; img/fit.py takes --g_max")
    require(low < high, "--device: no conductance can be programmed on all of them")


def resize(cfg, task_size, devices):
    """The settings for tasks of another size, with default times for their samples."""
    times = dict.fromkeys(("tprog", "tlook", "ttest"))
    return complete(dataclasses.replace(cfg, task_size=task_size, **times), devices)


def configure(flags):
    """Config and devices of a new run."""
    cfg = config_of(flags)
    devices = devices_of(cfg.device)
    return complete(cfg, devices), devices


def resumed(flags, folder):
    """The Run in a folder with the flags that may change; others must be as they were."""
    run = load(folder)
    devices = devices_of(flags["device"]) if "device" in flags else run.devices
    other = f"{folder} holds a run on other devices or constants: {run.cfg.device}"
    require(devices == run.devices, other)
    cfg = complete(config_of(vars(run.cfg) | flags), run.devices)
    differ = {name for name, x in vars(cfg).items() if x != getattr(run.cfg, name)}
    for name in sorted(differ - MAY_CHANGE):
        before = getattr(run.cfg, name)
        what = (
            f"{folder} holds a run with --{name} {before}: leave out that flag or --resume"
        )
        raise Refused(what)
    past = f"{folder} is past --n_iter {cfg.n_iter}: it is at iteration {run.step}"
    require(run.step <= cfg.n_iter, past)
    now = provenance().items()
    changed = [name for name, x in now if run.versions.get(name) != x]
    print(
        f"resuming {folder} after iteration {run.step}; "
        f"versions changed since: {changed or 'none'}"
    )
    return run._replace(cfg=cfg)


def prepare(argv):
    """The Run to go on from, and its folder."""
    flags, run_dir, resume = parse(argv)
    if resume:
        folder = Path(run_dir or latest())
        return resumed(flags, folder), folder
    cfg, devices = configure(flags)
    families = families_of(cfg)
    state = start(cfg, population_of(cfg, devices), families.training)
    run = Run(cfg, devices, families, state, versions=provenance())
    return run, new_folder(run_dir)


# ---- main ----------------------------------------------------------------------------------------


def assert_sound(run, measured, folder):
    """Refuse to go on with a run that has diverged; the last checkpoint stands."""
    problem = ""
    for i, rate in enumerate(measured["rates"]):
        if rate == 0:
            problem = f"layer {i} is silent; try a larger --drive"
        if rate * network.DT > 0.95:  # share of the time steps with a spike
            problem = (
                f"layer {i} always fires; try a smaller --drive or a larger --lambda_fr"
            )
    numbers = jax.tree.leaves((measured, run.state))
    if not all(np.isfinite(x).all() for x in numbers):
        problem = "the loss is not finite; try a smaller --lr_out"
    what = f"iteration {run.step}: {problem}; the checkpoint in {folder} is good"
    require(not problem, what, 1)


def row_of(step, meta, measured):
    """The row of metrics.csv for a chunk whose means are measured, its values by column."""
    row = {"step": step}
    thresholds = np.exp(np.median(meta.log_theta, (1, 2)))
    for name, x in {**measured, "theta": thresholds}.items():
        names = [f"{name}_{k}" for k in range(len(x))] if np.ndim(x) else [name]
        row |= dict(zip(names, np.ravel(x).tolist(), strict=True))
    return row


def train(run, folder):
    """The Run after meta-training up to n_iter, saved every CHUNK iterations."""
    if run.step == run.cfg.n_iter:
        return run
    cfg, population = run.cfg, population_of(run.cfg, run.devices)
    family, key = run.families.training, stream(run.cfg, 1)
    # no iteration: it compiles, for which the bar's clock should not count
    train_chunk(key, cfg, population, family, run.state, run.step, run.step)
    bar = tqdm(total=cfg.n_iter, initial=run.step, unit="it", file=sys.stdout)
    with bar:
        while run.step < cfg.n_iter:
            last = min((run.step // CHUNK + 1) * CHUNK, cfg.n_iter)
            found = train_chunk(key, cfg, population, family, run.state, run.step, last)
            state, measured = jax.device_get(found)
            row = row_of(last, state.meta, measured)
            rows = *run.rows, row
            run = run._replace(state=state, step=last, rows=rows, versions=provenance())
            assert_sound(run, measured, folder)
            save(run, folder)
            bar.set_postfix(loss=row["loss"], refresh=False)
            bar.update(last - bar.n)
    return run


def meta_test(run):
    """Episodes on each device by its name, and what results.json holds."""
    cfg, meta, key = run.cfg, run.state.meta, stream(run.cfg, 2)
    family = run.families.testing
    episodes = {
        name: jax.device_get(test(key, reported, cfg, family, device, cfg.batch_test, meta))
        for name, device in run.devices.items()
    }
    found = {name: jax.tree.map(summary, x.measured) for name, x in episodes.items()}
    first = next(iter(found.values()))
    measured = first["rates"]["mean"], first["pulses"]["mean"]
    chip = energy.chip_of(cfg, family, rows_of(cfg, family), *measured)
    return episodes, {
        "step": run.step,
        "theta": np.exp(meta.log_theta).tolist(),
        "baselines": family.baselines(),
        "energy": energy.report(chip),
        "devices": found,
        **first,
    }


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def draw(run, episodes, results, folder):
    """Draw the run's figures into its folder, and copy them to img/."""
    side = run.families.testing.side
    name, found = next(iter(episodes.items()))
    about = f"{run.cfg.tasks}, trained on {run.cfg.device}, seed {run.cfg.seed}"
    note = f"{folder}: {about}, iteration {run.step}; test on chips of {name}"
    for name, image in figures.of_run(run.rows, found, results, side, note).items():
        write(folder / name, image)
        try:
            write(HERE / "img" / name, image)
        except Refused as refused:
            print(f"warning: {refused}")


def execute(run, folder):
    """Meta-train, meta-test, draw and report."""
    where = (
        f"{jax.device_count()} of JAX's devices ({jax.default_backend()}), {cores()} cores"
    )
    print(f"run folder {folder}, tasks {run.cfg.tasks}, devices {run.cfg.device}; {where}")
    n = (run.families.about or {}).get("clipped")
    if n:
        print(
            f"{n} numbers of the test part were clipped to the range of the training part"
        )
    print("Ctrl-C is safe: what was saved stands, and --resume goes on from it")
    print("compiling, which takes up to a minute, comes first")
    save(run, folder)
    places_for(run.cfg.batch_test)  # a fault of the test must not wait for training
    tested = partial(reported, cfg=run.cfg, family=run.families.testing)
    for device in run.devices.values():
        jax.eval_shape(tested, stream(run.cfg, 2), run.state.meta, device=device)
    run = train(run, folder)
    episodes, results = meta_test(run)
    write_json(folder / "results.json", results)
    for name, found in episodes.items():
        write_arrays(folder / f"chips_{name}.npz", found.measured)
    print(figures.table(results))
    draw(run, episodes, results, folder)
    print(f"results and figures in {folder}/, the figures also in img/")


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
    jit = not jax.config.jax_disable_jit
    require(jit, "JAX_DISABLE_JIT is set, with which a run would take days: unset it")
    # a core each: threads of a product would be in each other's way
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    with suppress(RuntimeError):  # already set up by whoever called main
        if "JAX_NUM_CPU_DEVICES" not in os.environ:
            jax.config.update("jax_num_cpu_devices", cores())
    if not jax.config.jax_compilation_cache_dir:
        # by machine, as another may have another processor
        cache = HERE / "__pycache__" / platform.node()
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
        run, folder = prepare(argv)
        with held(folder):
            execute(run, folder)


def end_at_once():
    """Let Ctrl-C, or a reader that has gone, end even a long computation at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # where a shell has closed it
    sys.stdout.reconfigure(line_buffering=True, errors="replace")


if __name__ == "__main__":
    end_at_once()
    main()
