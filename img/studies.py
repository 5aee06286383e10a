"""Studies of a meta-trained network: each prints a table and writes its figure and numbers.

    python img/studies.py chips|drift|life|limits|updates RUN [--n 256] [--out DIR]
    python img/studies.py recipes|bits|steps [--n 256] [--out DIR] [flags of train.py]

chips     one network on new, old, used and faulty chips of its own and the built-in devices
drift     how a task that was learned ages, and how an old chip learns
life      50 tasks in sequence on one chip, with four ways to keep its readout
limits    what is left of the error on other devices; bounds of any rule
updates   sizes of pulses against those of gradient descent and Adam
recipes   networks trained on other devices or with another rule
bits      bits of an update
steps     looks at a task

RUN is a run folder. The networks that a study trains itself go to run/studies.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import analog  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
from img import figures  # noqa: E402

AGES = 150.0, 1e3, 1e4, 1e5, 1e6, 1e7  # s
OLD = 1e6  # s
N_LIFE = 50  # tasks of a life
PERIOD = 1000.0  # s, from one of them to the next
AHEAD = 10.0  # s, from the programming of a readout to the first look at a task
RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0
STUCK = {"stuck_low": 0.005, "stuck_high": 0.005}  # shares of all devices


class Options(NamedTuple):
    """What a study is asked for."""

    run: train.Run | None  # of the folder on the command line
    n: int  # chips of a test
    flags: dict  # of the networks that a study trains


# ---- parts of experiments ------------------------------------------------------------------------


def deployed(key, meta, cfg, device):
    """A new chip of a network, programmed at t = 0."""
    return network.assemble(key, device, train.programmed(cfg, device), meta.g)


def with_readout(chip, readout):
    """The chip with another readout."""
    return chip._replace(xbars=chip.xbars._replace(readout=readout))


def writable(device, w):
    """Conductances [2, rows, cols] in µS of weights w, as far as the device can have them."""
    wanted = analog.conductances(device, jnp.clip(w, -1.0, 1.0))
    return jnp.minimum(wanted, device.g_prog)


def learn(key, meta, cfg, device, chip, trial, times):
    """The readouts of a chip after each look at a trial, and the pulses of each look."""
    look_key, adapt_key = jax.random.split(key)
    looks = train.look_at(look_key, cfg, device, chip, times)
    return train.adapt(adapt_key, meta, cfg, device, chip, looks, trial.support, times)


def moments_at(key, cfg, device, chip, t):
    """Moments of the whole range in one read of a chip."""
    parts, _ = train.observe(train.moments_of_range, key, cfg, device, chip, t)
    return train.pooled(parts)


def meet(key, meta, cfg, device, chip, trial, times):
    """Readout, pulses [2, H, 1] and squared error after a chip has met a trial."""
    learn_key, hidden_key, readout_key = jax.random.split(key, 3)
    readouts, pulses = learn(learn_key, meta, cfg, device, chip, trial, times)
    moments = moments_at(hidden_key, cfg, device, chip, times.query)
    w = network.read_readout(readout_key, device, readouts[-1], times.query)
    return readouts[-1], sum(pulses), train.squared_error(moments, trial.query, w)


def tested(experiment, options, device=None, net=None):
    """What an experiment measures on the chips of a network, by default the run's, on its
    device."""
    net = net or options.run
    device = device or net.devices[0]
    meta = train.project((device,), net.state.meta)
    key = train.stream(net.cfg, 3)
    return jax.device_get(train.test(experiment, net.cfg, device, options.n, key, meta))


def show(label, values):
    """Print mean, interval and number of values [n]; their summary."""
    found = train.summary(values)
    interval = f" ± {found['ci95']:.3f}" if "ci95" in found else ""
    print(
        f"  {label:<64}{found['mean']:9.3f}{interval}  (n = {found['n']})", flush=True
    )
    return found


def final_error(label, options, **of):
    """Summary of the error after adaptation of a network on new chips, which is printed."""
    return show(label, tested(train.episode, options, **of).measured["mse"][:, -1])


# ---- life: 50 tasks in sequence on one chip ------------------------------------------------------


def reset(key, device, readout, target, t):
    """analog.Programmed of a readout whose devices were all RESET."""
    every = jnp.ones(target.shape, bool)
    none = jnp.zeros(target.shape, int)
    return analog.Programmed(
        analog.reset(key, device, readout, every, t), none, none + 1, none
    )


def nothing(key, device, readout, target, t):
    """analog.Programmed of a readout that is left as it is."""
    none = jnp.zeros(target.shape, int)
    return analog.Programmed(readout, none, none, none)


def refresh(key, device, readout, target, t):
    """analog.Programmed of a readout whose weights were read, without their mean drift, and
    written again with one device of each pair at g_min."""
    read_key, program_key = jax.random.split(key)
    g = analog.read(read_key, device, readout, t)
    before = g / analog.mean_drift(device, g, analog.age_of(readout, t))
    wanted = writable(device, analog.weights(device, before))
    return analog.program(program_key, device, readout, wanted, t)


# What is done with a readout before its next task, given the key, the device, the readout, what
# it was programmed to at the start, and the time; restoring is to program that again.
POLICIES = {
    "nothing": nothing,
    "restore": analog.program,
    "reset": reset,
    "refresh": refresh,
}


def lives(key, meta, cfg, device, policy):
    """Squared errors [N_LIFE] of one chip, pulses and RESETs [N_LIFE, 2, H, 1], where the
    policy comes between two tasks."""
    chip_key, life_key = jax.random.split(key)
    chip = deployed(chip_key, meta, cfg, device)

    def task(readout, inputs):
        key, k = inputs
        keep_key, trial_key, meet_key = jax.random.split(key, 3)
        times = train.times_of_test(cfg, cfg.tread + PERIOD * k)
        kept = nothing(keep_key, device, readout, meta.g.readout, 0.0)
        done = policy(keep_key, device, readout, meta.g.readout, times.reads[0] - AHEAD)
        done = jax.tree.map(lambda new, old: jnp.where(k > 0, new, old), done, kept)
        trial = train.draw_trial(trial_key, cfg)
        used = with_readout(chip, done.xbar)
        after, fired, error = meet(meet_key, meta, cfg, device, used, trial, times)
        return after, {
            "error": error,
            "pulses": fired + done.pulses,
            "resets": done.resets,
        }

    tasks = jax.random.split(life_key, N_LIFE), jnp.arange(float(N_LIFE))
    return jax.lax.scan(task, chip.xbars.readout, tasks)[1]


SPANS = (1, 1), (2, 10), (11, 20), (21, 30), (31, 40), (41, N_LIFE)


def life(options):
    """50 tasks in sequence on one chip, with four ways to keep its readout."""
    numbers, drawn = {}, {}
    for name, policy in POLICIES.items():
        found = tested(functools.partial(lives, policy=policy), options)
        error = found.pop("error")
        print(name)
        of = {"error": train.summary(error)}
        for first, last in SPANS:
            label = f"error, tasks {first} to {last}"
            of[label] = show(label, np.mean(error[:, first - 1 : last], 1))
        for what, counts in found.items():
            of_device = np.sum(counts, 1)  # [n, 2, H, 1], in a life
            for label, x in (
                (
                    f"{what} of the readout for a task",
                    np.sum(of_device, (1, 2, 3)) / N_LIFE,
                ),
                (f"{what} of a device in its life", np.mean(of_device, (1, 2, 3))),
                (
                    f"{what} of the busiest device in its life",
                    np.max(of_device, (1, 2, 3)),
                ),
            ):
                of[label] = show(label, x)
        numbers[name] = of
        drawn[name] = range(1, N_LIFE + 1), of["error"]
    return numbers, figures.lines(drawn, "task in sequence on one chip")


# ---- chips ---------------------------------------------------------------------------------------


def old(key, meta, cfg, device):
    """Squared error of a task that a chip meets at the age OLD."""
    chip_key, trial_key, meet_key = jax.random.split(key, 3)
    chip = deployed(chip_key, meta, cfg, device)
    trial = train.draw_trial(trial_key, cfg)
    return meet(
        meet_key, meta, cfg, device, chip, trial, train.times_of_test(cfg, OLD)
    )[-1]


def regression(key, meta, cfg, device):
    """Squared errors of readouts of a chip that were found by regression on its noisy
    traces, [RIDGES]: as computed, and as written to the chip and read; and of the best
    readout for all inputs."""
    chip_key, trial_key, look_key, write_key, read_key, query_key = jax.random.split(
        key, 6
    )
    chip = deployed(chip_key, meta, cfg, device)
    trial = train.draw_trial(trial_key, cfg)
    looks = train.look_at(
        look_key, cfg, device, chip, train.times_of_test(cfg, cfg.tread)
    )
    seen = looks.moments[0]
    second = jnp.tensordot(trial.support.share, seen.second, 1)
    first = trial.support.y @ seen.first
    query = moments_at(query_key, cfg, device, chip, cfg.ttest)
    eye = jnp.eye(len(first))

    def fit(ridge):
        w = jnp.linalg.solve(second + ridge * eye, first + ridge * looks.readout)
        wanted = writable(device, w[:, None])
        done = analog.program(write_key, device, chip.xbars.readout, wanted, cfg.tprog)
        written = network.read_readout(read_key, device, done.xbar, cfg.ttest)
        return {
            "ridge regression": train.squared_error(query, trial.query, w),
            "ridge regression, written": train.squared_error(
                query, trial.query, written
            ),
        }

    best = jnp.linalg.solve(query.second[0] + 1e-5 * eye, trial.query.y @ query.first)
    best = train.squared_error(query, trial.query, best)
    return {
        **jax.lax.map(fit, jnp.array(RIDGES)),
        "best readout of all inputs": best[None],
    }


def show_best(label, errors):
    """Print and return the summary of the column of errors [n, RIDGES] with the lowest
    mean."""
    best = int(np.argmin(np.mean(errors, 0)))
    note = f", ridge {RIDGES[best]:g}" if len(errors.T) > 1 else ""
    return show(label + note, errors[:, best])


def chips(options):
    """One network on new, old, used and faulty chips of its own devices and of the built-in
    ones of the same g_max."""
    own = {device.name: device for device in options.run.devices}
    g_max = options.run.devices[0].g_max
    rows = {}
    for name, device in (own | analog.DEVICES).items():
        if device.g_max != g_max or isinstance(device.law, analog.Ideal):
            continue
        new = tested(train.episode, options, device).measured["mse"]
        used = tested(functools.partial(lives, policy=analog.program), options, device)[
            "error"
        ]
        faulty = tested(train.episode, options, device._replace(**STUCK)).measured[
            "mse"
        ]
        ridge = tested(regression, options, device)["ridge regression, written"]
        rows[name] = {
            "before adaptation": show(f"{name}, before adaptation", new[:, 0]),
            "first task": show(f"{name}, first task", new[:, -1]),
            "second task": show(f"{name}, second task", used[:, 1]),
            "50th task": show(f"{name}, 50th task", used[:, -1]),
            "10⁶ s old": show(f"{name}, 10⁶ s old", tested(old, options, device)),
            "1 % stuck": show(f"{name}, 1 % of devices stuck", faulty[:, -1]),
            "ridge, written": show_best(f"{name}, ridge regression, written", ridge),
        }
    kinds = list(next(iter(rows.values())))[1:]
    bars = {kind: [row[kind] for row in rows.values()] for kind in kinds}
    return rows, figures.bars(bars, rows)


# ---- drift ---------------------------------------------------------------------------------------


def aged(key, meta, cfg, device):
    """Squared errors [ages] of one chip by what was done, times in seconds since
    deployment."""
    chip_key, first_key, second_key, learn_key, scale_key, ages_key = jax.random.split(
        key, 6
    )
    chip = deployed(chip_key, meta, cfg, device)
    first = train.draw_trial(first_key, cfg)
    second = train.draw_trial(second_key, cfg)
    times = train.times_of_test(cfg, cfg.tread)
    readouts, _ = learn(learn_key, meta, cfg, device, chip, first, times)
    readout = readouts[-1]
    seen = analog.read(scale_key, device, readout, times.pulses[-1] + device.t0)

    def at(inputs):
        key, age = inputs
        kept_key, fresh_key, program_key, again_key = jax.random.split(key, 4)
        times = train.times_of_test(cfg, age)
        target = meta.g.readout
        new = analog.program(
            program_key, device, readout, target, times.reads[0] - AHEAD
        )
        restored = with_readout(chip, new.xbar)
        fresh = meet(fresh_key, meta, cfg, device, chip, first, times)
        again = meet(again_key, meta, cfg, device, restored, second, times)
        return {
            **kept(
                kept_key, cfg, device, chip, readout, jnp.sum(seen), first, times.query
            ),
            "first adapted at that age": fresh[-1],
            "second task at that age, restored before": again[-1],
        }

    return jax.lax.map(at, (jax.random.split(ages_key, len(AGES)), jnp.array(AGES)))


def kept(key, cfg, device, chip, readout, reference, trial, t):
    """Squared errors at time t (s) of a readout that was adapted long before, by
    compensation."""
    hidden_key, readout_key = jax.random.split(key)
    g = analog.read(readout_key, device, readout, t)
    w = analog.weights(device, g)[:, 0]
    found = {}
    for label, compensate in (("", False), (", hidden layers compensated", True)):
        compensated = dataclasses.replace(cfg, compensate=compensate)
        moments = moments_at(hidden_key, compensated, device, chip, t)
        found[f"adapted once{label}"] = train.squared_error(moments, trial.query, w)
    scaled = w * reference / jnp.sum(g)
    error = train.squared_error(moments, trial.query, scaled)
    return {**found, "adapted once, all layers compensated": error}


def drift(options):
    """How a task that was learned ages, and how an old chip learns."""
    errors = tested(aged, options)
    numbers = {"age": AGES}
    for label, values in errors.items():
        for age, column in zip(AGES, values.T, strict=True):
            show(f"{label}, {age:g} s", column)
        numbers[label] = train.summary(values)
    found = {label: (AGES, numbers[label]) for label in errors}
    return numbers, figures.lines(found, "age of the chip (s)", "log")


# ---- networks that a study trains ----------------------------------------------------------------


def other(device, constants):
    """The device with other constants."""
    return analog.make(analog.describe(device) | constants)


def trained(name, options, constants=None, **flags):
    """The Run of a network of these flags, its device with other constants; trained once
    and kept."""
    folder = Path("run/studies") / name
    cfg, devices = train.configure({"n_iter": 800, **options.flags, **flags})
    devices = tuple(other(device, constants or {}) for device in devices)
    run = train.Run(cfg, devices, train.start(train.stream(cfg, 0), cfg, devices))
    if (folder / "checkpoint.npz").exists():
        run = train.load(folder)
    if (run.cfg, run.devices) != (cfg, devices):
        train.stop(f"{folder} holds a network of other settings: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"network in {folder}", flush=True)
    return train.train(run, folder)


def compare(settings, options):
    """Networks trained with each of the settings, {label: flags}."""
    rows = {}
    for label, flags in settings.items():
        net = trained(label.replace(" ", "_"), options, **flags)
        rows[label] = [final_error(label, options, net=net)]
    return rows, figures.bars(rows, ("after adaptation",))


def bits(options):
    """Bits of an update, real and ideal devices."""
    settings = {}
    for name in ("pcm", "perf"):
        for n in range(2, 7):
            settings[f"{name} {n} bits"] = {"device": name, "n_bits": n}
        settings[f"{name} real-valued"] = {"device": name, "n_bits": 6, "rule": "real"}
    return compare(settings, options)


def steps(options):
    """Looks at a task: networks trained for so many."""
    return compare({f"{n} looks": {"n_inner": n} for n in (1, 2, 4, 8)}, options)


# Constants of a device of the family nandakumar.
PULSE_NOISE = {"set_std_slope": 0.0, "set_std_offset": 0.0, "set_std_history": 0.0}
READ_NOISE = {"read_slope": 0.0, "read_offset": 0.0}
DRIFT = {"nu_mean": 0.0, "nu_std": 0.0}
OTHER_DEVICES = {
    "no pulse noise": PULSE_NOISE,
    "no read noise": READ_NOISE,
    "no drift": DRIFT,
    "no noise, no drift": PULSE_NOISE | READ_NOISE | DRIFT,
    "1 % of devices stuck": STUCK,
}


def others_of(device):
    """Those of the other constants that a device has, by label."""
    known = analog.describe(device).keys()
    return {label: x for label, x in OTHER_DEVICES.items() if x.keys() <= known}


def recipes(options):
    """Networks trained, and tested, on other devices or with another rule."""
    _, (device, *_) = train.configure(options.flags)
    devices = {label: {"constants": x} for label, x in others_of(device).items()}
    rules = {
        "one threshold for all synapses": {"shared_thr": True},
        "real-valued updates": {"n_bits": 6, "rule": "real"},
    }
    return compare({"as it is": {}, **devices, **rules}, options)


# ---- limits --------------------------------------------------------------------------------------


def limits(options):
    """What is left of the error on other devices; bounds of any rule for the readout."""
    run = options.run
    rows = {"as it is": [final_error("as it is", options)]}
    for label, constants in others_of(run.devices[0]).items():
        device = other(run.devices[0], constants)
        rows[label] = [final_error(label, options, device=device)]
    exact = run._replace(cfg=dataclasses.replace(run.cfg, off_noise=0.0))
    mse = tested(train.quick_episode, options, net=exact).measured["mse"]
    rows["no programming error"] = [show("no programming error", mse[:, -1])]
    for label, errors in tested(regression, options).items():
        rows[label] = [show_best(label, errors)]
    return rows, figures.bars(rows, ("after adaptation",))


# ---- updates -------------------------------------------------------------------------------------


def walk(direction, memory, size, w, gradient):
    """|ΔW| [100, H] of the steps that a direction of an optimizer takes from weights w."""

    def one(state, step):
        w, memory = state
        move, memory = direction(step, gradient(w), memory)
        return (w + size * move, memory), size * jnp.abs(move)

    return jax.lax.scan(one, (w, memory), jnp.arange(100.0))[1]


def descent(step, gradient, memory):
    """Direction of gradient descent."""
    return -gradient, memory


def moves(key, meta, cfg, device):
    """|ΔW| of one adaptation's pulses [H], 0 where there was none, and of 100 steps of
    gradient descent at half of the largest stable rate and of Adam at 10⁻³ on the same
    task, [100, H]."""
    chip_key, trial_key, learn_key, look_key = jax.random.split(key, 4)
    chip = deployed(chip_key, meta, cfg, device)
    trial = train.draw_trial(trial_key, cfg)
    times = train.times_of_test(cfg, cfg.tread)
    readouts, pulses = learn(learn_key, meta, cfg, device, chip, trial, times)
    moved = analog.weights(device, readouts[-1].g - readouts[0].g)[:, 0]
    fired = jnp.any(sum(pulses) > 0, 0)[:, 0]
    looks = train.look_at(look_key, cfg, device, chip, times)
    moments = looks.moments[0]
    second = jnp.tensordot(trial.support.share, moments.second, 1)
    rate = 0.5 / jnp.maximum(jnp.linalg.eigvalsh(second)[-1], 1e-6)

    def gradient(w):
        return 2 * train.residual(moments, trial.support, w)

    w = looks.readout
    return {
        "meta-learned pulses": jnp.where(fired, jnp.abs(moved), 0.0),
        "gradient descent, half the largest stable rate": walk(
            descent, 0.0, rate, w, gradient
        ),
        "Adam at 0.001": walk(train.adam, train.adam_start(w), 1e-3, w, gradient),
    }


def updates(options):
    """Sizes of pulses against those of gradient descent and Adam."""
    numbers, drawn = {}, {}
    for label, sizes in tested(moves, options).items():
        positive = sizes[sizes > 0]
        if not len(positive):
            print(f"  no {label}: nothing was moved")
            continue
        low, median, high = np.quantile(positive, (0.05, 0.5, 0.95)).tolist()
        numbers[label] = {"median": median, "quantiles 0.05, 0.95": [low, high]}
        drawn[label] = positive
        print(
            f"  |ΔW| of {label:<48} median {median:.1e}, 90 % from {low:.1e} to {high:.1e}"
        )
    return numbers, figures.histograms(drawn, "|ΔW| of a synapse in one step")


# ---- command line --------------------------------------------------------------------------------

OF_A_RUN = chips, drift, life, limits, updates
STUDIES = {study.__name__: study for study in (*OF_A_RUN, recipes, bits, steps)}


def parse(argv):
    """Name of a study, its Options and the folder of its figure."""
    parser = train.Parser(
        prog="studies.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("run", nargs="?", help="run folder")
    parser.add_argument(
        "--n", type=int, default=256, help="chips of a test (default: 256)"
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "gallery", help="folder of figures"
    )
    given, rest = parser.parse_known_args(argv)
    needs_run = STUDIES[given.study] in OF_A_RUN
    if needs_run and (given.run is None or rest):
        train.stop(f"{given.study} needs a run folder and no other flags")
    if given.run and not needs_run:
        train.stop(f"{given.study} trains its own networks and takes no run folder")
    if given.n < 1:
        train.stop("--n must be at least 1")
    run = train.load(given.run) if needs_run else None
    return given.study, Options(run, given.n, train.parse(rest)[0]), given.out


def main(argv=None):
    """Run a study."""
    train.configure_backend()
    name, options, out = parse(argv)
    numbers, figure = STUDIES[name](options)
    if options.run:
        name += train.suffix_of(options.run.devices[0])
    train.write(out / f"{name}.png", figures.png(figure))
    train.write_json(out / f"{name}.json", numbers)
    print(f"figure in {out / name}.png, numbers in {out / name}.json")


if __name__ == "__main__":
    main()
