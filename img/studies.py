"""Studies of a meta-trained network: each prints a table and writes its figure and numbers.

    python img/studies.py STUDY RUN [RUN ...] [--n 256] [--task_size N] [--out DIR]
    python img/studies.py STUDY [--out DIR]         draws again what was measured before

compare   several networks, each on new and old chips of all devices, and their mean
chips     one network on new, old, used and faulty chips of all devices
drift     how a task that was learned ages, and how an old chip learns
life      50 tasks in sequence on one chip, with four ways to keep its readout
few_shot  errors after each look, and of regression on the same traces; --task_size 5 is 1-shot
limits    what is left of the error on other devices; bounds of any rule
updates   sizes of pulses, of a float step, and of the change that a task needs
baselines the network against regression, a float delta rule and float MAML, by samples
energy    several networks: devices, and energies at low, typical and high prices
circuits  one network with circuits that are not ideal

RUN is the folder of a run. All devices are those of the (first) run and the built-in ones of the
same g_max, but for perf. To compare settings, train a network with each of them. Ages, devices and
networks that are compared have the same tasks, and random draws from the same keys.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
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
from img import baselines as ways  # noqa: E402
from img import energy as joules  # noqa: E402
from img import figures  # noqa: E402
from img.baselines import baselines, readouts, solve  # noqa: E402
from img.circuits import circuits, stuck  # noqa: E402
from img.parts import (  # noqa: E402
    READ_NOISE,
    error,
    error_of,
    last_error,
    recorded,
    resized,
    show,
    tested,
    tuned,
    unit,
    without,
    writable,
)

RESTS = 10.0, 3600.0, train.DAY, 1e6, 1e7  # s, from the last pulse of an adaptation
OLD = 1e6  # s, age of an old chip
N_LIFE = 50  # tasks of a life
PERIOD = 1e4  # s, from one of them to the next
AHEAD = 30.0  # s, from the end of a readout's programming to the first look at a task


# ---- parts of experiments ------------------------------------------------------------------------


def error_at(key, cfg, family, device, chip, u, query, t, compensate):
    """Error of a chip at time t (s), its readout compensated for drift or not, its hidden
    layers as the settings say."""
    see_key, read_key = jax.random.split(key)
    e = train.observe(see_key, cfg, device, chip, u, t).e
    w = network.read(read_key, device, chip.readout, t, compensate)
    return error(family, train.outputs(cfg, e, w), query)


def devices_for(run):
    """By name, the devices of a run, and the built-in ones of the same g_max but for perf."""
    g_max = next(iter(run.devices.values())).g_max
    built_in = {
        name: device
        for name, device in analog.DEVICES.items()
        if device.g_max == g_max and name not in {"perf", *run.devices}
    }
    return run.devices | built_in


# ---- life: 50 tasks in sequence on one chip ------------------------------------------------------

# What is done with a readout before its next task: functions of a key, the device, the tile, what
# it was programmed to at first (µS), and the time (s) at which programming ends. Each returns the
# tile and analog.Programmed.


def restore(key, device, readout, target, t):
    """Programmed to its first target again."""
    done = analog.program(key, device, readout.xbar, target, t)
    reference = network.programmed_total(device, done.xbar, target)
    return readout._replace(xbar=done.xbar, reference=reference), done


def reset(key, device, readout, target, t):
    """All devices RESET."""
    none = jnp.zeros(target.shape, int)
    erased = analog.reset(key, device, readout.xbar, none == 0, t)
    level = jnp.full(target.shape, device.reset_mean)
    done = analog.Programmed(erased, none, none + 1, none)
    return readout._replace(xbar=erased, reference=network.total(device, level)), done


def refresh(key, device, readout, target, t):
    """Read as programming begins, compensated for drift, and the weights that were read written
    with one device of each pair at g_min."""
    read_key, program_key = jax.random.split(key)
    began = t - analog.MAX_STEPS * device.t_verify
    w = network.read(read_key, device, readout, began, True)
    return restore(program_key, device, readout, writable(device, w), t)


def nothing(key, device, readout, target, t):
    """Left as it is."""
    none = jnp.zeros(target.shape, int)
    return readout, analog.Programmed(readout.xbar, none, none, none)


POLICIES = {"nothing": nothing, "restore": restore, "reset": reset, "refresh": refresh}


def lives(key, meta, cfg, family, device, policy):
    """Errors [N_LIFE] of one chip, and the pulses and RESETs [N_LIFE, 2, H, n_out] of a
    task and of the policy that comes after it, ready for the next."""
    chip, u, _, key = train.scene(key, meta, cfg, family, device)
    target = train.targets_of(meta, family).readout

    def meet(chip, key):
        task_key, learn_key, ask_key, keep_key = jax.random.split(key, 4)
        task = family.task(task_key, u)
        keys = jax.random.split(learn_key)
        readouts, fired = train.teach(*keys, meta, cfg, device, chip, u, task.support)
        chip = train.with_last(chip, readouts)
        t = train.wait_of(cfg)
        wrong = error_at(
            ask_key, cfg, family, device, chip, u, task.query, t, cfg.compensate
        )
        chip = network.later(chip, PERIOD)
        kept, done = policy(keep_key, device, chip.readout, target, -AHEAD)
        pulses = jnp.sum(fired, 0) + done.pulses
        found = {"error": wrong, "pulses": pulses, "resets": done.resets}
        return chip._replace(readout=kept), found

    keys = jax.random.split(key, N_LIFE)
    return jax.lax.scan(meet, network.later(chip, cfg.tread), keys)[1]


LIVES = {name: partial(lives, policy=policy) for name, policy in POLICIES.items()}
IN_WORDS = {
    "nothing": "left as it is",
    "restore": "programmed to its first state",
    "reset": "all devices RESET",
    "refresh": "its own weights written again",
}


SPANS = (1, 1), (2, 10), (41, N_LIFE)


def show_wear(what, counts):
    """Print what the devices of n chips took in N_LIFE tasks, counts [n, N_LIFE, 2, H, n_out]; its
    summaries."""
    of_device = np.sum(counts, 1)
    devices = (1, 2, 3)
    values = {
        f"{what} of the readout for a task": np.sum(of_device, devices) / N_LIFE,
        f"{what} of a device in its life": np.mean(of_device, devices),
        f"{what} of the busiest device in its life": np.max(of_device, devices),
    }
    return {label: show(label, x) for label, x in values.items()}


def life(n, run):
    """50 tasks in sequence on one chip, with four ways to keep its readout, by way."""
    numbers = {}
    for name, experiment in LIVES.items():
        found = tested(experiment, n, run)
        print(f"{name}: before each task the readout is {IN_WORDS[name]}")
        of = {"error": recorded(found["error"])}
        for first, last in SPANS:
            label = f"error, tasks {first} to {last}"
            of[label] = show(label, np.mean(found["error"][:, first - 1 : last], 1))
        of |= show_wear("pulses", found["pulses"])
        numbers[name] = of | show_wear("resets", found["resets"])
    return numbers


def draw_life(found, unit):
    """Figure of errors by task."""
    drawn = {f"before a task: {IN_WORDS[name]}": of["error"] for name, of in found.items()}
    return figures.lines(range(1, N_LIFE + 1), drawn, "task in sequence on one chip", unit)


# ---- chips ---------------------------------------------------------------------------------------


def first_tasks(key, meta, cfg, family, device):
    """Errors, by label, of one task on one chip: learned at the age tread, at the query and a day
    later; and learned at the age OLD instead."""
    chip, u, task, key = train.scene(key, meta, cfg, family, device)

    def at(age):
        aged = network.later(chip, age)
        measured = train.learn_and_test(
            key, meta, cfg, family, device, aged, u, task
        ).measured
        return error_of(measured)[-1], error_of(measured, "_day")

    (young, old), (day, _) = jax.lax.map(at, jnp.array([cfg.tread, OLD]))
    return {"first task": young, "a day after it": day, "first task, 10⁶ s old": old}


# Labels of chips that have the tasks of the first.
SAME_TASKS = "a day after it", "first task, 10⁶ s old", "1 % stuck", "ridge, written"


def chip_errors(n, run, device):
    """Errors of n chips of a device by label."""
    used = tested(LIVES["restore"], n, run, device)["error"]
    first = tested(first_tasks, n, run, device)
    return {
        "first task": first["first task"],
        **first,
        "second task": used[:, 1],
        "tasks 41 to 50": np.mean(used[:, 40:], 1),
        "1 % stuck": tested(last_error, n, run, stuck("stuck1", device)),
        "ridge, written": tuned(readouts, n, run, device)["ridge, written"],
    }


def chips(n, run):
    """One network on new, old, used and faulty chips of all devices: {device: {label: errors}},
    those of the same tasks over the first."""
    found = {}
    for name, device in devices_for(run).items():
        errors = chip_errors(n, run, device)
        first = errors["first task"]
        found[name] = {}
        for label, x in errors.items():
            base = first if label in SAME_TASKS else None
            found[name][label] = show(f"{name}, {label}", x, base)
    return found


def compare(n, runs):
    """Several networks, by folder, each on new and old chips of all devices: {folder: {label:
    errors}}. Prints their means."""
    first, *_ = runs.values()
    found = {folder: {} for folder in runs}
    for name, device in devices_for(first).items():
        for folder, run in runs.items():
            errors = tested(first_tasks, n, run, device)
            found[folder] |= {
                f"{name}, {label}": recorded(x) for label, x in errors.items()
            }
    networks = list(found.values())
    for label in networks[0]:
        means = [of[label]["mean"] for of in networks]
        spread = " ".join(f"{x:.3f}" for x in means)
        print(f"  {label:<40}{np.mean(means):9.3f}   each {spread}")
    return found


# ---- drift ---------------------------------------------------------------------------------------


def kept(key, cfg, family, device, chip, u, query):
    """Errors at time 0, by what is compensated, of a chip that has learned a task before."""

    def with_compensation(hidden, readout):
        settings = dataclasses.replace(cfg, compensate=hidden)
        return error_at(key, settings, family, device, chip, u, query, 0.0, readout)

    return {
        "learned before, all layers compensated": with_compensation(True, True),
        "learned before, readout not compensated": with_compensation(True, False),
        "learned before, nothing compensated": with_compensation(False, False),
    }


def aged(key, meta, cfg, family, device):
    """Errors [RESTS] of one chip, by label: of a task learned before it rested; of a first task at
    that age; of a second task, after it rested and its readout was then restored."""
    chip, u, first, key = train.scene(key, meta, cfg, family, device)
    first_key, task_key, ask_key, keep_key, second_key = jax.random.split(key, 5)
    learned = partial(train.learn_and_test, first_key, meta, cfg, family, device)
    used = learned(network.later(chip, cfg.tread), u, first).chip
    targets = train.targets_of(meta, family)
    second = family.task(task_key, u)
    last, took = train.times_of(cfg).pulses[-1], analog.MAX_STEPS * device.t_verify

    def at(rest):
        rested = network.later(used, last + rest)
        errors = kept(ask_key, cfg, family, device, rested, u, first.query)
        readout, _ = restore(keep_key, device, rested.readout, targets.readout, took)
        new = network.later(rested._replace(readout=readout), took + AHEAD)
        again = train.learn_and_test(second_key, meta, cfg, family, device, new, u, second)
        fresh = learned(network.later(chip, rest), u, first)
        return {
            **errors,
            "first task of a chip that old": error_of(fresh.measured)[-1],
            "second task, readout restored before": error_of(again.measured)[-1],
        }

    return jax.lax.map(at, jnp.array(RESTS))


def drift(n, run):
    """How a task that was learned ages, and how an old chip learns."""
    found = {}
    for label, values in tested(aged, n, run).items():
        for rest, column in zip(RESTS, values.T, strict=True):
            show(f"{label}, {rest:g} s", column)
        found[label] = recorded(values)
    return found


def draw_drift(found, unit):
    """Figure of errors by age."""
    x = "time since the last pulse, or age of the chip (s)"
    return figures.lines(RESTS, found, x, unit, "log")


# ---- limits --------------------------------------------------------------------------------------

PULSE_NOISE = "set_std_slope", "set_std_offset", "set_std_history"
DRIFT = "nu_mean nu_std nu_slope nu_offset nu_low nu_high".split()
DRIFT += "nu_std_slope nu_std_offset nu_std_low nu_std_high".split()


def others_of(device):
    """The device with other constants, by label."""
    return {
        "as it is": device,
        "no pulse noise": without(device, *PULSE_NOISE),
        "no read noise": without(device, *READ_NOISE),
        "no drift": without(device, *DRIFT),
        "no noise, no drift": without(device, *PULSE_NOISE, *READ_NOISE, *DRIFT),
        "1 % of devices stuck": stuck("stuck1", device),
    }


def limits(n, run):
    """What is left of the error on other devices; bounds of any rule for the readout."""
    others = others_of(next(iter(run.devices.values())))
    errors = {label: tested(last_error, n, run, device) for label, device in others.items()}
    exact = partial(last_error, make=analog.fabricate)
    errors["no programming error"] = tested(exact, n, run)
    groups = {
        "the network on other devices": errors,
        "other readouts": tuned(readouts, n, run),
    }
    base, found = errors["as it is"], {}
    for group, errors in groups.items():
        found[group] = {label: show(label, x, base) for label, x in errors.items()}
    return found


# ---- few_shot ------------------------------------------------------------------------------------


def nearest_mean(key, meta, cfg, family, device):
    """Error of the class whose mean sample in the support is nearest."""
    _, u, task, _ = train.scene(key, meta, cfg, family, device)
    means = family.n_out * task.support.y.T @ u  # [n_way, n_in]
    distance = jnp.sum((u[:, None] - means) ** 2, 2)  # [L, n_way]
    return {"nearest mean of a class": error(family, -distance, task.query)}


def few_shot(n, run):
    """Errors after each look, and of regression on the same traces, chips and tasks."""
    population = train.population_of(run.cfg, run.devices)
    untrained = run._replace(state=train.start(run.cfg, population, run.families.training))
    found = {}
    for name, device in devices_for(run).items():
        wrong = error_of(tested(train.reported, n, run, device).measured)
        errors = {f"look {k}": x for k, x in enumerate(wrong.T)}
        errors |= tuned(readouts, n, run, device)
        other = tuned(readouts, n, untrained, device)["ridge regression"]
        errors["ridge regression, untrained network"] = other
        if run.families.about:
            errors |= tested(nearest_mean, n, run, device)
        found[name] = {label: show(f"{name}, {label}", x) for label, x in errors.items()}
    return found


# ---- updates -------------------------------------------------------------------------------------


NEEDED = 1e-2  # ridge towards the readout before adaptation


def best_step(e, w, samples):
    """The change [H, n_out] of weights w along the gradient that lowers the samples' error
    most."""
    gradient = train.delta_rule(e, e @ w, samples)
    curvature = 2 * jnp.sum(samples.share[:, None] * (e @ gradient) ** 2)
    return -gradient * jnp.sum(gradient**2) / jnp.maximum(curvature, train.TINY)


def moves(key, meta, cfg, family, device):
    """|ΔW| of the looks of an adaptation [n_inner, H, n_out], 0 where no pulse was fired; of one
    float step, and of what the task needs [H, n_out]."""
    chip, u, task, key = train.scene(key, meta, cfg, family, device)
    learn_key, see_key, read_key = jax.random.split(key, 3)
    chip = network.later(chip, cfg.tread)
    keys = jax.random.split(learn_key)
    readouts, pulses = train.teach(*keys, meta, cfg, device, chip, u, task.support)
    g = jnp.concatenate([chip.readout.xbar.g[None], readouts.xbar.g])
    moved = jax.vmap(partial(analog.weights, device))(jnp.diff(g, axis=0))
    fired = jnp.any(pulses > 0, 1)
    e = train.observe(see_key, cfg, device, chip, u, 0.0).e
    w = network.read(read_key, device, chip.readout, 0.0, False)
    found = {
        "meta-learned pulses": jnp.where(fired, moved, 0.0),
        "the best float step": best_step(e, w, task.support),
        "what a task needs": solve(e[None], task.query, NEEDED, w) - w,
    }
    return jax.tree.map(jnp.abs, found)


def updates(n, run):
    """Distributions of sizes: of pulses, of a float step, of the change that a task needs."""
    numbers = {}
    for label, sizes in tested(moves, n, run).items():
        positive = sizes[sizes > 0]
        if not len(positive):
            continue  # nothing was moved
        least, low, median, high = np.quantile(positive, (0.002, 0.05, 0.5, 0.95)).tolist()
        edges = np.geomspace(least, positive.max(), 80)
        counts, _ = np.histogram(positive, edges)
        numbers[label] = {
            "quantiles 0.05, 0.5, 0.95": [low, median, high],
            "edges": edges.tolist(),
            "shares": (counts / len(positive)).tolist(),
        }
        print(
            f"  |ΔW| of {label:<48} median {median:.1e}, 90 % from {low:.1e} to {high:.1e}"
        )
    return numbers


def draw_updates(found, unit):
    """Figure of the distributions."""
    return figures.histograms(found, "|ΔW| of a synapse")


# ---- energy --------------------------------------------------------------------------------------


def programming(key, meta, cfg, family, device):
    """Counts of programming one new chip."""
    targets = train.targets_of(meta, family)
    done = network.each(analog.program_new, key, device, targets)
    crossbars = *done.hidden, done.readout
    return {
        "SET pulses": sum(jnp.sum(x.pulses) for x in crossbars),
        "RESET pulses": sum(jnp.sum(x.resets) for x in crossbars),
        "verify reads": sum(jnp.sum(x.reads) for x in crossbars),
    }


def chip_of(run, measured):
    """joules.Chip of a run of which a meta-test has measured arrays [n, ...]."""
    family = run.families.testing
    rates, pulses = (np.mean(measured[name], 0).tolist() for name in ("rates", "pulses"))
    return joules.chip_of(run.cfg, family, train.rows_of(run.cfg, family), rates, pulses)


def at_prices(bill, item="total"):
    """Energy (nJ) of an item of a bill at all prices."""
    return [bill["nJ"][level][item] for level in joules.LEVELS]


def show_bills(label, found):
    """Print a joules.report: its bills, their ratios to those of joules.OLD, and the items of its
    adaptation."""

    def row(name, values):
        print(f"  {name:<60}" + "".join(f"{x:11.4g}" for x in values), flush=True)

    print(
        f"{label}: {sum(found['devices'].values())} devices; nJ at low, typical, high prices"
    )
    old = joules.report(joules.OLD)["bills"]
    for name, bill in found["bills"].items():
        row(name, at_prices(bill))
        if name in old:
            row(
                "  over that of the first", np.divide(at_prices(bill), at_prices(old[name]))
            )
    spent = found["bills"]["adaptation"]
    for item in spent["counts"]:
        row(f"  of an adaptation: {item}", at_prices(spent, item))


def energy(n, runs):
    """Several networks, by folder: devices, and energies at low, typical and high prices."""
    found = {joules.OLD_NAME: joules.report(joules.OLD)}
    for folder, run in runs.items():
        measured = tested(train.reported, n, run).measured
        chip, error = chip_of(run, measured), error_of(measured)[:, -1]
        made = {item: float(x[0]) for item, x in tested(programming, 1, run).items()}
        of = joules.report(chip)
        of["bills"]["programming, once"] = joules.bill(made)
        label = f"{folder}: {chip.n_h0}-{chip.n_h1}, looks: {chip.n_inner}"
        found[label] = {
            "error": recorded(error),
            "unit": unit(run),
            "chip": chip._asdict(),
            **of,
        }
    for label, of in found.items():
        show_bills(label, of)
    return found


def draw_energy(found, unit):
    """Figure of errors against energies, of the networks whose errors have that unit."""
    drawn = {
        label: (of["error"], at_prices(of["bills"]["adaptation"]))
        for label, of in found.items()
        if of.get("unit") == unit
    }
    x = "energy of an adaptation (nJ) at typical prices; bars: from low to high ones"
    return figures.spans(drawn, x, unit)


# ---- command line --------------------------------------------------------------------------------


class Study(NamedTuple):
    """A study, in two parts: what it measures is written and read again before it is drawn."""

    # of the number of chips and the Run, or Runs by folder; to a dictionary
    measure: Callable
    # of that dictionary and the unit of errors, to a figure
    draw: Callable


STUDIES = {
    "compare": Study(compare, figures.bars),
    "chips": Study(chips, figures.bars),
    "drift": Study(drift, draw_drift),
    "life": Study(life, draw_life),
    "limits": Study(limits, figures.bars),
    "few_shot": Study(few_shot, figures.bars),
    "updates": Study(updates, draw_updates),
    "baselines": Study(baselines, ways.draw),
    "energy": Study(energy, draw_energy),
    "circuits": Study(circuits, figures.bars),
}
OF_SEVERAL = "compare", "energy"


def parse(argv):
    """The arguments of the command line."""
    parser = train.Parser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    text = "run folder; without one, the figure is drawn again from its numbers"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    parser.add_argument("--n", type=int, default=256, help="chips (default: 256)")
    text = "folder of figures and numbers (default: run/studies)"
    parser.add_argument("--out", type=Path, default=Path("run/studies"), help=text)
    text = "support samples of a task (default: as in training)"
    parser.add_argument("--task_size", type=int, help=text)
    given = parser.parse_args(argv)
    is_alone = len(given.runs) < 2 or given.study in OF_SEVERAL
    train.require(is_alone, f"{given.study} takes one run folder")
    train.require(given.n > 0, "--n must be at least 1")
    return given


def measure(given):
    """What a study finds, with the command that finds it."""
    runs = {x: resized(train.load(x), given.task_size) for x in given.runs}
    first, *_ = runs.values()
    several = given.study in OF_SEVERAL
    print(f"{given.study}, {given.n} chips: {unit(first)}")
    found = STUDIES[given.study].measure(given.n, runs if several else first)
    size = f" --task_size {given.task_size}" if given.task_size else ""
    command = f"img/studies.py {given.study} {' '.join(given.runs)} --n {given.n}{size}"
    return {"command": f"python {command}", "unit": unit(first), "found": found}


def execute(given):
    """Run a study, unless it was run before, and draw what it has found."""
    path = given.out / given.study
    numbers = path.with_suffix(".json")
    if given.runs:
        train.write_json(numbers, measure(given), indent=None)
    train.require(numbers.exists(), f"there is no {numbers} to draw: name a run folder")
    saved = json.loads(numbers.read_text(encoding="utf-8"))
    figure = STUDIES[given.study].draw(saved["found"], saved["unit"])
    train.write(path.with_suffix(".png"), figures.png(figure, saved["command"]))
    print(f"figure in {path}.png, numbers of all chips in {numbers}")


def main(argv=None):
    """Run the command line."""
    with train.one_line_errors():
        given = parse(argv)
        train.configure_backend()
        execute(given)


if __name__ == "__main__":
    main()
