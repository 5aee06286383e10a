"""Draw the laws of a device over simulated devices: python analog.py --device mine.json"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import analog
import train
from img import figures

N = 500  # pairs of devices at a point
N_PULSES = 20  # SET pulses of a staircase
AGES = np.geomspace(1.0, 1e7, 29)  # s
N_TARGETS = 16  # of program-and-verify


def targets_of(device):
    """Targets (µS) over the range that the device can be programmed to, [N_TARGETS]."""
    return np.linspace(device.g_min, device.g_prog, N_TARGETS)


@jax.jit(static_argnums=0)
def simulate(device):
    """G (µS) of devices after each pulse [N_PULSES + 1, 2, N, 1]; at AGES [AGES, 2, N, 1];
    what a read adds to it t0 after the pulse [2, N, N_TARGETS]; and analog.Programmed."""
    keys = jax.random.split(jax.random.key(0), 7)
    targets = jnp.broadcast_to(targets_of(device), (2, N, N_TARGETS))
    xbar = analog.fabricate(keys[0], device, targets)
    done = analog.program(keys[1], device, xbar, targets)
    noise = analog.read(keys[2], device, xbar, device.t0) - analog.drift(
        device, xbar, device.t0
    )

    middle = analog.fabricate(keys[3], device, jnp.full((2, N, 1), device.g_prog / 2))
    aged = jax.vmap(partial(analog.drift, device, middle))(jnp.array(AGES))

    def pulse(xbar, key):
        after = analog.pulse(key, device, xbar, jnp.ones_like(xbar.g), 0.0)
        return after, after.g

    start = analog.reset(keys[4], device, middle, middle.free, 0.0)
    _, steps = jax.lax.scan(pulse, start, jax.random.split(keys[5], N_PULSES))
    return jnp.concatenate([start.g[None], steps]), aged, noise, done


def report(device, done):
    """Print what programming takes, 0 where that is not known, and leaves by range of
    targets."""
    targets = targets_of(device)
    print(f"{device.name}: programming, mean of {2 * N} devices a target")
    print("  targets (µS)     SET pulses    RESETs     reads   rms error (µS)")
    for part in np.array_split(np.arange(N_TARGETS), 4):
        pulses, resets, reads = (np.mean(x[..., part]) for x in done[1:])
        rms = np.sqrt(np.mean((done.xbar.g - targets)[..., part] ** 2))
        span = f"{targets[part[0]]:5.2f} to {targets[part[-1]]:5.2f}"
        print(f"  {span}{pulses:14.1f}{resets:10.2f}{reads:10.1f}{rms:17.3f}")


def draw(device, steps, aged, noise, done):
    """Figure of the laws, simulated devices beside them."""
    middle = device.g_prog / 2
    drifted = middle * analog.mean_drift(device, middle, jnp.array(AGES))
    staircase, _ = analog.staircase(device, N_PULSES)
    targets = targets_of(device)
    zero = np.zeros(N_TARGETS)
    error = done.xbar.g - targets
    panels = (
        ("SET pulses after RESET", "G (µS)", range(N_PULSES + 1), staircase, steps.T),
        ("age (s) of a device that drifts", "G (µS)", AGES, drifted, aged.T),
        ("G (µS) of a device at a read", "noise (µS)", targets, zero, noise),
        ("target of programming (µS)", "error (µS)", targets, zero, error),
    )
    return figures.laws(device.name, panels)


def main():
    """Draw and report the device on the command line."""
    parser = train.Parser(description=__doc__)
    parser.add_argument(
        "--device", default="pcm", help="built-in names or JSON files, by commas"
    )
    for device in train.devices_of(parser.parse_args().device):
        found = jax.device_get(simulate(device))
        report(device, found[-1])
        path = Path(__file__).parent / f"model{train.suffix_of(device)}.png"
        train.write(path, figures.png(draw(device, *found)))
        print(f"figure in {path}")
