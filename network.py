"""A network of leaky integrate-and-fire (LIF) neurons whose weights are read from crossbars.

    u0 = input converter(x), held for all T steps         x in [−5, 5], 2^dac_bits levels
    v0 ← α v0 + [u0, 2]·W0 − z0,  z0 = H(v0 − 1)          layer 0: membranes and spikes
    v1 ← α v1 + [z0, 1]·W1 − z1,  z1 = H(v1 − 1)          layer 1
    e  ← κ e + gain·z1                                    trace of the spikes
    ŷ  = e·W2                                             leaky-integrator readout, linear in W2

A spike resets its membrane by subtraction. The input drives several rows of its crossbar, and the
bias of layer 0 as many: each weight W0 is a mean over them, which lessens read noise, the spread of
drift and the error of programming. The last row of a later crossbar is its bias. Drift compensation
scales the weights of a hidden neuron by one number, Σ G that its devices were programmed to over
Σ G in the present read, whose currents are summed before the converter clips them. Hidden activity
depends on the input's level and on the chip, never on the task, so it is simulated once per level.
To draw the network at work, run this file.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    # Σ G (µS) that the devices of each hidden neuron were programmed to, for drift compensation
    reference: tuple


class Activity(NamedTuple):
    """State of the network under L inputs; over time, every field is [T, L, ...]."""

    layers: tuple  # of Neurons
    e: jax.Array  # [L, H], traces of the last layer


class Dynamics(NamedTuple):
    """Constants of neurons and traces."""

    layers: tuple  # of Lif
    kappa: float  # factor by which a trace decays in one time step
    gain: float  # what one spike adds to its trace


# ---- neurons -------------------------------------------------------------------------------------


@jax.custom_jvp
def spike(u):
    """1 where u > 0, else 0; its derivative is that of the fast sigmoid u/(1 + |u|), which
    is 1/(1 + |u|)²."""
    return (u > 0).astype(u.dtype)


def surrogate(du, _, u):
    """The derivative of spike at u, times du."""
    return du / (1 + jnp.abs(u)) ** 2


spike.defjvps(surrogate)


class Lif(NamedTuple):
    """Constants of the neurons of a layer."""

    alpha: float  # factor by which membranes decay in one time step


class Neurons(NamedTuple):
    """State of the neurons of a layer, one of each for each input, [L, neurons]."""

    v: jax.Array  # membrane potentials
    z: jax.Array  # spikes, 0 or 1


def at_rest(shape):
    """Neurons before the first time step."""
    zero = jnp.zeros(shape)
    return Neurons(v=zero, z=zero)


def lif_step(lif, neurons, drive):
    """Neurons one time step later; a spike resets its membrane by subtraction."""
    v = lif.alpha * neurons.v + drive - neurons.z
    return Neurons(v, spike(v - THRESHOLD))


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


def step(dynamics, hidden, u, activity):
    """Activity one time step later, with hidden weights, a tuple of [inputs + 1, neurons],
    and the inputs u [L]."""
    signal = u[:, None]
    layers = []
    for lif, w, neurons in zip(dynamics.layers, hidden, activity.layers, strict=True):
        drive = signal @ w[:-1] + w[-1]  # [L, neurons]
        neurons = lif_step(lif, neurons, drive)
        layers.append(neurons)
        signal = neurons.z
    e = dynamics.kappa * activity.e + dynamics.gain * signal
    return Activity(tuple(layers), e)


def simulate(dynamics, hidden, u):
    """Activity over time [T, ...], from rest, of the network with hidden weights under the
    inputs u [L]. On an accelerator ten time steps are unrolled, as each is short there."""

    def both(activity, _):
        activity = step(dynamics, hidden, u, activity)
        return activity, activity

    layers = tuple(at_rest((len(u), w.shape[1])) for w in hidden)
    rest = Activity(layers, jnp.zeros_like(layers[-1].z))
    unroll = 1 if jax.default_backend() == "cpu" else 10
    _, states = jax.lax.scan(both, rest, length=N_STEPS, unroll=unroll)
    return states


def rates(activity):
    """Mean firing rate (Hz) of each layer for each input, [L, layers], of an activity over
    time."""
    shares = [jnp.mean(neurons.z, (0, 2)) for neurons in activity.layers]
    return jnp.stack(shares, 1) / DT


def each(f, key, device, xs, *rest):
    """[f(key, device, x, *rest)] of every x of xs, each with a key of its own."""
    keys = jax.random.split(key, len(xs))
    pairs = zip(keys, xs, strict=True)
    return [f(key, device, x, *rest) for key, x in pairs]


def column_sums(device, g):
    """Σ G (µS) of the devices of each neuron [neurons], of g [2, rows, neurons]; at least a
    thousandth of the range, as a column may read as 0."""
    total = jnp.sum(g, (0, 1))
    return jnp.maximum(total, 1e-3 * analog.span(device))


def assemble(key, device, make, g):
    """Chip of the conductances g (µS), a Network of [2, rows, cols]; make(key, device, g)
    makes a crossbar."""
    hidden_key, readout_key = jax.random.split(key)
    hidden = tuple(each(make, hidden_key, device, g.hidden))
    readout = make(readout_key, device, g.readout)
    reference = tuple(column_sums(device, target) for target in g.hidden)
    xbars = Network(hidden, readout)
    return Chip(xbars, reference)


def mean_over_rows(w):
    """What the input 1 and the bias add to each neuron [2, neurons], of the weights of all
    rows [2·n_rows, neurons]."""
    of_input, of_bias = jnp.split(w, 2)
    from_input = jnp.mean(of_input, 0)
    from_bias = BIAS * jnp.mean(of_bias, 0)
    return jnp.stack([from_input, from_bias])


def read_hidden(key, device, chip, t, compensate):
    """Weights of each hidden layer, a tuple of [inputs + 1, neurons], from one read at time t
    (s), scaled back by their references if compensate."""

    def weights(g, reference):
        w = analog.weights(device, analog.convert(device, g))
        if not compensate:
            return w
        return w * reference / column_sums(device, g)

    reads = each(analog.measure, key, device, chip.xbars.hidden, t)
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
