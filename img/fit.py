"""Fit the constants of a device to measured pulses, by maximum likelihood.

    python img/fit.py curves.csv --name mine > mine.json
    python train.py --device mine.json

A row of the CSV is a read, in any order: device (a label), pulse (0 after RESET, then the number of
SET pulses since), g_uS (µS), and if wanted time_s, the seconds since that pulse. Several reads of a
pulse tell read noise, several ages tell drift: that of the family nandakumar of analog.py. From one
read of each pulse, read_offset and reset_std are hardly told apart. SET is fitted without history
and with it, and history stays if it lowers BIC. Beside the CSV comes a figure, curves.png for
curves.csv.

What is assumed: a read without time_s has the age analog.MIN_AGE. t0 is the earliest age, so that G
is what the earliest reads see. A pulse acts on this G, whatever drift has left of it, as does
analog.pulse. G is cut off at g_max and at g_min, which is reset_mean − 2·reset_std, at least 0.
g_max is pcm's 12 µS if the highest read is from 6 to 12 µS, else the highest read. g_prog is 94 %
of the G where SET stops raising it, as pcm's is, at most g_max. What reads cannot tell, such as
spreads if there is one device, is pcm's, its µS scaled to g_max.

The likelihood is that of an extended Kalman filter with the state (G, ν) of each device. Its
maximum is found by Fisher scoring, damped as by Levenberg; standard errors are of the information
there. A constant that is not negative is sought above 1 % of pcm's.
"""

import csv
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.scipy.stats import norm  # noqa: E402

import analog  # noqa: E402
import train  # noqa: E402
from img import figures  # noqa: E402

# The fit has G in units in which g_max is pcm's. Values [NAMES] are the leaves of a Device's tree.
START = (
    analog.PCM,
    analog.DEVICES["pcm_history"],
)  # where the two laws are sought from
NAMES = (*analog.Nandakumar._fields, *analog.Device._fields[1:-1])
SIGNED = np.isin(NAMES, ["set_slope", "set_offset", "set_history"])
SQUARED = np.isin(NAMES, ["reset_std", "nu_std"])
IN_US = [x.startswith(("g_", "reset")) or x.endswith(("offset", "history")) for x in NAMES]
LOWEST = np.where(SIGNED, -np.inf, np.log(0.01))  # of x
NODES = np.array(norm.ppf((np.arange(200) + 0.5) / 200), float)  # equally likely, N(0, 1)
NODES /= NODES.std()
RESOLVED = 1e-4  # of pcm's µS
BELOW_STOP = 0.94  # g_prog, as a share of where SET stops raising G
N_LEAST = 30  # reads of a file
N_STEPS = 200  # of a search, at most
N_PAIRS = 500  # of simulated devices in the figure


# ---- the file ------------------------------------------------------------------------------------


def read_of(row):
    """Device, pulse, age (s) and G (µS) of a row; nothing may be left of it."""
    device, pulse, g = map(row.pop, ("device", "pulse", "g_uS"))
    time = row.pop("time_s", "") or 0
    if row:
        raise ValueError(f"there is a cell of {', '.join(row)}")
    return device, int(pulse), float(time), float(g)


def columns_of(path):
    """Device, pulse, age (s) and G (µS) of the reads of a file, arrays [reads] in this order;
    Refused where it is not such a file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restkey="no column")
            missing = {"device", "pulse", "g_uS"} - set(rows.fieldnames or ())
            if missing:
                raise ValueError(f"no column {sorted(missing)}; found {rows.fieldnames}")
            reads = sorted(map(read_of, rows), key=lambda read: read[:3])
        device, pulse, age, g = map(np.array, zip(*reads, strict=True))
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        what = (
            "rows of device, pulse, g_uS and perhaps time_s, with commas and decimal points"
        )
        raise train.Refused(f"{path} must have {what}: {error}") from None
    has_pulses = min(pulse) == 0 and max(pulse) > 1
    train.require(np.all(np.isfinite(g + age)), f"{path}: leave out what is not a number")
    train.require(min(age) >= 0, f"{path}: time_s must be 0 or more")
    train.require(max(pulse) < 10_000, f"{path}: pulse must be from 0 to 9999")
    train.require(has_pulses, f"{path} needs pulse 0, after RESET, and 2 at least")
    train.require(max(abs(g)) >= 1e-3, f"{path}: g_uS is in siemens, it seems; give µS")
    return device, pulse, np.maximum(age, analog.MIN_AGE), g


def load(path):
    """Reads in µS and their ages in s, both [devices, pulses, reads], NaN where there is none;
    Refused where pulses do not raise G."""
    device, pulse, age, g = columns_of(path)
    rise = np.mean(g[pulse == max(pulse)]) - np.mean(g[pulse == 0])
    train.require(rise > 0, f"{path}: pulses do not raise G, as those of SET do")
    names, device = np.unique(device, return_inverse=True)
    shape = len(names), 1 + max(pulse)
    place = device * shape[1] + pulse
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    table = np.full((2, np.prod(shape), 1 + max(rank)), np.nan)
    table[:, place, rank] = g, age
    return table.reshape(2, *shape, -1)


# ---- likelihood ----------------------------------------------------------------------------------

# A belief about a device: mean [2] and covariance [2, 2] of its G (µS) and ν.


def pulsed(device, belief, p):
    """The belief after a SET pulse at history p, G cut off at g_min and g_max."""
    mean, cov = belief
    stretch = 1 + device.set_slope
    var = (stretch**2 + device.set_std_slope**2) * cov[0, 0]
    std = jnp.sqrt(var + analog.set_std(device, mean[0], p) ** 2)
    raised = mean[0] + analog.set_mean(device, mean[0], p) + std * NODES
    g = jnp.clip(raised, device.g_min, device.g_max)
    passed = stretch * jnp.mean(g * NODES) / std  # of a deviation
    scale = jnp.array([[0.0, passed], [passed, 1.0]])
    return mean.at[0].set(jnp.mean(g)), (scale * cov).at[0, 0].set(jnp.var(g))


def seen(device, belief, read):
    """The belief after a read, which is g (µS) and ln(age/t0), and what was known of g before:
    its error and log-variance. A g of NaN tells nothing."""
    (mean, cov), (g, log_age) = belief, read
    left = jnp.exp(-mean[1] * log_age)
    expected = mean[0] * left
    slope = jnp.stack([left, -expected * log_age])
    # a read is closer to the G that sets its noise than what was expected
    g, is_read = jnp.where(jnp.isnan(g), expected, g), ~jnp.isnan(g)
    noise = device.law.read_std(g, g, log_age, device.t0)
    reach = cov @ slope
    var = slope @ reach + noise**2 + RESOLVED**2
    gain = jnp.where(is_read, reach / var, 0.0)
    error = g - expected
    return (mean + gain * error, cov - jnp.outer(gain, reach)), (
        error,
        jnp.log(var),
    )


def errors_of(device, g, log_age):
    """Errors (µS) of what is expected of a device's reads g (µS) at ln(age/t0), [pulses, reads],
    and their log-variances."""

    def step(belief, inputs):
        *reads, p = inputs
        belief, found = jax.lax.scan(partial(seen, device), belief, reads)
        return pulsed(device, belief, p), found

    mean = jnp.stack([device.reset_mean, device.law.nu_mean])
    cov = jnp.diag(jnp.stack([device.reset_std, device.law.nu_std]) ** 2)
    p = jnp.exp(-jnp.arange(1.0, 1 + len(g)) / device.history_decay)
    return jax.lax.scan(step, (mean, cov), (g, log_age, p))[1]


def values_of(x, held, start):
    """Values [NAMES] of an unbounded x, start at x = 0 and where held."""
    return jnp.where(held, start, start * jnp.where(SIGNED, 1 + x, jnp.exp(x)))


def device_of(values):
    """The Device of values [NAMES]; g_min and g_prog follow from the others."""
    device = jax.tree.unflatten(jax.tree.structure(analog.PCM), values)
    low = device.reset_mean - 2 * device.reset_std
    stop = device.set_offset / jnp.maximum(-device.set_slope, 1e-9)
    high = jnp.minimum(device.g_max, BELOW_STOP * stop)
    return device._replace(g_min=jnp.maximum(low, 0.0), g_prog=high)


@jax.jit
def likelihood(x, held, start, g, log_age):
    """Minus the log-density of all reads at x [NAMES], but for a constant, its gradient and Fisher
    information."""

    def errors(x):
        device = device_of(values_of(x, held, start))
        found = jax.vmap(partial(errors_of, device))(g, log_age)
        return [jnp.ravel(part) for part in found]

    error, log_var = errors(x)
    by_error, by_var = jax.jacfwd(errors)(x)  # [reads, NAMES]
    known = jnp.where(jnp.isnan(jnp.ravel(g)), 0.0, 1.0)
    weight = known * jnp.exp(-log_var)
    excess = (known - weight * error**2) / 2
    loss = jnp.sum(known * log_var + weight * error**2) / 2
    gradient = (weight * error) @ by_error + excess @ by_var
    information = (weight * by_error.T) @ by_error + (known * by_var.T) @ by_var / 2
    return loss, gradient, information


# ---- fit -----------------------------------------------------------------------------------------


def standard_errors(information, values, start):
    """Standard errors of values [NAMES], NaN of what has no information [NAMES, NAMES] by x."""
    told = np.diag(information) > 0
    variance = np.diag(np.linalg.inv(information + np.diag(1.0 - told)))
    of_x = np.where(told & (variance > 0), variance, np.nan) ** 0.5
    # what enters by its square has an error at 0 too
    of_x = np.where(SQUARED, np.sqrt(1 + 2 * of_x) - 1, of_x)
    return of_x * np.where(SIGNED, abs(start), values)


def search(start, held, data):
    """BIC, values [NAMES] and their standard errors [NAMES] at the highest likelihood; held values
    stay at the start, and so do those that reads do not tell. The errors of both are NaN."""
    x, damping = np.zeros(len(NAMES)), 1.0
    best = likelihood(x, held, start, *data)
    for _ in range(N_STEPS):
        loss, gradient, information = best
        step = np.linalg.solve(information + damping * np.eye(len(x)), gradient)
        trial = np.maximum(x - np.clip(step, -1.0, 1.0), LOWEST)
        found = likelihood(trial, held, start, *data)
        gain = loss - found[0]
        if gain > 0:
            x, best, damping = trial, found, damping / 10
        else:
            damping *= 10
        if abs(gain) < 1e-3:
            break
    loss, _, information = best
    values = np.array(values_of(x, held, start))
    n_told = np.sum(np.diag(information) > 0)
    bic = 2 * loss + n_told * np.log(np.sum(np.isfinite(data[0])))
    return bic, values, standard_errors(information, values, start)


def fit(g, age, g_max):
    """The Device fitted to reads g (µS) at ages (s), both [devices, pulses, reads]; and standard
    errors by name, NaN of what they do not tell."""
    t0, scale = np.nanmin(age), g_max / analog.PCM.g_max
    held = ["g_max"]
    held += ["reset_std", "nu_std"] * (len(g) == 1)
    data = g / scale, np.log(np.where(np.isnan(g), t0, age) / t0)
    starts = [np.array(jax.tree.leaves(device)) for device in START]
    with jax.enable_x64(True):
        found = [search(start, np.isin(NAMES, held), data) for start in starts]
        _, *best = min(found, key=lambda law: law[0])
        values, errors = (np.where(IN_US, scale, 1.0) * x for x in best)
        device = jax.tree.map(float, device_of(values))
    return device._replace(t0=float(t0)), dict(zip(NAMES, errors, strict=True))


# ---- command line --------------------------------------------------------------------------------


def simulate(key, device, n_pairs, n_pulses, ages):
    """Reads (µS) of simulated devices after RESET and SET pulses, at ages (s): [2 · n_pairs,
    1 + n_pulses, ages]."""
    blank_key, key = jax.random.split(key)
    xbar, reads = analog.blank(blank_key, device, (2, n_pairs, 1)), []
    measure = jax.vmap(analog.measure, (0, None, None, 0))
    for n in range(1 + n_pulses):
        pulse_key, read_key = jax.random.split(jax.random.fold_in(key, n))
        fired = jnp.ones_like(xbar.g)
        xbar = analog.pulse(pulse_key, device, xbar, fired, 0.0, n == 0)
        keys = jax.random.split(read_key, len(ages))
        reads.append(measure(keys, device, xbar, ages))
    return np.reshape(reads, (1 + n_pulses, len(ages), -1)).transpose(2, 0, 1)


def at_each_age(g, age):
    """Ages (s), those within 1 % taken as one, and the mean of the reads g (µS) at each of them,
    [devices, pulses, ages]."""
    ages = np.nanmean(age, (0, 1))  # of the first reads, of the second, …
    first = np.append(0, 1 + np.flatnonzero(np.diff(ages) > 0.01 * ages[:-1]))
    n_known = np.add.reduceat(np.isfinite(g), first, 2, dtype=float)
    total = np.add.reduceat(np.nan_to_num(g), first, 2)
    return ages[first], np.where(n_known > 0, total / np.maximum(n_known, 1), np.nan)


def draw(name, device, g, age):
    """Figure of measured and simulated devices: after each pulse, and at the ages after that one
    which was read most."""
    ages, g = at_each_age(g, age)
    most = np.argmax(np.sum(np.isfinite(g), (0, 2)))
    n_pulses = g.shape[1] - 1
    simulated = simulate(
        jax.random.key(0), device, N_PAIRS, n_pulses, jnp.array(ages, float)
    )
    panels = {
        "SET pulses after RESET": (
            range(1 + n_pulses),
            g[:, :, 0],
            simulated[:, :, 0],
        )
    }
    if len(ages) > 1:
        panels[f"age (s) after pulse {most}"] = (
            ages,
            g[:, most],
            simulated[:, most],
        )
    return figures.curves(name, panels)


def report(device, errors):
    """What reads tell of the constants, in lines of text."""
    constants = dict(zip(NAMES, jax.tree.leaves(device), strict=True))
    told = [name for name in NAMES if errors[name] >= 0]
    lines = [
        f"{name:<16}{constants.pop(name):>10.4g} ± {errors[name]:.2g}" for name in told
    ]
    rest = ", ".join(f"{name} {x:.4g}" for name, x in constants.items())
    return "\n".join([*lines, f"not told by the reads, so as pcm's or as assumed: {rest}"])


def range_of(g, given):
    """g_max (µS) of reads g (µS): the given one, else as said above."""
    top = np.nanmax(g)
    is_pcms = top <= analog.PCM.g_max <= 2 * top
    return given or float(analog.PCM.g_max if is_pcms else top)


def constants_of(path, name, device):
    """The constants of a device fitted to a file; Refused where they contradict each other."""
    constants = analog.describe(name, device)
    try:
        analog.from_constants(constants)
    except ValueError as error:
        raise train.Refused(f"{path} makes a device that cannot be: {error}") from None
    return constants


def execute(path, name, g_max):
    """Fit the device of a file, print it, report and draw it."""
    g, age = load(path)
    g_max = range_of(g, g_max)
    n_reads, is_in_range = np.sum(np.isfinite(g)), g_max >= np.nanquantile(g, 0.9)
    is_free = name not in analog.DEVICES
    train.require(n_reads >= N_LEAST, f"{path} needs {N_LEAST} reads or more")
    train.require(name.isidentifier(), f"--name {name} must be letters, digits and _")
    train.require(is_free, f"--name {name} is that of a built-in device")
    train.require(is_in_range, f"--g_max {g_max:g}: over a tenth of reads are above it")
    device, errors = fit(g, age, g_max)
    constants = constants_of(path, name, device)
    print(report(device, errors), file=sys.stderr)
    if g.shape[2] == 1:
        warning = (
            "with one read of a pulse, read_offset and reset_std are hardly told apart"
        )
        print(warning, file=sys.stderr)
    if np.nanmax(g) > 1000:
        print(f"reads reach {np.nanmax(g):.4g} µS: are they in nS?", file=sys.stderr)
    figure = path.with_suffix(".png")
    train.write(figure, figures.png(draw(name, device, g, age), str(path)))
    print(f"figure in {figure}", file=sys.stderr)
    print(json.dumps(constants, indent=1))


def main(argv=None):
    """Run the command line."""
    parser = train.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("curves", type=Path, help="CSV file of reads")
    parser.add_argument("--name", default="mine", help="name of the device (mine)")
    parser.add_argument(
        "--g_max",
        type=float,
        help="µS, the highest G (default: 12 if the highest read is from 6 to 12, else that read)",
    )
    with train.one_line_errors():
        given = parser.parse_args(argv)
        train.configure_backend()
        execute(given.curves, given.name, given.g_max)


if __name__ == "__main__":
    main()
