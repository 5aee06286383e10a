"""Meta-train a spiking network so that a few coarse, noisy pulses at its readout teach it a new task, and test it.

    deploy        new task: read     pulse(s)            meta-training query     meta-test
    t = 0 s       tread = 100 s      tprog = 101 s       tprog + twait = 151 s   ttest = 251 s
                                     (+1 s per further inner step)

Inner loop, on the chip: the delta rule on the readout, each synapse pulsed up, down or not as its gradient passes the
synapse's threshold. Outer loop, offline: Adam on the conductances that chips are programmed to and on the thresholds,
through reads, drift and pulses (MAML: Finn, Abbeel, Levine, ICML 2017). The task is regression of A sin(x + φ).

Both loops use closed forms. With e [T, L, H1] the traces of one read of the hidden crossbars for each of L input levels,
S_l = mean_t e eᵀ and m_l = mean_t e, a task's gradient is 2·mean_n(S_l(n) W − y_n m_l(n)) over its samples n, and its
expected squared error over all inputs is Wᵀ mean_l(S_l) W − 2·mean_l(ȳ_l m_l)·W + E[y²]. Pulse and read noise of synapses
are independent, so that its expectation over them is the same of W's mean, plus mean_l(S_l)'s diagonal times W's variance.
"""
import argparse
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import signal
import sys
import threading
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":    # first of all, as loading the libraries takes seconds
    def end_when_told():
        """Ctrl-C and SIGTERM end the process at once with one line: also within a computation or a library's callback,
        where Python's own interrupt waits or is lost. Nothing is lost: a checkpoint is replaced as a whole."""
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)    # every thread's, so that they wait for the one below

        def wait():
            number = signal.sigwait(ends)
            line = "train.py: interrupted; what was saved stands, and --resume goes on from it\n"
            os.write(2, ("\n"*os.isatty(2) + line).encode())    # below the progress bar
            os._exit(128 + number)

        threading.Thread(target=wait, daemon=True).start()

    end_when_told()

import jax
import jax.numpy as jnp
import numpy as np
from jax.example_libraries import optimizers
from tqdm import tqdm

import analog
import network

CHUNK = 200         # meta-iterations between two checkpoints and rows of metrics.csv
TEST_CHIPS = 64     # chips tested at a time, and for a row of metrics.csv
NOISE_DRAWS = 64    # draws of pulse and read noise that stand for their distribution on a chip
FIGURES = Path("img")


# ---- configuration --------------------------------------------------------------------------------------------------

def flag(default, unit, help, low=None, high=None, compiled=True):
    """A setting from low to high; compiled: whether a program compiled for one value is of no use for another."""
    return dataclasses.field(default=default, compare=compiled,
                             metadata={"unit": unit, "help": help, "low": low, "high": high})


MANY = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, and of the command line."""
    seed: int = flag(0, "N", "seed of every random draw", 0, 2**32 - 1)
    n_iter: int = flag(4000, "N", "meta-iterations", 0, 2**31 - 1, compiled=False)
    device: str = flag("pcm", "NAME|FILE", "device model: pcm, pcm_history, perf, or a JSON file of constants")
    n_inner: int = flag(1, "N", "inner steps: times that a new task is looked at and pulsed", 1, 64)
    n_bits: int = flag(2, "BITS", "bits of an update: at most 2^(bits−1) − 1 pulses per synapse and step", 2, 8)
    grad_thr: float = flag(1.0, "MSE/W", "thresholds at the start; meta-learned for each synapse and inner step", 1e-6, 1e6)
    shared_thr: bool = flag(False, "", "one threshold for all synapses, meta-learned for each inner step")
    task_size: int = flag(20, "N", "support samples of a task", 1, MANY)
    batch_train: int = flag(256, "N", "tasks per chip and meta-iteration", 1, MANY)
    n_chips: int = flag(1, "N", "chips per meta-iteration, each with noise, drift and tasks of its own", 1, MANY)
    batch_test: int = flag(1024, "N", "tasks of the meta-test, each on a chip of its own", 4, MANY, compiled=False)
    n_h0: int = flag(40, "N", "neurons of layer 0", 1, 2**12)
    n_h1: int = flag(40, "N", "neurons of layer 1", 1, 2**12)
    dac_bits: int = flag(7, "BITS", "resolution of the input converter", 1, 12)
    tau_mem: float = flag(0.01, "S", "time constant of the membranes, s", 1e-4, 1)
    tau_out: float = flag(0.002, "S", "time constant of the readout, s", 1e-4, 1)
    gain_out: float = flag(1.0, "GAIN", "what one spike adds to its trace, hence the scale of the readout", 1e-3, 1e3)
    lr_out: float = flag(0.1, "µS", "step size of Adam, µS and ln of threshold", 1e-6, 1e3)
    lr_drop: int = flag(None, "N", "iteration from which lr_out is divided by 10 (default: 60 %% of n_iter)", 0, 2**31 - 1)
    off_noise: float = flag(0.05, "SHARE", "programming error injected in meta-training, of a crossbar's largest G", 0, 1)
    target_fr: float = flag(2.0, "RATE", "target firing rate, spikes per 10 ms (2 = 200 Hz); needs lambda_fr", 0, 10)
    lambda_fr: float = flag(0.0, "WEIGHT", "weight of Σ_layers (target_fr − rate)² in the outer loss", 0, 1e38)
    tread: float = flag(100.0, "S", "time of the first read of a new task, s since deployment", 1e-3, 1e7)
    tprog: float = flag(101.0, "S", "time of its first pulse, s; each further inner step is 1 s later", 1e-3, 1e7)
    twait: float = flag(50.0, "S", "from tprog to the query in meta-training, s", 1e-3, 1e7)
    max_age: float = flag(1e5, "S", "age of a chip at its first read in meta-training: log-uniform, tread to this", 1e-3, 1e7)
    ttest: float = flag(251.0, "S", "time of the query in the meta-test, s since deployment", 1e-3, 1e7)


class UserError(Exception):
    """Something that the user can mend; its message is the one line shown, its status the exit status."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(message.splitlines()))    # what the user typed may hold line breaks
        self.status = status


# ---- tasks: to learn another family, replace the class, the two functions after it and YARDSTICKS -------------------

class Sinusoid(NamedTuple):
    """A sin(x + φ), as coefficients · (sin x, cos x): sines are then taken of x alone."""
    coefficients: jax.Array    # [2], A·(cos φ, sin φ)


def draw_task(key):
    """A ~ U[0.1, 5] and φ ~ U[0, π]."""
    amplitude, phase = jnp.array([0.1, 0.0]) + jnp.array([4.9, np.pi])*jax.random.uniform(key, (2,))
    return Sinusoid(amplitude*jnp.stack([jnp.cos(phase), jnp.sin(phase)]))


def target(task, x):
    """y of the task at its inputs x, of x's shape."""
    return task.coefficients[0]*jnp.sin(x) + task.coefficients[1]*jnp.cos(x)


YARDSTICKS = {"predicting 0": 4.252, "best function that ignores the task": 3.006}    # E[y²], and 2.55·(2/π)·cos x


class Query(NamedTuple):
    """A task's targets over the whole input range."""
    y: jax.Array        # [L], mean target over the level's cell
    y2: jax.Array       # mean squared target


class Trial(NamedTuple):
    """A task to be learned: its samples [task_size], as the chip sees them, and what is asked of it then."""
    x: jax.Array
    y: jax.Array
    support: jax.Array    # [L, 2], the samples by input level: their share, and their targets' sum over their number
    query: Query


def by_level(cfg, x, y):
    """Support of the samples x, y [N]."""
    empty = jnp.zeros((2**cfg.dac_bits, 2))
    return empty.at[network.level(cfg.dac_bits, x)].add(jnp.stack([jnp.ones_like(y), y], 1)/len(x))


def query_targets(cfg, task):
    """Query by Gauss-Legendre quadrature over each level's cell: the converter's error is counted in full."""
    low, high = network.X_RANGE
    centres, half_cell = network.level_centres(cfg.dac_bits), (high - low)/2**(cfg.dac_bits + 1)
    quadrature = zip(*map(np.ndarray.tolist, np.polynomial.legendre.leggauss(max(2, 64//2**cfg.dac_bits))))
    weights, y = zip(*((weight/2, target(task, centres + node*half_cell)) for node, weight in quadrature))
    return Query(sum(w*y for w, y in zip(weights, y)), sum(w*jnp.mean(y**2) for w, y in zip(weights, y)))


def draw_trial(key, cfg):
    """A task and task_size samples of it, x ~ U over the converter's span."""
    task_key, x_key = jax.random.split(key)
    task, (low, high) = draw_task(task_key), network.X_RANGE
    x = jax.random.uniform(x_key, (cfg.task_size,), minval=low, maxval=high)
    y = target(task, x)
    return Trial(x, y, by_level(cfg, x, y), query_targets(cfg, task))


# ---- inner loop: one task on one chip; of its levels and tasks each device of the computer takes an equal part -------

class Times(NamedTuple):
    """Of an episode, in s since deployment: first read, first pulse, query."""
    read: float
    prog: float
    query: float


class Step(NamedTuple):
    """An inner step: pulses that are to be fired."""
    key: jax.Array              # of their noise
    readout: analog.Crossbar    # [2, H1, 1], before them
    masks: jax.Array            # [n_pulses, 2, H1, 1], 1 where the j-th is fired
    t: float                    # s


PARTS = "parts"    # axis of the devices that share a chip


def part(x):
    """This device's part of x's leading axis."""
    return x.reshape(jax.lax.axis_size(PARTS), -1, *x.shape[1:])[jax.lax.axis_index(PARTS)]


def whole(x):
    """x of all the parts, joined along the leading axis."""
    return jax.lax.all_gather(x, PARTS, tiled=True)


def read_weights(key, device, readout, t):
    """Weights [H1] in a read of the readout alone."""
    return analog.weights(device, analog.read(key, device, readout, t))[:, 0]


def decays(cfg):
    return network.Decay(*(float(np.exp(-network.DT/tau)) for tau in (cfg.tau_mem, cfg.tau_out)))


def activity(key, cfg, device, chip, t):
    """Activity of this part's input levels, from one read of chip at time t (s)."""
    w = network.read(key, device, chip, t)
    active = network.simulate(decays(cfg), w, part(network.level_centres(cfg.dac_bits)))
    return active._replace(trace=cfg.gain_out*active.trace)


def second_moments(e):
    """Mean of e eᵀ over the rows of e [..., n, H]: [..., H, H]. As it is symmetric, its derivative can be one product in
    place of two equal ones."""
    half = jnp.einsum("...ni,...nj->...ij", e, jax.lax.stop_gradient(e))/e.shape[-2]
    moments = 2*half - jax.lax.stop_gradient(half)
    return (moments + jnp.swapaxes(moments, -1, -2))/2


def delta_rule(e, w, support, moments):
    """Gradient [H1] of the support's squared error, mean over samples and steps, at the readout w [H1], from this part's
    traces e [T, l, H1]. moments: form S_l, which serves all tasks of a chip, whose w differ; otherwise S_l w alone."""
    mean = jnp.mean(e, 0)
    if moments:
        s = whole(jnp.concatenate([second_moments(jnp.swapaxes(e, 0, 1)), mean[:, None]], 1))
        s, mean = s[:, :-1], s[:, -1]
        product = (support[:, 0] @ s.reshape(len(s), -1)).reshape(s.shape[1:]) @ w
        return 2*(product - support[:, 1] @ mean)
    table = whole(jnp.stack([jnp.mean((e @ w)[..., None]*e, 0), -mean], 1))
    return 2*jnp.einsum("lk,lkh->h", support, table)


def comparators(cfg, gradient, theta):
    """Masks [n_pulses, 2, H1, 1] of a step's up to 2^(n_bits−1) − 1 pulses: of the j-th, H(−g − jθ) on G+ and H(g − jθ) on
    G−, for the gradient [H1] and the thresholds θ [H1], or [1] where synapses share one."""
    j = jnp.arange(1.0, 2**(cfg.n_bits - 1))[:, None, None]
    return network.spike(jnp.stack([-gradient, gradient]) - j*theta)[..., None]


def fire(device, step):
    """The readout after the step."""
    return jax.tree.map(lambda x: x[-1], analog.pulse_train(step.key, device, step.readout, step.masks, step.t))


def adapt(chip_key, task_key, cfg, device, chip, theta, support, times, alone):
    """The n_inner steps, each from a read of all crossbars; the last is still to be fired. What a chip's tasks share, that is
    the reads of all but a pulsed readout, draws from chip_key; all else from task_key. alone: the chip has no other task."""
    steps = []
    for k in range(cfg.n_inner):
        chip_key, hidden_key = jax.random.split(chip_key)
        task_key, read_key, pulse_key = jax.random.split(task_key, 3)
        t = times.prog + k
        active = activity(hidden_key, cfg, device, chip, t if k else times.read)
        readout = fire(device, steps[-1]) if k else chip.readout
        w = read_weights(read_key, device, readout, t) if k else active.readout
        gradient = delta_rule(active.trace, w, support, moments=k > 0 and not alone)
        steps.append(Step(pulse_key, readout, comparators(cfg, gradient, theta[k]), t))
    return steps


def expected_weights(key, cfg, device, step, t):
    """Mean and variance [H1] of the weights in a read at time t after the last step, over the noise of its pulses and of the
    read. Of a first step it is the chip's: NOISE_DRAWS draws from key serve all tasks. Of a later one each task has a draw."""
    key, n_draws = (key, NOISE_DRAWS) if cfg.n_inner == 1 else (step.key, 1)
    outcome = analog.outcome(key, device, step.readout, len(step.masks), step.t, t, n_draws)
    g = jax.tree.map(lambda x: x[0] + (step.masks*jnp.diff(x, axis=0)).sum(0), outcome)
    return analog.weights(device, g.mean)[:, 0], g.var.sum(0)[:, 0]/(device.g_max - device.g_min)**2


def mse(e, w, w_var, query):
    """Squared error in expectation over the inputs and over the noise of the readouts, whose weights have the mean w and the
    variance w_var [N, H1]; mean over tasks and over the steps of this part's traces e [T, l, H1]."""
    means = whole(jnp.mean(e, 0))
    second = jax.lax.pmean(second_moments(e.reshape(-1, e.shape[-1])), PARTS)
    return (jnp.sum(second*second_moments(w)) + jnp.diag(second) @ w_var.mean(0)
            - 2/means.shape[0]/len(w)*jnp.sum(means.T*(w.T @ query.y)) + query.y2.mean())


def mse_alone(e, w, query):
    """mse of the only task of its chip, from the outputs e w of all levels: no second moments are worth while."""
    y = e @ w
    return jnp.mean(y**2) - 2*jnp.mean(query.y*y.mean(0)) + query.y2


# ---- outer loop -----------------------------------------------------------------------------------------------------

class Meta(NamedTuple):
    """The meta-parameters."""
    g: network.Network      # µS, the conductances that chips are programmed to
    log_theta: jax.Array    # [n_inner, H1], ln of the thresholds; [n_inner, 1] where synapses share one


class Metrics(NamedTuple):
    """Of a meta-iteration: loss of the query, firing rates in Hz and pulses of an adaptation."""
    loss: jax.Array
    rate0: jax.Array
    rate1: jax.Array
    pulses: jax.Array


def meta_loss(meta, key, cfg, device):
    """Outer loss of one chip and this part's tasks, and its Metrics."""
    tasks_key, chip_key, age_key, adapt_key, noise_key, hidden_key = jax.random.split(key, 6)
    delay = cfg.tread*((cfg.max_age/cfg.tread)**jax.random.uniform(age_key) - 1)
    times = Times(*(t + delay for t in (cfg.tread, cfg.tprog, cfg.tprog + cfg.twait)))
    chip = network.fabricate(chip_key, device._replace(prog_err=cfg.off_noise), meta.g)
    active = activity(hidden_key, cfg, device, chip, times.query)

    def task(key):
        trial_key, pulse_key = jax.random.split(key)
        trial = draw_trial(trial_key, cfg)
        steps = adapt(adapt_key, pulse_key, cfg, device, chip, jnp.exp(meta.log_theta), trial.support, times, alone=False)
        w, w_var = expected_weights(noise_key, cfg, device, steps[-1], times.query)
        return w, w_var, trial.query, sum(step.masks.sum(0) for step in steps)

    w, w_var, query, pulses = jax.vmap(task)(part(jax.random.split(tasks_key, cfg.batch_train)))
    loss, rates = mse(active.trace, w, w_var, query), jax.lax.pmean((active.rate0, active.rate1), PARTS)
    penalty = sum((cfg.target_fr - 0.01/network.DT*rate)**2 for rate in rates)
    return loss + cfg.lambda_fr*penalty, Metrics(loss, *(rate/network.DT for rate in rates), pulses.mean(0).sum())


def optimizer(cfg):
    """Adam with lr_out, divided by 10 from step lr_drop on: (init, update, parameters of a state)."""
    return optimizers.adam(lambda step: cfg.lr_out*jnp.where(step < cfg.lr_drop, 1.0, 0.1))


@partial(jax.jit, static_argnums=(0, 1))
def start(cfg, device):
    """Optimizer state before training."""
    g = network.init(stream(cfg, 0), device, cfg.n_h0, cfg.n_h1)
    thresholds = cfg.n_inner, 1 if cfg.shared_thr else cfg.n_h1
    return optimizer(cfg)[0](Meta(g, jnp.full(thresholds, float(np.log(cfg.grad_thr)))))


def stream(cfg, index):
    """Key of the start (0), of meta-training (1), of the meta-test (2), of the drift study (3), of a chip's life (4)."""
    return jax.random.fold_in(jax.random.key(cfg.seed), index)


def meta_of(state):
    """The Meta of an optimizer state."""
    return optimizers.adam(0.0)[2](state)


def project(device, state):
    """Optimizer state with its conductances clipped to the device's range."""
    *conductances, threshold = state.packed_state
    clipped = [[jnp.clip(g, device.g_min, device.g_max), *moments] for g, *moments in conductances]
    return optimizers.OptimizerState((*clipped, threshold), state.tree_def, state.subtree_defs)


def on_chips(one, keys, *shared, parts=1):
    """one(key, *shared) of every key's own chip, stacked, the chips spread over as many devices as divide their number, and
    each chip over as many of the devices left as divide `parts`; a result is the mean of its parts.

    On a CPU the chips of a device take turns, as its caches hold one; elsewhere they run as a batch."""
    def local(keys, *shared):
        here = partial(lambda shared, key: one(key, *shared), shared)
        stacked = jax.lax.map(here, keys) if jax.default_backend() == "cpu" else jax.vmap(here)(keys)
        return jax.lax.pmean(stacked, PARTS)

    n_chips = math.gcd(len(keys), jax.device_count())
    n_parts = math.gcd(parts, jax.device_count()//n_chips)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:n_chips*n_parts]).reshape(n_chips, n_parts), ("chips", PARTS))
    everywhere, by_chip = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("chips")
    stacked = jax.shard_map(local, mesh=mesh, in_specs=(by_chip, *[everywhere]*len(shared)), out_specs=by_chip,
                            check_vma=False)(keys, *shared)
    return jax.lax.with_sharding_constraint(stacked, jax.sharding.NamedSharding(mesh, everywhere))


@partial(jax.jit, static_argnums=(0, 1))
def train_chunk(cfg, device, state, first, last):
    """Optimizer state after meta-iterations first … last − 1, and their mean Metrics."""
    _, update, _ = optimizer(cfg)

    def gradient(key, meta):
        return jax.grad(meta_loss, has_aux=True)(meta, key, cfg, device)

    def iterate(step, carry):
        state, total = carry
        keys = jax.random.split(jax.random.fold_in(stream(cfg, 1), step), cfg.n_chips)
        parts = math.gcd(cfg.batch_train, 2**cfg.dac_bits)
        mean, metrics = jax.tree.map(lambda x: x.mean(0), on_chips(gradient, keys, meta_of(state), parts=parts))
        state = project(device, update(step.astype(jnp.float32), mean, state))
        return state, jax.tree.map(jnp.add, total, metrics)

    state, total = jax.lax.fori_loop(first, last, iterate, (state, Metrics(0.0, 0.0, 0.0, 0.0)))
    return state, jax.tree.map(lambda x: x/(last - first), total)


# ---- meta-test ------------------------------------------------------------------------------------------------------

class Episode(NamedTuple):
    """One task on one freshly programmed chip; K inner steps."""
    mse: jax.Array         # [K+1], all time steps, before adaptation and after each inner step
    mse_last: jax.Array    # [K+1], at the last time step
    pulses: jax.Array      # fired in all
    touched: jax.Array     # share of the 2·H1 readout devices
    rate0: jax.Array       # Hz
    rate1: jax.Array
    dw: jax.Array          # mean |ΔW| of a programmed synapse
    dw_gd: jax.Array       # mean |ΔW| of a first step of gradient descent at the largest stable rate
    x: jax.Array           # [task_size], support
    y: jax.Array
    curves: jax.Array      # [3, L], over the levels: truth, mean output before and after


def episode(key, cfg, device, meta, times):
    trial_key, chip_key, shared_key, pulse_key, hidden_key, read_key = jax.random.split(key, 6)
    trial, chip = draw_trial(trial_key, cfg), network.fabricate(chip_key, device, meta.g)
    steps = adapt(shared_key, pulse_key, cfg, device, chip, jnp.exp(meta.log_theta), trial.support, times, alone=True)
    active = activity(hidden_key, cfg, device, chip, times.query)
    readouts = [*(step.readout for step in steps), fire(device, steps[-1])]
    w = [read_weights(key, device, readout, times.query)
         for key, readout in zip(jax.random.split(read_key, len(readouts)), readouts)]
    e = active.trace
    pulses = sum(step.masks.sum(0) for step in steps)
    touched = jnp.sign(pulses.sum(0))
    before, after = (analog.weights(device, readout.g) for readout in (readouts[0], readouts[-1]))
    dw = jnp.sum(jnp.abs(after - before)*touched)/jnp.maximum(touched.sum(), 1.0)
    rows = e[:, network.level(cfg.dac_bits, trial.x)].reshape(-1, e.shape[-1])
    hessian = 2*second_moments(rows)
    dw_gd = 2/jnp.maximum(jnp.linalg.eigvalsh(hessian)[-1], 1e-6)*jnp.mean(jnp.abs(
        delta_rule(e, w[0], trial.support, moments=False)))
    curves = jnp.stack([trial.query.y, *(e.mean(0) @ w[i] for i in (0, -1))])
    errors, errors_last = (jnp.stack([mse_alone(e, w, trial.query) for w in w]) for e in (e, e[-1:]))
    return Episode(errors, errors_last, pulses.sum(), jnp.mean(pulses > 0), active.rate0/network.DT, active.rate1/network.DT,
                   dw, dw_gd, trial.x, trial.y, curves)


def aging(key, cfg, device, meta, ages):
    """Squared errors [ages, 4] of one chip at each of the ages (s): never adapted, adapted once at tprog, adapted again to
    the same task at that age with the query ttest − tprog later, and that again with pulses that act on the drifted
    conductances. The four share their noise, so that they differ by what they do alone."""
    trial_key, chip_key, once_key, again_key, *query_keys = jax.random.split(key, 6)
    trial, chip, theta = draw_trial(trial_key, cfg), network.fabricate(chip_key, device, meta.g), jnp.exp(meta.log_theta)

    def adapted(key, device, readout, times):
        return fire(device, adapt(*jax.random.split(key), cfg, device, chip._replace(readout=readout), theta,
                                  trial.support, times, alone=True)[-1])

    def errors(key, readouts, t):
        hidden_key, read_key = jax.random.split(key)
        e = activity(hidden_key, cfg, device, chip, t).trace
        return [mse_alone(e, read_weights(read_key, device, readout, t), trial.query) for readout in readouts]

    once = adapted(once_key, device, chip.readout, Times(cfg.tread, cfg.tprog, cfg.ttest))

    def at(t):
        again = Times(t - 1.0, t, t + cfg.ttest - cfg.tprog)
        twice = [adapted(again_key, device._replace(set_on_drifted=x), once, again) for x in (0.0, 1.0)]
        return jnp.stack([*errors(query_keys[0], (chip.readout, once), t), *errors(query_keys[1], twice, again.query)])

    return jax.lax.map(at, ages)


@partial(jax.jit, static_argnums=(0, 1, 2))
def test_batch(experiment, cfg, device, keys, meta, when):
    return on_chips(lambda key, meta, when: experiment(key, cfg, device, meta, when), keys, meta, when)


def test(experiment, cfg, device, meta, when, n, key):
    """experiment of n chips, TEST_CHIPS at a time so that one compiled program serves any n; NumPy arrays [n, ...]."""
    keys = jax.random.split(key, -(-n//TEST_CHIPS)*TEST_CHIPS).reshape(-1, TEST_CHIPS)
    parts = [jax.device_get(test_batch(experiment, cfg, device, batch, meta, when)) for batch in keys]
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


def summary(x):
    """Mean and half-width of its 95 % confidence interval over axis 0."""
    return {"mean": np.mean(x, 0).tolist(), "ci95": (1.96*np.std(x, 0, ddof=1)/len(x)**0.5).tolist(), "n": len(x)}


# ---- run folder -----------------------------------------------------------------------------------------------------

STATE = [name + moment for name in (*network.Network._fields, "log_theta") for moment in ("", "_m", "_v")]    # its leaves
COLUMNS = ("step", "loss", "rate0_hz", "rate1_hz", "pulses", "test_before", "test_mse", "test_ci95")


def write(path, data):
    """Replace the file as a whole: a reader, or a run killed at any moment, finds the old one or the new one.
    Of the hosts of a distributed run the first alone writes."""
    if jax.process_index():
        return
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is untouched", 1) from None


def digest(arrays):
    text = hashlib.sha256()
    for name in sorted(arrays):
        text.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return np.frombuffer(text.digest(), np.uint8)


class Run(NamedTuple):
    """A run at one moment, all that it needs to go on: settings, optimizer state, next step and rows of metrics.csv."""
    cfg: Config
    device: analog.Device
    state: optimizers.OptimizerState
    step: int = 0
    rows: list = []


def settings_of(run):
    """The settings as a dictionary of JSON's types."""
    return {**dataclasses.asdict(run.cfg), "device_constants": run.device._asdict()}


def save(run, folder):
    """checkpoint.npz and metrics.csv."""
    arrays = dict(zip(STATE, map(np.asarray, jax.tree.leaves(run.state))))
    arrays |= {"theta": np.exp(arrays["log_theta"]), "step": np.array(run.step), "rows": np.array(run.rows, np.float64),
               "settings": np.array(json.dumps(settings_of(run)))}
    file = io.BytesIO()
    np.savez(file, **arrays, digest=digest(arrays))
    write(folder/"checkpoint.npz", file.getvalue())
    table = io.StringIO()
    header = [*COLUMNS, *(f"theta_{k}" for k in range(run.cfg.n_inner))]
    csv.writer(table).writerows([header, *([int(row[0]), *row[1:]] for row in run.rows)])
    write(folder/"metrics.csv", table.getvalue().encode())


def load(folder):
    """The folder's Run; a file that is not exactly as it was written is refused."""
    path = folder/"checkpoint.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not np.array_equal(arrays.pop("digest"), digest(arrays)):
            raise ValueError("its contents are not those that were written")
        settings = json.loads(str(arrays["settings"]))
        device = analog.check_device(settings.pop("device_constants"))
        cfg = Config(**settings)
        structure = jax.tree.structure(jax.eval_shape(lambda: start(cfg, device)))
        state = jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in STATE])
        return Run(cfg, device, state, int(arrays["step"]), arrays["rows"].tolist())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: nothing to resume") from None
    except Exception as error:    # a damaged archive fails in many ways, all the same to the user
        raise UserError(f"{path} is damaged or no checkpoint of this version ({error}); nothing was changed") from None


def hold(folder):
    """The folder, made if need be and locked to this process until it ends."""
    if jax.process_index():
        return contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder/".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(folder/".lock")):    # moved aside by another meanwhile
            raise BlockingIOError
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another run; name another with --run_dir") from None
    except OSError as error:
        raise UserError(f"cannot use the run folder {folder}: {error.strerror}; name another with --run_dir") from None
    return lock


def move_aside(folder):
    """Rename a folder that holds a checkpoint to the first free folder.1, folder.2, ..."""
    folder, n = folder.absolute(), 1
    while (free := folder.with_name(f"{folder.name}.{n}")).exists():
        n += 1
    try:
        folder.rename(free)
    except OSError as error:
        raise UserError(f"cannot move the earlier run {folder} aside: {error.strerror}; name another folder with --run_dir"
                        ) from None
    print(f"earlier run: {folder.name} is now {free.name}")


# ---- command line ---------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def given(argv):
    """Of the command line: the settings given, as a dictionary, --run_dir and --resume."""
    parser = Parser(prog="train.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    for field in dataclasses.fields(Config):
        default = "" if field.default is None or field.default is False else f" (default: {field.default})"
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": field.metadata["unit"]}
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=field.metadata["help"] + default, **kind)
    parser.add_argument("--perf", action="store_true", help="ideal devices, the same as --device perf")
    parser.add_argument("--run_dir", metavar="DIR", help="folder of this run (default: run/ and the device's name)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the run folder's checkpoint; once n_iter is reached, only test")
    flags = vars(parser.parse_args(argv))
    perf, run_dir, resume = map(flags.pop, ("perf", "run_dir", "resume"))
    if perf and flags.setdefault("device", "perf") != "perf":
        raise UserError("--perf is --device perf: give one of the two")
    return flags, run_dir, resume


def check(cfg):
    """Refuse settings that make no sense."""
    for field in dataclasses.fields(Config):
        value, low, high = getattr(cfg, field.name), *map(field.metadata.get, ("low", "high"))
        if low is not None and not low <= value <= high:
            raise UserError(f"--{field.name} must be from {low} to {high}, not {value}")
    if jax.process_count() > 1 and (cfg.n_chips % jax.device_count() or TEST_CHIPS % jax.device_count()):
        raise UserError(f"--n_chips and {TEST_CHIPS} must be multiples of the {jax.device_count()} devices of all hosts")
    last = cfg.tprog + cfg.n_inner - 1
    if not (cfg.tread <= cfg.max_age and cfg.tread < cfg.tprog and cfg.twait >= cfg.n_inner and cfg.ttest > last):
        raise UserError(f"times are out of order: they must keep tread ({cfg.tread:g}) ≤ max_age ({cfg.max_age:g}), tread "
                        f"< tprog ({cfg.tprog:g}), twait ({cfg.twait:g}) ≥ n_inner ({cfg.n_inner}) and ttest "
                        f"({cfg.ttest:g}) > last pulse ({last:g})")


def device_of(flags):
    """The Device that the flags name."""
    try:
        return analog.load_device(flags.get("device", Config.device))
    except ValueError as error:
        raise UserError(f"--device: {error}") from None


def configure(flags):
    """Config and Device of a new run."""
    device = device_of(flags)
    cfg = Config(**{**flags, "device": device.name})
    if cfg.lr_drop is None:
        cfg = dataclasses.replace(cfg, lr_drop=cfg.n_iter*6//10)
    check(cfg)
    return cfg, device


MAY_CHANGE = "n_iter", "lr_drop", "batch_test", "ttest"    # between a checkpoint and its --resume


def resumed(flags, folder):
    """The folder's Run, with the flags that may change."""
    run = load(folder)
    if "device" in flags and device_of(flags) != run.device:
        raise UserError(f"{folder} holds a run with other constants of --device {run.cfg.device}: resume it without "
                        "--device and --perf")
    for name, value in flags.items():
        if name not in (*MAY_CHANGE, "device") and value != getattr(run.cfg, name):
            raise UserError(f"{folder} holds a run with --{name} {getattr(run.cfg, name)}, not {value}: resume it without "
                            "that flag, or start another with --run_dir")
    cfg = dataclasses.replace(run.cfg, **{name: value for name, value in flags.items() if name in MAY_CHANGE})
    check(cfg)
    if "n_iter" in flags and cfg.n_iter < run.step:
        raise UserError(f"{folder} is past --n_iter {cfg.n_iter}: its checkpoint is of iteration {run.step}")
    if cfg.n_iter != run.cfg.n_iter and "lr_drop" not in flags:
        print(f"schedule: lr_out drops at iteration {cfg.lr_drop}, as in the checkpoint")
    return run._replace(cfg=cfg)


def prepare(argv):
    """The Run to go on from, its folder and the lock on it."""
    flags, run_dir, resume = given(argv)
    folder = Path(run_dir or f"run/{device_of(flags).name}")
    if resume:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder} to resume; name it with --run_dir")
        lock = hold(folder)
        return resumed(flags, folder), folder, lock
    cfg, device = configure(flags)
    run = Run(cfg, device, start(cfg, device))
    lock = hold(folder)
    if (folder/"checkpoint.npz").exists() and jax.process_index() == 0:
        move_aside(folder)
        lock = hold(folder)
    return run, folder, lock


# ---- main -----------------------------------------------------------------------------------------------------------

def assert_sound(state, loss, rates, step, folder):
    """Stop a run that has diverged; the last checkpoint stands."""
    def stop(what, advice):
        raise UserError(f"stopped at iteration {step}: {what}; {advice}. The last good checkpoint is in {folder}", 1)

    if not all(np.isfinite(x).all() for x in (loss, *jax.tree.leaves(state))):
        stop("the loss is not finite", "try a smaller --lr_out")
    for layer, rate in enumerate(rates):
        if rate <= 0:
            stop(f"all neurons of layer {layer} are silent", "try a smaller --lr_out, or --lambda_fr 0.01")
        if rate >= 0.95/network.DT:    # at rest a neuron has nothing to fire for
            stop(f"all neurons of layer {layer} fire at nearly every step", "try a smaller --lr_out, or --lambda_fr 0.01")


def train(run, folder):
    """The Run after meta-training up to n_iter, saved every CHUNK iterations."""
    cfg, times = run.cfg, Times(run.cfg.tread, run.cfg.tprog, run.cfg.ttest)
    with tqdm(total=cfg.n_iter, initial=run.step, disable=None, unit="it", dynamic_ncols=True) as bar:
        while run.step < cfg.n_iter:
            last = min((run.step//CHUNK + 1)*CHUNK, cfg.n_iter)
            state, metrics = jax.device_get(train_chunk(cfg, run.device, run.state, run.step, last))
            meta = meta_of(state)
            episodes = test(episode, cfg, run.device, meta, times, TEST_CHIPS, stream(cfg, 2))
            assert_sound(state, metrics.loss, (episodes.rate0.mean(), episodes.rate1.mean()), last, folder)
            tested = summary(episodes.mse)
            row = (last, *metrics, tested["mean"][0], tested["mean"][-1], tested["ci95"][-1],
                   *np.exp(np.median(meta.log_theta, 1)))
            run = run._replace(state=state, step=last, rows=[*run.rows, [float(x) for x in row]])
            save(run, folder)
            bar.update(last - bar.n)
            bar.set_postfix_str(f"loss {metrics.loss:.3f}, test {tested['mean'][-1]:.3f}")
    return run


SINCE = np.append(0, np.logspace(2.5, 7, 10)).astype(np.float32)    # s after the age of meta-training's query


def meta_test(run):
    """Episodes, and their summary with that of the drift study for results.json."""
    cfg, device, meta = run.cfg, run.device, meta_of(run.state)
    times = Times(cfg.tread, cfg.tprog, cfg.ttest)
    episodes = test(episode, cfg, device, meta, times, cfg.batch_test, stream(cfg, 2))
    elsewhere = test(episode, cfg, analog.aihwkit(device), meta, times, cfg.batch_test, stream(cfg, 2))
    n_drift = min(cfg.batch_test, 4*TEST_CHIPS)
    ages = cfg.tprog + cfg.twait + SINCE
    errors = test(aging, cfg, device, meta, ages, n_drift, stream(cfg, 3))
    scalars = {name: summary(getattr(episodes, name)) for name in Episode._fields if name not in ("x", "y", "curves")}
    names = "never", "once", "again", "again_on_drifted"
    drift = {"age_s": ages.tolist(), **{name: summary(errors[:, :, i]) for i, name in enumerate(names)}}
    return episodes, {"step": run.step, **scalars, "transfer": summary(elsewhere.mse),
                      "theta": np.exp(meta.log_theta).tolist(), "drift": drift}


def report(results):
    """The result table."""
    def line(label, x, index=..., unit="", scale=1):
        mean, half = (scale*np.asarray(x[key])[index] for key in ("mean", "ci95"))
        print(f"  {label:<44}{mean:9.3f} ± {half:.3f} {unit}")

    print(f"{results['mse']['n']} tasks, each on its own freshly programmed chip; mean ± 95 % interval")
    for what, error in YARDSTICKS.items():
        print(f"  {'MSE of ' + what:<44}{error:9.3f}")
    line("MSE before adaptation, all time steps", results["mse"], 0)
    for k in range(1, len(results["mse"]["mean"])):
        line(f"MSE after inner step {k}", results["mse"], k)
    line("MSE after adaptation, last time step", results["mse_last"], -1)
    line("MSE before adaptation on aihwkit's devices", results["transfer"], 0)
    line("MSE after adaptation on aihwkit's devices", results["transfer"], -1)
    line("pulses per adaptation", results["pulses"])
    line("readout devices touched", results["touched"], unit="%", scale=100)
    line("firing rate, layer 0", results["rate0"], unit="Hz")
    line("firing rate, layer 1", results["rate1"], unit="Hz")
    line("|ΔW| per programmed synapse", results["dw"])
    largest_stable = max(results["dw_gd"]["mean"], 1e-12)    # 0 where nothing is wrong, or nothing fires
    print(f"  {'  over a step of gradient descent (stable)':<44}{results['dw']['mean']/largest_stable:9.1f}")
    print(f"  {'  over a step of Adam at 1e-3':<44}{results['dw']['mean']/1e-3:9.1f}")


def draw(run, episodes, results):
    """Write the run's figures; their paths."""
    from img import figures    # not before: matplotlib takes a third of a second to load
    row = dict(zip(COLUMNS, np.array(run.rows).T))    # without the thresholds
    drawn = {"meta_testing": figures.testing(network.level_centres(run.cfg.dac_bits), episodes, results),
             "drift": figures.aging(results["drift"], run.cfg.tprog),
             **({"meta_training": figures.training(row, YARDSTICKS, TEST_CHIPS)} if row else {})}
    suffix = "" if run.cfg.device == "pcm" else f"_{run.cfg.device}"
    paths = [FIGURES/f"{name}{suffix}.png" for name in drawn]
    try:
        FIGURES.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {FIGURES}: {error.strerror}", 1) from None
    for path, figure in zip(paths, drawn.values()):
        write(path, figures.png(figure))
    return paths


def announce(run, folder):
    mode = f"{run.cfg.device} devices, seed {run.cfg.seed}, run folder {folder}"
    print(f"meta-analog on {jax.default_backend()} ({jax.device_count()} devices, {cores()} cores): {mode}")
    changed = {field.name: getattr(run.cfg, field.name) for field in dataclasses.fields(Config)
               if field.name not in ("device", "lr_drop", "seed") and getattr(run.cfg, field.name) != field.default}
    words = (f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
    print(f"settings: {' '.join(words) or 'all default'}")
    if run.step:
        print(f"resuming after iteration {run.step} of {run.cfg.n_iter}")


def execute(run, folder):
    """Meta-train, meta-test, report and draw."""
    announce(run, folder)
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy", "matplotlib")}
    write(folder/"config.json", json.dumps({"config": settings_of(run), "versions": versions}, indent=1).encode())
    save(run, folder)
    run = train(run, folder)
    print(f"testing {run.cfg.batch_test} chips", flush=True)
    episodes, results = meta_test(run)
    write(folder/"results.json", json.dumps(results, indent=1).encode())
    report(results)
    paths = draw(run, episodes, results)
    print(f"results in {folder}/ (config.json metrics.csv results.json checkpoint.npz), figures in "
          f"{' '.join(map(str, paths))}")


# On a CPU every core is a device of its own: threads within an operation only wait for each other. XLA's YNN kernels are
# slower on a sum over thousands of tasks.
CPU_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_cpu_experimental_ynn_fusion_type="


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep_compiled():
    """Keep compiled programs beside Python's own, for later runs on this machine: another may have another processor. What
    cannot be kept or read is compiled again, without a word."""
    warnings.filterwarnings("ignore", ".*persistent compilation cache")
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(__file__).parent/"__pycache__"/platform.node()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def configure_devices():
    """A CPU device per core, so that chips are spread over them; hosts that share a coordinator act as one machine."""
    with contextlib.suppress(OSError, AttributeError):    # where the C library is another
        ctypes.CDLL(None).mallopt(-8, 2)    # M_ARENA_MAX: more pools hold on to 80 MB of the compiler's; one is slow
    if CPU_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{CPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}"    # the user's own come last and win
    with contextlib.suppress(RuntimeError):    # already set up by whoever called main
        jax.config.update("jax_num_cpu_devices", cores())
    keep_compiled()
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        place = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))    # else the cluster tells
        try:
            jax.distributed.initialize(None, *(int(x) if x else None for x in place))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot join the hosts at JAX_COORDINATOR_ADDRESS: {str(error).splitlines()[0]}") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def complain(message, status):
    print(f"train.py: {message}", file=sys.stderr)
    return status


def main(argv=None):
    """Run the command line; the exit status."""
    try:
        configure_devices()
        run, folder, lock = prepare(argv)
        with lock:
            execute(run, folder)
    except UserError as error:
        return complain(error, error.status)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return complain("out of memory; try fewer tasks (--batch_train), chips, levels (--dac_bits) or neurons", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
