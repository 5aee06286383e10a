"""A two-layer leaky integrate-and-fire (LIF) network whose weights are read from three crossbars.

    u0 = input converter(x), held for the run         x in [−5, 5], 2^dac_bits levels
    v0 ← α v0 + [u0, 1]·W0 − z0,  z0 = H(v0 − 1)      membrane and spikes of layer 0, reset by subtraction
    v1 ← α v1 + [z0, 1]·W1 − z1,  z1 = H(v1 − 1)      layer 1
    e  ← κ e + z1                                     trace of the spikes
    ŷ  = e·W2                                         leaky-integrator readout, linear in W2

The last row of a hidden crossbar is its bias, driven by a constant 1. Hidden activity depends on the input's level and
on the chip, never on the task, so it is simulated once per level. Units of layers are the last axis of every array.
Run this file to draw the network at work for one input (img/network.png).
"""
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import analog

# ---- constants ------------------------------------------------------------------------------------------------------

N_STEPS = 100            # time steps T of one presentation
DT = 1e-3                # s, one step
X_RANGE = (-5.0, 5.0)    # span of the input converter
G_READOUT = 0.4/11.9     # every readout device at the start, share of the range above g_min: 0.5 µS on PCM


class Network(NamedTuple):
    """One value per crossbar: conductances, crossbars, weights or keys."""
    hidden0: jax.Array   # [2, 1+1, H0]
    hidden1: jax.Array   # [2, H0+1, H1]
    readout: jax.Array   # [2, H1, 1]


class Decay(NamedTuple):
    """Factors by which membrane and trace decay in one time step."""
    alpha: float
    kappa: float


class Activity(NamedTuple):
    """Of one presentation of each of L levels, after one read of all crossbars."""
    trace: jax.Array     # [T, L, H1], e
    readout: jax.Array   # [H1], the readout's weights
    rate0: jax.Array     # spikes per step, mean over time, levels and neurons
    rate1: jax.Array


# ---- neurons --------------------------------------------------------------------------------------------------------

@jax.custom_jvp
def spike(u):
    """Heaviside step of u; its surrogate derivative is that of the fast sigmoid u/(1 + |u|), namely 1/(1 + |u|)²."""
    return (u > 0).astype(u.dtype)


@spike.defjvp
def _(primals, tangents):
    (u,), (du,) = primals, tangents
    return spike(u), du/(1 + jnp.abs(u))**2


row = partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False, allow_negative_indices=False)
with_row = partial(jax.lax.dynamic_update_index_in_dim, axis=0, allow_negative_indices=False)


def lif(decay, bias, drive):
    """Membrane potentials and traces [T, N] of N neurons from rest, under bias [N] and drive [T, N]; the potentials are
    written over the drive, step by step, so that no other array has to be filled first."""
    def step(t, state):
        v, e, potentials, traces = state
        v = decay.alpha*v + row(potentials, t) + bias - spike(v - 1)
        e = decay.kappa*e + spike(v - 1)
        return v, e, with_row(potentials, v, t), with_row(traces, e, t)

    rest = jnp.zeros_like(bias)
    return jax.lax.fori_loop(0, N_STEPS, step, (rest, rest, drive, jnp.zeros_like(drive)))[2:]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lif_trace(decay, bias, drive):
    """The traces of lif. Its derivative keeps the potentials alone and runs the adjoint backwards in time:
    λe ← κ λe + ē,  λv ← α λv + s·(λe − λv),  s the surrogate derivative at v. λv is the drive's gradient."""
    return lif(decay, bias, drive)[1]


def _lif_forward(decay, bias, drive):
    v, e = lif(decay, bias, drive)
    return e, v


def _lif_backward(decay, v, e_bar):
    def step(k, state):
        lv, le, total, gradient = state
        t = N_STEPS - 1 - k
        le = decay.kappa*le + row(gradient, t)
        lv = decay.alpha*lv + row(s, t)*(le - lv)
        return lv, le, total + lv, with_row(gradient, lv, t)

    rest, s = jnp.zeros_like(v[0]), 1/(1 + jnp.abs(v - 1))**2
    return jax.lax.fori_loop(0, N_STEPS, step, (rest, rest, rest, e_bar))[2:]    # of bias and drive


lif_trace.defvjp(_lif_forward, _lif_backward)


# ---- network --------------------------------------------------------------------------------------------------------

def level(n_bits, x):
    """Index of the input converter's level for x, clipped to its span."""
    low, high = X_RANGE
    return jnp.clip(jnp.floor((x - low)/(high - low)*2**n_bits), 0, 2**n_bits - 1).astype(jnp.int32)


def level_centres(n_bits):
    """The input that each level stands for, the centre of its cell, [2^n_bits]."""
    low, high = X_RANGE
    return low + (high - low)*jnp.arange(0.5, 2**n_bits)/2**n_bits


def mean_spikes(kappa, e):
    """Mean spikes per step behind the traces e [T, ...]: inverts e ← κ e + z."""
    return (1 - kappa)*jnp.mean(jnp.mean(e, 0)) + kappa*jnp.mean(e[-1])/len(e)    # the mean over time is in use elsewhere


def simulate(decay, w, u):
    """Activity of the network with weights w (a Network of [rows, cols]) for each of the inputs u [L].

    Layer 1 feeds nothing back, so each layer is run through all steps at once, levels and neurons flattened, and the
    drive of layer 1 is a single product."""
    n_levels = u.shape[0]
    bias0 = jnp.stack([u, jnp.ones_like(u)], 1) @ w.hidden0
    z0 = lif_trace(decay._replace(kappa=0.0), bias0.reshape(-1), jnp.zeros((N_STEPS, bias0.size)))
    drive = z0.reshape(N_STEPS*n_levels, -1) @ w.hidden1[:-1]
    e = lif_trace(decay, jnp.tile(w.hidden1[-1], n_levels), drive.reshape(N_STEPS, -1))
    rates = mean_spikes(0.0, z0), mean_spikes(decay.kappa, e)
    return Activity(e.reshape(N_STEPS, n_levels, -1), w.readout[:, 0], *rates)


def fabricate(key, device, g):
    """A chip, a Network of crossbars, programmed at t = 0 to g, a Network of [2, rows, cols] in µS. Here and in read all
    devices draw from one vector: a draw for each crossbar takes the compiler a second."""
    joined, part = ravel_pytree(g)
    largest, _ = ravel_pytree(jax.tree.map(lambda g: jnp.full_like(g, jnp.max(g)), g))
    fields = map(part, analog.fabricate(key, device, joined, largest))
    return Network(*(analog.Crossbar(*crossbar) for crossbar in zip(*fields)))


def read(key, device, chip, t):
    """Weights, a Network of [rows, cols], from one read of all crossbars of chip at time t (s)."""
    fields, (_, part) = zip(*chip), ravel_pytree(Network(*(xbar.g for xbar in chip)))
    joined = analog.Crossbar(*(ravel_pytree(field)[0] for field in fields))
    return Network(*(analog.weights(device, g) for g in part(analog.read(key, device, joined, t))))


def init(key, device, n_h0, n_h1):
    """Conductances in µS at the start of meta-training: a Network of [2, rows, cols]."""
    key0, key1 = jax.random.split(key)
    bound = (6/(n_h0 + n_h1))**0.5
    w0 = jax.random.uniform(key0, (2, n_h0), minval=-1.0, maxval=1.0)
    w1 = jax.random.uniform(key1, (n_h0, n_h1), minval=-bound, maxval=bound)
    w1 = jnp.concatenate([w1, jnp.zeros((1, n_h1))])
    readout = jnp.full((2, n_h1, 1), device.g_min + G_READOUT*(device.g_max - device.g_min))
    return Network(analog.conductances(device, w0), analog.conductances(device, w1), readout)


# ---- figure ---------------------------------------------------------------------------------------------------------

def presentation(device, x, n_h=40):
    """What the network before training does with one input x: u0, then spikes of layer 0, potentials and spikes of layer
    1 [T, n_h] and ŷ [T]."""
    decay = Decay(math.exp(-DT/0.01), math.exp(-DT/0.002))
    start_key, chip_key, read_key = jax.random.split(jax.random.key(0), 3)
    chip = fabricate(chip_key, device, init(start_key, device, n_h, n_h))
    w = read(read_key, device, chip, 100.0)
    u = level_centres(7)[level(7, x)]
    _, z0 = lif(decay._replace(kappa=0.0), jnp.array([u, 1.0]) @ w.hidden0, jnp.zeros((N_STEPS, n_h)))
    v1, e = lif(decay, w.hidden1[-1], z0 @ w.hidden1[:-1])
    return u, z0, v1, spike(v1 - 1), e @ w.readout[:, 0]


if __name__ == "__main__":
    from img import figures
    shown = presentation(analog.PCM, x=1.5)
    figure = figures.network(1e3*DT, X_RANGE, *map(np.asarray, shown))
    (Path(__file__).parent/"img/network.png").write_bytes(figures.png(figure))
