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

The likelihood is that of an extended Kalman filter with the state (G, ν) of each device; its
maximum is found by Fisher scoring with Levenberg's damping. Standard errors are those of the
information at the maximum. They hold for many devices that differ in ν and after RESET alone.
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

START = analog.DEVICES["pcm_history"]  # where the search begins
HISTORY = ["set_history", "set_std_history", "history_decay"]
SIGNED = ["set_slope", "set_offset", "set_history"]  # the others are not negative
SHARES = {"set_slope", "set_std_slope", "history_decay", "nu_mean", "nu_std", "read_slope"}
NAMES = [x for x in analog.Device._fields if x.startswith(("set", "history", "reset"))]
NAMES += analog.Nandakumar._fields
NODES = np.asarray(norm.ppf((np.arange(200) + 0.5) / 200), float)  # of a normal density, equally likely
FLOOR = 1e-5  # of g_max, a std that no read resolves
N_STEPS = 200  # of the search, at most


# ---- the file ------------------------------------------------------------------------------------


def columns_of(path):
    """Device, pulse, G (µS) and age (s) of the reads of a file; Refused where it has none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        header, *rows = filter(None, csv.reader(text.splitlines()))
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        device, pulse, g = (np.array(columns.pop(x)) for x in ("device", "pulse", "g_uS"))
        age = [x.strip() or "0" for x in columns.pop("time_s", "0" * len(rows))]
        pulse, g, age = (np.array(x, float) for x in (pulse, g, age))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        what = "columns device, pulse, g_uS and perhaps time_s, commas between, decimal points"
        raise train.Refused(f"{path} must have {what}: {error!r}") from None
    train.refuse(
        {
            f"{path} has a column that is unknown: {', '.join(columns)}": not columns,
            f"{path}: g_uS must be finite; leave out what is not known": np.all(np.isfinite(g)),
            f"{path}: time_s must be 0 or more": np.all(np.isfinite(age) & (age >= 0)),
            f"{path}: pulse must be 0, 1, 2, …": np.all(np.isin(pulse, np.arange(10_000))),
            f"{path}: g_uS is in siemens, it seems; give µS": np.any(np.abs(g) >= 1e-3),
        }
    )
    return device, pulse.astype(int), g, np.maximum(age, analog.MIN_AGE)


def load(path):
    """Reads in µS and their ages in s, both [devices, pulses, reads], NaN where there is none;
    Refused where pulses do not raise G."""
    device, pulse, g, age = columns_of(path)
    names, device = np.unique(device, return_inverse=True)
    shape = len(names), 1 + pulse.max()
    place = np.ravel_multi_index((device, pulse), shape)
    order = np.lexsort((age, place))
    place = place[order]
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    table = np.full((2, np.prod(shape), 1 + rank.max()), np.nan)
    table[:, place, rank] = g[order], age[order]
    first, last = (g[pulse == n] for n in (0, pulse.max()))
    train.refuse(
        {
            f"{path} needs reads of pulse 0 (after RESET) to 2 or more": len(first) and shape[1] > 2,
            f"{path}: pulses do not raise G, as SET pulses do": np.mean(last) > np.mean(first),
        }
    )
    return table.reshape(2, *shape, -1)


# ---- likelihood ----------------------------------------------------------------------------------

# A belief about a device: mean [2] and covariance [2, 2] of its G (µS) and ν.


def pulsed(device, belief, p):
    """The belief after a SET pulse at history p, G cut off at g_min and g_max."""
    mean, cov = belief
    var = (1 + device.set_slope) ** 2 * cov[0, 0] + device.set_std_slope**2 * cov[0, 0]
    std = jnp.sqrt(var + analog.set_std(device, mean[0], p) ** 2)
    raised = mean[0] + analog.set_mean(device, mean[0], p) + std * NODES
    g = jnp.clip(raised, device.g_min, device.g_max)
    shared = cov[0, 1] * (1 + device.set_slope) * jnp.mean(g * NODES) / std
    cov = jnp.stack([jnp.stack([jnp.var(g), shared]), jnp.stack([shared, cov[1, 1]])])
    return mean.at[0].set(jnp.mean(g)), cov


def seen(device, belief, read):
    """The belief after a read, which is g (µS) and ln(age/t0), and what was known of g before:
    its error and log-variance. A g of NaN tells nothing."""
    (mean, cov), (g, log_age) = belief, read
    left = jnp.exp(-mean[1] * log_age)
    expected, slope = mean[0] * left, jnp.stack([left, -mean[0] * left * log_age])
    error, reach = jnp.where(jnp.isnan(g), 0.0, g - expected), cov @ slope
    spread = slope @ reach + (FLOOR * device.g_max) ** 2

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

    cov = jnp.diag(jnp.stack([device.reset_std, device.law.nu_std]) ** 2)
    mean = jnp.stack([device.reset_mean, device.law.nu_mean])
    p = jnp.exp(-jnp.arange(1.0, 1 + len(g)) / device.history_decay)
    return jax.lax.scan(step, (mean, cov), (g, log_age, p))[1]


def device_of(values, g_max, t0):
    """The Device of values [NAMES]."""
    given = dict(zip(NAMES, values, strict=True))
    law = analog.Nandakumar(*map(given.pop, analog.Nandakumar._fields))
    device = analog.PCM._replace(law=law, g_max=g_max, t0=t0, **given)
    return device._replace(g_min=jnp.maximum(device.reset_mean - 2 * device.reset_std, 0.0))


@jax.jit
def likelihood(values, g_max, t0, g, age):
    """Minus the log-density of all reads at values [NAMES], its gradient and Fisher information."""
    known = jnp.isfinite(g)
    log_age = jnp.log(jnp.where(known, age, t0) / t0)

    def errors(values):
        found = jax.vmap(partial(errors_of, device_of(values, g_max, t0)))(g, log_age)
        found = [jnp.ravel(x) for x in found]
        return found, found

    (by_error, by_var), (error, log_var) = jax.jacfwd(errors, has_aux=True)(values)
    known = jnp.ravel(known).astype(float)
    weight = known * jnp.exp(-log_var)
    excess = (known - weight * error**2) / 2
    loss = jnp.sum(known * log_var / 2 - excess)
    gradient = (weight * error) @ by_error + excess @ by_var
    information = (weight * by_error.T) @ by_error + (known * by_var.T) @ by_var / 2
    return loss, gradient, information


# ---- fit -----------------------------------------------------------------------------------------


def values_of(device, g_max):
    """Constants [NAMES] of a built-in device, their µS scaled to g_max."""
    known, scale = analog.describe("", device), g_max / device.g_max
    return np.array([known[x] * (1.0 if x in SHARES else scale) for x in NAMES])


def search(free, start, data):
    """Values [NAMES] at the highest likelihood, all but the free ones as at the start; minus its
    logarithm; and standard errors [free]."""
    free = np.isin(NAMES, free)
    signed = np.isin(NAMES, SIGNED)[free]
    values, damping, best = start, 1.0, likelihood(start, *data)
    for _ in range(N_STEPS):
        unit = np.where(signed, start[free], values[free])
        curvature = best[2][free][:, free] * np.outer(unit, unit) + damping * np.eye(len(unit))
        step = -np.linalg.solve(curvature, best[1][free] * unit)
        trial = values.copy()
        trial[free] += unit * np.where(signed, step, np.expm1(np.clip(step, -1.0, 1.0)))
        found = likelihood(trial, *data)
        gain = best[0] - found[0]
        if gain > 0:
            values, best = trial, found
        damping *= 0.1 if gain > 0 else 10.0
        if abs(gain) < 1e-5:
            break
    print(_, damping, best[0])
    errors = np.diag(np.linalg.inv(best[2][free][:, free])) ** 0.5
    # what enters by its square alone has an error at 0 too
    spread = np.isin(NAMES, ["reset_std", "nu_std"])[free]
    by_square = np.sqrt(values[free] ** 2 + 2 * values[free] * errors) - values[free]
    return values, best[0], np.where(spread, by_square, errors)


def told(g, age):
    """Names of the constants that reads can tell, without history."""
    several = g.shape[2] > 1
    drifts = several and np.nanmax(age) > np.nanmin(age)
    unknown = set(HISTORY)
    if len(g) == 1:
        unknown |= {"reset_std", "nu_std"}
    if not several:
        unknown |= {"read_slope", "read_offset"}
    if not drifts:
        unknown |= {"nu_mean", "nu_std"}
    return [x for x in NAMES if x not in unknown]


def fit(g, age, g_max):
    """The fitted Device, and standard errors by name of the constants that are told by reads g (µS)
    at ages (s), both [devices, pulses, reads]."""
    free, t0 = told(g, age), float(np.nanmin(age))
    data = g_max, t0, g, age
    start = values_of(analog.PCM, g_max)
    plain, loss, errors = search(free, start, data)
    values, lower, errors_of_more = search(free + HISTORY, values_of(START, g_max), data)
    if 2 * (loss - lower) > len(HISTORY) * np.log(np.sum(np.isfinite(g))):
        plain, errors, free = values, errors_of_more, free + HISTORY
    named = [x for x in NAMES if x in free]
    return device_of(plain.tolist(), g_max, t0), dict(zip(named, errors.tolist(), strict=True))
