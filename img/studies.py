"""Studies of what limits adaptation. Each trains the networks it needs under run/studies, prints and draws.

    python img/studies.py bits|steps|limits|updates|cost [--n_iter 1000]

bits      error against bits of an update, 2 to 6 and real-valued, PCM and ideal devices
steps     error against inner steps 0 to 8 of networks trained for 1, 2, 4 and 8
limits    one non-ideality off at a time, in the test and in training too; the comparators' thresholds; bounds of any
          rule for the readout
updates   |ΔW| of a programmed synapse against gradient descent and Adam on the same task
cost      error against pulses of an adaptation, of the networks of bits (one step) and of several steps (2 bits)
"""
import argparse
import contextlib
import dataclasses
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

N_TASKS = 1024
BITS = 2, 3, 4, 5, 6
STEPS = 1, 2, 4, 8
QUIET = {    # constants of a device without one of its non-idealities
    "pulse noise": {"set_std_slope": 0.0, "set_std_offset": 0.0},
    "read noise": {"read_slope": 0.0, "read_offset": 0.0},
    "drift": {"nu_mean": 0.0, "nu_std": 0.0},
    "programming error": {"prog_err": 0.0}}
QUIET["noise or drift at all"] = {name: value for constants in QUIET.values() for name, value in constants.items()}


# ---- networks -------------------------------------------------------------------------------------------------------

def amounts(cfg, gradient, theta):
    """train.comparators without quantisation: a device moves by max(∓g/θ, 0) of a pulse, noise and all."""
    return jnp.maximum(jnp.stack([-gradient, gradient])/theta, 0.0)[None, :, :, None]


def drawn_weights(key, cfg, device, step, t):
    """train.expected_weights by one draw for each task: the noise of a part of a pulse has no table."""
    pulse_key, read_key = jax.random.split(step.key)
    w = train.read_weights(read_key, device, train.fire(device, step._replace(key=pulse_key)), t)
    return w, jnp.zeros_like(w)


def saturating(device, step, fire=train.fire):
    """train.fire within the device's range, which a part of a pulse, or several at once, may leave."""
    readout = fire(device, step)
    return readout._replace(g=analog.clip(readout.g, device.g_min, device.g_max))


QUANTISED = train.comparators, train.fire, train.expected_weights
REAL = amounts, saturating, drawn_weights


@contextlib.contextmanager
def update(rule):
    """Adapt by this rule; what was compiled with another is forgotten."""
    def use(rule):
        if (train.comparators, train.fire, train.expected_weights) != rule:
            train.comparators, train.fire, train.expected_weights = rule
            jax.clear_caches()

    use(rule)
    try:
        yield
    finally:
        use(QUANTISED)


class Trained(NamedTuple):
    cfg: train.Config
    device: analog.Device
    meta: train.Meta
    rule: tuple


def trained(name, n_iter, constants=None, rule=QUANTISED, **flags):
    """A network of these flags, on the device with some constants replaced; trained unless its run folder has it."""
    folder = Path("run/studies")/name
    cfg, device = train.configure({**flags, "n_iter": n_iter})
    device = device._replace(**(constants or {}))
    with train.hold(folder), update(rule):
        begun = (folder/"checkpoint.npz").exists()
        run = train.load(folder) if begun else train.Run(cfg, device, train.start(cfg, device))
        if (run.cfg, run.device, run.cfg.n_iter) != (cfg, device, n_iter):
            raise train.UserError(f"{folder} holds a network of other settings: move it away")
        run = train.train(run, folder)
    return Trained(cfg, device, train.meta_of(run.state), rule)


def tested(net, constants=None, experiment=train.episode, **changes):
    """An experiment on N_TASKS tasks and chips; more inner steps than trained for go on with the last threshold."""
    cfg = dataclasses.replace(net.cfg, **changes)
    times, theta = train.Times(cfg.tread, cfg.tprog, cfg.ttest), net.meta.log_theta
    theta = theta[np.minimum(np.arange(cfg.n_inner), len(theta) - 1)]
    with update(net.rule):
        return train.test(experiment, cfg, net.device._replace(**(constants or {})), net.meta._replace(log_theta=theta),
                          times, N_TASKS, train.stream(cfg, 2))


def show(label, values):
    """Print mean and interval of values [n]; the two."""
    x = train.summary(values)
    print(f"{label:<56}{x['mean']:8.3f} ± {x['ci95']:.3f}", flush=True)
    return x["mean"], x["ci95"]


def line(points):
    """The summary of a line through points that show gave."""
    return dict(zip(("mean", "ci95"), zip(*points)))


def bits_networks(n_iter):
    """(device, bits, network), real-valued updates last."""
    for name in ("pcm", "perf"):
        for bits in BITS:
            yield name, str(bits), trained(f"{name}_bits{bits}", n_iter, device=name, n_bits=bits)
        yield name, "real", trained(f"{name}_real", n_iter, device=name, rule=REAL)


def steps_networks(n_iter):
    for steps in STEPS:
        yield steps, trained(f"steps{steps}", n_iter, n_inner=steps, tau_out=0.001)


# ---- experiments on one chip ------------------------------------------------------------------------------------------

def traces(key, cfg, device, meta, times):
    """A trial, the traces of a deployed chip at the query, and of its support the Hessian, the linear term and E[y²]."""
    trial_key, chip_key, hidden_key = jax.random.split(key, 3)
    trial = train.draw_trial(trial_key, cfg)
    chip = network.fabricate(chip_key, device, meta.g)
    e = train.activity(hidden_key, cfg, device, chip, times.query).trace
    share, y = trial.support.T
    second = jnp.einsum("tli,tlj,l->ij", e, e, share)/len(e)
    return trial, e, analog.weights(device, chip.readout.g)[:, 0], second, y @ e.mean(0)


def imprecise(error):
    """train.episode on a chip each of whose thresholds is off by a factor exp(N(0, error²))."""
    def episode(key, cfg, device, meta, times):
        *_, theta_key = jax.random.split(key, 7)    # beside the six of train.episode, whose tasks and chips stay the same
        off = error*jax.random.normal(theta_key, meta.log_theta.shape)
        return train.episode(key, cfg, device, meta._replace(log_theta=meta.log_theta + off), times)

    return episode


RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0


def bounds(key, cfg, device, meta, times):
    """Errors of readouts of any real weights on the chip's own noisy traces: the best for the query itself, and those that
    ridge regression finds from the support, [1 + len(RIDGES)]."""
    trial, e, w0, second, first = traces(key, cfg, device, meta, times)
    everywhere, eye = jnp.einsum("tli,tlj->ij", e, e)/e[..., 0].size, jnp.eye(len(w0))
    best = jnp.linalg.solve(everywhere + 1e-5*eye, trial.query.y @ e.mean(0)/e.shape[1])
    learnt = [w0 + jnp.linalg.solve(second + ridge*eye, first - second @ w0) for ridge in RIDGES]
    return jnp.stack([train.mse_alone(e, w, trial.query) for w in (best, *learnt)])


def sizes(key, cfg, device, meta, times, n_steps=100):
    """|ΔW| [H1] of one adaptation, 0 where none was programmed, and [n_steps, H1] of steps of gradient descent at the
    largest stable rate and of Adam at 1e-3 on the same task."""
    trial_key, chip_key, *keys = jax.random.split(key, 4)
    trial, _, w0, second, first = traces(key, cfg, device, meta, times)
    chip = network.fabricate(chip_key, device, meta.g)
    after = train.fire(device, train.adapt(*keys, cfg, device, chip, jnp.exp(meta.log_theta), trial.support, times,
                                           alone=True)[-1])
    programmed = jnp.any(after.t_prog > 0, 0)[:, 0]
    moved = jnp.abs(analog.weights(device, after.g) - analog.weights(device, chip.readout.g))[:, 0]
    rate = 1/jnp.maximum(jnp.linalg.eigvalsh(second)[-1], 1e-6)    # 2 over the largest curvature of the squared error

    def steps(optimizer):
        init, step, parameters = optimizer

        def one(state, i):
            w = parameters(state)
            state = step(i, 2*(second @ w - first), state)
            return state, jnp.abs(parameters(state) - w)

        return jax.lax.scan(one, init(w0), jnp.arange(float(n_steps)))[1]

    return jnp.where(programmed, moved, 0.0), steps(train.optimizers.sgd(rate)), steps(train.optimizers.adam(1e-3))


# ---- studies --------------------------------------------------------------------------------------------------------

def save(figure, name):
    (FOLDER/f"{name}.png").write_bytes(figures.png(figure))


def bits(n_iter):
    found = {}
    for name, bits, net in bits_networks(n_iter):
        found.setdefault(name, []).append(show(f"{name}, {bits} bits", tested(net).mse[:, -1]))
    labels = {"pcm": ("PCM", figures.AFTER, "-"), "perf": ("ideal devices", figures.LATE, "--")}
    save(figures.curves([(labels[name], [*BITS, BITS[-1] + 1], line(points)) for name, points in found.items()],
                        "bits of an update", ticks=dict(zip([*BITS, BITS[-1] + 1], [*map(str, BITS), "real"]))), "bits")


def steps(n_iter):
    lines = []
    for (n, net), style in zip(steps_networks(n_iter), figures.FOUR):
        mse = tested(net, n_inner=max(STEPS)).mse
        lines.append(((f"trained for {n}", *style), range(max(STEPS) + 1),
                      line([show(f"trained for {n} steps, after {k}", mse[:, k]) for k in range(max(STEPS) + 1)])))
    save(figures.curves(lines, "inner steps in the test", ticks={k: str(k) for k in range(max(STEPS) + 1)}), "steps")


def limits(n_iter):
    net = trained("pcm_bits2", n_iter, device="pcm", n_bits=2)
    rows = [("every non-ideality", show("every non-ideality", tested(net).mse[:, 1]), None)]
    for name, constants in QUIET.items():
        alone = show(f"no {name}, in the test", tested(net, constants).mse[:, 1])
        noise = {"off_noise": 0.0} if "prog_err" in constants else {}
        other = trained(f"no_{name.replace(' ', '_')}", n_iter, constants, **noise)
        rows.append((f"no {name}", alone, show(f"no {name}, in training too", tested(other).mse[:, 1])))
    shared = trained("shared_thr", n_iter, shared_thr=True)
    rows.append(("one threshold for all synapses", None, show("one threshold for all synapses", tested(shared).mse[:, 1])))
    for share in (0.1, 0.3):
        off = tested(net, experiment=imprecise(share)).mse[:, 1]
        rows.append((f"thresholds off by {share:.0%}", show(f"thresholds off by {share:.0%}", off), None))
    real = trained("pcm_real", n_iter, device="pcm", rule=REAL)
    rows.append(("real-valued updates", None, show("real-valued updates, in training too", tested(real).mse[:, 1])))
    rows.append(("100 samples, not 20", show("100 samples, not 20", tested(net, task_size=100).mse[:, 1]), None))
    for shots in (20, 100):
        errors = tested(net, experiment=bounds, task_size=shots)
        ridge = 1 + int(np.argmin(errors[:, 1:].mean(0)))
        rows.append((f"ridge regression, {shots} samples",
                     show(f"ridge regression of {shots} samples, ridge {RIDGES[ridge - 1]:g}", errors[:, ridge]), None))
    rows.append(("best readout of all inputs", show("best readout of all inputs", errors[:, 0]), None))
    save(figures.bars(rows, "in the test", "in training too"), "limits")


def updates(n_iter):
    net = trained("pcm_bits2", n_iter, device="pcm", n_bits=2)
    dw, descent, adam = (x[x > 0] for x in tested(net, experiment=sizes))
    for name, x in (("a pulse", dw), ("a step of gradient descent", descent), ("a step of Adam at 1e-3", adam)):
        print(f"|ΔW| of {name:<28} median {np.median(x):.2e}, 5 to 95 %: {np.quantile(x, 0.05):.1e} to "
              f"{np.quantile(x, 0.95):.1e}; a pulse's median is {np.median(dw)/np.median(x):.1f} times as large")
    save(figures.histograms([("meta-learned pulses", dw, figures.AFTER, "-"),
                             ("gradient descent, largest stable rate", descent, figures.LATE, "--"),
                             ("Adam at 1e-3", adam, figures.TRUTH, ":")], "|ΔW| of a synapse in one step"), "updates")


def cost(n_iter):
    points = []
    for label, net in [*((f"{bits} bits", net) for name, bits, net in bits_networks(n_iter)
                         if name == "pcm" and bits != "real"),
                       *((f"{n} steps", net) for n, net in steps_networks(n_iter) if n > 1)]:
        episodes = tested(net)
        pulses = show(f"{label}, pulses of an adaptation", episodes.pulses)[0]
        show(f"{label}, readout devices touched (%)", 100*episodes.touched)
        points.append((label, pulses, *show(f"{label}, error", episodes.mse[:, -1])))
    save(figures.pareto(points), "cost")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[study.__name__ for study in (bits, steps, limits, updates, cost)])
    parser.add_argument("--n_iter", type=int, default=1000, help="meta-iterations of each network (default: 1000)")
    arguments = parser.parse_args()
    try:
        train.configure_devices()
        globals()[arguments.study](arguments.n_iter)
    except train.UserError as error:
        sys.exit(f"studies.py: {error}")


if __name__ == "__main__":
    main()
