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
    return jnp.linspace(device.g_min, device.g_prog, N_TARGETS)


@jax.jit
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


def report(name, device, done):
    """Print what programming takes, 0 where that is not known, and leaves by range of
    targets."""
    targets = np.asarray(targets_of(device))
    errors = done.xbar.g - targets
    print(f"{name}: programming, mean of {2 * N} devices a target")
    head = "  targets (µS)     SET pulses    RESETs     reads"
    print(f"{head}   mean error (µS)   rms error (µS)")
    for part in np.array_split(np.arange(N_TARGETS), 4):
        pulses, resets, reads = (np.mean(x[..., part]) for x in done[1:])
        mean, rms = np.mean(errors[..., part]), np.sqrt(np.mean(errors[..., part] ** 2))
        span = f"{targets[part[0]]:5.2f} to {targets[part[-1]]:5.2f}"
        took = f"{pulses:14.1f}{resets:10.2f}{reads:10.1f}"
        print(f"  {span}{took}{mean:18.3f}{rms:17.3f}")


def draw(name, device, steps, aged, noise, done):
    """Figure of the laws, simulated devices beside them."""
    middle = device.g_prog / 2
    drifted = middle * analog.mean_drift(device, middle, jnp.array(AGES))
    staircase, _ = analog.staircase(device, N_PULSES)
    targets = np.asarray(targets_of(device))
    zero = np.zeros(N_TARGETS)
    error = done.xbar.g - targets
    panels = (
        ("SET pulses after RESET", "G (µS)", range(N_PULSES + 1), staircase, steps.T),
        ("age (s) of a device that drifts", "G (µS)", AGES, drifted, aged.T),
        ("G (µS) of a device at a read", "noise (µS) of the read", targets, zero, noise),
        ("target of programming (µS)", "error (µS), before drift", targets, zero, error),
    )
    return figures.laws(name, panels)


def main():
    """Draw and report the device on the command line."""
    parser = train.Parser(description=__doc__)
    parser.add_argument(
        "--device", default="pcm", help="built-in names or JSON files, by commas"
    )
    with train.one_line_errors():
        for name, device in train.devices_of(parser.parse_args().device).items():
            found = jax.device_get(simulate(device))
            report(name, device, found[-1])
            suffix = "" if name == "pcm" else f"_{name}"
            path = Path(__file__).parent / f"model{suffix}.png"
            train.write(path, figures.png(draw(name, device, *found)))
            print(f"figure in {path}")
