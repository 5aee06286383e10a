"""Fit the constants of a device to measured pulses, by maximum likelihood.

    python img/fit.py curves.csv --name mine > mine.json
    python train.py --device mine.json

A row of the CSV is a read, in any order: device (a label), pulse (0 after RESET, then the number of
SET pulses since), g_uS (µS), and if wanted time_s, the seconds since that pulse. Several reads of a
pulse tell read noise, several ages tell drift: that of the family nandakumar of analog.py. SET is
fitted without history and with it, and history stays if it lowers BIC. Beside the CSV comes a
figure, curves.png for curves.csv.

What is assumed: a read without time_s has the age analog.MIN_AGE. t0 is the earliest age, so that G
is what the earliest reads see. A pulse acts on this G, whatever drift has left of it, as does
analog.pulse. G is cut off at g_max and at g_min, which is reset_mean − 2·reset_std, at least 0.
g_max is pcm's 12 µS, or the highest read if that is above. g_prog is 94 % of where SET stops
raising G, as pcm's is, at most g_max. What reads cannot tell is pcm's, its µS scaled to g_max.

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

# The fit has the G of reads scaled to pcm's g_max. An array of values [NAMES] has the constants of
# a device in the order of its tree's leaves.
PCM, PCM_HISTORY = analog.PCM, analog.DEVICES["pcm_history"]
NAMES = (*analog.Nandakumar._fields, *analog.Device._fields[1:-1])
SET = "set_slope set_offset set_std_slope set_std_offset reset_mean "
HISTORY = "set_history set_std_history history_decay "
SIGNED = np.isin(NAMES, ["set_slope", "set_offset", "set_history"])
IN_US = [x.startswith(("g_", "reset")) or x.endswith(("offset", "history")) for x in NAMES]
NODES = norm.ppf((np.arange(200) + 0.5) / 200)  # of a normal density, equally likely
RESOLVED = 1e-4  # µS, where pcm's range is 12
BELOW_STOP = 0.94  # g_prog, as a share of where SET stops raising G
N_STEPS = 200  # of the search, at most
N_PAIRS = 500  # of simulated devices in the figure


# ---- the file ------------------------------------------------------------------------------------


def columns_of(path):
    """Device, pulse, G (µS) and age (s) of the reads of a file; Refused where it has none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        header, *rows = filter(None, csv.reader(text.splitlines()))
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        device, pulse, g = map(columns.pop, ("device", "pulse", "g_uS"))
        age = [x.strip() or "0" for x in columns.pop("time_s", "0" * len(rows))]
        g, age = np.array([g, age], float)
        pulse = np.array(pulse, int)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        what = "columns device, pulse, g_uS and perhaps time_s, with commas and decimal points"
        raise train.Refused(f"{path} must have {what}: {error!r}") from None
    needs = {
        f"{path} has a column that is unknown: {', '.join(columns)}": not columns,
        f"{path}: leave out reads that are not numbers": np.all(np.isfinite(g + age)),
        f"{path}: time_s must be 0 or more": np.min(age) >= 0,
        f"{path}: pulse must be from 0 to 9999": np.all((pulse >= 0) & (pulse < 10_000)),
        f"{path}: g_uS is in siemens, it seems; give µS": np.max(np.abs(g)) >= 1e-3,
    }
    train.refuse(needs)
    return device, pulse, g, np.maximum(age, analog.MIN_AGE)


def load(path):
    """Reads in µS and their ages in s, both [devices, pulses, reads], NaN where there is none;
    Refused where pulses do not raise G."""
    device, pulse, g, age = columns_of(path)
    names, device = np.unique(device, return_inverse=True)
    shape = len(names), 1 + pulse.max()
    place = device * shape[1] + pulse
    order = np.lexsort((age, place))
    ordered = place[order]
    rank = np.arange(len(place)) - np.searchsorted(ordered, ordered)
    table = np.full((2, np.prod(shape), 1 + rank.max()), np.nan)
    table[:, ordered, rank] = g[order], age[order]
    first, last = g[pulse == 0], g[pulse == pulse.max()]
    needs = {
        f"{path} needs reads of pulse 0 (after RESET) to 2 or more": first.size and shape[1] > 2,
        f"{path}: pulses do not raise G, as SET does": np.mean(last) > np.mean(first),
    }
    train.refuse(needs)
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
    expected, slope = mean[0] * left, jnp.stack([left, -mean[0] * left * log_age])
    error, reach = jnp.where(jnp.isnan(g), 0.0, g - expected), cov @ slope
    spread = slope @ reach + RESOLVED**2

    def variance(level):
        return spread + device.law.read_std(level, level, log_age, device.t0) ** 2

    # noise at what the read says, not at what was expected
    var = variance(expected + spread / variance(expected) * error)
    gain = jnp.where(jnp.isnan(g), 0.0, reach / var)
    return (mean + gain * error, cov - jnp.outer(gain, reach)), (error, jnp.log(var))


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


def device_of(values):
    """The Device of values [NAMES]."""
    device = jax.tree.unflatten(jax.tree.structure(PCM), values)
    return device._replace(g_min=jnp.maximum(device.reset_mean - 2 * device.reset_std, 0.0))


@jax.jit
def likelihood(values, g, log_age):
    """Minus the log-density of all reads at values [NAMES], its gradient and Fisher information."""

    def errors(values):
        found = jax.vmap(partial(errors_of, device_of(values)))(g, log_age)
        found = [jnp.ravel(x) for x in found]
        return found, found

    (by_error, by_var), (error, log_var) = jax.jacfwd(errors, has_aux=True)(values)
    known = jnp.ravel(jnp.isfinite(g)).astype(error.dtype)
    weight = known * jnp.exp(-log_var)
    excess = (known - weight * error**2) / 2
    loss = jnp.sum(known * log_var / 2 - excess)
    gradient = (weight * error) @ by_error + excess @ by_var
    information = (weight * by_error.T) @ by_error + (known * by_var.T) @ by_var / 2
    return loss, gradient, information


# ---- fit -----------------------------------------------------------------------------------------


def search(names, start, data):
    """Of the values at the highest likelihood, those of other names as at the start: minus its
    logarithm, values [NAMES] and standard errors [NAMES], NaN where not free."""
    free = np.isin(NAMES, names.split())
    values, damping, best = start, 1.0, likelihood(start, *data)
    for _ in range(N_STEPS):
        unit = np.where(SIGNED, start, values)[free]
        curvature = best[2][free][:, free] * np.outer(unit, unit) + damping * np.eye(len(unit))
        step = np.zeros(len(NAMES))
        step[free] = -np.linalg.solve(curvature, best[1][free] * unit)
        grown = np.maximum(values * np.exp(np.clip(step, -1.0, 1.0)), start / 100)
        trial = np.where(SIGNED, values + start * step, grown)
        found = likelihood(trial, *data)
        gain = best[0] - found[0]
        if gain > 0:
            values, best = trial, found
        damping *= 0.1 if gain > 0 else 10.0
        if abs(gain) < 1e-3:
            break
    errors = np.full(len(NAMES), np.nan)
    errors[free] = np.sqrt(np.diag(np.linalg.inv(best[2][free][:, free])))
    return best[0], values, errors


def told(g, age):
    """Names of the constants that reads tell, without history."""
    several, many = g.shape[2] > 1, len(g) > 1
    drifts = several and np.nanmax(age) > np.nanmin(age)
    groups = {
        SET: True,
        "reset_std ": many,
        "read_slope read_offset ": several,
        "nu_mean ": drifts,
        "nu_std ": drifts and many,
    }
    return "".join(names for names, is_told in groups.items() if is_told)


def fit(g, age, g_max):
    """The Device fitted to reads g (µS) at ages (s), both [devices, pulses, reads]; and standard
    errors by name, NaN of what they do not tell."""
    t0, scale, names = float(np.nanmin(age)), g_max / PCM.g_max, told(g, age)
    data = g / scale, np.log(np.where(np.isnan(g), t0, age) / t0)
    starts = [np.array(jax.tree.leaves(x._replace(t0=t0))) for x in (PCM, PCM_HISTORY)]
    loss, *plain = search(names, starts[0], data)
    lower, *best = search(names + HISTORY, starts[1], data)
    if 2 * (loss - lower) < 3 * np.log(np.sum(np.isfinite(g))):
        best = plain
    values, errors = (np.where(IN_US, scale, 1.0) * x for x in best)
    # what enters by its square alone has an error at 0 too
    by_square = np.sqrt(values**2 + 2 * values * errors) - values
    errors = np.where(np.isin(NAMES, ["reset_std", "nu_std"]), by_square, errors)
    device = device_of(values.tolist())
    stop = device.set_offset / max(-device.set_slope, 1e-9)
    device = device._replace(g_min=float(device.g_min), g_prog=min(g_max, BELOW_STOP * stop))
    return device, dict(zip(NAMES, errors, strict=True))
