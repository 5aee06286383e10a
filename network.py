"""A network of leaky integrate-and-fire (LIF) neurons whose weights are read from crossbars.

    u0 = the input, held for all T steps of a presentation
    v0 ← α v0 + drive·[u0, 2]·W0 − z0,  z0 = H(v0 − 1)    layer 0: membranes and spikes
    v1 ← α v1 + [z0, 1]·W1 − z1,        z1 = H(v1 − 1)    layer 1
    e  ← κ e + gain·z1                                    traces of the spikes
    ŷ  = e(T)·W2                                          readout, read once, at the end

Membranes and traces start each presentation at rest: this assumes that a chip discharges them
before it. A spike resets its membrane by subtraction. Each input drives several rows of its
crossbar, and the bias of layer 0 as many: each weight W0 is a mean over them, which lessens read
noise, the spread of drift and the error of programming. The last row of a later hidden crossbar is
its bias; the readout has none.

Drift compensation multiplies all weights of a crossbar by one number: Σ G when it was written, over
Σ G now, a sum of currents that the converter has not clipped. After programming, the former is Σ G
of the targets, which takes no read; after pulses on the readout, it is read t_verify after the last
of them. Hidden crossbars are compensated in every read, the readout at the query only.

Circuits between devices and outputs are ideal, unless a Circuit says what they do.

Hidden activity depends on the input and on the chip, never on the task. So a read of the hidden
crossbars is simulated once for a pool of inputs, and tasks look theirs up. To draw the network at
work, run this file.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import analog

# ---- constants -----------------------------------------------------------------------------------

DT = 1e-3  # s, one time step
THRESHOLD = 1.0  # of a membrane
X_RANGE = (-5.0, 5.0)  # span of the input converter
BIAS = 2.0  # the constant that drives the bias of layer 0
# Every readout device at the start, share of the range above g_min: 0.5 µS on PCM.
READOUT_START = 0.4 / 11.9


# ---- types ---------------------------------------------------------------------------------------


class Network(NamedTuple):
    """One value per crossbar: conductances [2, rows, cols], tiles or weights [rows, cols]."""

    # layer by layer, [2, inputs + 1, neurons]; in the first each input and the bias, which is the
    # last, have n_rows rows: [2, (n_in + 1)·n_rows, neurons]
    hidden: tuple
    readout: Any  # [2, neurons of the last layer, outputs]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Circuit:
    """What the circuits around a chip's devices do: five functions, by default those of ideal
    circuits."""

    # (device, g): conductances g [2, rows, cols] in µS, as a read sees them through wires
    wires: Callable = lambda device, g: g
    # (key, n): fixed gains [n] of the columns of a new crossbar, by which its weights are
    # multiplied, the readout's too
    gains: Callable = lambda key, n: jnp.ones(n)
    # (k, x): x [..., cols], which crossbar k (0 is the first) adds to membranes in a time step, as
    # the circuit passes it on; of the readout, x is the outputs
    current: Callable = lambda k, x: x
    # of traces [L, H] at the end of a presentation, for the readout and the delta rule alike
    traces: Callable = lambda e: e
    gradient: Callable = lambda g: g  # of a look's gradient [H, n_out]


class Tile(NamedTuple):
    """A crossbar and what is around it. A chip is a Network of tiles."""

    xbar: analog.Crossbar
    reference: jax.Array  # µS, Σ G when it was written, by which its drift is compensated
    gain: jax.Array  # [cols], of each column
    circuit: Circuit


class Activity(NamedTuple):
    """State of the network under L inputs; over time, every field is [T, L, ...]."""

    layers: tuple  # of Neurons
    e: jax.Array  # [L, H], traces of the last layer


class Dynamics(NamedTuple):
    """Constants of neurons, traces and presentations."""

    drive: float  # what a weight of 1 adds to a membrane of layer 0 in a step, at an input of 1
    layers: tuple  # of Lif
    kappa: float  # factor by which a trace decays in one time step
    gain: float  # what one spike adds to its trace
    n_steps: int  # time steps T of a presentation
    circuit: Circuit = Circuit()


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


def lif_step(lif, neurons, current):
    """Neurons one time step later; a spike resets its membrane by subtraction."""
    v = lif.alpha * neurons.v + current - THRESHOLD * neurons.z
    return Neurons(v, spike(v - THRESHOLD))


# ---- presentation --------------------------------------------------------------------------------


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


def held_current(drive, w, u):
    """What inputs u [L, n_in] and the bias add to the membranes of layer 0 in each time step
    [L, neurons], through the weights w [(n_in + 1)·n_rows, neurons] of all rows."""
    n_in = u.shape[1]
    rows = w.reshape(n_in + 1, -1, w.shape[1])
    mean = jnp.mean(rows, 1)  # [n_in + 1, neurons]
    return drive * (u @ mean[:-1] + BIAS * mean[-1])


def step(dynamics, held, upper, activity):
    """Activity one time step later, with the weights [inputs + 1, neurons] of the upper layers;
    held [L, neurons] is what the inputs add to layer 0."""
    (first_lif, *lifs), (first, *others) = dynamics.layers, activity.layers
    layers = [lif_step(first_lif, first, held)]
    for lif, neurons, w in zip(lifs, others, upper, strict=True):
        current = layers[-1].z @ w[:-1] + w[-1]  # [L, neurons]
        current = dynamics.circuit.current(len(layers), current)
        layers.append(lif_step(lif, neurons, current))
    e = dynamics.kappa * activity.e + dynamics.gain * layers[-1].z
    return Activity(tuple(layers), e)


def rest(hidden, n_inputs):
    """Activity of a network with hidden weights, a tuple of [rows, neurons], that is at rest under
    that many inputs."""
    layers = tuple(at_rest((n_inputs, w.shape[1])) for w in hidden)
    return Activity(layers, jnp.zeros_like(layers[-1].z))


def present(dynamics, hidden, u, start=None):
    """Activity over time [T, ...] of a network with hidden weights, a tuple of [rows, neurons], as
    each of the inputs u [L, n_in] is held for a presentation. It starts at rest, or from an
    activity [L, ...]. On an accelerator ten time steps are unrolled, as each is short there."""
    first, *upper = hidden
    held = dynamics.circuit.current(0, held_current(dynamics.drive, first, u))

    def both(activity, _):
        activity = step(dynamics, held, upper, activity)
        return activity, activity

    start = rest(hidden, len(u)) if start is None else start
    unroll = 1 if jax.default_backend() == "cpu" else 10
    _, over_time = jax.lax.scan(both, start, length=dynamics.n_steps, unroll=unroll)
    return over_time


def rates(activity):
    """Firing rate (Hz) of each neuron, a mean over the inputs, of an activity over time: a tuple
    of [neurons]."""
    return tuple(jnp.mean(neurons.z, (0, 1)) / DT for neurons in activity.layers)


# ---- chips ---------------------------------------------------------------------------------------


def total(device, g):
    """Σ G (µS) of a crossbar's devices g [2, rows, cols]; at least a thousandth of the range, as
    all of them may read as 0."""
    least = 1e-3 * analog.span(device)
    return jnp.maximum(jnp.sum(g), least)


def programmed_total(device, xbar, target):
    """Σ G (µS) of a crossbar that was programmed to target [2, rows, cols] in µS, with its stuck
    devices, as it is known without a read."""
    return total(device, analog.goals(device, xbar, target))


def each(f, key, device, network, *rest):
    """Network of f(key, device, value, *rest) of every value of a network, each with a key of its
    own."""
    *hidden_keys, readout_key = jax.random.split(key, len(network.hidden) + 1)
    pairs = zip(hidden_keys, network.hidden, strict=True)
    hidden = tuple(f(key, device, value, *rest) for key, value in pairs)
    readout = f(readout_key, device, network.readout, *rest)
    return Network(hidden, readout)


def assemble(key, device, make, g, circuit):
    """Chip of the conductances g (µS), a Network of [2, rows, cols], and of a Circuit; make(key,
    device, g) makes a crossbar."""

    def tile(key, device, target):
        make_key, gain_key = jax.random.split(key)
        gain = circuit.gains(gain_key, target.shape[2])
        xbar = make(make_key, device, target)
        return Tile(xbar, programmed_total(device, xbar, target), gain, circuit)

    return each(tile, key, device, g)


def later(chip, seconds):
    """The chip on a clock that starts that many seconds later, so that float32 keeps the times of
    an old chip's fresh pulses."""

    def move(tile):
        return tile._replace(xbar=analog.later(tile.xbar, seconds))

    hidden = tuple(move(tile) for tile in chip.hidden)
    return Network(hidden, move(chip.readout))


def measure(key, device, tile, t):
    """Conductances [2, rows, cols] in µS of a tile from one read at time t (s), not clipped."""
    return tile.circuit.wires(device, analog.measure(key, device, tile.xbar, t))


def read(key, device, tile, t, compensate):
    """Weights [rows, cols] of a tile from one read at time t (s), compensated for drift if
    compensate."""
    g = measure(key, device, tile, t)
    w = tile.gain * analog.weights(device, analog.convert(device, g))
    if not compensate:
        return w
    factor = tile.reference / total(device, g)
    return w * factor


def with_reference(key, device, tile, t):
    """The tile after its crossbar was pulsed, its reference a read at time t (s)."""
    return tile._replace(reference=total(device, measure(key, device, tile, t)))


def start(key, device, sizes, n_in, n_out, n_rows):
    """Conductances (µS), a Network, at the start of meta-training; sizes are the neurons of each
    hidden layer, n_rows the rows of an input."""
    uniform = partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    first, *keys = jax.random.split(key, len(sizes))
    largest = min(1.0, 4 / n_in**0.5)
    of_inputs = largest * uniform(first, (n_in + 1, sizes[0]))
    w = [jnp.repeat(of_inputs, n_rows, 0)]
    for key, n_before, n in zip(keys, sizes[:-1], sizes[1:], strict=True):
        bound = (6 / (n_before + n)) ** 0.5
        inner = bound * uniform(key, (n_before, n))
        w.append(jnp.concatenate([inner, jnp.zeros((1, n))]))
    hidden = tuple(analog.conductances(device, layer) for layer in w)
    lowest = device.g_min + READOUT_START * analog.span(device)
    readout = jnp.full((2, sizes[-1], n_out), lowest, float)
    return Network(hidden, readout)


# ---- figure --------------------------------------------------------------------------------------

if __name__ == "__main__":
    from img import presentation

    presentation.main()
