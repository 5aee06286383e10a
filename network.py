"""A network of leaky integrate-and-fire (LIF) neurons whose weights are read from crossbars.

    u0 = input converter(x), held for the run             x in [−5, 5], 2^dac_bits levels
    v0 ← α v0 + [u0, 2]·W0 − z0,  z0 = H(v0 − 1)          layer 0: membranes and spikes
    v1 ← α v1 + [z0, 1]·W1 − z1,  z1 = H(v1 − 1)          layer 1
    e  ← κ e + gain·z1                                    trace of the spikes
    ŷ  = e·W2                                             leaky-integrator readout, linear in W2

A spike resets its membrane by subtraction. The input drives several rows of its crossbar, and the
bias of layer 0 as many: each weight W0 is a mean over them, which lessens read noise, the spread of
drift and the error of programming. The last row of a later crossbar is its bias. Drift compensation
scales the weights of a hidden neuron by one number, Σ G of its devices in a reference read over
Σ G in the present read. Hidden activity depends on the input's level and on the chip, never on the
task, so it is simulated once per level. To draw the network at work, run this file.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import analog

# ---- constants -----------------------------------------------------------------------------------

N_STEPS = 100  # time steps T of one presentation
DT = 1e-3  # s, one step
THRESHOLD = 1.0  # of a membrane
X_RANGE = (-5.0, 5.0)  # span of the input converter
BIAS = 2.0  # the constant that drives the bias of layer 0
# Every readout device at the start, share of the range above g_min: 0.5 µS on PCM.
READOUT_START = 0.4 / 11.9


# ---- types ---------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One value per crossbar: conductances [2, rows, cols], crossbars or weights [rows,
    cols]."""

    # layer by layer, [2, inputs + 1, neurons]; the first [2, 2·n_rows, neurons], one half of
    # the rows for the input and one for the bias
    hidden: tuple
    readout: Any  # [2, neurons of the last layer, 1]


class Chip(NamedTuple):
    """A deployed network."""

    xbars: Network  # of analog.Crossbar
    # Σ G (µS) of the devices of each hidden neuron in a read at age t0, for drift compensation
    reference: tuple


class Dynamics(NamedTuple):
    """Constants of neurons and traces."""

    alpha: tuple  # factor by which the membranes of each layer decay in one time step
    kappa: float  # factor by which a trace decays in one time step
    gain: float  # what one spike adds to its trace


# ---- neurons -------------------------------------------------------------------------------------


def spike(u):
    """1 where u > 0, else 0; its derivative is that of the fast sigmoid u/(1 + |u|), which
    is 1/(1 + |u|)²."""
    sigmoid = u / (1 + jnp.abs(u))
    step = (u > 0).astype(u.dtype)
    slope = sigmoid - jax.lax.stop_gradient(sigmoid)  # 0, but for its derivative
    return step + slope


def lif_step(alpha, v, drive):
    """Membrane potentials one time step after v."""
    return alpha * v + drive - spike(v - THRESHOLD)


def over_time(step, inputs):
    """The states [T, ...] of a recursion step(state, inputs[t]) from rest, that is 0. On an
    accelerator ten time steps are unrolled, which makes it six times as fast."""

    def both(state, now):
        state = step(state, now)
        return state, state

    rest = jnp.zeros_like(inputs[0])
    unroll = 1 if jax.default_backend() == "cpu" else 10
    _, states = jax.lax.scan(both, rest, inputs, unroll=unroll)
    return states


def potentials(alpha, drive):
    """Membrane potentials [T, ...] of neurons from rest under drive [T, ...]."""
    step = partial(lif_step, alpha)
    return over_time(step, drive)


def lif(alpha, drive):
    """Spikes [T, ...] of neurons from rest under drive [T, ...]."""
    return spike(potentials(alpha, drive) - THRESHOLD)


def trace(dynamics, z):
    """Traces [T, ...] of the spikes z [T, ...]."""

    def step(e, z):
        return dynamics.kappa * e + dynamics.gain * z

    return over_time(step, z)


# ---- network -------------------------------------------------------------------------------------


def level(n_bits, x):
    """Index of the input converter's level for x, clipped to its span."""
    low, high = X_RANGE
    n_levels = 2**n_bits
    share = (x - low) / (high - low)
    index = (share * n_levels).astype(jnp.int32)
    return jnp.clip(index, 0, n_levels - 1)


def level_centres(n_bits):
    """The input that each level stands for, the centre of its cell, [2^n_bits]."""
    low, high = X_RANGE
    n_levels = 2**n_bits
    cell = (high - low) / n_levels
    return low + cell * jnp.arange(0.5, n_levels)


def simulate(dynamics, hidden, u):
    """Traces [T, L, H] of the last layer of the network with hidden weights, a tuple of
    [inputs + 1, neurons], for each of the inputs u [L]; and the mean rate (Hz) of each
    layer, [layers]."""
    signal = jnp.broadcast_to(u[:, None], (N_STEPS, len(u), 1))
    rates = []
    for alpha, w in zip(dynamics.alpha, hidden, strict=True):
        drive = signal @ w[:-1] + w[-1]  # [T, L, neurons]
        signal = lif(alpha, drive)
        rates.append(jnp.mean(signal) / DT)
    return trace(dynamics, signal), jnp.stack(rates)


def each(read, key, device, xbars, t):
    """[read(key, device, crossbar, t)] of every crossbar, each with a key of its own."""
    keys = jax.random.split(key, len(xbars))
    pairs = zip(keys, xbars, strict=True)
    return [read(key, device, xbar, t) for key, xbar in pairs]


def column_sums(device, g):
    """Σ G (µS) of the devices of each neuron [neurons] in a read g [2, rows, neurons]; at
    least a thousandth of the range, as a column may read as 0."""
    total = jnp.sum(g, (0, 1))
    return jnp.maximum(total, 1e-3 * analog.span(device))


def assemble(key, device, make, g):
    """Chip of the conductances g (µS), a Network of [2, rows, cols]; make(key, device, g)
    makes all of its devices at once, from their conductances in one row."""
    make_key, read_key = jax.random.split(key)
    row, unravel = ravel_pytree(g)
    made = make(make_key, device, row)
    xbars = jax.tree.map(analog.Crossbar, *map(unravel, made))
    reads = each(analog.read, read_key, device, xbars.hidden, device.t0)
    sums = partial(column_sums, device)
    reference = tuple(map(sums, reads))
    return Chip(xbars, reference)


def mean_over_rows(w):
    """What the input 1 and the bias add to each neuron [2, neurons], of the weights of all
    rows [2·n_rows, neurons]."""
    of_input, of_bias = jnp.split(w, 2)
    from_input = jnp.mean(of_input, 0)
    from_bias = BIAS * jnp.mean(of_bias, 0)
    return jnp.stack([from_input, from_bias])


def read_hidden(key, device, chip, t, compensate):
    """Weights [inputs + 1, neurons] of the hidden layers from one read at time t (s), scaled
    back by their references if compensate."""

    def weights(g, reference):
        w = analog.weights(device, g)
        if not compensate:
            return w
        return w * reference / column_sums(device, g)

    reads = each(analog.read, key, device, chip.xbars.hidden, t)
    first, *later = map(weights, reads, chip.reference)
    return mean_over_rows(first), *later


def read_readout(key, device, readout, t):
    """Weights [neurons] of the readout from one read at time t (s)."""
    g = analog.read(key, device, readout, t)
    return analog.weights(device, g)[:, 0]


def start(key, device, sizes, n_rows):
    """Conductances (µS), a Network, at the start of meta-training; sizes are the neurons of
    each hidden layer, n_rows the rows of the input."""
    uniform = partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    first, *keys = jax.random.split(key, len(sizes))
    of_layer_0 = uniform(first, (2, sizes[0]))
    w = [jnp.repeat(of_layer_0, n_rows, 0)]
    for key, n_in, n_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        bound = (6 / (n_in + n_out)) ** 0.5
        inner = bound * uniform(key, (n_in, n_out))
        bias = jnp.zeros((1, n_out))
        w.append(jnp.concatenate([inner, bias]))
    hidden = tuple(analog.conductances(device, layer) for layer in w)
    lowest = device.g_min + READOUT_START * analog.span(device)
    readout = jnp.full((2, sizes[-1], 1), lowest, float)
    return Network(hidden, readout)


# ---- figure --------------------------------------------------------------------------------------

if __name__ == "__main__":
    from img import presentation

    presentation.main()
