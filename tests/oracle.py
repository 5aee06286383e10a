"""The network in its plain form, the oracle of the tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import network


def row_inputs(w, u):
    """What drives each row of layer 0, of weights w [(n_in + 1)·n_rows, neurons], under the
    input u [n_in]: n_rows rows have the same share of an input, and as many that of the bias."""
    n_rows = len(w) // (len(u) + 1)
    shares = [u[i // n_rows] / n_rows for i in range(len(u) * n_rows)]
    return shares + [network.BIAS / n_rows] * n_rows


# ---- in JAX: one time step after the other -------------------------------------------------------


def output(dynamics, w, u):
    """ŷ [n_out] at the end of a presentation of the input u [n_in], of the network of weights w,
    a network.Network."""
    first, *later = w.hidden
    held = dynamics.drive * sum(x * row for x, row in zip(row_inputs(first, u), first, strict=True))

    def step(state, _):
        v, z, e = map(list, state)
        current = held
        for k, lif in enumerate(dynamics.layers):
            v[k] = lif.alpha * v[k] + current - z[k]
            z[k] = network.spike(v[k] - network.THRESHOLD)
            if k < len(later):
                current = z[k] @ later[k][:-1] + later[k][-1]
        return (v, z, [dynamics.kappa * e[0] + dynamics.gain * z[-1]]), None

    rest = [jnp.zeros_like(layer[0]) for layer in w.hidden]
    (_, _, (e,)), _ = jax.lax.scan(step, (rest, rest, rest[-1:]), length=dynamics.n_steps)
    return e @ w.readout


def squared_error(dynamics, w, u, y):
    """Mean over samples, summed over outputs, of the network under inputs u [N, n_in], for targets
    y [N, n_out]."""
    outputs = jax.vmap(partial(output, dynamics, w))(u)
    return jnp.mean(jnp.sum((outputs - y) ** 2, 1))


# ---- in Python: one neuron after the other -------------------------------------------------------


def neuron(lif, w, signals):
    """Spikes [T] of a neuron with weights w [rows] under signals [T, rows]."""
    v, z, spikes = 0.0, 0.0, []
    for signal in signals:
        v = lif.alpha * v + sum(signal * w) - z
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


def presentation(dynamics, hidden, u):
    """Spikes of each layer [T, neurons] and traces [T, H] for one input u [n_in]."""
    held = dynamics.drive * np.array(row_inputs(hidden[0], u))
    signals = np.tile(held, (dynamics.n_steps, 1))
    layers = []
    for lif, w in zip(dynamics.layers, hidden, strict=True):
        spikes = np.array([neuron(lif, column, signals) for column in w.T]).T
        layers.append(spikes)
        signals = np.concatenate([spikes, np.ones((dynamics.n_steps, 1))], 1)
    return layers, filtered(dynamics, spikes)


def loop(dynamics, hidden, u):
    """Spikes of each layer, a list of [T, L, neurons], and traces [T, L, H] for inputs u
    [L, n_in]."""
    hidden = [np.asarray(w) for w in hidden]
    shown = [presentation(dynamics, hidden, x) for x in np.asarray(u)]
    layers, traces = zip(*shown, strict=True)
    spikes = [np.stack(layer, 1) for layer in zip(*layers, strict=True)]
    return spikes, np.stack(traces, 1)
