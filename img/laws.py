"""Draw the laws of a device over simulated devices: python analog.py --device mine.json"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import analog
import train
from img import figures

N = 500  # devices at a point
N_PULSES = 20  # SET pulses of a staircase
AGES = np.geomspace(1.0, 1e7, 29)  # s
N_TARGETS = 16  # of program-and-verify


def blank(device, shape):
    """Sound devices [2, *shape] after RESET at t = 0, each with a drift exponent of its own."""
    sound = device._replace(stuck_low=0.0, stuck_high=0.0)
    lowest = jnp.full((2, *shape), device.g_min)
    xbar = analog.fabricate(jax.random.key(6), sound, lowest)
    return analog.reset(jax.random.key(0), device, xbar, xbar.free, 0.0)


def staircases(device):
    """G (µS) after RESET and each of N_PULSES SET pulses, [2·N, N_PULSES + 1]."""
    start = blank(device, (N, 1))

    def pulse(xbar, key):
        after = analog.set_pulse(key, device, xbar, jnp.ones_like(xbar.g), 0.0)
        return after, after.g

    _, g = jax.lax.scan(pulse, start, jax.random.split(jax.random.key(1), N_PULSES))
    return jnp.concatenate([start.g[None], g]).reshape(N_PULSES + 1, -1).T


def program(device, targets):
    """analog.Programmed of 2·N devices at each of the targets (µS)."""
    target = jnp.broadcast_to(targets, (2, N, len(targets)))
    xbar = blank(device, target.shape[1:])
    return analog.program(jax.random.key(2), device, xbar, target)


def ageing(device):
    """G (µS) at AGES of devices programmed to half of g_prog, [2·N, AGES]."""
    target = jnp.full((2, N, 1), device.g_prog / 2)
    xbar = analog.place(
        jax.random.key(3), device, blank(device, (N, 1)), target, 0.0, 0.0
    )
    g = jax.vmap(functools.partial(analog.drift, device, xbar))(jnp.array(AGES))
    return g.reshape(len(AGES), -1).T


def read_noise(device, targets):
    """What t0 after the pulse a read adds to devices at targets (µS), [2·N, targets]."""
    target = jnp.broadcast_to(targets, (2, N, len(targets)))
    xbar = analog.place(
        jax.random.key(4), device, blank(device, target.shape[1:]), target, 0.0, 0.0
    )
    noise = analog.read(jax.random.key(5), device, xbar, device.t0) - analog.drift(
        device, xbar, device.t0
    )
    return noise.reshape(-1, len(targets))


def report(device, targets, done):
    """Print what programming takes and leaves by range of targets."""
    error = done.xbar.g - targets
    print(
        f"{device.name}: what programming takes and leaves, mean of {2 * N} devices a target"
    )
    print("  targets (µS)     SET pulses    RESETs     reads   rms error (µS)")
    for part in np.array_split(np.arange(N_TARGETS), 4):
        pulses, resets, reads = (np.mean(x[..., part]) for x in done[1:])
        rms = np.sqrt(np.mean(np.square(error[..., part])))
        low, high = targets[part[0]], targets[part[-1]]
        print(
            f"  {low:5.2f} to {high:5.2f}{pulses:14.1f}{resets:10.2f}{reads:10.1f}{rms:17.3f}"
        )
    if not np.any(done.reads):
        print(
            "  (programmed with an error of its law; the pulses of that are not known)"
        )


@functools.partial(jax.jit, static_argnums=0)
def simulate(device):
    """All that is drawn, from one compiled program."""
    targets = jnp.linspace(device.g_min, device.g_prog, N_TARGETS)
    done = program(device, targets)
    return (
        staircases(device),
        ageing(device),
        read_noise(device, targets),
        targets,
        done,
    )


def draw(device, steps, aged, noise, targets, done):
    """Figure of the laws, simulated devices beside them."""
    middle = device.g_prog / 2
    nu, _ = device.law.nu_law(jnp.array(middle / device.g_max))
    drifted = middle * device.law.clock(jnp.array(AGES), device.t0) ** -nu
    error = (done.xbar.g - targets).reshape(-1, N_TARGETS)
    zero = np.zeros(N_TARGETS)
    pulses = range(N_PULSES + 1)
    return figures.laws(
        device.name,
        (
            (
                "SET pulses after RESET",
                "G (µS)",
                pulses,
                analog.staircase(device, N_PULSES)[0],
                steps,
            ),
            ("age (s) of a device that drifts", "G (µS)", AGES, drifted, aged),
            ("G (µS) of a device at a read", "noise (µS)", targets, zero, noise),
            ("target of programming (µS)", "error (µS)", targets, zero, error),
        ),
    )


def main():
    """Draw and report the device on the command line, and end the process."""
    parser = train.Parser(prog="analog.py", description=__doc__)
    parser.add_argument(
        "--device", default="pcm", help="a built-in name or a JSON file"
    )
    device, *others = train.devices_of(parser.parse_args().device)
    if others:
        train.stop("--device: one at a time")
    found = jax.device_get(simulate(device))
    report(device, *found[3:])
    path = (
        Path(__file__).parent
        / f"model{'' if device.name == 'pcm' else '_' + device.name}.png"
    )
    train.write(path, figures.png(draw(device, *found)))
    print(f"figure in {path}")
