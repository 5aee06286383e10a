"""Studies of a meta-trained network: each prints a table and writes its figure and numbers.

    python img/studies.py STUDY RUN [RUN ...] [--n 256] [--out DIR]

compare   several networks, each on new and old chips of all devices, and their mean
chips     one network on new, old, used and faulty chips of all devices
drift     how a task that was learned ages, and how an old chip learns
life      50 tasks in sequence on one chip, with four ways to keep its readout
limits    what is left of the error on other devices; bounds of any rule
updates   sizes of pulses against those of steps of Adam

RUN is the folder of a run. All devices are those of the run and the built-in ones of the same
g_max, but for the ideal one. To compare settings, train a network with each of them.
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
import numpy as np  # noqa: E402

import analog  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
from img import figures  # noqa: E402

AGES = 400.0, 1e3, 1e4, 1e5, 1e6, 1e7  # s, the first after an adaptation at tread
OLD = 1e6  # s
N_LIFE = 50  # tasks of a life
PERIOD = 1e4  # s, from one of them to the next
AHEAD = 30.0  # s, from the end of a readout's programming to the first look at a task
RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0
STUCK = {"stuck_low": 0.005, "stuck_high": 0.005}  # shares of all devices


# ---- parts of experiments ------------------------------------------------------------------------


def new_chip(key, meta, cfg, device):
    """A chip of a network, programmed at t = 0, and its first trial."""
    chip_key, trial_key = jax.random.split(key)
    chip = network.assemble(chip_key, device, analog.deploy, meta.g)
    return chip, train.draw_trial(trial_key, cfg)


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


def learn_and_test(key, meta, cfg, device, chip, trial, times):
    """Readout, pulses [2, H, 1] and squared error after a chip has learned a trial."""
    learn_key, hidden_key, readout_key = jax.random.split(key, 3)
    readouts, pulses = learn(learn_key, meta, cfg, device, chip, trial, times)
    moments = train.observe(hidden_key, cfg, device, chip, times.query).moments
    w = network.read_readout(readout_key, device, readouts[-1], times.query)
    return readouts[-1], sum(pulses), train.squared_error(moments, trial.query, w)


def tested(experiment, n, run, device=None):
    """What an experiment measures on n chips of a run's network, of its first device or of
    another."""
    device = device or run.devices[0]
    meta = train.project((device,), run.state.meta)
    key = train.stream(train.Config(), 3)  # the same tasks for every network
    return jax.device_get(train.test(experiment, run.cfg, device, n, key, meta))


def devices_for(run):
    """The devices of a run, and the built-in ones of the same g_max but for the ideal one."""
    own = {device.name: device for device in run.devices}
    g_max = run.devices[0].g_max
    return [
        device
        for device in (own | analog.DEVICES).values()
        if device.g_max == g_max and not isinstance(device.law, analog.Ideal)
    ]


def show(label, values):
    """Print mean, interval and number of values [n]; of those at all RIDGES, [n, RIDGES],
    the ones of lowest mean. Their summary."""
    if values.ndim > 1:
        best = int(np.argmin(np.mean(values, 0)))
        label, values = f"{label}, ridge {RIDGES[best]:g}", values[:, best]
    found = train.summary(values)
    interval = f" ± {found['ci95']:.3f}" if "ci95" in found else ""
    print(
        f"  {label:<64}{found['mean']:9.3f}{interval}  (n = {found['n']})", flush=True
    )
    return found


# ---- life: 50 tasks in sequence on one chip ------------------------------------------------------


def reset(key, device, readout, target, t):
    """analog.Programmed of a readout whose devices were all RESET."""
    none = jnp.zeros(target.shape, int)
    erased = analog.reset(key, device, readout, none == 0, t)
    return analog.Programmed(erased, none, none + 1, none)


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
    chip, _ = new_chip(chip_key, meta, cfg, device)

    def task(readout, inputs):
        key, k = inputs
        keep_key, trial_key, learn_key = jax.random.split(key, 3)
        times = train.times_of_test(cfg, cfg.tread + PERIOD * k)
        kept = nothing(keep_key, device, readout, meta.g.readout, 0.0)
        done = policy(keep_key, device, readout, meta.g.readout, times.reads[0] - AHEAD)
        done = jax.tree.map(lambda new, old: jnp.where(k > 0, new, old), done, kept)
        trial = train.draw_trial(trial_key, cfg)
        used = with_readout(chip, done.xbar)
        after, fired, error = learn_and_test(
            learn_key, meta, cfg, device, used, trial, times
        )
        return after, {
            "error": error,
            "pulses": fired + done.pulses,
            "resets": done.resets,
        }

    tasks = jax.random.split(life_key, N_LIFE), jnp.arange(float(N_LIFE))
    return jax.lax.scan(task, chip.xbars.readout, tasks)[1]


SPANS = (1, 1), (2, 10), (41, N_LIFE)


def show_wear(what, counts):
    """Print what the devices [2, H, 1] of n chips took in N_LIFE tasks, counts [n, N_LIFE, 2, H,
    1]; its summaries."""
    of_device = np.sum(counts, 1)
    devices = (1, 2, 3)
    values = {
        f"{what} of the readout for a task": np.sum(of_device, devices) / N_LIFE,
        f"{what} of a device in its life": np.mean(of_device, devices),
        f"{what} of the busiest device in its life": np.max(of_device, devices),
    }
    return {label: show(label, x) for label, x in values.items()}


def life(n, run):
    """50 tasks in sequence on one chip, with four ways to keep its readout."""
    numbers = {}
    for name, policy in POLICIES.items():
        found = tested(partial(lives, policy=policy), n, run)
        print(name)
        of = {"error": train.summary(found["error"])}
        for first, last in SPANS:
            label = f"error, tasks {first} to {last}"
            of[label] = show(label, np.mean(found["error"][:, first - 1 : last], 1))
        of |= show_wear("pulses", found["pulses"])
        numbers[name] = of | show_wear("resets", found["resets"])
    drawn = {name: of["error"] for name, of in numbers.items()}
    x = range(1, N_LIFE + 1)
    return numbers, figures.lines(x, drawn, "task in sequence on one chip")


# ---- chips ---------------------------------------------------------------------------------------


def first_tasks(key, meta, cfg, device):
    """Squared errors, by label, of the same task that a new chip meets first at tread, or at
    the age OLD."""
    chip_key, learn_key = jax.random.split(key)
    chip, trial = new_chip(chip_key, meta, cfg, device)

    def at(age):  # the draws are the same at both ages
        times = train.times_of_test(cfg, age)
        return learn_and_test(learn_key, meta, cfg, device, chip, trial, times)[-1]

    young, old = jax.lax.map(at, jnp.array([cfg.tread, OLD]))
    return {"first task": young, "first task, 10⁶ s old": old}


def written(key, cfg, device, chip, w):
    """Weights [H] as read at ttest from a readout whose programming to weights w [H] began at
    tprog."""
    write_key, read_key = jax.random.split(key)
    wanted = writable(device, w[:, None])
    ended = cfg.tprog + analog.MAX_STEPS * device.t_verify
    done = analog.program(write_key, device, chip.xbars.readout, wanted, ended)
    return network.read_readout(read_key, device, done.xbar, cfg.ttest)


def regression(key, meta, cfg, device):
    """Squared errors of readouts of a chip that were found by regression on its noisy
    traces, [RIDGES]: as computed, and as written to the chip and read; and of the best
    readout for all inputs."""
    chip_key, look_key, query_key, write_key = jax.random.split(key, 4)
    chip, trial = new_chip(chip_key, meta, cfg, device)
    times = train.times_of_test(cfg, cfg.tread)
    looks = train.look_at(look_key, cfg, device, chip, times)
    seen, support = looks.moments_at(0), trial.support
    second = jnp.tensordot(support.share, seen.second, 1)
    first = support.y @ seen.first
    query = train.observe(query_key, cfg, device, chip, times.query).moments
    eye = jnp.eye(len(first))
    error = partial(train.squared_error, query, trial.query)

    def fit(ridge):
        w = jnp.linalg.solve(second + ridge * eye, first + ridge * looks.readout)
        on_chip = written(write_key, cfg, device, chip, w)
        return {"ridge regression": error(w), "ridge, written": error(on_chip)}

    range_second = jnp.mean(query.second, 0) + 1e-5 * eye
    range_first = trial.query.y @ query.first / len(query.first)
    best = jnp.linalg.solve(range_second, range_first)
    found = jax.lax.map(fit, jnp.array(RIDGES))
    return {**found, "best readout of all inputs": error(best)}


def chip_errors(n, run, device):
    """Errors of n chips of a device by label, those of ridge regression at all RIDGES."""
    restored = partial(lives, policy=analog.program)
    used = tested(restored, n, run, device)["error"]
    faulty = tested(train.episode, n, run, device._replace(**STUCK)).measured["mse"]
    return {
        **tested(first_tasks, n, run, device),
        "second task": used[:, 1],
        "tasks 41 to 50": np.mean(used[:, 40:], 1),
        "1 % stuck": faulty[:, -1],
        "ridge, written": tested(regression, n, run, device)["ridge, written"],
    }


def chips(n, run):
    """One network on new, old, used and faulty chips of all devices."""
    found = {}
    for device in devices_for(run):
        errors = chip_errors(n, run, device)
        found[device.name] = {
            label: show(f"{device.name}, {label}", x) for label, x in errors.items()
        }
    return found, figures.bars(found)


def compare(n, *runs):
    """Several networks, each on new and old chips of all devices, and their mean."""
    found = {}
    for k, run in enumerate(runs):
        of = found[f"network {k}"] = {}
        for device in devices_for(run):
            for label, x in tested(first_tasks, n, run, device).items():
                of[f"{device.name}, {label}"] = train.summary(x)
    for label in of:
        means = [of[label]["mean"] for of in found.values()]
        spread = " ".join(f"{x:.3f}" for x in means)
        print(f"  {label:<40}{np.mean(means):9.3f}   each {spread}")
    return found, figures.bars(found)


# ---- drift ---------------------------------------------------------------------------------------


def kept(key, cfg, device, chip, readout, reference, trial, t):
    """Squared errors at time t (s) of a readout that was adapted long before, by
    compensation; reference is its Σ G (µS) soon after."""
    hidden_key, readout_key = jax.random.split(key)
    g = analog.read(readout_key, device, readout, t)
    w = analog.weights(device, g)[:, 0]

    def error(compensate, w):
        settings = dataclasses.replace(cfg, compensate=compensate)
        moments = train.observe(hidden_key, settings, device, chip, t).moments
        return train.squared_error(moments, trial.query, w)

    scaled = w * reference / jnp.sum(g)
    return {
        "adapted once": error(False, w),
        "adapted once, hidden layers compensated": error(True, w),
        "adapted once, all layers compensated": error(True, scaled),
    }


def aged(key, meta, cfg, device):
    """Squared errors [ages] of one chip by what was done, times in seconds since
    deployment."""
    chip_key, trial_key, learn_key, scale_key, ages_key = jax.random.split(key, 5)
    chip, first = new_chip(chip_key, meta, cfg, device)
    second = train.draw_trial(trial_key, cfg)
    times = train.times_of_test(cfg, cfg.tread)
    (*_, readout), _ = learn(learn_key, meta, cfg, device, chip, first, times)
    seen = analog.read(scale_key, device, readout, times.pulses[-1] + device.t0)

    def at(inputs):
        key, age = inputs
        kept_key, fresh_key, program_key, again_key = jax.random.split(key, 4)
        times = train.times_of_test(cfg, age)
        wanted = meta.g.readout
        new = analog.program(program_key, device, readout, wanted, age - AHEAD)

        def learned(key, chip, trial):
            return learn_and_test(key, meta, cfg, device, chip, trial, times)[-1]

        errors = kept(
            kept_key, cfg, device, chip, readout, jnp.sum(seen), first, times.query
        )
        again = learned(again_key, with_readout(chip, new.xbar), second)
        return {
            **errors,
            "first adapted at that age": learned(fresh_key, chip, first),
            "second task at that age, restored before": again,
        }

    return jax.lax.map(at, (jax.random.split(ages_key, len(AGES)), jnp.array(AGES)))


def drift(n, run):
    """How a task that was learned ages, and how an old chip learns."""
    found = {}
    for label, values in tested(aged, n, run).items():
        for age, column in zip(AGES, values.T, strict=True):
            show(f"{label}, {age:g} s", column)
        found[label] = train.summary(values)
    figure = figures.lines(AGES, found, "age of the chip (s)", "log")
    return {"age": AGES, **found}, figure


# ---- limits --------------------------------------------------------------------------------------

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
    """The device with other constants, as far as it has them, by label."""
    known = analog.describe(device)
    return {
        label: analog.from_constants(known | constants)
        for label, constants in OTHER_DEVICES.items()
        if constants.keys() <= known.keys()
    }


def limits(n, run):
    """What is left of the error on other devices; bounds of any rule for the readout."""
    found = {}
    for label, device in {"as it is": None, **others_of(run.devices[0])}.items():
        mse = tested(train.episode, n, run, device).measured["mse"]
        found[label] = show(label, mse[:, -1])
    exact = dataclasses.replace(run.cfg, off_noise=0.0)
    programmed = partial(train.episode, make=partial(train.injected, exact))
    mse = tested(programmed, n, run).measured["mse"]
    others = {"no programming error": mse[:, -1], **tested(regression, n, run)}
    found |= {label: show(label, errors) for label, errors in others.items()}
    return found, figures.bars({"after adaptation": found})


# ---- updates -------------------------------------------------------------------------------------


def walk(w, gradient):
    """|ΔW| [100, H] of the steps that Adam at 10⁻³ takes from weights w [H]."""

    def one(state, step):
        w, memory = state
        move, memory = memory.move(step, gradient(w))
        return (w + 1e-3 * move, memory), 1e-3 * jnp.abs(move)

    return jax.lax.scan(one, (w, train.Adam.start(w)), jnp.arange(100.0))[1]


def moves(key, meta, cfg, device):
    """|ΔW| of one adaptation's pulses [H], 0 where there was none, and of 100 steps of Adam
    on the same task [100, H]."""
    chip_key, learn_key, look_key = jax.random.split(key, 3)
    chip, trial = new_chip(chip_key, meta, cfg, device)
    times = train.times_of_test(cfg, cfg.tread)
    readouts, pulses = learn(learn_key, meta, cfg, device, chip, trial, times)
    moved = analog.weights(device, readouts[-1].g - readouts[0].g)[:, 0]
    fired = jnp.any(sum(pulses) > 0, 0)[:, 0]
    looks = train.look_at(look_key, cfg, device, chip, times)

    def gradient(w):
        return 2 * train.residual(looks.moments_at(0), trial.support, w)

    return {
        "meta-learned pulses": jnp.where(fired, jnp.abs(moved), 0.0),
        "Adam at 0.001": walk(looks.readout, gradient),
    }


def updates(n, run):
    """Sizes of pulses against those of steps of Adam."""
    numbers, drawn = {}, {}
    for label, sizes in tested(moves, n, run).items():
        positive = sizes[sizes > 0]
        if not len(positive):
            continue  # nothing was moved
        low, median, high = np.quantile(positive, (0.05, 0.5, 0.95)).tolist()
        numbers[label] = {"quantiles 0.05, 0.5, 0.95": [low, median, high]}
        drawn[label] = positive
        print(
            f"  |ΔW| of {label:<48} median {median:.1e}, 90 % from {low:.1e} to {high:.1e}"
        )
    return numbers, figures.histograms(drawn, "|ΔW| of a synapse in one step")


# ---- command line --------------------------------------------------------------------------------

STUDIES = {x.__name__: x for x in (compare, chips, drift, life, limits, updates)}


def parse(argv):
    """The arguments of the command line."""
    parser = train.Parser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--n", type=int, default=256, help="chips (default: 256)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "gallery", help="folder of figures"
    )
    given = parser.parse_args(argv)
    if len(given.runs) > 1 and given.study != "compare":
        train.stop(f"{given.study} takes one run folder")
    if given.n < 1:
        train.stop("--n must be at least 1")
    return given


def main(argv=None):
    """Run a study."""
    train.configure_backend()
    given = parse(argv)
    runs = [train.load(folder) for folder in given.runs]
    numbers, figure = STUDIES[given.study](given.n, *runs)
    path = given.out / (given.study + train.suffix_of(runs[0].devices[0]))
    train.write(path.with_suffix(".png"), figures.png(figure))
    train.write_json(path.with_suffix(".json"), numbers)
    print(f"figure in {path}.png, numbers in {path}.json")


if __name__ == "__main__":
    main()
