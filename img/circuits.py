"""Circuits that are not ideal: what they cost a trained network, and training with them.

    python img/studies.py circuits RUN                          errors of a network with each
    python img/circuits.py NAME [flags of train.py]             a network that is trained with one
    python img/circuits.py scales RUN                           full scales of a network

Each row has the chips, tasks and random draws of the first. Full scales are the 99.9 % quantiles
of img/trained on chips of `pcm`, means over 64; that of the output is 1.2 times the largest target.
A converter clips what is beyond. These full scales suit functions only, not classes.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import analog  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
from img import parts  # noqa: E402

CURRENTS = 1.15, 4.3, 6.0  # full scales of layers 0 and 1 in a step, and of the output
TRACES = 1.1  # that of traces
GRADIENT = 1.25  # that of a look's gradient


# ---- circuits ------------------------------------------------------------------------------------


def quantise(x, n_bits, full):
    """x as a converter of n_bits has it, up to ± full: 0, and as many levels on either side. It
    passes gradients as if it were ideal, but none where it clips."""
    step = full / (2 ** (n_bits - 1) - 1)
    inside = analog.clip(x, -full, full)
    return inside + jax.lax.stop_gradient(step * jnp.round(inside / step) - inside)


def current(k, x, n_bits):
    """What crossbar k adds to membranes, or the outputs x, after a converter."""
    return quantise(x, n_bits, CURRENTS[k])


def wires(device, g, ohm):
    """Conductances g [2, rows, cols] in µS through wires of that resistance per cell, to the first
    order in it: rows are driven at their first column, columns end below their last row, and all
    rows are driven, which is the most that columns carry."""
    siemens = 1e-6 * g
    to_the_right = jnp.flip(
        jnp.cumsum(jnp.flip(siemens, 2), 2), 2
    )  # what a row's segment carries
    from_above = jnp.cumsum(siemens, 1)  # what a column's segment carries
    row_drop = ohm * jnp.cumsum(to_the_right, 2)
    column_drop = ohm * jnp.flip(jnp.cumsum(jnp.flip(from_above, 1), 1), 1)
    return g * (1 - row_drop - column_drop)


def gains(key, n, std):
    """Gains [n] around 1."""
    return 1 + std * jax.random.normal(key, (n,))


COARSE = {
    "traces": partial(quantise, n_bits=7, full=TRACES),  # 6 bits from 0 on, and a sign
    "gradient": partial(quantise, n_bits=6, full=GRADIENT),
}
PLAUSIBLE = network.Circuit(
    wires=partial(wires, ohm=2.5),
    gains=partial(gains, std=0.05),
    current=partial(current, n_bits=8),
    **COARSE,
)
CIRCUITS = {
    **{f"adc{n}": network.Circuit(current=partial(current, n_bits=n)) for n in (8, 6, 5)},
    **{
        f"wires{ohm:g}": network.Circuit(wires=partial(wires, ohm=ohm))
        for ohm in (1.0, 2.5, 5.0)
    },
    "gains10": network.Circuit(gains=partial(gains, std=0.1)),
    "coarse6": network.Circuit(**COARSE),
    "plausible": PLAUSIBLE,
}
train.CIRCUITS |= CIRCUITS

LABELS = {
    "ideal": "ideal circuits",
    "adc8": "currents of 8 bits",
    "adc6": "currents of 6 bits",
    "adc5": "currents of 5 bits",
    "wires1": "wires of 1 Ω per cell",
    "wires2.5": "wires of 2.5 Ω per cell",
    "wires5": "wires of 5 Ω per cell",
    "gains10": "gains of neurons ± 10 %",
    "coarse6": "gradient and traces of 6 bits",
    "stuck1": "1 % of devices stuck",
    "stuck5": "5 % of devices stuck",
    "plausible": "8 bits, 2.5 Ω, gains ± 5 %, 6-bit gradient, 0.5 % stuck",
}
# Time steps of a pause after each presentation, and whether traces are kept.
NOT_DISCHARGED = {
    "nothing is discharged": (0, True),
    "membranes are not discharged": (0, False),
    "membranes are not discharged, but pause for 150 ms": (150, False),
    "nothing is discharged, but pauses for 0.5 s": (500, True),
}
STUCK_SHARE = {
    "stuck1": 0.01,
    "stuck5": 0.05,
    "plausible": 0.005,
}  # shares, half of them at g_max


def stuck(name, device):
    """The device as the chips of that name have it."""
    half = STUCK_SHARE.get(name, 0.0) / 2
    return device._replace(stuck_low=half, stuck_high=half)


# ---- errors with each ----------------------------------------------------------------------------


def frozen(noisy, key, device, target):
    """A new crossbar as analog.deploy makes it, with the read noise of the device noisy in G: it
    stays the same from read to read."""
    xbar = analog.deploy(key, noisy, target)
    noise_key = jax.random.fold_in(key, 2)  # deploy has split it in two
    r, age = xbar.g / device.g_max, device.t0
    std = noisy.law.read_std(xbar.g, r, age, device.t0)
    return xbar._replace(g=xbar.g + std * jax.random.normal(noise_key, target.shape))


def with_circuit(run, name):
    """The run, its chips with that circuit."""
    return run._replace(cfg=dataclasses.replace(run.cfg, circuit=name))


N_BEFORE = 3  # inputs that were shown before, where nothing is discharged


def after_others(key, dynamics, hidden, u, pause, keeps_traces):
    """Traces [L, H] after each of the inputs u [L, n_in], where others were shown before, drawn at
    random. Each of the others is followed by a pause of that many time steps without input.
    Membranes are never discharged, traces only if not keeps_traces."""
    quiet, start = tuple(0.0 * w for w in hidden), None
    for order_key in jax.random.split(key, N_BEFORE):
        others = u[train.shuffled(order_key, len(u))]
        start = train.entry(network.present(dynamics, hidden, others, start), -1)
        if pause:
            waiting = dynamics._replace(n_steps=pause)
            start = train.entry(network.present(waiting, quiet, others, start), -1)
        if not keeps_traces:
            start = start._replace(e=jnp.zeros_like(start.e))
    return network.present(dynamics, hidden, u, start).e[-1]


def not_discharged(key, meta, cfg, family, device, pause, keeps_traces):
    """Error after a new chip has learned a task, where membranes, or traces too, are not discharged
    between presentations, but pause for so many time steps."""
    chip, u, task, key = train.scene(key, meta, cfg, family, device)
    chip = network.later(chip, cfg.tread)
    look_key, adapt_key, refer_key, ask_key, readout_key = jax.random.split(key, 5)
    times, asked = train.times_of(cfg), train.wait_of(cfg)

    def traces_at(inputs):
        key, t = inputs
        read_key, order_key = jax.random.split(key)
        w = network.each(network.read, read_key, device, chip, t, cfg.compensate)
        dynamics = train.dynamics_of(cfg)
        return after_others(order_key, dynamics, w.hidden, u, pause, keeps_traces)

    e = jax.lax.map(traces_at, (jax.random.split(look_key, cfg.n_inner), times.reads))
    support = task.support
    readouts, _ = train.adapt(adapt_key, meta, cfg, device, chip.readout, e, support, times)
    readout = train.entry(readouts, -1)
    read_at = times.pulses[-1] + device.t_verify
    readout = network.with_reference(refer_key, device, readout, read_at)
    w = network.read(readout_key, device, readout, asked, cfg.compensate)
    y = train.outputs(cfg, traces_at((ask_key, asked)), w)
    return parts.error(family, y, task.query)


def errors_of(n, run):
    """Errors [n] by label, on chips of the run's first device, those of ideal circuits first."""
    device = next(iter(run.devices.values()))
    found = {}
    for name, label in LABELS.items():
        changed = with_circuit(run, name if name in CIRCUITS else "ideal")
        found[label] = parts.tested(parts.last_error, n, changed, stuck(name, device))
    still = parts.without(device, *parts.READ_NOISE)
    staying = partial(parts.last_error, make=partial(frozen, device))
    found["read noise that stays the same"] = parts.tested(staying, n, run, still)
    for label, (pause, keeps_traces) in NOT_DISCHARGED.items():
        experiment = partial(not_discharged, pause=pause, keeps_traces=keeps_traces)
        found[label] = parts.tested(experiment, n, run)
    return found


def circuits(n, run):
    """Errors with circuits that are not ideal, each over those with ideal ones."""
    errors = errors_of(n, run)
    ideal = errors[LABELS["ideal"]]
    found = {label: parts.show(label, x, ideal) for label, x in errors.items()}
    return {"after adaptation": found}


def scales(key, meta, cfg, family, device):
    """The 99.9 % quantiles of magnitudes on one chip: of what both layers and the readout add in a
    step, of traces, and of the gradient of a first look."""
    chip, u, task, key = train.scene(key, meta, cfg, family, device)
    w = network.each(network.read, key, device, chip, cfg.tread, cfg.compensate)
    dynamics = train.dynamics_of(cfg)
    activity = network.present(dynamics, w.hidden, u)
    e, second = activity.e[-1], w.hidden[1]
    y = e @ w.readout
    shown = {
        "layer 0": network.held_current(dynamics.drive, w.hidden[0], u),
        "layer 1": activity.layers[0].z @ second[:-1] + second[-1],
        "readout": y,
        "traces": e,
        "gradient": train.delta_rule(e, y, task.support),
    }
    return {name: jnp.quantile(jnp.abs(x), 0.999) for name, x in shown.items()}


# ---- command line --------------------------------------------------------------------------------


def train_with(name, flags):
    """Meta-train with a circuit, or stuck devices, on chips of pcm and pcm_history."""
    files = []
    for device in ("pcm", "pcm_history"):
        label = f"{device}_{name}".replace(".", "_")
        constants = analog.describe(label, stuck(name, analog.DEVICES[device]))
        files.append(Path("run") / f"{label}.json")
        train.write_json(files[-1], constants)
    circuit = name if name in CIRCUITS else "ideal"
    given = "--circuit", circuit, "--device", ",".join(map(str, files))
    train.main([*given, *flags])


def main(argv=None):
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    with train.one_line_errors():
        parser = train.Parser(description=__doc__, allow_abbrev=False)
        parser.add_argument("name", choices=[*LABELS, "scales"])
        parser.add_argument("flags", nargs=argparse.REMAINDER)
        given = parser.parse_args(argv)
        train.configure_backend()
        if given.name != "scales":
            return train_with(given.name, given.flags)
        train.require(given.flags, "scales needs a run folder")
        run = train.load(given.flags[0])
        for name, x in parts.tested(scales, 64, run).items():
            print(f"{name:<10}{x.mean():10.3g}")


if __name__ == "__main__":
    main()
