"""A crossbar of phase-change memory (PCM): programming noise, read noise, drift; differentiable throughout.

Conductances G are in µS and times in s. The laws, with r = G/g_max and N(mean, std²) a normal draw:

    SET pulse     P ← P·exp(−1/history_decay)
                  G ← clip(G + N(set_slope·G + set_offset + set_history·P,
                                 (set_std_slope·G + set_std_offset + set_std_history·P)²))
    RESET         G ← clip(N(reset_mean, reset_std²)),  P ← 1
    drift         G(t) = G·(max(t − t_prog, 1 s)/t0)^−ν,  ν fixed per device when the chip is made
    read          clip(G(t) + N(0, σ²)),  σ = read_slope·G(t) + read_offset;  one draw a read (1/f noise)
    synapse       W = (G+ − G−)/(g_max − g_min), a differential pair of devices

`Device` holds the constants, `Crossbar` the state of an array of devices. Neither knows the other modes: an ideal
device is a Device whose noise is zero. Run this file to draw the laws over simulated devices (img/model.png).
"""
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


# ---- constants ------------------------------------------------------------------------------------------------------

class Device(NamedTuple):
    """The constants of one kind of device. The fields after `prog_err` are optional in a user's file."""
    name: str
    g_min: float             # µS, the range of G
    g_max: float             # µS
    set_slope: float         # mean ΔG of a SET pulse, per µS of G
    set_offset: float        # µS, mean ΔG at G = 0
    set_history: float       # µS, mean ΔG added at P = 1 (the first pulses after RESET act more)
    set_std_slope: float     # std of ΔG, per µS of G
    set_std_offset: float    # µS, std of ΔG at G = 0
    set_std_history: float   # µS, std of ΔG added at P = 1
    history_decay: float     # pulses over which P falls by e
    reset_mean: float        # µS
    reset_std: float         # µS
    t0: float                # s after the last pulse at which G is specified
    nu_mean: float           # drift exponent ν, mean over devices
    nu_std: float            # its spread between devices
    read_slope: float        # std of read noise, per µS of G(t)
    read_offset: float       # µS
    prog_err: float          # std of the error left by program-and-verify, as a share of the crossbar's largest G
    set_on_drifted: float = 0.0   # what a pulse adds to: 0, G as specified at t0; 1, G as it has drifted since
    prog_std: tuple = (0.0, 0.0, 0.0)        # µS, programming error added as std c0 + c1·r + c2·r²
    nu_log: tuple = (0.0, 0.0, 1e9)          # ν mean = clip(nu_mean + k·ln r, low, high), as (k, low, high)
    nu_std_log: tuple = (0.0, 0.0, 1e9)      # the same for ν's spread
    read_power: float = 0                    # read_offset is multiplied by r(t)^read_power (an int 0 costs nothing)
    read_cap: float = 1e6                    # read noise is at most this multiple of G(t) ...
    read_log: float = 0                      # ... times ln((t − t_prog + 250 ns)/500 ns)^read_log


# Doped-GST mushroom cells: Nandakumar et al., "A phase-change memory model for neuromorphic computing", J. Appl. Phys.
# 124, 152135 (2018). ν's spread is not given there: 0.008 is what IBM's aihwkit (PCMLikeNoiseModel) has at high G.
PCM = Device("pcm", g_min=0.1, g_max=12.0,
             set_slope=-0.084, set_offset=0.892, set_history=0.0,
             set_std_slope=0.09, set_std_offset=0.575, set_std_history=0.0, history_decay=2.6,
             reset_mean=0.1, reset_std=0.01, t0=38.6, nu_mean=0.04, nu_std=0.008,
             read_slope=0.03, read_offset=0.13, prog_err=0.05)

# The same cells with the memory of earlier pulses that the paper fits; PCM above is its history-free form.
PCM_HISTORY = PCM._replace(name="pcm_history", set_offset=0.880, set_history=1.40,
                           set_std_slope=0.091, set_std_offset=0.260, set_std_history=2.15)

# No noise, no drift, every pulse 0.75 µS = g_max/2⁴.
PERF = PCM._replace(name="perf", set_slope=0.0, set_offset=0.75, set_std_slope=0.0, set_std_offset=0.0,
                    reset_std=0.0, nu_mean=0.0, nu_std=0.0, read_slope=0.0, read_offset=0.0, prog_err=0.0)

DEVICES = {device.name: device for device in (PCM, PCM_HISTORY, PERF)}
POSITIVE = "g_min", "g_max", "history_decay", "t0"
NOT_NEGATIVE = ("set_std_slope", "set_std_offset", "set_std_history", "reset_mean", "reset_std", "nu_mean", "nu_std",
                "read_slope", "read_offset", "prog_err", "read_power", "read_cap", "read_log")
MIN_AGE = 1.0   # s: a read at the instant of programming is taken as a read 1 s after it


def aihwkit(device):
    """Another source's chips for networks trained on device, with its range and its pulses: programming error, drift and
    read noise of IBM's million-device array as aihwkit's PCMLikeNoiseModel has them, its 25 µS scaled to g_max."""
    return device._replace(
        name="aihwkit", t0=20.0, prog_err=0.0, prog_std=tuple(c*device.g_max/25 for c in (0.26348, 1.9650, -1.1731)),
        nu_mean=0.0244, nu_log=(-0.0155, 0.049, 0.1), nu_std=-0.0059, nu_std_log=(-0.0125, 0.008, 0.045),
        read_slope=0.0, read_offset=0.0088*device.g_max, read_power=0.35, read_cap=0.2, read_log=0.5)


class Crossbar(NamedTuple):
    """State of an array of differential pairs; every field is [2, rows, cols], axis 0 being (G+, G−)."""
    g: jax.Array        # µS, the conductance t0 after the last pulse
    t_prog: jax.Array   # s, time of the last pulse
    nu: jax.Array       # drift exponent
    p: jax.Array        # history P: 1 at RESET, 0 after many pulses


# ---- devices of one's own ---------------------------------------------------------------------------------------------

def load_device(name):
    """Device of a built-in name or of a JSON file {"name": ..., "g_min": ..., ...}; ValueError names a wrong key."""
    if name in DEVICES:
        return DEVICES[name]
    try:
        constants = json.loads(Path(name).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} is neither one of {', '.join(DEVICES)} nor a readable JSON file ({error})") from None
    if not isinstance(constants, dict):
        raise ValueError(f"{name} must hold one JSON object of constants")
    for key in Device._fields:
        if key not in constants and key not in Device._field_defaults:
            raise ValueError(f"{name}: key {key} is missing")
    return check_device(constants)


def check_device(constants):
    """Device of a dictionary of constants; ValueError names the first key that is unknown or out of its range."""
    for key, value in constants.items():
        default = Device._field_defaults.get(key)
        if key not in Device._fields:
            raise ValueError(f"key {key} is unknown; known are {', '.join(Device._fields)}")
        items = value if isinstance(default, tuple) and isinstance(value, list) else [value]
        if key == "name" and not (isinstance(value, str) and value.isidentifier()):
            raise ValueError(f"key name must be a word of letters, digits and _, not {value!r}")
        if key != "name" and not all(type(x) in (int, float) and math.isfinite(x) for x in items):
            raise ValueError(f"key {key} must be a finite number, not {value!r}")
        if isinstance(default, tuple) and len(items) != len(default):
            raise ValueError(f"key {key} must be a list of {len(default)} numbers")
        if key in NOT_NEGATIVE and value < 0 or key in POSITIVE and value <= 0:
            raise ValueError(f"key {key} must {'be positive' if key in POSITIVE else 'not be negative'}, not {value}")
    device = Device(**{key: tuple(x) if isinstance(x, list) else x for key, x in constants.items()})
    if device.g_min >= device.g_max:
        raise ValueError(f"key g_min ({device.g_min}) must be below g_max ({device.g_max})")
    return device


# ---- physics --------------------------------------------------------------------------------------------------------

def clip(x, low, high):
    """Saturate at [low, high]; the derivative is 1 on the closed range and 0 outside (jnp.clip has 0.5 at the ends)."""
    return jnp.where((x >= low) & (x <= high), x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


def staircase(device, n_pulses):
    """Noise-free mean of n_pulses SET pulses from RESET: G [n_pulses + 1] in µS and P [n_pulses + 1]."""
    g, p = [device.reset_mean], [1.0]
    for _ in range(n_pulses):
        p.append(p[-1]*math.exp(-1/device.history_decay))
        step = device.set_slope*g[-1] + device.set_offset + device.set_history*p[-1]
        g.append(min(max(g[-1] + step, device.g_min), device.g_max))
    return np.array(g), np.array(p)


def history(device, g):
    """P of a device programmed to g: that of the number of pulses that lead from RESET to g on average."""
    return jnp.interp(jax.lax.stop_gradient(g), *map(jnp.array, staircase(device, 64)))


def inject(error, device, g, largest):
    """Add the programming error to g (µS), error being its normal draws [*g.shape] and largest the largest G of each device's
    crossbar; within the range, and straight-through: the gradient ignores it."""
    r = g/device.g_max
    c0, c1, c2 = device.prog_std
    std = device.prog_err*largest + c0 + c1*r + c2*r**2
    noisy = jnp.clip(g + std*error, device.g_min, device.g_max)
    return g + jax.lax.stop_gradient(noisy - g)


def fabricate(key, device, g, largest=None):
    """A chip whose devices were programmed at t = 0 to g [2, rows, cols] in µS; each draws its ν, which it keeps. Where g holds
    the devices of several crossbars, in any shape, largest [*g.shape] is the largest G in each one's own."""
    error, spread = jax.random.normal(key, (2, *g.shape))
    g = inject(error, device, g, jnp.max(g) if largest is None else largest)
    log_r = jax.lax.stop_gradient(jnp.log(g/device.g_max))
    mean, std = (jnp.clip(base + k*log_r, low, high) for base, (k, low, high) in
                 ((device.nu_mean, device.nu_log), (device.nu_std, device.nu_std_log)))
    nu = jnp.maximum(mean + std*spread, 0.0)
    return Crossbar(g, jnp.zeros_like(g), nu, history(device, g))


def drift(device, xbar, t):
    """Conductance [2, rows, cols] in µS at time t (s), before read noise."""
    age = jnp.maximum(t - xbar.t_prog, MIN_AGE)
    return xbar.g*jnp.exp(-xbar.nu*jnp.log(age/device.t0))    # a vectorised power


def set_pulse(key, device, xbar, mask, t):
    """One SET pulse at time t (s) on the devices whose mask is 1; mask (0 or 1, any float) passes a gradient."""
    p = xbar.p*math.exp(-1/device.history_decay)
    lost = xbar.g - jnp.minimum(drift(device, xbar, t), xbar.g)    # nothing before t0
    g = xbar.g - device.set_on_drifted*lost
    mean = device.set_slope*g + device.set_offset + device.set_history*p
    std = device.set_std_slope*g + device.set_std_offset + device.set_std_history*p
    pulsed = clip(g + mean + std*jax.random.normal(key, g.shape), device.g_min, device.g_max)
    return xbar._replace(g=xbar.g + mask*(pulsed - xbar.g), t_prog=jnp.where(mask > 0, t, xbar.t_prog),
                         p=jnp.where(mask > 0, p, xbar.p))


def reset(key, device, xbar, mask, t):
    """RESET at time t (s) the devices whose mask is true."""
    g = device.reset_mean + device.reset_std*jax.random.normal(key, xbar.g.shape)
    g = jnp.clip(g, device.g_min, device.g_max)
    return xbar._replace(g=jnp.where(mask, g, xbar.g), t_prog=jnp.where(mask, t, xbar.t_prog),
                         p=jnp.where(mask, 1.0, xbar.p))


def read(key, device, xbar, t):
    """Conductance [2, rows, cols] in µS as measured at time t (s): drifted, with one draw of read noise."""
    g = drift(device, xbar, t)
    age = jnp.maximum(t - xbar.t_prog, MIN_AGE)
    std = device.read_slope*g + device.read_offset*(g/device.g_max)**device.read_power
    std = jnp.minimum(std, device.read_cap*g)*jnp.log((age + 250e-9)/500e-9)**device.read_log
    return clip(g + std*jax.random.normal(key, g.shape), device.g_min, device.g_max)


def weights(device, g):
    """Weights [rows, cols] of the conductances g [2, rows, cols] in µS."""
    return (g[0] - g[1])/(device.g_max - device.g_min)


def conductances(device, w):
    """One-sided pair [2, rows, cols] in µS for weights w in [−1, 1]: one device carries |w|, the other is at g_min."""
    return device.g_min + jnp.stack([jnp.maximum(w, 0.0), jnp.maximum(-w, 0.0)])*(device.g_max - device.g_min)


# ---- composites -----------------------------------------------------------------------------------------------------

def pulse_train(key, device, xbar, masks, t):
    """Crossbars before and after each of n SET pulses at time t (s) under masks [n, 2, rows, cols], every field
    [n + 1, 2, rows, cols]."""
    def pulse(xbar, inputs):
        key, mask = inputs
        xbar = set_pulse(key, device, xbar, mask, t)
        return xbar, xbar

    _, after = jax.lax.scan(pulse, xbar, (jax.random.split(key, len(masks)), masks))
    return jax.tree.map(lambda first, later: jnp.concatenate([first[None], later]), xbar, after)


class Outcome(NamedTuple):
    """Conductances as measured after 0, 1, … n pulses: moments over the noise of pulses and read [n + 1, 2, rows, cols]."""
    mean: jax.Array    # µS
    var: jax.Array     # µS²


def outcome(key, device, xbar, n_pulses, t_pulse, t, n_draws):
    """Outcome, from n_draws draws of the noise, of a read at time t (s) after up to n_pulses SET pulses at t_pulse."""
    pulse_key, read_key = jax.random.split(key)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (n_draws, *x.shape)), xbar)
    states = pulse_train(pulse_key, device, copies, jnp.ones((n_pulses, *copies.g.shape)), t_pulse)
    g = read(read_key, device, states, t)    # [n + 1, n_draws, 2, rows, cols]
    return Outcome(g.mean(1), g.var(1))


class Programming(NamedTuple):
    """What program-and-verify did: the crossbar, and per device [2, rows, cols] its pulses, RESETs and success."""
    xbar: Crossbar
    pulses: jax.Array
    resets: jax.Array
    done: jax.Array


def program(key, device, xbar, target, t=0.0, tolerance=0.4, max_steps=50):
    """Program-and-verify at time t (s) to target [2, rows, cols] in µS: SET pulses from RESET until a noisy read is within
    tolerance (µS) of the target; an overshot device is RESET and tried again. Reads are taken MIN_AGE after the pulse
    and corrected by the mean drift. Devices still out of tolerance after max_steps are left as they are, done = 0."""
    correction = (MIN_AGE/device.t0)**device.nu_mean
    reset_key, key = jax.random.split(key)
    zero = jnp.zeros(target.shape, int)
    start = Programming(reset(reset_key, device, xbar, True, t), zero, zero + 1, zero > 0)

    def step(state, key):
        read_key, reset_key, set_key = jax.random.split(key, 3)
        error = correction*read(read_key, device, state.xbar, t + MIN_AGE) - target
        done = state.done | (jnp.abs(error) <= tolerance)
        over, under = ~done & (error > 0), ~done & (error < 0)
        xbar = reset(reset_key, device, state.xbar, over, t)
        xbar = set_pulse(set_key, device, xbar, under.astype(target.dtype), t)
        return Programming(xbar, state.pulses + under.astype(int), state.resets + over.astype(int), done), None

    return jax.lax.scan(step, start, jax.random.split(key, max_steps))[0]


def refresh(key, device, xbar, t):
    """Undo the common growth of the pairs at time t (s): read both devices, RESET both, program their difference."""
    read_key, program_key = jax.random.split(key)
    w = weights(device, read(read_key, device, xbar, t))
    return program(program_key, device, xbar, conductances(device, w), t)


# ---- figure ---------------------------------------------------------------------------------------------------------

def staircase_of_samples(key, device, n, n_pulses=20):
    """G [2n, n_pulses + 1] in µS of 2n devices after RESET and each of n_pulses SET pulses."""
    chip_key, reset_key, pulse_key = jax.random.split(key, 3)
    ones = jnp.ones((n_pulses, 2, n, 1))
    start = reset(reset_key, device, fabricate(chip_key, device, device.g_min*ones[0]), ones[0] > 0, 0.0)
    return np.reshape(pulse_train(pulse_key, device, start, ones, 0.0).g, (n_pulses + 1, -1)).T


def panels(device, n=2000):
    """Per law: (title, x, x scale, x label, y label, law without noise at x, samples [2n, len(x)])."""
    set_key, chip_key, read_key, program_key = jax.random.split(jax.random.key(0), 4)
    still = device._replace(nu_mean=0.0, nu_std=0.0, prog_err=0.0)
    g = jnp.linspace(device.g_min, device.g_max, 25)
    measured = read(read_key, still, fabricate(chip_key, still, jnp.broadcast_to(g, (2, n, 25))), device.t0)
    half = device.g_max/2
    t = np.logspace(0, 7, 29, dtype=np.float32)
    aged = fabricate(chip_key, device._replace(prog_err=0.0), jnp.full((2, n, 1), half))
    target = jax.random.uniform(chip_key, (2, n, 1), minval=device.g_min, maxval=half)
    chip, steps = fabricate(chip_key, device, target), (1, 2, 4, 8, 16, 32, 64)
    errors = [np.ravel(program(program_key, device, chip, target, max_steps=k).xbar.g - target) for k in steps]
    return [(f"SET, {device.name}", range(21), "linear", "pulses after RESET", "G (µS)", staircase(device, 20)[0],
             staircase_of_samples(set_key, device, n)),
            ("READ", g, "linear", "programmed G (µS)", "measured G (µS)", g, measured.reshape(2*n, 25)),
            ("DRIFT", t, "log", "time since the pulse (s)", "G(t) (µS)", half*(t/device.t0)**-device.nu_mean,
             np.stack([np.ravel(drift(device, aged, x)) for x in t], 1)),
            (f"PROGRAM AND VERIFY, targets up to {half:g} µS", steps, "log", "pulses and RESETs allowed",
             "G − target (µS)", np.zeros(len(steps)), np.stack(errors, 1))]


def programming_error(device, top, n=20_000):
    """What program-and-verify costs and leaves, as a line, over targets drawn from g_min to top (µS)."""
    target_key, chip_key, program_key = jax.random.split(jax.random.key(0), 3)
    target = jax.random.uniform(target_key, (2, n, 1), minval=device.g_min, maxval=top)
    made = program(program_key, device, fabricate(chip_key, device, target), target)
    rms = jnp.sqrt(jnp.mean((made.xbar.g - target)**2))
    return (f"targets up to {top:4.1f} µS: {jnp.mean(made.pulses):5.1f} pulses and {jnp.mean(made.resets):.1f} RESETs a "
            f"device, {100*jnp.mean(~made.done):4.1f} % miss, rms error {rms:.2f} µS = {rms/top:.3f} of the largest")


if __name__ == "__main__":
    for share in (0.25, 0.5, 0.75):
        print(f"program and verify, {programming_error(PCM, share*PCM.g_max)}")
    from img import figures
    (Path(__file__).parent/"img/model.png").write_bytes(figures.png(figures.device(panels(PCM))))
