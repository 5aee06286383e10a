"""The network in its plain form, the oracle of the tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import network

# ---- in JAX: one time step after the other -------------------------------------------------------


def output(dynamics, w, u):
    """ŷ [T] of the network of weights w, a network.Network, for one input u."""

    def step(state, _):
        v, z, e = map(list, state)
        signal = jnp.reshape(u, 1)
        for k, layer in enumerate(w.hidden):
            drive = signal @ layer[:-1] + layer[-1]
            v[k] = dynamics.layers[k].alpha * v[k] + drive - z[k]
            z[k] = network.spike(v[k] - network.THRESHOLD)
            signal = z[k]
        e = [dynamics.kappa * e[0] + dynamics.gain * signal]
        return (v, z, e), e[0] @ w.readout

    rest = [jnp.zeros_like(layer[0]) for layer in w.hidden]
    return jax.lax.scan(step, (rest, rest, rest[-1:]), length=network.N_STEPS)[1]


def squared_error(dynamics, w, u, y):
    """Mean over samples [N] and time steps, of the network with inputs u [N] and targets y
    [N]."""
    outputs = jax.vmap(partial(output, dynamics, w))(u)
    return jnp.mean((outputs - y[:, None]) ** 2)


# ---- in Python: one neuron after the other -------------------------------------------------------


def neuron(lif, w, signals):
    """Spikes [T] of a neuron with weights w [inputs + 1] under signals [T, inputs]."""
    v, z, spikes = 0.0, 0.0, []
    for signal in signals:
        v = lif.alpha * v + sum(signal * w[:-1]) + w[-1] - z
        z = float(v > network.THRESHOLD)
        spikes.append(z)
    return spikes


def filtered(dynamics, spikes):
    """Traces [T, H] of spikes [T, H]."""
    e, traces = np.zeros_like(spikes[0]), []
    for z in spikes:
        e = dynamics.kappa * e + dynamics.gain * z
        traces.append(e)
    return np.array(traces)


def presentation(dynamics, hidden, x):
    """Spikes of each layer [T, neurons] and traces [T, H] for one input x."""
    signals = np.full((network.N_STEPS, 1), x)
    layers = []
    for lif, w in zip(dynamics.layers, hidden, strict=True):
        signals = np.array([neuron(lif, column, signals) for column in w.T]).T
        layers.append(signals)
    return layers, filtered(dynamics, signals)


def loop(dynamics, hidden, u):
    """Spikes of each layer, a list of [T, L, neurons], and traces [T, L, H] for inputs u
    [L]."""
    hidden = [np.asarray(w) for w in hidden]
    shown = [presentation(dynamics, hidden, x) for x in np.asarray(u)]
    layers, traces = zip(*shown, strict=True)
    spikes = [np.stack(layer, 1) for layer in zip(*layers, strict=True)]
    return spikes, np.stack(traces, 1)
