"""50 tasks in sequence on the same chip without redeploying it, with and without refresh of its readout.

    python img/lifelong.py run/pcm

SET only increases G, so repeated adaptation drives both devices of a pair up. Reads a run folder, prints the squared
error by task and draws lifelong.png beside this file.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import analog  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
from img import figures  # noqa: E402

N_TASKS = 50
PERIOD = 1000.0     # s from one task to the next
SATURATED = 0.8     # a device above this share of g_max counts as saturated


def life(key, cfg, device, meta, every):
    """Squared error before and after adaptation and share of saturated devices, [N_TASKS, 3], of one chip whose readout
    is refreshed before every `every`-th task."""
    chip_key, key = jax.random.split(key)
    chip, theta = network.fabricate(chip_key, device, meta.g), jnp.exp(meta.log_theta)

    def task(readout, inputs):
        key, k = inputs
        trial_key, refresh_key, shared_key, pulse_key, hidden_key, *read_keys = jax.random.split(key, 7)
        t = cfg.tprog + PERIOD*k
        trial = train.draw_trial(trial_key, cfg)
        times = train.Times(t - (cfg.tprog - cfg.tread), t, t + cfg.ttest - cfg.tprog)
        readout = jax.lax.cond((k > 0) & (k % every == 0), lambda xbar: analog.refresh(
            refresh_key, device, xbar, times.read - 10).xbar, lambda xbar: xbar, readout)
        after = train.fire(device, train.adapt(shared_key, pulse_key, cfg, device, chip._replace(readout=readout), theta,
                                               trial.support, times, alone=True)[-1])
        e = train.activity(hidden_key, cfg, device, chip, times.query).trace
        errors = [train.mse_alone(e, train.read_weights(read_key, device, xbar, times.query), trial.query)
                  for read_key, xbar in zip(read_keys, (readout, after))]
        return after, jnp.stack([*errors, jnp.mean(after.g > SATURATED*device.g_max)])

    inputs = jax.random.split(key, N_TASKS), jnp.arange(0.0, N_TASKS)
    return jax.lax.scan(task, chip.readout, inputs)[1]


def main(folder, n_chips=256):
    cfg, device, state, *_ = train.load(Path(folder))
    meta = train.meta_of(state)
    figure = figures.Figure(figsize=(9.6, 3.8), layout="constrained")
    axes, numbers = figure.subplots(1, 2), {}
    for every, color, style, label in ((1e9, figures.BEFORE, "-", "never refreshed"),
                                       (10.0, figures.AFTER, "--", "refreshed every 10 tasks"),
                                       (1.0, figures.LATE, ":", "refreshed before every task")):
        lives = train.test(life, cfg, device, meta, every, n_chips, train.stream(cfg, 4))
        for ax, values in zip(axes, (lives[:, :, 1], 100*lives[:, :, 2])):
            figures.band(ax, range(1, N_TASKS + 1), train.summary(values), color=color, ls=style, label=label)
        numbers[label] = {f"tasks {a + 1} to {a + 10}": train.summary(lives[:, a:a + 10, 1].mean(1))
                          for a in range(0, N_TASKS, 10)}
        print(label, *(f"{name}: {x['mean']:.3f} ± {x['ci95']:.3f}," for name, x in numbers[label].items()),
              f"saturated at the end {100*lives[:, -1, 2].mean():.1f} %")
    axes[0].set(xlabel="task in sequence on one chip", ylabel="mean squared error after adaptation", ylim=0)
    axes[1].set(xlabel="task in sequence on one chip", ylabel=f"readout devices above {SATURATED:.0%} of g_max (%)", ylim=0)
    axes[0].legend(fontsize=9)
    path = Path(__file__).parent/f"lifelong{'' if device.name == 'pcm' else '_' + device.name}.png"
    figure.savefig(path, dpi=150)
    train.write(Path(folder)/"lifelong.json", json.dumps(numbers, indent=1).encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        train.configure_devices()
        main(sys.argv[1])
    except train.UserError as error:
        sys.exit(f"lifelong.py: {error}")
