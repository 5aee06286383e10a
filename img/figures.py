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
LINES = matplotlib.cycler(  # of a figure, in their order
    color=(AFTER, LATE, OTHER, BEFORE, TRUTH, "#CC79A7", "#E69F00"),
    linestyle=("-", "--", "-.", ":", (0, (1, 1)), "--", "-."),
    marker=list("os^Dv<>"),
)
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

plain = matplotlib.style.context(
    ["default", STYLE]
)  # decorates what makes or saves a figure


@plain
def png(figure, note=""):
    """The figure's file as bytes, with a note in small print below, to the letter: a folder's
    name may hold dollar signs, or bytes that are no text."""
    text = textwrap.fill(note.encode(errors="replace").decode(), 150)
    figure.supxlabel(text, fontsize=6.5, color="#666666", parse_math=False)
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
    mean, half = np.asarray(mean, float), np.asarray(half, float)
    (line,) = axes.plot(x, mean, ms=4, **style)
    shade = {"color": line.get_color(), "alpha": 0.25, "lw": 0}
    axes.fill_between(x, mean - half, mean + half, **shade)


def legend_above(axes, n_columns):
    """Put the legend of axes above everything."""
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=n_columns,
        frameon=False,
    )


def plain_ticks(axis):
    """Write the ticks of a logarithmic axis as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
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
def training(rows, results):
    """Figure of what adaptation reaches, against meta-iterations: the accuracy, else the squared
    error; rows of metrics.csv, results as in results.json."""
    figure, axes = empty(4.2)
    step = [row["step"] for row in rows]
    is_accuracy = "accuracy" in rows[0]
    name = "accuracy" if is_accuracy else "mse"
    label = "after adaptation, mean since the point before"
    axes.plot(step, [row[name] for row in rows], ".-", color=AFTER, label=label)
    before = results[name]["mean"][0]
    label = f"before adaptation, in the test: {before:.3g}"
    axes.axhline(before, color=BEFORE, ls="--", label=label)
    levels = results["baselines"]
    for label, level in levels.items():
        what = f"{label.split(' of ')[-1]}: {level:.3g}"
        mark_level(axes, level, what, above=level == max(levels.values()))
    axes.set(xlabel="meta-iteration", xlim=(0, None))
    if is_accuracy:
        axes.set(ylabel="accuracy on new tasks (%)", ylim=(0, 100))
    else:
        axes.set(ylabel="mean squared error of new tasks", yscale="log")
        plain_ticks(axes.yaxis)
    legend_above(axes, 3)
    return figure


def entry(task, k):
    """Support and query of the task k of many, a Task of arrays [n, ...]."""
    return type(task)(*(type(part)(*(x[k] for x in part)) for part in task))


def show_task(axes, x, support, query, outputs):
    """Draw one task and its samples at the input converter's levels x [L], and the outputs [2, L]
    before and after adaptation."""
    labels = "task", "output before", "output after"
    colors, widths, dashes = (TRUTH, BEFORE, AFTER), (1, 1.6, 2.2), ("-", "--", "-")
    curves = query.y[:, 0] / query.share, *outputs
    half = (x[1] - x[0]) / 2
    edges = np.append(x - half, x[-1] + half)
    for values, label, color, lw, ls in zip(
        curves, labels, colors, widths, dashes, strict=True
    ):
        style = {"color": color, "lw": lw, "ls": ls}
        axes.stairs(values, edges, baseline=None, label=label, **style)
    seen = support.share > 0
    means = support.y[seen, 0] / support.share[seen]
    axes.plot(x[seen], means, "o", color=LATE, ms=4.5, label="samples seen")
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
    )


def show_errors(axes, before, after, words):
    """Draw the distributions of the errors [n] of chips before and after adaptation, means
    marked; words below the second."""
    errors = np.concatenate([before, after])
    shown = errors[np.isfinite(errors) & (errors > 0)]  # what a logarithmic axis can show
    if not len(shown):
        shown = np.ones(1)
    low = min(x for x in (shown.min(), after.mean() / 30) if x > 0)
    high = 1.1 * shown.max()
    n_bins = int(np.clip(2 * len(before) ** 0.5, 8, 40))
    edges = np.geomspace(low, high, n_bins + 1)
    filled = {"histtype": "stepfilled", "linewidth": 1.5}
    axes.hist(before, edges, fc=(BEFORE, 0.4), ec=BEFORE, ls="--", **filled)
    axes.hist(after, edges, fc=(AFTER, 0.4), ec=AFTER, **filled)
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.4 * axes.get_ylim()[1]))
    axes.yaxis.get_major_locator().set_params(integer=True)
    plain_ticks(axes.xaxis)
    mark_mean(axes, before.mean(), 0.99, f"mean {before.mean():.2g} before", "#555555")
    mark_mean(axes, after.mean(), 0.91, f"{after.mean():.2g} after\n{words}", AFTER)


def activity(results):
    """What results.json says of the network's activity, in words."""
    rates, silent = (
        " and ".join(f"{x:.0f}" for x in results[name]["mean"])
        for name in ("rates", "silent")
    )
    spikes = results["spikes"]["mean"]
    first = f"{spikes:.0f} spikes per presentation"
    return f"{first}\nlayers at {rates} Hz, {silent} % silent"


@plain
def testing(episodes, results):
    """Figure of four tasks and of all chips' errors; results as in results.json."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplot_mosaic("AABBEEEE\nCCDDEEEE")
    x, n_shown = episodes.u[0, :, 0], min(4, len(episodes.u))  # [L]
    for k, panel in enumerate("ABCD"[:n_shown]):
        support, query = entry(episodes.task, k)
        show_task(axes[panel], x, support, query, episodes.outputs[k, :, :, 0])
        axes[panel].tick_params(labelbottom=panel in "CD")
        axes[panel].set(xlabel="x" * (panel in "CD"), ylabel="y" * (panel in "AC"))
    ranges = [axes[panel].get_ylim() for panel in "ABCD"[:n_shown]]
    for panel in "ABCD"[:n_shown]:
        axes[panel].set_ylim(np.min(ranges), np.max(ranges))
    mse, late = episodes.measured["mse"], results["mse_day"]["mean"]
    words = f"{results['pulses']['mean']:.0f} pulses\n{late:.2g} a day later"
    show_errors(axes["E"], mse[:, 0], mse[:, -1], words)
    axes["E"].set(xlabel="squared error of a chip over all inputs", ylabel="chips")
    title = f"{len(mse)} tasks, each on a chip of its own\n{activity(results)}"
    axes["E"].set_title(title, fontsize=10)
    legend_above(axes["A"], 4)
    return figure


def show_images(panel, images, right):
    """Draw images [rows, columns, side, side] into a panel of a figure, in frames that say which
    are right [rows, columns]."""
    rows, columns = images.shape[:2]
    grid = panel.subplots(rows, columns, squeeze=False)
    for place in np.ndindex(rows, columns):
        axes = grid[place]
        axes.imshow(images[place], cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=AFTER if right[place] else LATE, lw=2.2)
        if not right[place]:
            axes.plot((0, 1), (0, 1), color=LATE, lw=1.5, transform=axes.transAxes)


def of_classes(side, u, samples, n_shown):
    """The first n_shown images of each class [n_way, n_shown, side, side], and which of the pool
    u [L, side²] they are [n_way, n_shown]."""
    n_each = min(n_shown, min(np.sum(samples.y > 0, 0)))
    index = np.stack([np.flatnonzero(column > 0)[:n_each] for column in samples.y.T])
    return u[index].reshape(*index.shape, side, side), index


def show_classes(panels, side, task, u, output):
    """Draw the support and queries of one task into two panels; the output [L, n_way] is after
    adaptation."""
    support, index = of_classes(side, u, task.support, 5)
    show_images(panels[0], support, np.full(index.shape, True))
    panels[0].suptitle("one task, a row per class:\nthe samples seen", fontsize=10)
    query, index = of_classes(side, u, task.query, 8)
    right = np.argmax(output[index], 2) == np.arange(len(index))[:, None]
    show_images(panels[1], query, right)
    n_right, n_wrong = right.sum(), (~right).sum()
    words = f"other samples: {n_right} right (blue),\n{n_wrong} wrong (orange, struck out)"
    panels[1].suptitle(words, fontsize=10)


@plain
def classes(side, episodes, results):
    """Figure of one task of images of side × side (none for side 0) and of the accuracy after each
    look; results as in results.json."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    *panels, right = figure.subfigures(1, 3, width_ratios=(5, 8, 9)) if side else [figure]
    if side:
        task = entry(episodes.task, 0)
        show_classes(panels, side, task, episodes.u[0], episodes.outputs[0, 1])
    axes = right.subplots()
    found = results["accuracy"]
    looks = range(len(found["mean"]))
    band(axes, looks, found["mean"], found.get("ci95", 0), color=AFTER, marker="o")
    for label, level in results["baselines"].items():
        axes.axhline(level, color=TRUTH, lw=1, ls=":")
        axes.annotate(
            label.split(" of ")[-1],
            (looks[-1], level),
            (0, 3),
            ha="right",
            textcoords="offset points",
            fontsize=9,
        )
    mean = found["mean"][-1]
    words = f"{mean:.0f} %, a day later {results['accuracy_day']['mean']:.0f} %"
    axes.annotate(words, (0.97, 0.35), xycoords="axes fraction", ha="right")
    axes.set(xlabel="looks", ylabel="accuracy (%)", ylim=(0, 100), xticks=looks)
    n = len(episodes.measured["accuracy"])
    title = f"{n} tasks, each on a chip of its own\n{activity(results)}"
    axes.set_title(title, fontsize=9)
    return figure


# What a meta-test measures: name, and label with the unit and the number of an entry.
MEASURED = {
    "accuracy": "accuracy (%) after look {}",
    "accuracy_day": "accuracy (%) a day later",
    "mse": "squared error after look {}",
    "mse_day": "squared error a day later",
    "pulses": "pulses of an adaptation",
    "touched": "readout devices touched (%)",
    "dw": "Σ|ΔW| over the synapses",
    "rates": "firing rate (Hz) of layer {}",
    "silent": "neurons of layer {} silent for all inputs (%)",
    "spikes": "spikes per presentation",
}


def table(results):
    """The results of a run, as in results.json, in lines of text."""
    lines = [f"  {what:<60}{x:9.3f}" for what, x in results["baselines"].items()]
    for name, found in results["devices"].items():
        n = found["pulses"]["n"]
        interval = " ± 95 % interval" if "ci95" in found["pulses"] else ""
        lines.append(f"{n} tasks, each on its own chip of {name}; mean{interval}")
        for key in (key for key in MEASURED if key in found):
            halves = np.ravel(found[key].get("ci95", []))
            for i, mean in enumerate(np.ravel(found[key]["mean"])):
                interval = f" ± {halves[i]:.3f}" if len(halves) else ""
                lines.append(f"  {MEASURED[key].format(i):<60}{mean:9.3f}{interval}")
    spent = results["energy"]["bills"]["adaptation"]["nJ"]
    totals = ", ".join(f"{prices['total']:.3g}" for prices in spent.values())
    lines.append(f"energy of an adaptation at low, typical and high prices (nJ): {totals}")
    return "\n".join(lines)


def of_run(rows, episodes, results, side, note):
    """The files of a run's figures by name, as bytes: rows of metrics.csv, episodes and results of
    the meta-test; side is that of images to classify, 0 of other samples."""
    drawn = {}
    if "accuracy" in results:
        drawn["meta_testing.png"] = classes(side, episodes, results)
    elif episodes.u.shape[-1] == 1:
        drawn["meta_testing.png"] = testing(episodes, results)
    if rows:
        drawn["meta_training.png"] = training(rows, results)
    return {name: png(figure, note) for name, figure in drawn.items()}


# ---- devices and neurons -------------------------------------------------------------------------


@plain
def laws(name, panels):
    """Figure of a device's laws, a panel for each (x label, y label, x, law, samples [...,
    x])."""
    figure, axes = empty(6.4, 2, 2)
    n_devices = len(panels[0][-1].reshape(-1, len(panels[0][2])))
    what = f"{name}: laws, and {n_devices:,} simulated devices at each point"
    figure.suptitle(what, fontsize=12)
    for ax, (xlabel, ylabel, x, law, samples) in zip(axes.flat, panels, strict=True):
        samples = samples.reshape(-1, len(x))
        mean, std = np.mean(samples, 0), np.std(samples, 0)
        band(ax, x, mean, std, color=AFTER, ls="--", label="simulated, mean ± std")
        ax.plot(x, law, color=TRUTH, lw=1, label="law without noise")
        ax.set(xlabel=xlabel, ylabel=ylabel)
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].set_xscale("log")
    axes[0, 0].legend(loc="lower right", fontsize=10, frameon=False)
    return figure


@plain
def curves(name, panels):
    """Figure of measured and simulated devices, mean ± std: a panel for each {x label: (x,
    measured, simulated)}, both [devices, x] in µS, NaN where nothing was measured."""
    figure, axes = empty(4.2, 1, len(panels), squeeze=False)
    figure.suptitle(f"{name}: mean ± std over devices", fontsize=12)
    for ax, (xlabel, (x, measured, simulated)) in zip(axes[0], panels.items(), strict=True):
        known = np.ma.masked_invalid(measured)
        band(ax, x, known.mean(0), known.std(0), color=LATE, marker="o", label="measured")
        mean, std = simulated.mean(0), simulated.std(0)
        band(ax, x, mean, std, color=AFTER, ls="--", label="simulated")
        ax.set(
            xlabel=xlabel, ylabel="G (µS)", xscale="log" if "age" in xlabel else "linear"
        )
    axes[0, 0].legend(fontsize=10, frameon=False)
    return figure


N_SHOWN = 64  # neurons of a layer in a raster


def raster(axes, t, z, layer):
    """Draw the spikes z [T, n] of a layer at times t (ms), of some of its neurons."""
    n = z.shape[1]
    shown = np.linspace(0, n - 1, min(n, N_SHOWN)).round().astype(int)
    axes.eventplot([t[z[:, i] > 0] for i in shown], color=TRUTH, lw=1.2, linelengths=0.9)
    rate = 1e3 * z.mean() / (t[1] - t[0])
    part = f"{len(shown)} of" if len(shown) < n else "all"
    axes.set_ylabel(f"layer {layer}, {rate:.0f} Hz\n{part} {n} neurons")
    axes.set_ylim(-1, len(shown))
    axes.set_yticks([])


@plain
def presentation(t, x, spikes, membrane, output, target):
    """Figure of an input x [n_in] that is held at times t (ms): spikes [T, n] of layers, a membrane
    [T], and the output [T] as it would be read at each time, which has to meet the target."""
    ratios = (*(2.2 for _ in spikes), 0.9, 1.1)
    figure, axes = empty(9, len(ratios), sharex=True, height_ratios=ratios)
    what = f"input x = {x[0]:.2g}" if len(x) == 1 else f"a sample of {len(x)} numbers"
    figure.suptitle(f"{what}, held for {t[-1]:.0f} ms", fontsize=12)
    for layer, (ax, z) in enumerate(zip(axes, spikes, strict=False)):
        raster(ax, t, z, layer)
    axes[-2].plot(t, membrane, color=AFTER)
    axes[-2].axhline(1, color=TRUTH, lw=1, ls=":")
    axes[-2].set_ylabel(f"a membrane\nof layer {len(spikes) - 1}")
    axes[-2].annotate("threshold", (0.5, 1), (0, 2), textcoords="offset points", fontsize=9)
    axes[-1].plot(t, output, color=LATE)
    axes[-1].axhline(target, color=TRUTH, ls="--")
    place = {"textcoords": "offset points", "fontsize": 9}
    axes[-1].annotate("target of the task", (0.5, target), (0, 3), **place)
    axes[-1].plot(t[-1], output[-1], "o", color=LATE)
    side = -22 if output[-1] > 0 else 12
    axes[-1].annotate(
        "read here, once", (t[-1], output[-1]), (0, side), ha="right", **place
    )
    axes[-1].set(
        ylabel="readout ŷ\nif read then", xlabel="time (ms)", xlim=(0, 1.01 * t[-1])
    )
    axes[-1].margins(y=0.25)
    figure.align_ylabels()
    return figure


# ---- studies -------------------------------------------------------------------------------------


@plain
def lines(x, found, xlabel, ylabel, scale="linear"):
    """Figure of errors along x, a line for each label of found, {label: summary}, the highest at
    the end first; both axes have the scale."""
    figure, axes = empty(4.5)
    axes.set_prop_cycle(LINES)
    for label, summary in sorted(found.items(), key=lambda item: -item[1]["mean"][-1]):
        band(axes, x, summary["mean"], summary.get("ci95", 0), label=label)
    axes.set(xlabel=xlabel, xscale=scale, yscale=scale, ylabel=ylabel)
    if scale == "log":
        plain_ticks(axes.yaxis)
        axes.set_xticks(x, [f"{at:g}" for at in x])
        axes.xaxis.set_minor_formatter("")
    else:
        axes.set_ylim(0)
    legend_above(axes, 2 if len(found) > 3 else 3)
    return figure


@plain
def bars(groups, xlabel):
    """Figure of errors, {group: {label: summary}}: a row for each label, in it a bar for each group
    that has it. Groups share all rows or none."""
    labels = list(dict.fromkeys(label for found in groups.values() for label in found))
    figure, axes = empty(1.5 + 0.45 * len(labels))
    axes.set_prop_cycle(LINES)
    is_shared = all(len(found) == len(labels) for found in groups.values())
    n_beside = len(groups) if is_shared else 1
    width = 0.8 / n_beside
    for k, (group, found) in enumerate(groups.items()):
        rows = np.array([labels.index(label) for label in found])
        axes.barh(
            rows + (k % n_beside - (n_beside - 1) / 2) * width,
            np.array([x["mean"] for x in found.values()], float),
            width,
            xerr=np.array([x.get("ci95", 0) for x in found.values()], float),
            hatch=("", "//", "..", "\\\\")[k % 4],
            edgecolor="white",
            label=group,
        )
    widths = [bar.get_width() for bar in axes.patches]
    if np.nanmax(widths) > 10 * np.nanmedian(widths):  # else most bars would be too short
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{xlabel} (lines: 95 % interval)")
    legend_above(axes, min(len(groups), 4))
    return figure


@plain
def spans(found, xlabel, ylabel):
    """Figure of errors against what is known as a range, {label: (summary, [low,
    typical, high])}."""
    figure, axes = empty(4.2)
    axes.set_prop_cycle(LINES)
    for label, (error, (low, typical, high)) in found.items():
        half, span = error.get("ci95", 0), ([typical - low], [high - typical])
        axes.errorbar(typical, error["mean"], half, span, ls="none", capsize=3, label=label)
    axes.set(xscale="log", xlabel=xlabel, ylim=(0, None), ylabel=ylabel)
    legend_above(axes, 2)
    return figure


@plain
def histograms(found, xlabel):
    """Figure of distributions on a logarithmic axis, {label: {edges, shares}}."""
    figure, axes = empty(4.2)
    axes.set_prop_cycle(LINES)
    for label, of in found.items():
        axes.step(of["edges"][1:], of["shares"], where="pre", marker="", label=label)
    axes.set(xscale="log", xlabel=xlabel, ylabel="share of the changes")
    legend_above(axes, 3)
    return figure
