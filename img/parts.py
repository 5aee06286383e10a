"""What the studies are made of: experiments on many chips, their errors, and words for them."""

import jax
import jax.numpy as jnp
import numpy as np

import analog
import train

DIVERGED = 1e6  # an error above it, or no number, counts as this
READ_NOISE = "read_slope", "read_offset", "read_scale"


def error_of(measured, suffix=""):
    """The error among what was measured: wrong answers (%) of a classification, else the squared
    error."""
    if "accuracy" in measured:
        return 100 - measured["accuracy" + suffix]
    return measured["mse" + suffix]


def error(family, y, query):
    """The error of outputs y [L, n_out]."""
    return error_of(family.measures(y, query))


def last_error(key, meta, cfg, family, device, make=analog.deploy):
    """Error after a new chip has learned a task."""
    return error_of(train.episode(key, meta, cfg, family, device, make).measured)[-1]


def writable(device, w):
    """Conductances [2, rows, cols] in µS of weights w, as far as the device can have them."""
    wanted = analog.conductances(device, jnp.clip(w, -1.0, 1.0))
    return jnp.minimum(wanted, device.g_prog)


def without(device, *constants):
    """The device with these of its constants, and of those of its law, at 0."""

    def zero(part):
        return part._replace(**{name: 0.0 for name in constants if name in part._fields})

    return zero(device)._replace(law=zero(device.law))


def unit(run):
    """What an error of the run's tasks is, in words."""
    return "wrong answers (%)" if run.families.about else "mean squared error"


def measured(experiment, n, run, device, given, index=3):
    """What an experiment measures of what is given, on n chips of a run's network; every network
    has the same tasks, and another index means other chips and tasks."""
    meta = train.project(run.state.meta, *train.common_range([device]))
    key = train.stream(train.Config(), index)
    family = run.families.testing
    return jax.device_get(train.test(key, experiment, run.cfg, family, given, n, meta))


def tested(experiment, n, run, device=None):
    """What an experiment measures on n chips of a run's network, of its first device or of
    another."""
    device = device or next(iter(run.devices.values()))
    return measured(experiment, n, run, device, device)


def tuned(experiment, n, run, device=None):
    """Errors [n] by label of an experiment that measures them at several strengths [n, strengths]:
    at the strength that is best on n other chips with other tasks."""
    device = device or next(iter(run.devices.values()))
    kind = train.Kind(device, analog.program_table(device))
    found, others = (measured(experiment, n, run, device, kind, index) for index in (3, 4))
    chosen = {}
    for label, x in others.items():
        bounded = np.where(x < DIVERGED, x, DIVERGED)
        chosen[label] = found[label][:, np.argmin(np.mean(bounded, 0))]
    return chosen


def ratio(x, y):
    """Summary of mean(x)/mean(y) of pairs x and y [n], its interval to first order."""
    share = np.mean(x) / np.mean(y)
    return train.summary(share + (x - share * y) / np.mean(y))


def in_words(found):
    """Mean and interval of a summary."""
    interval = f" ± {found['ci95']:.3f}" if "ci95" in found else ""
    return f"{found['mean']:9.3f}{interval}"


def recorded(values):
    """Summary of values [n, ...], and the values of all chips, to four digits."""
    digits = np.char.mod("%.4g", values).astype(float)
    return train.summary(values) | {"chips": digits.tolist()}


def show(label, values, base=None):
    """Values [n] as recorded, with their ratio to a base of the same chips and tasks if there is
    one; prints mean, interval and ratio."""
    found, over = recorded(values), ""
    if base is not None:
        found["over"] = ratio(values, base)
        over = f"   times the first{in_words(found['over'])}"
    print(f"  {label:<56}{in_words(found)}{over}", flush=True)
    return found


def resized(run, task_size):
    """The run, its tasks of another size if one is given."""
    if task_size in (None, run.cfg.task_size):
        return run
    cfg = train.resize(run.cfg, task_size, run.devices)
    return run._replace(cfg=cfg, families=train.families_of(cfg))
