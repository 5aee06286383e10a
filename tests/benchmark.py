"""Time and memory of meta-training against the obvious formulation, second-order autodiff of the time-step network.

    python tests/benchmark.py [--json]

Every ratio is of times taken alternately in this one process or side by side; run it on an otherwise idle machine.
The tests use the obvious formulation as their oracle.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
    task_key, x_key, chip_key, support_key, pulse_key, query_key = jax.random.split(key, 6)
    tasks = train.draw_tasks(task_key, cfg.batch_train)
    low, high = network.X_RANGE
    x = jax.random.uniform(x_key, (2, cfg.task_size, cfg.batch_train), minval=low, maxval=high)
    y = train.target(tasks, x)
    u = network.level_centres(cfg.dac_bits)[network.level(cfg.dac_bits, x)]
    chip = train.deploy(chip_key, device._replace(prog_err=cfg.off_noise), meta)
    theta = jnp.exp(meta.log_theta)
    decay = train.decays(cfg)

    def read(key, chip, t):
        return network.each(lambda key, xbar: train.read_weights(key, device, xbar, t), key, chip)

    def task(key, u, y):
        gradient = jax.grad(lambda w: squared_error(decay, w, u[0], y[0]))(read(support_key, chip, cfg.tread))
        readout = train.fire(key, cfg, device, chip.readout, gradient.readout, theta[0], cfg.tprog).readout
        adapted = chip._replace(readout=readout)
        return squared_error(decay, read(query_key, adapted, cfg.tprog + cfg.twait), u[1], y[1])

    keys = jax.random.split(pulse_key, cfg.batch_train)
    return jnp.mean(jax.vmap(task, (0, 2, 2))(keys, u, y))
