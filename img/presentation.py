"""Draw a network that has learned a task at work on one input: python network.py [RUN]"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import network
import train
from img import figures

FOLDER = Path(__file__).parent
INPUT = 1.5
SEED = 7  # of a task whose target at INPUT is far from 0


@jax.jit(static_argnums=0)
def present(cfg, device, meta):
    """Activity [T, 1, ...] and outputs [T] of a new chip that has learned a task, at the level of
    INPUT; that level's input, and the task's target for it."""
    chip, u, task, key = train.scene(jax.random.key(SEED), meta, cfg, device)
    learn_key, read_key = jax.random.split(key)
    chip = network.later(chip, cfg.tread)
    keys = jax.random.split(learn_key)
    readouts, _ = train.learn(*keys, meta, cfg, device, chip, u, task)
    chip = chip._replace(readout=jax.tree.map(lambda x: x[-1], readouts))
    t = train.wait_of(cfg)
    w = network.each(network.read, read_key, device, chip, t, cfg.compensate)
    level = network.level(cfg.dac_bits, jnp.array(INPUT))
    activity = network.present(train.dynamics_of(cfg), w.hidden, u[level][None])
    output = (activity.e[:, 0] @ w.readout)[:, 0]
    target = task.query.y[level, 0] / task.query.share[level]
    return activity, output, u[level, 0], target


def draw(folder):
    """Draw the network of a run folder, on a chip of its first device."""
    run = train.load(folder)
    device = next(iter(run.devices.values()))
    shown = present(run.cfg, device, run.state.meta)
    activity, output, x, target = jax.device_get(shown)
    spikes = [neurons.z[:, 0] for neurons in activity.layers]
    neuron = np.argmin(np.abs(spikes[-1].sum(0) - 5))  # one that fires now and then
    membrane = activity.layers[-1].v[:, 0, neuron]
    t = 1e3 * network.DT * np.arange(1, network.N_STEPS + 1)
    figure = figures.presentation(t, x, spikes, membrane, output, target)
    path = FOLDER / "network.png"
    train.write(path, figures.png(figure))
    print(f"figure in {path}")


def main():
    """Draw the network of the run folder on the command line."""
    parser = train.Parser(description=__doc__)
    trained = FOLDER / "trained"
    text = "run folder (default: img/trained)"
    parser.add_argument("run", nargs="?", default=trained, help=text)
    with train.one_line_errors():
        train.configure_backend()
        draw(parser.parse_args().run)
