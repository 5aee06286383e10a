"""A crossbar of phase-change memory (PCM): pulses, drift, read noise and programming.

Gradients pass through pulses, drift and reads, but not through ν, P, the error of programming or
program-and-verify. Conductances G are in µS and times in s.
N(mean, std²) is a normal draw, r = G/g_max, and age the time since the last pulse, at least 1 s.

    SET pulse    P ← P·exp(−1/history_decay)
                 G ← clip(G + N(set_slope·G + set_offset + set_history·P,
                                (set_std_slope·G + set_std_offset + set_std_history·P)²))
    RESET        G ← clip(N(reset_mean, reset_std²)),  P ← 1
    stuck        a share stuck_low of all devices stays at g_min, a share stuck_high at g_max; the
                 other device of such a pair is programmed to make up for it, as far as it can
    synapse      W = (G+ − G−)/(g_max − g_min), a differential pair of devices

Drift and read noise belong to a family of devices. A read gives clip(N(G(t), σ²)), with one draw
per read (1/f noise).

    nandakumar   ν = |N(nu_mean, nu_std²)|, drawn once per device
                 G(t) = G·(age/t0)^−ν
                 σ = read_slope·G(t) + read_offset
    ibm          ν = |N(clip(nu_slope·ln r + nu_offset, nu_low, nu_high),
                        clip(nu_std_slope·ln r + nu_std_offset, nu_std_low, nu_std_high)²)|,
                 drawn from the target when a device is programmed, from G when it is pulsed
                 G(t) = G·((age + t0)/t0)^−ν
                 σ = G(t)·min(read_scale·r^−read_power, read_cap)·√ln((age+t0+t_read)/(2·t_read))

A device is programmed in one of two ways.

    by pulses    a RESET, then verify reads, each t_verify after the pulse before it, and SET pulses
                 (a RESET after an overshoot); it ends at time 0 of a new chip's clock
    as stated    G = clip(N(target, (g_max·(prog_0 + prog_1·r + prog_2·r²))²)) at that time, where
                 the source of a device states the error and not the pulses

`Device` holds the constants, `Crossbar` the state of an array of devices. To draw the laws over
simulated devices: python analog.py, or python analog.py --device mine.json
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# ---- families of devices -------------------------------------------------------------------------

MIN_AGE = 1.0  # s: a read within 1 s of a pulse is taken as a read 1 s after it
MIN_SHARE = 1e-7  # of g_max: a smaller r counts as this one in ln r and in a power of r


class Nandakumar(NamedTuple):
    """Drift and read noise of Nandakumar et al., J. Appl. Phys. 124, 152135 (2018)."""

    nu_mean: float  # drift exponent ν, mean over devices
    nu_std: float  # its spread between devices
    read_slope: float  # std of read noise, per µS of G(t)
    read_offset: float  # µS, std of read noise at G = 0
    redraws_nu = False  # whether a pulse draws a device's ν anew

    def nu_law(self, r):
        """Mean and std of ν of devices programmed to the share r of g_max."""
        return self.nu_mean, self.nu_std

    def clock(self, age, t0):
        """The base of the power law of drift."""
        return age / t0

    def read_std(self, g, r, age, t0):
        """Std of a read (µS) where drift has left g (µS) of the share r of g_max."""
        return self.read_slope * g + self.read_offset


class Ibm(NamedTuple):
    """Drift and read noise of IBM's array of a million devices (PCMLikeNoiseModel of
    aihwkit)."""

    nu_slope: float  # mean of ν, per ln r
    nu_offset: float  # mean of ν at r = 1, before its limits
    nu_low: float  # lower limit of the mean
    nu_high: float  # upper limit of the mean
    nu_std_slope: float  # spread of ν, per ln r
    nu_std_offset: float  # spread of ν at r = 1, before its limits
    nu_std_low: float  # lower limit of the spread
    nu_std_high: float  # upper limit of the spread
    read_scale: float  # std of read noise at r = 1, share of G(t)
    read_power: float  # how fast that share grows towards small r
    read_cap: float  # its upper limit
    t_read: float  # s, duration of a read; not the time at which a chip is read
    redraws_nu = True

    def nu_law(self, r):
        log_r = jnp.log(jnp.maximum(r, MIN_SHARE))
        mean = jnp.clip(self.nu_slope * log_r + self.nu_offset, self.nu_low, self.nu_high)
        std = jnp.clip(
            self.nu_std_slope * log_r + self.nu_std_offset,
            self.nu_std_low,
            self.nu_std_high,
        )
        return mean, std

    def clock(self, age, t0):
        return (age + t0) / t0

    def read_std(self, g, r, age, t0):
        share = self.read_scale * jnp.maximum(r, MIN_SHARE) ** -self.read_power
        growth = jnp.sqrt(jnp.log((age + t0 + self.t_read) / (2 * self.t_read)))
        return g * jnp.minimum(share, self.read_cap) * growth


FAMILIES = {"nandakumar": Nandakumar, "ibm": Ibm}


# ---- types ---------------------------------------------------------------------------------------


class StatedError(NamedTuple):
    """The error that programming leaves, as the source of a device states it."""

    prog_0: float  # std, share of g_max
    prog_1: float  # the same, per r
    prog_2: float  # the same, per r²

    def std(self, r):
        """Std of the error, share of g_max, at targets of the share r of g_max."""
        return self.prog_0 + self.prog_1 * r + self.prog_2 * r**2


class Device(NamedTuple):
    """The constants of one kind of device. They are data of a compiled program: another
    value compiles nothing anew."""

    law: Nandakumar | Ibm
    g_min: float  # µS, the lowest G
    g_max: float  # µS, the highest G
    g_prog: float  # µS, the highest target of programming
    set_slope: float  # mean ΔG of a SET pulse, per µS of G
    set_offset: float  # µS, mean ΔG at G = 0
    set_history: float  # µS, mean ΔG added at P = 1, as the first pulses act more
    set_std_slope: float  # std of ΔG, per µS of G
    set_std_offset: float  # µS, std of ΔG at G = 0
    set_std_history: float  # µS, std of ΔG added at P = 1
    history_decay: float  # pulses over which P falls by a factor of e
    reset_mean: float  # µS
    reset_std: float  # µS
    t0: float  # s, time constant of drift; nandakumar: the age at which G is specified
    t_verify: float = MIN_AGE  # s, from a pulse to its verify read, or to the read of Σ G
    tolerance: float = 0.4 / 11.9  # share of the range by which a verified device may miss
    stuck_low: float = 0.0  # share of devices that stay at g_min
    stuck_high: float = 0.0  # share of devices that stay at g_max
    stated: StatedError | None = None  # None: programmed by pulses


class Crossbar(NamedTuple):
    """State of an array of differential pairs; every field is [2, rows, cols], axis 0 being
    (G+, G−)."""

    g: jax.Array  # µS, the conductance after the last pulse, before drift
    t_prog: jax.Array  # s, time of the last pulse
    nu: jax.Array  # drift exponent
    p: jax.Array  # history P: 1 at RESET, 0 after many pulses
    free: jax.Array  # bool, false where the device is stuck


# ---- devices -------------------------------------------------------------------------------------

# Doped-GST mushroom cells: Nandakumar et al., J. Appl. Phys. 124, 152135 (2018), their model
# without pulse history. ν's spread is not given there: 0.008 is what aihwkit has at high G. SET
# has its fixed point at 10.6 µS, so that 10 µS is the highest that programming reaches.
PCM = Device(
    law=Nandakumar(nu_mean=0.04, nu_std=0.008, read_slope=0.03, read_offset=0.13),
    g_min=0.1,
    g_max=12.0,
    g_prog=10.0,
    set_slope=-0.084,
    set_offset=0.892,
    set_history=0.0,
    set_std_slope=0.09,
    set_std_offset=0.575,
    set_std_history=0.0,
    history_decay=2.6,
    reset_mean=0.1,
    reset_std=0.01,
    t0=38.6,
)

# How the first pulses after a RESET act more, as the paper fits it to the same cells (Table I).
HISTORY = {
    "set_offset": 0.880,
    "set_history": 1.40,
    "set_std_slope": 0.091,
    "set_std_offset": 0.260,
    "set_std_history": 2.15,
}

# aihwkit, PCMLikeNoiseModel, its 25 µS scaled to g_max. It has no pulses of its own, so these are
# PCM's.
IBM = PCM._replace(
    g_min=0.0,
    g_prog=12.0,
    t0=20.0,
    stated=StatedError(0.26348 / 25, 1.9650 / 25, -1.1731 / 25),
    law=Ibm(
        nu_slope=-0.0155,
        nu_offset=0.0244,
        nu_low=0.049,
        nu_high=0.1,
        nu_std_slope=-0.0125,
        nu_std_offset=-0.0059,
        nu_std_low=0.008,
        nu_std_high=0.045,
        read_scale=0.0088,
        read_power=0.65,
        read_cap=0.2,
        t_read=250e-9,
    ),
)

# No noise, no drift, no error of programming; every pulse adds 0.75 µS = g_max/2⁴.
PERF = PCM._replace(
    law=Nandakumar(nu_mean=0.0, nu_std=0.0, read_slope=0.0, read_offset=0.0),
    stated=StatedError(0.0, 0.0, 0.0),
    g_prog=12.0,
    set_slope=0.0,
    set_offset=0.75,
    set_std_slope=0.0,
    set_std_offset=0.0,
    reset_std=0.0,
)

DEVICES = {
    "pcm": PCM,
    "pcm_history": PCM._replace(**HISTORY),
    "ibm": IBM,
    "ibm_history": IBM._replace(**HISTORY),
    "perf": PERF,
}


# ---- physics -------------------------------------------------------------------------------------


def clip(x, low, high):
    """x saturated at [low, high]. The derivative is 1 on the closed range and 0 outside
    (jnp.clip has 0.5 at the ends)."""
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, jnp.clip(x, low, high))


def span(device):
    """The range of G in µS, which is the scale of a weight."""
    return device.g_max - device.g_min


def weights(device, g):
    """Weights [rows, cols] of the conductances g [2, rows, cols] in µS."""
    plus, minus = jnp.split(g, 2)  # on a CPU the derivative of g[0] − g[1] is slow
    return jnp.squeeze(plus - minus, 0) / span(device)


def conductances(device, w):
    """One-sided pairs [2, rows, cols] in µS of weights w in [−1, 1]: one device carries
    |w|, the other is at g_min."""
    sides = jnp.stack([w, -w])
    return device.g_min + span(device) * jnp.maximum(sides, 0.0)


def set_mean(device, g, p):
    """Mean ΔG (µS) of a SET pulse at conductance g (µS) and history p."""
    return device.set_slope * g + device.set_offset + device.set_history * p


def set_std(device, g, p):
    """Std of ΔG (µS) of a SET pulse at conductance g (µS) and history p."""
    return device.set_std_slope * g + device.set_std_offset + device.set_std_history * p


def staircase(device, n_pulses):
    """Noise-free G [n_pulses + 1] in µS and P [n_pulses + 1] after RESET and each of
    n_pulses SET pulses."""
    p = jnp.exp(-jnp.arange(float(n_pulses + 1)) / device.history_decay)

    def raise_once(g, p):
        raised = jnp.clip(g + set_mean(device, g, p), device.g_min, device.g_max)
        return raised, raised

    start = jnp.asarray(device.reset_mean, p.dtype)
    _, g = jax.lax.scan(raise_once, start, p[1:])
    return jnp.concatenate([start[None], g]), p


def history(device, g):
    """P of devices at g (µS): that of the number of pulses that lead from RESET to g on
    average."""
    return jnp.interp(jax.lax.stop_gradient(g), *staircase(device, 64))


def draw_nu(key, device, g):
    """Drift exponents of devices programmed to g (µS), of its shape."""
    mean, std = device.law.nu_law(jax.lax.stop_gradient(g) / device.g_max)
    return jnp.abs(mean + std * jax.random.normal(key, g.shape))


def age_of(xbar, t):
    """Age (s) of the devices at time t (s), of the crossbar's shape."""
    return jnp.maximum(t - xbar.t_prog, MIN_AGE)


def mean_drift(device, g, age):
    """Share of G that is left at age (s), at the mean ν of devices programmed to g (µS)."""
    nu, _ = device.law.nu_law(g / device.g_max)
    return device.law.clock(age, device.t0) ** -nu


def drift(device, xbar, t):
    """Conductance [2, rows, cols] in µS at time t (s), before read noise."""
    log_clock = jnp.log(device.law.clock(age_of(xbar, t), device.t0))
    return xbar.g * jnp.exp(-xbar.nu * log_clock)


def measure(key, device, xbar, t):
    """Conductance [2, rows, cols] in µS at time t (s): drifted, with one draw of read noise."""
    g = drift(device, xbar, t)
    std = device.law.read_std(g, xbar.g / device.g_max, age_of(xbar, t), device.t0)
    return g + std * jax.random.normal(key, g.shape)


def convert(device, g):
    """Measured conductances g (µS) within the range of the crossbar's converter."""
    return clip(g, device.g_min, device.g_max)


def read(key, device, xbar, t):
    """Conductance [2, rows, cols] in µS at time t (s) as a read of the crossbar sees it, within the
    range of its converter."""
    return convert(device, measure(key, device, xbar, t))


def changed(xbar, mask, **fields):
    """Crossbar with new fields where mask is true and the device is not stuck."""
    choose = functools.partial(jnp.where, mask & xbar.free)
    return jax.tree.map(choose, xbar._replace(**fields), xbar)


def pulse(key, device, xbar, amount, t, is_reset=False):
    """Crossbar after one pulse of each device at time t (s): a RESET where is_reset (bool, or
    [2, rows, cols]), else SET. amount [2, rows, cols] is 1 where the pulse is fired, 0 where it is
    not, and between for a part of a SET pulse; gradients pass through it."""
    noise_key, nu_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, xbar.g.shape)
    amount = jnp.where(xbar.free, amount, 0.0)
    p = xbar.p * jnp.exp(-1 / device.history_decay)
    raised = xbar.g + set_mean(device, xbar.g, p) + set_std(device, xbar.g, p) * noise
    erased = device.reset_mean + device.reset_std * noise
    full = clip(jnp.where(is_reset, erased, raised), device.g_min, device.g_max)
    g = (1 - amount) * xbar.g + amount * full
    nu = draw_nu(nu_key, device, g) if device.law.redraws_nu else xbar.nu
    p = jnp.where(is_reset, 1.0, p)
    return changed(xbar, amount > 0, t_prog=t, nu=nu, p=p)._replace(g=g)


def reset(key, device, xbar, mask, t):
    """Crossbar after a RESET at time t (s) of the devices whose mask [2, rows, cols] is
    true."""
    return pulse(key, device, xbar, mask.astype(float), t, is_reset=True)


def later(xbar, seconds):
    """The crossbar on a clock that starts that many seconds later."""
    return xbar._replace(t_prog=xbar.t_prog - seconds)


# ---- programming ---------------------------------------------------------------------------------

# fabricate draws a new crossbar for meta-training, with normal errors of programming. program
# programs an existing crossbar. deploy makes a blank crossbar and programs it, as on a real chip.

MAX_STEPS = 120  # of program-and-verify; only slow devices take more than a few dozen
# The first step without RESETs: a device that overshoots from here on stays where it is,
# as there would be no time to come back.
NO_RESET = 80


class ProgramTable(NamedTuple):
    """What programming leaves, by target, of devices that are not stuck; fields are [targets]."""

    target: jax.Array  # µS
    mean: jax.Array  # µS, mean of G − target
    std: jax.Array  # µS, std of G − target
    age: jax.Array  # s, mean age of the devices when programming has ended

    def at(self, g):
        """Mean, std and age at targets g (µS), each of g's shape."""
        g = jax.lax.stop_gradient(g)
        target, *rest = (jnp.asarray(x, g.dtype) for x in self)
        return [jnp.interp(g, target, x) for x in rest]


EXACT = ProgramTable(*np.zeros((4, 1), np.float32))  # no error, no age


class Programmed(NamedTuple):
    """Result of programming: the crossbar, and counts for each device [2, rows, cols]."""

    xbar: Crossbar
    pulses: jax.Array  # SET pulses
    resets: jax.Array  # RESET pulses
    reads: jax.Array  # verify reads, each t_verify after a pulse


def goals(device, xbar, target):
    """Conductances [2, rows, cols] in µS that programming aims at, for a target. A stuck device has
    its own G, and the other device of its pair makes up for it: their weight is that of the target
    where the range allows it."""
    is_sound = jnp.all(xbar.free, 0)
    missed = jnp.flip(xbar.g - target, 0)
    made_up = clip(target + missed, device.g_min, device.g_prog)
    return jnp.where(xbar.free, jnp.where(is_sound, target, made_up), xbar.g)


def write(device, xbar, target, error, nu, t):
    """Crossbar whose devices were programmed to target [2, rows, cols] in µS at times t (s), missed
    it by error (µS) and have drift exponents nu. The error is straight-through: the gradient
    ignores it."""
    noisy = jnp.clip(target + error, device.g_min, device.g_max)
    g = target + jax.lax.stop_gradient(noisy - target)
    return changed(xbar, True, g=g, t_prog=t, nu=nu, p=history(device, g))


def blank(key, device, shape):
    """A new crossbar of that shape [2, rows, cols] that was never pulsed: all devices are at g_max,
    but for those stuck at g_min."""
    stuck_key, nu_key = jax.random.split(key)
    draw = jax.random.uniform(stuck_key, shape)
    low = draw < device.stuck_low
    high = draw >= 1 - device.stuck_high
    free = ~(low | high)
    g = jnp.where(low, device.g_min, device.g_max)
    nu = jnp.where(free, draw_nu(nu_key, device, g), 0.0)  # a stuck device stays
    zero = jnp.zeros_like(draw)
    return Crossbar(g, zero, nu, zero, free)


def fabricate(key, device, target, table=EXACT):
    """A new crossbar, some of its devices stuck, whose programming to target [2, rows, cols]
    in µS ended at time 0: errors are normal draws and ages means, both of the table."""
    stuck_key, error_key, nu_key = jax.random.split(key, 3)
    new = blank(stuck_key, device, target.shape)
    target = goals(device, new, target)
    mean, std, age = table.at(target)
    error = mean + std * jax.random.normal(error_key, target.shape)
    return write(device, new, target, error, draw_nu(nu_key, device, target), -age)


def program_by_pulses(key, device, xbar, target, t):
    """Result of program-and-verify that ends at time t (s): RESET, then MAX_STEPS steps of t_verify
    each. An unfinished device is read at the end of each step. It is finished if it is within the
    tolerance of its target (µS) times the mean drift; below, it gets a SET pulse; above, a RESET,
    but from step NO_RESET on it is finished."""
    reset_key, verify_key = jax.random.split(key)
    every = jnp.full(target.shape, True)
    began = t - MAX_STEPS * device.t_verify
    erased = reset(reset_key, device, xbar, every, began)
    tolerance = device.tolerance * span(device)
    expected = target * mean_drift(device, target, device.t_verify)

    def verify(state, step):
        xbar, unfinished = state
        read_key, pulse_key = jax.random.split(jax.random.fold_in(verify_key, step))
        now = began + (step + 1) * device.t_verify
        # measure, as the converter of a verify read has a wider range
        error = measure(read_key, device, xbar, now) - expected
        under = unfinished & (error < -tolerance)
        over = unfinished & (error > tolerance) & (step < NO_RESET)
        fired = under | over
        xbar = pulse(pulse_key, device, xbar, fired.astype(float), now, over)
        return (xbar, fired), (under, over, unfinished)

    steps = jnp.arange(float(MAX_STEPS))
    # stuck devices are known, and get no more pulses
    (xbar, _), counted = jax.lax.scan(verify, (erased, xbar.free), steps)
    pulses, resets, reads = (jnp.sum(x, 0) for x in counted)
    return Programmed(xbar, pulses, resets + 1, reads)


def program(key, device, xbar, target, t=0.0):
    """Result of programming to target [2, rows, cols] in µS, which ends at time t (s): by pulses,
    or with the error that the device's source states. The pulses of that source are not known and
    count as 0."""
    target = goals(device, xbar, target)
    if device.stated is None:
        return program_by_pulses(key, device, xbar, target, t)
    error_key, nu_key = jax.random.split(key)
    std = device.g_max * device.stated.std(target / device.g_max)
    error = std * jax.random.normal(error_key, target.shape)
    nu = draw_nu(nu_key, device, target) if device.law.redraws_nu else xbar.nu
    none = jnp.zeros(target.shape, int)
    return Programmed(write(device, xbar, target, error, nu, t), none, none, none)


def program_new(key, device, target):
    """Result of programming a new crossbar to target [2, rows, cols] in µS, ended at time 0."""
    stuck_key, program_key = jax.random.split(key)
    new = blank(stuck_key, device, target.shape)
    return program(program_key, device, new, target)


def deploy(key, device, target):
    """A new crossbar whose programming to target [2, rows, cols] in µS has ended at time 0."""
    return program_new(key, device, target).xbar


N_TARGETS, N_SAMPLES = 33, 2000  # of a program_table


@functools.cache
def program_table(device):
    """ProgramTable of a device, measured on N_SAMPLES devices at each of N_TARGETS over the
    range that programming reaches."""
    sound = device._replace(stuck_low=0.0, stuck_high=0.0)
    targets = jnp.linspace(device.g_min, device.g_prog, N_TARGETS)
    independent = jnp.repeat(targets, N_SAMPLES // 2)  # one row, as they share no wires
    target = jnp.broadcast_to(independent, (2, 1, len(independent)))
    reached = jax.jit(deploy)(jax.random.key(0), sound, target)
    error, age = (
        np.reshape(x, (2, N_TARGETS, -1)) for x in (reached.g - target, -reached.t_prog)
    )
    found = targets, error.mean((0, 2)), error.std((0, 2)), age.mean((0, 2))
    return ProgramTable(*map(np.asarray, found))


# ---- pulses of an adaptation ---------------------------------------------------------------------


def fire(key, device, xbar, counts, n_most, t):
    """Crossbar after counts [2, rows, cols] SET pulses at time t (s), at most n_most of
    each device, and the pulses fired. The last pulse of a device may be a part of one. The
    derivative with respect to a count is what the last pulse has added; at a count of 0, what a
    first pulse would add, so that training learns of it too. A negative count makes its device
    NaN."""
    counts = jnp.where(counts < 0, jnp.nan, counts)

    def fire_one(xbar, inputs):
        key, n_fired = inputs
        counted = ~(n_fired >= jnp.maximum(counts, 1.0))
        amount = jnp.where(counted, clip(counts - n_fired, 0.0, 1.0), 0.0)
        return pulse(key, device, xbar, amount, t), amount

    keys = jax.random.split(key, n_most)
    xbar, fired = jax.lax.scan(fire_one, xbar, (keys, jnp.arange(float(n_most))))
    return xbar, jnp.sum(fired, 0)


# ---- devices of one's own ------------------------------------------------------------------------

# The lowest value of a constant, where it is not 0.
ANY_SIGN = (
    "set_offset set_history prog_1 prog_2 nu_slope nu_offset nu_std_slope nu_std_offset"
)
HIGHEST = float(np.finfo(np.float32).max)
LOWEST = dict.fromkeys(ANY_SIGN.split(), -HIGHEST) | {
    "g_max": 1e-3,  # a lower one would be in siemens
    "set_slope": -1.0,  # below it, pulses overshoot their fixed point
    "history_decay": 1e-3,
    "t0": 1e-9,
    "t_read": 1e-12,
    "t_verify": MIN_AGE,
    "tolerance": 1e-6,
}


def describe(name, device):
    """The constants of a device as one flat dictionary, as its JSON file has them."""
    family = next(key for key, law in FAMILIES.items() if isinstance(device.law, law))
    constants = device._asdict()
    law, stated = constants.pop("law"), constants.pop("stated")
    parts = law._asdict() | (stated._asdict() if stated else {})
    return {"name": name, "law": family, **constants, **parts}


def number(key, x):
    """A constant as a float; ValueError where it cannot be one."""
    low = LOWEST.get(key, 0)
    if type(x) not in (int, float) or not low <= x <= HIGHEST:
        what = f"a number from {low:g} to {HIGHEST:.3g} (µS and s)"
        raise ValueError(f"key {key} must be {what}: {x!r:.40}")
    return float(x)


def check_keys(keys, parts):
    """ValueError where constants of a Device of these parts are missing or unknown."""
    fields = {field for part in (Device, *parts) for field in part._fields}
    known = fields - {"law", "stated"}
    wrong = [
        f"{key} is {'missing' if key in known else 'unknown'}"
        for key in sorted(known ^ keys)
    ]
    if wrong:
        raise ValueError(f"key {', '.join(wrong)}")


def from_constants(constants):
    """Name and Device of a flat dictionary of constants; ValueError names what is wrong. Where
    it has an error of programming, prog_0 and so on, the device is programmed as stated."""
    defaults = {"name": "", "law": "nandakumar", **Device._field_defaults}
    defaults.pop("stated")
    given = defaults | constants
    given.pop("comment", None)
    name, law = given.pop("name"), FAMILIES.get(str(given.pop("law")))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"key name must be letters, digits and _, no digit first: {name!r}"
        )
    if law is None:
        raise ValueError(f"key law must be one of {', '.join(FAMILIES)}")
    parts = {"law": law}
    if given.keys() & set(StatedError._fields):
        parts["stated"] = StatedError
    check_keys(given.keys(), parts.values())
    given = {key: number(key, x) for key, x in given.items()}
    for key, part in parts.items():
        parts[key] = part(*map(given.pop, part._fields))
    device = Device(**parts, **given)
    check_range(device)
    return name, device


def is_reachable(device):
    """Whether SET pulses raise G on average on the way from a RESET to g_prog: the first one, as
    history acts most then, and one at g_prog."""
    first = set_mean(device, device.reset_mean, 1.0)
    last = set_mean(device, device.g_prog, 0.0)
    return first > 0 and last > 0


def check_range(device):
    """ValueError where the constants of a device contradict each other."""
    if not device.g_min < device.g_prog <= device.g_max:
        raise ValueError("key g_prog must be above g_min, and at most g_max")
    if not device.g_min <= device.reset_mean < device.g_prog:
        raise ValueError("key reset_mean must be from g_min to below g_prog")
    if device.stuck_low + device.stuck_high > 1:
        raise ValueError("keys stuck_low and stuck_high must not sum above 1")
    law = device.law
    if isinstance(law, Ibm) and law.t_read > device.t0:
        raise ValueError("key t_read must be at most t0")
    if isinstance(law, Ibm) and (
        law.nu_low > law.nu_high or law.nu_std_low > law.nu_std_high
    ):
        raise ValueError("a lower limit of ν is above the upper one")
    if not device.stated and not is_reachable(device):
        raise ValueError("key g_prog is out of reach of SET pulses after a RESET; lower it")


def load_device(name):
    """Name and Device of a JSON file {"name": ..., "g_min": ..., ...} at the path name, or of
    a built-in name; ValueError says what is wrong with it."""
    if name in DEVICES and not Path(name).is_file():
        return name, DEVICES[name]
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
        # float, as Python refuses integers of very many digits
        constants = json.loads(text, parse_int=float)
        found, device = from_constants(constants)
    except (
        OSError,
        UnicodeError,
        json.JSONDecodeError,
        TypeError,
        RecursionError,
    ) as error:
        what = f"neither one of {', '.join(DEVICES)} nor a JSON object of constants"
        raise ValueError(f"this is {what} ({error})") from None
    if found in DEVICES:
        raise ValueError(f"key name ({found}) is that of a built-in device")
    return found, device


if __name__ == "__main__":
    from img import laws

    laws.main()
