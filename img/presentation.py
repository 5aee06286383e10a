"""Draw a network at work on one input: python network.py [RUN]"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import network
import train
from img import figures

FOLDER = Path(__file__).parent
INPUT = 1.5


def present(run):
    """Spikes [T, n] and membranes [T, n] of each layer, and the output [T], of a new chip
    at INPUT."""
    cfg, device, meta = run.cfg, run.devices[0], run.state.meta
    keys = jax.random.split(jax.random.key(0), 3)
    make = partial(train.injected, cfg)
    chip = network.assemble(keys[0], device, make, meta.g)
    w = network.read_hidden(keys[1], device, chip, cfg.tread, cfg.compensate)
    u = jnp.array([INPUT])
    activity = network.simulate(train.dynamics_of(cfg), w, u)
    spikes = [neurons.z[:, 0] for neurons in activity.layers]
    membranes = [neurons.v[:, 0] for neurons in activity.layers]
    readout = network.read_readout(keys[2], device, chip.xbars.readout, cfg.tread)
    return spikes, membranes, activity.e[:, 0] @ readout


def main():
    """Draw the network of the run folder on the command line."""
    parser = train.Parser(description=__doc__)
    trained = FOLDER / "trained"
    parser.add_argument(
        "run", nargs="?", default=trained, help="run folder (default: img/trained)"
    )
    run = train.load(parser.parse_args().run)
    spikes, membranes, output = jax.device_get(present(run))
    share = np.mean(spikes[-1], 0)
    shown = np.argmin(np.abs(share - 0.25))  # neither silent nor always firing
    t = 1e3 * network.DT * np.arange(1, network.N_STEPS + 1)
    figure = figures.presentation(t, INPUT, spikes, membranes[-1][:, shown], output)
    path = FOLDER / "network.png"
    train.write(path, figures.png(figure))
    print(f"figure in {path}")
