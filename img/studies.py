"""Studies of a meta-trained network: each prints a table and writes its figure and numbers.

    python img/studies.py chips|drift|life|faults|updates RUN [--n 256] [--out DIR]
    python img/studies.py limits|bits|steps [--n 256] [--out DIR] [flags of train.py]

chips     one network on chips of every built-in device
drift     how a task that was learned ages, and how an old chip learns
life      50 tasks in sequence on one chip, with four ways to keep its readout
faults    devices that are stuck
updates   sizes of pulses against those of gradient descent and Adam
limits    one non-ideality off at a time; other rules; bounds of any rule
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
N_LIFE = 50  # tasks of a life
PERIOD = 1000.0  # s, from one of them to the next
AHEAD = 10.0  # s, from the programming of a readout to the first look at a task
RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0


class Options(NamedTuple):
    """What a study is asked for."""

    run: train.Run | None  # of the folder on the command line
    n: int  # chips of a test
    flags: dict  # of the networks that a study trains


# ---- parts of experiments ------------------------------------------------------------------------


def deployed(key, cfg, device, meta):
    """A new chip of a network, programmed at t = 0."""
    return network.assemble(key, device, train.programmed(cfg, device), meta.g)


def with_readout(chip, readout):
    """The chip with another readout."""
    return chip._replace(xbars=chip.xbars._replace(readout=readout))


def learn(key, cfg, device, meta, chip, trial, times):
    """The readouts of a chip after each look at a trial, and the pulses of each look."""
    look_key, adapt_key = jax.random.split(key)
    looks = train.look_at(look_key, cfg, device, chip, times)
    theta = jnp.exp(meta.log_theta)
    return train.adapt(
        adapt_key, cfg, device, chip.xbars.readout, looks, theta, trial.support, times
    )


def moments_at(key, cfg, device, chip, t):
    """Moments of the whole range in one read of a chip."""
    parts, _ = train.observe(train.moments_of_range, key, cfg, device, chip, t)
    return train.pooled(parts)


def meet(key, cfg, device, meta, chip, trial, times):
    """Readout, pulses [2, H, 1] and squared error after a chip has met a trial."""
    learn_key, hidden_key, readout_key = jax.random.split(key, 3)
    readouts, pulses = learn(learn_key, cfg, device, meta, chip, trial, times)
    moments = moments_at(hidden_key, cfg, device, chip, times.query)
    w = network.read_readout(readout_key, device, readouts[-1], times.query)
    return readouts[-1], sum(pulses), train.squared_error(moments, trial.query, w)


def tested(experiment, options, device=None, net=None):
    """What an experiment measures on the chips of a network, by default the run's, on its
    device."""
    net = net or options.run
    device = device or net.devices[0]
    meta = train.project((device,), net.state.meta)
    return train.test(experiment, net.cfg, device, meta, options.n, train.stream(net.cfg, 3))


def show(label, values):
    """Print mean, interval and number of values [n]; their summary."""
    found = train.summary(values)
    half = found.get("ci95", np.nan)
    print(f"  {label:<64}{found['mean']:9.3f} ± {half:.3f}  (n = {found['n']})", flush=True)
    return found


# ---- chips and faults ----------------------------------------------------------------------------


def before_and_after(label, episodes):
    """The two summaries of the errors of episodes, which are printed."""
    mse = episodes.measured["mse"]
    return [show(f"{label}, before", mse[:, 0]), show(f"{label}, after", mse[:, -1])]


def chips(options):
    """One network on chips of every built-in device of its g_max."""
    rows = {}
    for name, device in analog.DEVICES.items():
        if device.g_max == options.run.devices[0].g_max:
            rows[name] = before_and_after(name, tested(train.episode, options, device))
    return rows, figures.bars(rows, ("before adaptation", "after adaptation"))


def faults(options):
    """Devices that are stuck, half of them at g_max."""
    rows = {}
    for share in (0.0, 0.005, 0.01):
        device = options.run.devices[0]._replace(stuck_low=share / 2, stuck_high=share / 2)
        label = f"{share:.1%} of devices stuck"
        rows[label] = before_and_after(label, tested(train.episode, options, device))
    return rows, figures.bars(rows, ("before adaptation", "after adaptation"))


# ---- drift ---------------------------------------------------------------------------------------


def aged(key, cfg, device, meta):
    """Squared errors [ages] of one chip by what was done, times in seconds since
    deployment."""
    chip_key, trial_key, first_key, reference_key, ages_key = jax.random.split(key, 5)
    wait = cfg.ttest - cfg.tprog
    chip = deployed(chip_key, cfg, device, meta)
    trial = train.draw_trial(trial_key, cfg)
    first = train.times_of(cfg, cfg.tread, wait)
    readouts, _ = learn(first_key, cfg, device, meta, chip, trial, first)
    last_pulse = first.pulses[-1]
    reference = jnp.sum(
        analog.read(reference_key, device, readouts[-1], last_pulse + device.t0)
    )

    def at(inputs):
        key, age = inputs
        kept_key, fresh_key, again_key = jax.random.split(key, 3)
        times = train.times_of(cfg, age, wait)
        return {
            **kept(kept_key, cfg, device, chip, readouts[-1], reference, trial, times.query),
            "first adapted at that age": meet(fresh_key, cfg, device, meta, chip, trial, times)[
                -1
            ],
            "restored, second task at that age": again(
                again_key, cfg, device, meta, chip, readouts[-1], times
            ),
        }

    return jax.lax.map(at, (jax.random.split(ages_key, len(AGES)), jnp.array(AGES)))


def kept(key, cfg, device, chip, readout, reference, trial, t):
    """Squared errors at time t (s) of a readout that was adapted long before, by
    compensation."""
    hidden_key, readout_key = jax.random.split(key)
    g = analog.read(readout_key, device, readout, t)
    w = analog.weights(device, g)[:, 0]
    found = {}
    for label, compensate in (("hidden layers not compensated", False), ("compensated", True)):
        other = dataclasses.replace(cfg, compensate=compensate)
        moments = moments_at(hidden_key, other, device, chip, t)
        found[f"adapted once, {label}"] = train.squared_error(moments, trial.query, w)
    scaled = w * reference / jnp.sum(g)
    found["adapted once, readout too"] = train.squared_error(moments, trial.query, scaled)
    return found


def again(key, cfg, device, meta, chip, readout, times):
    """Squared error of a chip after a second task, its readout programmed anew before."""
    program_key, trial_key, meet_key = jax.random.split(key, 3)
    restored = restore(device, program_key, readout, meta.g.readout, times.reads[0] - AHEAD)
    trial = train.draw_trial(trial_key, cfg)
    chip = with_readout(chip, restored.xbar)
    return meet(meet_key, cfg, device, meta, chip, trial, times)[-1]


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


# ---- life ----------------------------------------------------------------------------------------


def restore(device, key, readout, target, t):
    """analog.Programmed of a readout written back to its target at the start."""
    return analog.program(key, device, readout, target, t)


def erase(device, key, readout, target, t):
    """analog.Programmed of a readout whose devices were all RESET."""
    every = jnp.ones(target.shape, bool)
    none = jnp.zeros(target.shape, int)
    return analog.Programmed(analog.reset(key, device, readout, every, t), none, none + 1, none)


def leave(device, key, readout, target, t):
    """analog.Programmed of a readout that is left as it is."""
    none = jnp.zeros(target.shape, int)
    return analog.Programmed(readout, none, none, none)


def refresh(device, key, readout, target, t):
    """analog.Programmed of a readout whose weights were read, without their mean drift, and
    written again with one device of each pair at g_min."""
    read_key, program_key = jax.random.split(key)
    g = analog.read(read_key, device, readout, t)
    nu, _ = device.law.nu_law(g / device.g_max)
    age = jnp.maximum(t - readout.t_prog, analog.MIN_AGE)
    before = g * device.law.clock(age, device.t0) ** nu
    w = jnp.clip(analog.weights(device, before), -1.0, 1.0)
    wanted = jnp.minimum(analog.conductances(device, w), device.g_prog)
    return analog.program(program_key, device, readout, wanted, t)


POLICIES = {"nothing": leave, "restore": restore, "reset": erase, "refresh": refresh}


def lives(key, cfg, device, meta):
    """Squared errors [policies, N_LIFE] of one chip, pulses and RESETs [policies, N_LIFE,
    2, H, 1]."""
    chip_key, life_key = jax.random.split(key)
    chip = deployed(chip_key, cfg, device, meta)
    wait = cfg.ttest - cfg.tprog
    policies = [functools.partial(policy, device) for policy in POLICIES.values()]

    def life(policy):
        def task(readout, inputs):
            key, k = inputs
            keep_key, trial_key, meet_key = jax.random.split(key, 3)
            age = cfg.tread + PERIOD * k
            used = jnp.where(k > 0, policy, 0)
            done = jax.lax.switch(
                used, policies, keep_key, readout, meta.g.readout, age - AHEAD
            )
            after, fired, error = meet(
                meet_key,
                cfg,
                device,
                meta,
                with_readout(chip, done.xbar),
                train.draw_trial(trial_key, cfg),
                train.times_of(cfg, age, wait),
            )
            pulses = fired + done.pulses
            return after, {"error": error, "pulses": pulses, "resets": done.resets}

        tasks = jax.random.split(life_key, N_LIFE), jnp.arange(float(N_LIFE))
        return jax.lax.scan(task, chip.xbars.readout, tasks)[1]

    return jax.lax.map(life, jnp.arange(len(policies)))


def life(options):
    """50 tasks in sequence on one chip, with four ways to keep its readout."""
    found = tested(lives, options)
    numbers, drawn = {}, {}
    for i, policy in enumerate(POLICIES):
        error = found["error"][:, i]
        print(policy)
        numbers[policy] = {"error": train.summary(error)}
        for first, last in ((1, 1), (2, 10), (11, 20), (21, 30), (31, 40), (41, N_LIFE)):
            label = f"error, tasks {first} to {last}"
            numbers[policy][label] = show(label, np.mean(error[:, first - 1 : last], 1))
        for what in ("pulses", "resets"):
            counts = np.sum(found[what][:, i], 1)  # [n, 2, H, 1], of a life
            numbers[policy] |= {
                label: show(label, x)
                for label, x in (
                    (f"{what} of the readout for a task", np.sum(counts, (1, 2, 3)) / N_LIFE),
                    (f"{what} of a device in its life", np.mean(counts, (1, 2, 3))),
                    (f"{what} of the busiest device in its life", np.max(counts, (1, 2, 3))),
                )
            }
        drawn[policy] = range(1, N_LIFE + 1), numbers[policy]["error"]
    return numbers, figures.lines(drawn, "task in sequence on one chip")


# ---- networks that a study trains ----------------------------------------------------------------


def trained(name, options, change=None, **flags):
    """The Run of a network of these flags, its device as change makes it; trained once and
    kept."""
    folder = Path("run/studies") / name
    cfg, devices = train.configure({"n_iter": 800, **options.flags, **flags})
    if change:
        devices = tuple(map(change, devices))
    run = train.Run(cfg, devices, train.start(train.stream(cfg, 0), cfg, devices))
    if (folder / "checkpoint.npz").exists():
        run = train.load(folder)
    if (run.cfg, run.devices) != (cfg, devices):
        raise train.UserError(f"{folder} holds a network of other settings: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"network in {folder}", flush=True)
    return train.train(run, folder)


def bits(options):
    """Bits of an update, real and ideal devices."""
    numbers, drawn = {}, {}
    kinds = {str(n): {"n_bits": n} for n in range(2, 7)}
    kinds["real"] = {"n_bits": 6, "rule": "real"}
    for name in ("pcm", "perf"):
        found = {}
        for kind, flags in kinds.items():
            net = trained(f"{name}_bits_{kind}", options, device=name, **flags)
            mse = tested(train.episode, options, net=net).measured["mse"]
            found[kind] = show(f"{name}, {kind} bits", mse[:, -1])
        numbers[name] = found
        drawn[name] = range(2, 8), joined(found.values())
    ticks = dict(zip(range(2, 8), kinds, strict=True))
    return numbers, figures.lines(drawn, "bits of an update", ticks=ticks)


def joined(summaries):
    """The summaries of single numbers as one of a vector."""
    return {name: [x.get(name, 0.0) for x in summaries] for name in ("mean", "ci95")}


def steps(options):
    """Looks at a task: networks trained for so many."""
    numbers, drawn = {}, {}
    for n_inner in (1, 2, 4, 8):
        net = trained(f"looks_{n_inner}", options, n_inner=n_inner)
        mse = tested(train.episode, options, net=net).measured["mse"]
        label = f"trained for {n_inner}"
        for k, errors in enumerate(mse.T):
            show(f"{label} looks, after {k}", errors)
        numbers[label] = train.summary(mse)
        drawn[label] = range(n_inner + 1), numbers[label]
    ticks = {k: str(k) for k in range(9)}
    return numbers, figures.lines(drawn, "looks", ticks=ticks)


# ---- limits --------------------------------------------------------------------------------------

PULSE_NOISE = {"set_std_slope": 0.0, "set_std_offset": 0.0, "set_std_history": 0.0}
READ_NOISE = {"read_slope": 0.0, "read_offset": 0.0}
DRIFT = {"nu_mean": 0.0, "nu_std": 0.0}
LACKS = {  # what is off: constants of the device
    "pulse noise": PULSE_NOISE,
    "read noise": READ_NOISE,
    "drift": DRIFT,
    "programming error": {},
    "noise or drift at all": PULSE_NOISE | READ_NOISE | DRIFT,
}


def without(constants):
    """A function of a device that returns it with other constants."""

    def change(device):
        known = analog.describe(device)
        return analog.make({**known, **{k: v for k, v in constants.items() if k in known}})

    return change


def lacking(options, name, net):
    """Errors of a network on chips that lack a non-ideality, and those of a network trained
    so."""
    change = without(LACKS[name])
    experiment, flags = train.episode, {}
    if name not in ("pulse noise", "read noise", "drift"):
        experiment, flags = train.quick_episode, {"off_noise": 0.0}
    other = trained(f"no_{name.replace(' ', '_')}", options, change, **flags)
    in_test = net._replace(cfg=dataclasses.replace(net.cfg, **flags), devices=other.devices)
    return [
        show(f"no {name}, {where}", tested(experiment, options, net=run).measured["mse"][:, -1])
        for where, run in (("in the test", in_test), ("in training too", other))
    ]


def regression(key, cfg, device, meta):
    """Squared errors of readouts of a chip that were found by regression on its noisy
    traces, [RIDGES]: as computed, and as written to the chip and read; and of the best
    readout for all inputs."""
    chip_key, trial_key, look_key, write_key, read_key, query_key = jax.random.split(key, 6)
    chip = deployed(chip_key, cfg, device, meta)
    trial = train.draw_trial(trial_key, cfg)
    looks = train.look_at(look_key, cfg, device, chip, train.times_of(cfg, cfg.tread, 0.0))
    second = jnp.tensordot(trial.support.share, looks.moments.second[0], 1)
    first = trial.support.y @ looks.moments.first[0]
    query = moments_at(query_key, cfg, device, chip, cfg.ttest)
    eye = jnp.eye(len(first))

    def fit(ridge):
        w = jnp.linalg.solve(second + ridge * eye, first + ridge * looks.readout)
        wanted = analog.conductances(device, jnp.clip(w, -1.0, 1.0)[:, None])
        wanted = jnp.minimum(wanted, device.g_prog)
        done = analog.program(write_key, device, chip.xbars.readout, wanted, cfg.tprog)
        written = network.read_readout(read_key, device, done.xbar, cfg.ttest)
        return {
            "ridge regression": train.squared_error(query, trial.query, w),
            "ridge regression, written": train.squared_error(query, trial.query, written),
        }

    best = jnp.linalg.solve(query.second[0] + 1e-5 * eye, trial.query.y @ query.first)
    best = train.squared_error(query, trial.query, best)
    return {**jax.lax.map(fit, jnp.array(RIDGES)), "best readout of all inputs": best[None]}


def limits(options):
    """One non-ideality off at a time; other rules; bounds of any rule for the readout."""
    net = trained("as_is", options)
    mse = tested(train.episode, options, net=net).measured["mse"]
    rows = {"as it is": [show("as it is", mse[:, -1]), None]}
    for name in LACKS:
        rows[f"no {name}"] = lacking(options, name, net)
    for label, flags in (
        ("one threshold for all synapses", {"shared_thr": True}),
        ("real-valued updates", {"rule": "real"}),
    ):
        other = trained(label.replace(" ", "_"), options, **flags)
        mse = tested(train.episode, options, net=other).measured["mse"]
        rows[label] = [None, show(label, mse[:, -1])]
    for label, errors in tested(regression, options, net=net).items():
        best = int(np.argmin(np.mean(errors, 0)))
        note = f", ridge {RIDGES[best]:g}" if len(errors.T) > 1 else ""
        rows[label] = [show(label + note, errors[:, best]), None]
    return rows, figures.bars(rows, ("in the test", "in training too"))


# ---- updates -------------------------------------------------------------------------------------


def moves(key, cfg, device, meta):
    """|ΔW| of one adaptation's pulses [H], 0 where there was none, and of 100 steps of
    gradient descent at the largest stable rate and of Adam at 10⁻³ on the same task, [100,
    H]."""
    chip_key, trial_key, learn_key, look_key = jax.random.split(key, 4)
    chip = deployed(chip_key, cfg, device, meta)
    trial = train.draw_trial(trial_key, cfg)
    times = train.times_of(cfg, cfg.tread, 0.0)
    readouts, pulses = learn(learn_key, cfg, device, meta, chip, trial, times)
    moved = analog.weights(device, readouts[-1].g - readouts[0].g)[:, 0]
    fired = jnp.any(sum(pulses) > 0, 0)[:, 0]
    looks = train.look_at(look_key, cfg, device, chip, times)
    moments = train.Moments(looks.moments.second[0], looks.moments.first[0])
    second = jnp.tensordot(trial.support.share, moments.second, 1)
    rate = 1 / jnp.maximum(jnp.linalg.eigvalsh(second)[-1], 1e-6)

    def descent(step, gradient, memory):
        return -gradient, memory

    def walk(direction, memory, size):
        def one(state, step):
            w, memory = state
            gradient = 2 * train.residual(moments, trial.support, w)
            move, memory = direction(step, gradient, memory)
            return (w + size * move, memory), size * jnp.abs(move)

        return jax.lax.scan(one, (looks.readout, memory), jnp.arange(100.0))[1]

    return {
        "meta-learned pulses": jnp.where(fired, jnp.abs(moved), 0.0),
        "gradient descent, largest stable rate": walk(descent, 0.0, rate),
        "Adam at 0.001": walk(train.adam, train.adam_start(looks.readout), 1e-3),
    }


def updates(options):
    """Sizes of pulses against those of gradient descent and Adam."""
    numbers, drawn = {}, {}
    for label, sizes in tested(moves, options).items():
        drawn[label] = sizes[sizes > 0]
        low, median, high = np.quantile(drawn[label], (0.05, 0.5, 0.95))
        numbers[label] = {"median": median, "quantiles 0.05, 0.95": [low, high]}
        print(f"  |ΔW| of {label:<40} median {median:.1e}, 90 % from {low:.1e} to {high:.1e}")
    return numbers, figures.histograms(drawn, "|ΔW| of a synapse in one step")


# ---- command line --------------------------------------------------------------------------------

OF_A_RUN = {f.__name__: f for f in (chips, drift, life, faults, updates)}
TRAINING = {f.__name__: f for f in (limits, bits, steps)}


def parse(argv):
    """Name of a study, its Options and the folder of its figure."""
    parser = train.Parser(
        prog="studies.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=[*OF_A_RUN, *TRAINING])
    parser.add_argument("run", nargs="?", help="run folder")
    parser.add_argument("--n", type=int, default=256, help="chips of a test (default: 256)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "gallery", help="folder of figures"
    )
    given, rest = parser.parse_known_args(argv)
    needs_run = given.study in OF_A_RUN
    if needs_run != (given.run is not None) or (needs_run and rest):
        needs = (
            "needs a run folder and no other flags" if needs_run else "trains its own networks"
        )
        raise train.UserError(f"{given.study} {needs}")
    if given.n < 1:
        raise train.UserError("--n must be at least 1")
    run = train.load(given.run) if needs_run else None
    return given.study, Options(run, given.n, train.parse(rest)[0]), given.out


def main(argv=None):
    """Run a study; the exit status."""
    try:
        train.configure_backend()
        name, options, out = parse(argv)
        numbers, figure = (OF_A_RUN | TRAINING)[name](options)
        if options.run and options.run.devices[0].name != "pcm":
            name += f"_{options.run.devices[0].name}"
        out.mkdir(parents=True, exist_ok=True)
        train.write(out / f"{name}.png", figures.png(figure))
        train.write_json(out / f"{name}.json", numbers)
        print(f"figure in {out / name}.png, numbers in {out / name}.json")
        return 0
    except train.UserError as error:
        print(f"studies.py: {error}", file=sys.stderr)
        return error.status


if __name__ == "__main__":
    sys.exit(main())
