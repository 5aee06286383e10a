"""Draw a network that has learned a task at work on one input: python network.py [RUN]"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import network
import train
from img import figures

FOLDER = Path(__file__).parent
SEED = 7  # of the chip and its task


@jax.jit(static_argnums=0)
def present(cfg, family, device, meta):
    """Activity [T, 1, ...] and an output [T] of a new chip that has learned a task, under the
    query's input whose target is largest; that input [n_in] and target."""
    chip, u, task, key = train.scene(jax.random.key(SEED), meta, cfg, family, device)
    learn_key, read_key = jax.random.split(key)
    chip = network.later(chip, cfg.tread)
    keys = jax.random.split(learn_key)
    readouts, _ = train.teach(*keys, meta, cfg, device, chip, u, task.support)
    chip = train.with_last(chip, readouts)
    t = train.wait_of(cfg)
    w = network.each(network.read, read_key, device, chip, t, cfg.compensate)
    size = jnp.max(jnp.abs(task.query.y), 1)
    chosen = jnp.argmax(size)
    output = jnp.argmax(jnp.abs(task.query.y[chosen]))
    activity = network.present(train.dynamics_of(cfg), w.hidden, u[chosen][None])
    shown = activity.e[:, 0] @ w.readout[:, output]
    target = task.query.y[chosen, output] / task.query.share[chosen]
    return activity, shown, u[chosen], target


def draw(folder):
    """Draw the network of a run folder, on a chip of its first device."""
    run = train.load(folder)
    device = next(iter(run.devices.values()))
    family = run.families.testing
    shown = present(run.cfg, family, device, run.state.meta)
    activity, output, x, target = jax.device_get(shown)
    spikes = [neurons.z[:, 0] for neurons in activity.layers]
    neuron = np.argmin(np.abs(spikes[-1].sum(0) - 5))  # one that fires now and then
    membrane = activity.layers[-1].v[:, 0, neuron]
    t = 1e3 * network.DT * np.arange(1, run.cfg.n_steps + 1)
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
