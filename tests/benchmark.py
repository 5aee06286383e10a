"""Time and memory of meta-training against the obvious formulation, second-order autodiff of the time-step network.

    python tests/benchmark.py [--json] [--full]
    python tests/benchmark.py --soak 60    # minutes of training: does memory grow? (Linux; leave it running an hour)

Every ratio is of times taken alternately in this one process or side by side; run it on an otherwise idle machine.
The tests use the obvious formulation as their oracle.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import analog  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402


def output(decay, w, u):
    """ŷ [T] of the network for one input u, one time step after the other."""
    def step(state, _):
        v0, v1, e, z0, z1 = state
        v0 = decay.alpha*v0 + jnp.stack([u, jnp.ones_like(u)]) @ w.hidden0 - z0
        z0 = network.spike(v0 - 1)
        v1 = decay.alpha*v1 + z0 @ w.hidden1[:-1] + w.hidden1[-1] - z1
        z1 = network.spike(v1 - 1)
        e = decay.kappa*e + z1
        return (v0, v1, e, z0, z1), e @ w.readout[:, 0]

    rest0, rest1 = jnp.zeros_like(w.hidden0[0]), jnp.zeros_like(w.hidden1[0])
    return jax.lax.scan(step, (rest0, rest1, rest1, rest0, rest1), length=network.N_STEPS)[1]


def squared_error(decay, w, u, y):
    """Mean over samples [N] and time steps."""
    return jnp.mean((jax.vmap(lambda u: output(decay, w, u))(u) - y[:, None])**2)


def plain_loss(meta, key, cfg, device):
    """Outer loss with 20 query samples a task, by autodiff through the time steps of every task and sample."""
    tasks_key, chip_key, support_key, query_key = jax.random.split(key, 4)
    low, high = network.X_RANGE
    chip = network.fabricate(chip_key, device._replace(prog_err=cfg.off_noise), meta.g)
    theta, decay = jnp.exp(meta.log_theta), train.decays(cfg)
    before, after = (network.read(key, device, chip, t) for key, t in ((support_key, cfg.tread),
                                                                       (query_key, cfg.tprog + cfg.twait)))

    def task(key):
        task_key, x_key, pulse_key, read_key = jax.random.split(key, 4)
        x = jax.random.uniform(x_key, (2, cfg.task_size), minval=low, maxval=high)
        y = train.target(train.draw_task(task_key), x)
        u = network.level_centres(cfg.dac_bits)[network.level(cfg.dac_bits, x)]
        gradient = jax.grad(lambda w: squared_error(decay, w, u[0], y[0]))(before)
        masks = train.comparators(cfg, gradient.readout[:, 0], theta[0])
        readout = train.fire(device, train.Step(pulse_key, chip.readout, masks, cfg.tprog))
        w = train.read_weights(read_key, device, readout, cfg.tprog + cfg.twait)
        return squared_error(decay, after._replace(readout=w[:, None]), u[1], y[1])

    return jnp.mean(jax.vmap(task)(jax.random.split(tasks_key, cfg.batch_train)))


# ---- measurement ----------------------------------------------------------------------------------------------------

def alternate(programs, rounds=7):
    """Median seconds of each program {name: function}, run in turn so that a noisy machine slows all alike."""
    for program in programs.values():
        jax.block_until_ready(program())
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def iterations(n, **flags):
    """A function that runs n meta-iterations of these settings, as train.py does."""
    cfg, device = train.configure(flags)
    state = train.start(cfg, device)
    return lambda: train.train_chunk(cfg, device, state, 0, n)[0]


def yardstick(**flags):
    """A function for the gradient of the obvious formulation."""
    cfg, device = train.configure(flags)
    meta = train.meta_of(train.start(cfg, device))
    gradient = jax.jit(jax.grad(lambda meta, key: plain_loss(meta, key, cfg, device)))
    return lambda: gradient(meta, jax.random.key(0))


def products(**flags):
    """A function for the matrix products alone of two simulations: drive of layer 1 and S̄, forward and backward."""
    cfg, _ = train.configure(flags)
    rows = network.N_STEPS*2**cfg.dac_bits
    z, e = jax.random.normal(jax.random.key(0), (rows, cfg.n_h0)), jax.random.normal(jax.random.key(1), (rows, cfg.n_h1))
    w, s = jnp.ones((cfg.n_h0, cfg.n_h1)), jnp.ones((cfg.n_h1, cfg.n_h1))
    run = jax.jit(lambda z, e: (z @ w, e.T @ e, e @ w.T, z.T @ e, e @ s))
    return lambda: [run(z, e) for _ in range(2)]


FIRST = """
import train
train.configure_devices()
cfg, device = train.configure({})
train.jax.block_until_ready(train.train_chunk(cfg, device, train.start(cfg, device), 0, 1))
"""


def devices(n=10**6):
    """A function that pulses and reads n PCM devices."""
    xbar = analog.fabricate(jax.random.key(0), analog.PCM, jnp.ones((2, n//2, 1)))

    @jax.jit
    def run(xbar):
        xbar = analog.set_pulse(jax.random.key(1), analog.PCM, xbar, jnp.ones_like(xbar.g), 10.0)
        return analog.read(jax.random.key(2), analog.PCM, xbar, 100.0)

    return lambda: run(xbar)


def process(*command, **variables):
    """Seconds that a Python process takes from start to end, and its peak memory in MB.

    Run before this process grows: a child's peak counts what it shares with its parent before it starts Python."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL,
                                 env=os.environ | {"PYTHONPATH": str(SCRIPTS)} | variables)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0
        return time.perf_counter() - start, usage.ru_maxrss/1024


def soak(minutes):
    """Resident memory of a training process (MB), every 15 s for so many minutes."""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen([sys.executable, SCRIPTS/"train.py", "--n_iter", "100000000"], cwd=folder,
                                 stdout=subprocess.DEVNULL)
        try:
            for _ in range(int(4*minutes)):
                time.sleep(15)
                assert child.poll() is None, "the run ended by itself"
                pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
                yield pages*os.sysconf("SC_PAGE_SIZE")/2**20
        finally:    # also when whoever watches stops
            child.terminate()
            child.wait()


def table(full):
    """Rows (what, measured, unit)."""
    first, _ = process("-c", FIRST, JAX_ENABLE_COMPILATION_CACHE="false")
    process("-c", FIRST)
    later, _ = process("-c", FIRST)
    _, memory = process(SCRIPTS/"train.py", "--n_iter", str(2*train.CHUNK), "--batch_test", "64",
                        JAX_ENABLE_COMPILATION_CACHE="false")
    whole = [("python train.py --n_iter 50000, whole", process(SCRIPTS/"train.py", "--n_iter", "50000")[0]/60, "min")] \
        if full else []
    n = 100    # the first few after another program find its heap and caches, and are slower
    times = alternate({
        "yardstick": yardstick(), "default": iterations(n), "inner4": iterations(n, n_inner=4),
        "tasks": iterations(n, batch_train=4096), "bits": iterations(n, dac_bits=8), "chips": iterations(n, n_chips=4),
        "products": products(), "devices": devices()})
    step = {name: seconds/(1 if name in ("yardstick", "products", "devices") else n) for name, seconds in times.items()}
    return [("yardstick, second-order autodiff", 1e3*step["yardstick"], "ms"),
            ("meta-iteration, n_inner 1", 1e3*step["default"], "ms"),
            ("meta-iteration, n_inner 4", 1e3*step["inner4"], "ms"),
            ("yardstick / meta-iteration, n_inner 1", step["yardstick"]/step["default"], "x"),
            ("yardstick / meta-iteration, n_inner 4", step["yardstick"]/step["inner4"], "x"),
            ("4,096 tasks / 256 tasks", step["tasks"]/step["default"], "x"),
            ("dac_bits 8 / dac_bits 7", step["bits"]/step["default"], "x"),
            ("4 chips / 1 chip", step["chips"]/step["default"], "x"),
            ("matrix products alone / meta-iteration", step["products"]/step["default"], "x"),
            ("10⁶ devices pulsed and read", 1e3*step["devices"], "ms"),
            ("start of process to first meta-iteration, the first time", first, "s"),
            ("the same, programs compiled before", later, "s"),
            ("peak resident memory", memory, "MB"), *whole]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--full", action="store_true", help="also time a whole run of 50,000 iterations")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="train for so long and watch the memory, no more")
    arguments = parser.parse_args()
    if arguments.soak:
        _, _, _, after_a_minute, *later = soak(arguments.soak)
        print(f"resident memory: {after_a_minute:.0f} MB after a minute, then at most {max(later):.0f} MB, at the end "
              f"{later[-1]:.0f} MB; largest growth {100*(max(later)/after_a_minute - 1):.1f} %")
        sys.exit()
    train.configure_devices()
    rows = table(arguments.full)
    if arguments.json:
        print(json.dumps({"cores": os.cpu_count(), "jax": jax.__version__,
                          "rows": [dict(zip(("what", "value", "unit"), row)) for row in rows]}, indent=1))
    else:
        print(f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}")
        for what, value, unit in rows:
            print(f"{what:<60}{value:10.2f} {unit}")
