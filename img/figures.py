"""The figures, from plain arrays: one colour a quantity, told apart in grey, bands of 95 % where a mean is shown."""
import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

TRUTH, BEFORE, AFTER, LATE = "black", "#999999", "#0072B2", "#D55E00"
LAW, SAMPLES = TRUTH, AFTER    # a law without noise, simulated devices
FOUR = (AFTER, "-"), (LATE, "--"), ("#009E73", "-."), (TRUTH, ":")    # four lines of one kind


def png(figure):
    """The figure's file as bytes."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def band(axes, x, summary, **style):
    """The mean of a summary {"mean": [len(x)], "ci95": half-width, "n": number} with its 95 % confidence interval."""
    mean, half = np.array(summary["mean"]), np.array(summary["ci95"])
    axes.plot(x, mean, **style)
    axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.25, lw=0)


def law_panel(axes, title, x, scale, xlabel, ylabel, law, samples):
    """Noise-free law as a line over simulated devices [n, len(x)], their mean and ± 1 std as a band."""
    mean, std = np.mean(samples, 0), np.std(samples, 0)
    axes.fill_between(x, mean - std, mean + std, color=SAMPLES, alpha=0.3, lw=0, label="simulated, ± 1 std")
    axes.plot(x, mean, color=SAMPLES, ls="--", label="simulated, mean")
    axes.plot(x, law, color=LAW, lw=1.2, label="law without noise")
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale=scale)


def device(panels):
    """The device's laws, a panel each, from (title, x, x scale, x label, y label, law, samples)."""
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for ax, panel in zip(axes, panels):
        law_panel(ax, *panel)
    axes[0].set_xticks(range(0, 21, 5))
    axes[0].legend(fontsize=9, loc="lower right")
    return figure


def network(dt, x_range, u, z0, v1, z1, output):
    """One presentation: input u, spikes z0 and z1 [T, n], membrane potentials v1 of layer 1, output [T]; dt in ms."""
    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True, height_ratios=(0.5, 1.2, 1.2, 1, 1))
    t = dt*np.arange(1, len(z0) + 1)
    axes[0].plot(t, np.full(len(t), u), color=TRUTH)
    axes[0].set(ylabel="input u0", ylim=x_range, title=f"one input, u0 = {u:.2f}, held for {t[-1]:.0f} ms")
    for layer, (ax, spikes) in enumerate(zip(axes[1:], (z0, z1))):
        step, neuron = np.nonzero(spikes)
        ax.plot(t[step], neuron, "|", color=TRUTH, ms=3)
        ax.set(ylabel=f"neuron of\nlayer {layer}", ylim=(-1, spikes.shape[1]))
    busiest = int(np.argmax(z1.sum(0)))
    axes[3].plot(t, v1[:, busiest], color=AFTER)
    axes[3].axhline(1, color=TRUTH, lw=1, ls=":")
    axes[3].set(ylabel=f"v of neuron {busiest},\nlayer 1 (dotted:\nthreshold)")
    axes[4].plot(t, output, color=LATE)
    axes[4].set(ylabel="readout ŷ", xlabel="time (ms)")
    return figure


def training(row, yardsticks, n_chips):
    """Outer loss and test error against meta-iterations; row has metrics.csv's columns, yardsticks {label: error}."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, level in yardsticks.items():
        axes.axhline(level, color=TRUTH, lw=1, ls=":")
        axes.text(row["step"][-1], level*1.01, label, ha="right", va="bottom", fontsize=9,
                  bbox={"fc": "white", "ec": "none", "pad": 1})
    mark = {"marker": "o", "ms": 3} if len(row["step"]) == 1 else {}    # a line of one point is none
    axes.plot(row["step"], row["test_before"], color=BEFORE, **mark, label="meta-test, before adaptation")
    axes.plot(row["step"], row["loss"], color=LATE, ls="--", **mark, label="outer loss, meta-training tasks")
    band(axes, row["step"], {"mean": row["test_mse"], "ci95": row["test_ci95"]}, color=AFTER, **mark,
         label=f"meta-test, after adaptation ({n_chips} chips)")
    top = 1.2*max(*yardsticks.values(), *row["test_before"])
    axes.set(xlabel="meta-iteration", ylabel="mean squared error", yscale="log", xlim=(0, None), ylim=(None, top))
    low = axes.get_ylim()[0]
    ticks = [x for x in (m*10.0**k for k in range(-3, 4) for m in (1, 2, 3, 5)) if low <= x <= top]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=9, loc="center right")
    return figure


def testing(x, episodes, results):
    """Four tasks before and after adaptation at inputs x [L], and the error against inner steps; results as in
    results.json."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = figure.subplot_mosaic("AABBEEE\nCCDDEEE")
    for i, panel in enumerate("ABCD"):
        truth, before, after = episodes.curves[i]
        axes[panel].plot(x, truth, color=TRUTH, lw=1.2, label="task")
        axes[panel].plot(x, before, color=BEFORE, lw=1.2, ls="--", label="before")
        axes[panel].plot(x, after, color=AFTER, lw=1.6, label="after")
        axes[panel].plot(episodes.x[i], episodes.y[i], "o", color=LATE, ms=4, label="support")
        axes[panel].set(xlim=(x[0], x[-1]), xlabel="x" if panel in "CD" else None,
                        ylabel="y, mean over time" if panel in "AC" else None)
    figure.legend(*axes["A"].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    steps = range(len(results["mse"]["mean"]))
    for name, color, style, label in (("mse", AFTER, "-", "all time steps"), ("mse_last", TRUTH, ":", "last time step")):
        band(axes["E"], steps, results[name], color=color, ls=style, marker="o", label=label)
    axes["E"].set(xlabel="inner steps", ylabel="mean squared error", xticks=steps, ylim=0)
    axes["E"].set_title(f"{results['mse']['n']} tasks, a chip each; 95 % band", fontsize=9)
    axes["E"].legend(fontsize=9)
    return figure


def aging(drift, t_adapt):
    """Error against time since deployment; drift as in results.json."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, color, style, label in (("never", BEFORE, "-", "never adapted"),
                                      ("once", AFTER, "-", f"adapted once, at {t_adapt:g} s"),
                                      ("again", LATE, "--", "adapted again at that time"),
                                      ("again_on_drifted", TRUTH, ":", "the same, pulses act on the drifted G")):
        band(axes, drift["age_s"], drift[name], color=color, ls=style, label=label)
    axes.set(xscale="log", xlabel="time since deployment (s)", ylabel="mean squared error", ylim=0)
    axes.set_title(f"{drift['once']['n']} tasks, a chip each; 95 % band", fontsize=9)
    axes.legend(fontsize=9)
    return figure


# ---- studies --------------------------------------------------------------------------------------------------------

def curves(lines, xlabel, ticks):
    """Errors with intervals at a few x: lines of ((label, colour, style), x, summary)."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for (label, color, style), x, summary in lines:
        band(axes, x, summary, color=color, ls=style, marker="o", ms=4, label=label)
    axes.set(xlabel=xlabel, ylabel="mean squared error", ylim=0)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.legend(fontsize=9)
    return figure


def bars(rows, first, second):
    """Errors of rows (label, (mean, half-width), the same or None), two bars a row where there are two."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for shift, column, color, label in ((-0.2, 1, AFTER, first), (0.2, 2, LATE, second)):
        at = [i for i, row in enumerate(rows) if row[column]]
        mean, half = np.array([rows[i][column] for i in at]).T
        axes.barh(np.array(at) + shift, mean, 0.38, xerr=half, color=color, label=label, hatch="//"*(column == 2),
                  edgecolor="white")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="mean squared error after adaptation (lines: 95 % interval)")
    axes.legend(fontsize=9)
    return figure


def histograms(samples, xlabel):
    """Distributions of positive samples (label, values, colour, style) on a logarithmic axis."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    edges = np.logspace(-6, 0.5, 80)
    for label, values, color, style in samples:
        share, _ = np.histogram(values, edges)
        axes.stairs(share/len(values), edges, color=color, ls=style, lw=1.5, label=label)
    axes.set(xscale="log", xlabel=xlabel, ylabel="share of the steps")
    figure.legend(fontsize=9, loc="outside upper left", ncols=3, frameon=False)
    return figure


def pareto(points):
    """Error against pulses; points (label, pulses, mean, half-width)."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    best = np.inf
    for label, pulses, mean, half in sorted(points, key=lambda point: point[1]):
        front = mean < best    # nothing cheaper is as good: its label finds room below and left
        best = min(best, mean)
        axes.errorbar(pulses, mean, half, fmt="o", ms=5, color=AFTER if front else BEFORE)
        at, ha = ((-5, -12), "right") if front else ((0, 20), "center")
        axes.annotate(label, (pulses, mean), at, ha=ha, textcoords="offset points", fontsize=9)
    axes.margins(0.15)
    axes.set(xscale="log", xlabel="pulses of an adaptation", ylabel="mean squared error", ylim=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title("blue: no network that needs fewer pulses is as good", fontsize=9)
    return figure
