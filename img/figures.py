"""The figures, from plain arrays.

One colour a quantity, told apart in grey; the user's settings of matplotlib have no say.
"""

import io
import textwrap

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

TRUTH, BEFORE, AFTER, LATE, OTHER = "black", "#999999", "#0072B2", "#D55E00", "#009E73"
STYLES = (  # of the lines of one figure, in their order
    {"color": AFTER, "ls": "-", "marker": "o"},
    {"color": LATE, "ls": "--", "marker": "s"},
    {"color": OTHER, "ls": "-.", "marker": "^"},
    {"color": TRUTH, "ls": ":", "marker": "D"},
    {"color": BEFORE, "ls": (0, (1, 1)), "marker": "v"},
)
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}
LEAST = 1e-4  # the lowest error that a logarithmic axis shows

plain = matplotlib.style.context(
    ["default", STYLE]
)  # decorates what makes or saves a figure


@plain
def png(figure, note=""):
    """The figure's file as bytes, with a note in small print below."""
    figure.supxlabel(textwrap.fill(note, 150), fontsize=6.5, color="#666666")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


# ---- parts ---------------------------------------------------------------------------------------


def empty(height, *shape, **options):
    """A figure of README's width and its axes."""
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def band(axes, x, mean, half, **style):
    """Draw means [len(x)] as a line, and their intervals of half-widths [len(x)] as a
    band."""
    mean, half = np.asarray(mean), np.asarray(half)
    axes.plot(x, mean, ms=4, **style)
    low = np.maximum(mean - half, mean / 10)  # a logarithmic axis has no 0
    axes.fill_between(x, low, mean + half, color=style["color"], alpha=0.25, lw=0)


def legend_above(figure, axes, n_columns):
    """Put the legend of axes above everything."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=n_columns, frameon=False
    )


def plain_ticks(axis):
    """Write the ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


# ---- a run ---------------------------------------------------------------------------------------


def mark_level(axes, level, label, above):
    """Draw a dotted line at a level, its label beside the axes."""
    axes.axhline(level, color=TRUTH, lw=1, ls=":")
    axes.annotate(
        label.replace(" that ", "\nthat "),
        (1.01, level),
        xycoords=axes.get_yaxis_transform(),
        va="bottom" if above else "top",
        fontsize=9,
        annotation_clip=False,
    )


@plain
def training(rows, yardsticks, n_chips):
    """Figure of the errors against meta-iterations; rows of metrics.csv, yardsticks {label:
    error}."""
    figure, axes = empty(4.2)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    step = columns["step"]
    marker = "o" if len(rows) < 4 else ""  # a line of one point is none
    before = {"color": BEFORE, "ls": "--", "marker": marker}
    loss = {"color": LATE, "ls": "-.", "marker": marker}
    after = {"color": AFTER, "ls": "-", "marker": marker}
    axes.plot(step, columns["test_before"], label="test, before adaptation", **before)
    axes.plot(step, columns["loss"], label="outer loss", **loss)
    label = f"test, after adaptation ({n_chips} chips, 95 %)"
    band(axes, step, columns["test_mse"], columns["test_ci95"], label=label, **after)
    for k in np.flatnonzero(np.diff(columns["ttest"])):
        label = f"from here tested at {columns['ttest'][k + 1]:g} s"
        axes.axvline(step[k], color=OTHER, ls=":", label=label)
    for label, level in yardsticks.items():
        mark_level(axes, level, label, above=level == max(yardsticks.values()))
    axes.set(xlabel="meta-iteration", ylabel="mean squared error", yscale="log")
    axes.set_xlim(0, max(step[-1] * 1.02, 1))
    plain_ticks(axes.yaxis)
    legend_above(figure, axes, 3)
    return figure


def show_task(axes, edges, curves, x, y):
    """Draw one task, the output before and after adaptation, each level between its edges,
    and the samples x, y of the task."""
    truth, before, after = curves
    axes.stairs(truth, edges, baseline=None, color=TRUTH, lw=1, label="task")
    axes.stairs(
        before,
        edges,
        baseline=None,
        color=BEFORE,
        ls="--",
        lw=1.6,
        label="output before",
    )
    axes.stairs(after, edges, baseline=None, color=AFTER, lw=2.2, label="output after")
    axes.plot(x, y, "o", color=LATE, ms=4.5, label="samples seen")
    axes.set_xlim(edges[0], edges[-1])


def mark_mean(axes, x, height, text, color):
    """Draw a line at x up to a height (share of the axes), its text to the left of the
    top."""
    transform = axes.get_xaxis_transform()
    axes.plot([x, x], [0, height], color=color, lw=2, transform=transform)
    axes.annotate(
        text,
        (x, height),
        (-5, 0),
        xycoords=transform,
        textcoords="offset points",
        ha="right",
        va="top",
        bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.8},
    )


def show_counts(axes, values, edges, color, style):
    """Draw the distribution of values."""
    counts, _ = np.histogram(values, edges)
    axes.stairs(counts, edges, fill=True, color=color, alpha=0.4)
    axes.stairs(counts, edges, color=color, ls=style, lw=1.5)


def show_errors(axes, before, after, n_pulses):
    """Draw the distributions of the errors [n] of chips before and after adaptation, means
    marked."""
    before = np.maximum(before, LEAST)
    after = np.maximum(after, LEAST)
    low = min(before.min(), after.min(), after.mean() / 20)
    high = 1.1 * max(before.max(), after.max())
    n_bins = int(np.clip(2 * len(before) ** 0.5, 8, 40))
    edges = np.geomspace(low, high, n_bins + 1)
    show_counts(axes, before, edges, BEFORE, "--")
    show_counts(axes, after, edges, AFTER, "-")
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.4 * axes.get_ylim()[1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    plain_ticks(axes.xaxis)
    mark_mean(axes, before.mean(), 0.99, f"mean {before.mean():.2g} before", "#555555")
    words = f"{after.mean():.2g} after\nabout {n_pulses:.0f} pulses"
    mark_mean(axes, after.mean(), 0.91, words, AFTER)


@plain
def testing(edges, episodes, results):
    """Figure of four tasks, the levels' edges [L + 1], and of all chips' errors; results as in
    results.json."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplot_mosaic("AABBEEEE\nCCDDEEEE")
    trial = episodes.trial
    for panel, curves, x, y in zip(
        "ABCD", episodes.curves, trial.x, trial.y, strict=False
    ):
        show_task(axes[panel], edges, curves, x, y)
        axes[panel].tick_params(labelbottom=panel in "CD")
    for panel in "AC":
        axes[panel].set_ylabel("y")
    for panel in "CD":
        axes[panel].set_xlabel("x")
    mse = episodes.measured["mse"]
    show_errors(axes["E"], mse[:, 0], mse[:, -1], results["pulses"]["mean"])
    axes["E"].set(xlabel="squared error of a chip over all inputs", ylabel="chips")
    axes["E"].set_title(f"{len(mse)} tasks, each on a chip of its own", fontsize=11)
    legend_above(figure, axes["A"], 4)
    return figure


# ---- devices and neurons -------------------------------------------------------------------------


@plain
def laws(name, panels):
    """Figure of a device's laws, a panel for each (x label, y label, x, law, samples [...,
    x])."""
    figure, axes = empty(6.4, 2, 2)
    figure.suptitle(f"{name}: laws and simulated devices", fontsize=12)
    for ax, (xlabel, ylabel, x, law, samples) in zip(axes.flat, panels, strict=True):
        samples = samples.reshape(-1, len(x))
        mean, std = np.mean(samples, 0), np.std(samples, 0)
        ax.fill_between(
            x,
            mean - std,
            mean + std,
            color=AFTER,
            alpha=0.3,
            lw=0,
            label="simulated, ± 1 std",
        )
        ax.plot(x, mean, color=AFTER, ls="--", label="simulated, mean")
        ax.plot(x, law, color=TRUTH, lw=1, label="law without noise")
        ax.set(xlabel=xlabel, ylabel=ylabel)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].set_xscale("log")
    axes[0, 0].legend(loc="lower right", fontsize=10, frameon=False)
    return figure


@plain
def presentation(t, u, spikes, v, output):
    """Figure of one input u at times t (ms): spikes [T, n] of layers, a membrane v and the
    output."""
    ratios = (0.5, *(1.3 for _ in spikes), 1, 1)
    figure, axes = empty(7.2, len(ratios), sharex=True, height_ratios=ratios)
    axes[0].plot(t, np.full(len(t), u), color=TRUTH)
    axes[0].set_ylabel("input x")
    for layer, (ax, z) in enumerate(zip(axes[1:], spikes, strict=False)):
        step, neuron = np.nonzero(z)
        ax.plot(t[step], neuron, "|", color=TRUTH, ms=4)
        ax.set(ylabel=f"neuron of\nlayer {layer}", ylim=(-1, z.shape[1]))
    axes[-2].plot(t, v, color=AFTER)
    axes[-2].axhline(1, color=TRUTH, lw=1, ls=":")
    axes[-2].set_ylabel("a membrane\n(dotted: threshold)")
    axes[-1].plot(t, output, color=LATE)
    axes[-1].set(ylabel="readout ŷ", xlabel="time (ms)", xlim=(0, t[-1]))
    figure.align_ylabels()
    return figure


# ---- studies -------------------------------------------------------------------------------------


def half_width(summary):
    """Half-width of a summary's 95 % interval, 0 where it has none."""
    return summary.get("ci95", np.zeros_like(summary["mean"]))


@plain
def lines(found, xlabel, xscale="linear"):
    """Figure of errors along x, a line for each label of found, {label: (x, summary)}."""
    figure, axes = empty(4.5)
    for (label, (x, summary)), style in zip(found.items(), STYLES, strict=False):
        band(axes, x, summary["mean"], half_width(summary), label=label, **style)
    axes.set(xlabel=xlabel, xscale=xscale, ylabel="mean squared error", ylim=0)
    legend_above(figure, axes, 2 if len(found) > 3 else 3)
    return figure


@plain
def bars(rows, groups):
    """Figure of errors, a bar for each group with its summary in each row of rows, {label:
    [summary]}."""
    figure, axes = empty(1.5 + 0.45 * len(rows))
    width = 0.8 / len(groups)
    middle = np.arange(len(rows))
    for k, (group, style) in enumerate(zip(groups, STYLES, strict=False)):
        summaries = [row[k] for row in rows.values()]
        axes.barh(
            middle + (k - (len(groups) - 1) / 2) * width,
            [x["mean"] for x in summaries],
            width,
            xerr=[half_width(x) for x in summaries],
            color=style["color"],
            hatch=("", "//", "..", "\\\\")[k % 4],
            edgecolor="white",
            label=group,
        )
    axes.set_yticks(middle, list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("mean squared error (lines: 95 % interval)")
    legend_above(figure, axes, len(groups))
    return figure


@plain
def histograms(samples, xlabel):
    """Figure of the distributions of positive samples, {label: values}, on a logarithmic
    axis."""
    figure, axes = empty(4.2)
    low = min(np.quantile(x, 0.002) for x in samples.values())
    high = max(x.max() for x in samples.values())
    edges = np.geomspace(low, high, 80)
    for (label, values), style in zip(samples.items(), STYLES, strict=False):
        counts, _ = np.histogram(values, edges)
        axes.stairs(
            counts / len(values),
            edges,
            color=style["color"],
            ls=style["ls"],
            lw=1.8,
            label=label,
        )
    axes.set(xscale="log", xlabel=xlabel, ylabel="share of the steps")
    legend_above(figure, axes, 3)
    return figure
