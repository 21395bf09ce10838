"""Plots made from a run's own numbers, for every reader: colours that the colour-blind tell apart, shapes and greys that print, a text for each.

Colours are Okabe and Ito's (2008). No plot leaves the difference to colour alone: lines have dashes and markers, bars
hatches or their names inside. `Figure` carries what it shows as a sentence.
"""

import base64
import html
import io
import textwrap
from collections import Counter

import numpy as np
from matplotlib.figure import Figure as MatplotlibFigure

BLACK, BLUE, VERMILLION, ORANGE, SKY, YELLOW, PURPLE = "#000000", "#0072B2", "#D55E00", "#E69F00", "#56B4E9", "#F0E442", "#CC79A7"
LINES = [
    (BLUE, "-", "o"), (VERMILLION, "--", "s"), (BLACK, ":", "^"), (ORANGE, "-.", "D"), (SKY, (0, (5, 1, 1, 1, 1, 1)), "v"), (PURPLE, (0, (4, 4)), "P"),
]  # fmt: skip
FILLS = [(BLUE, ""), (YELLOW, "///"), (VERMILLION, "..."), (SKY, "xxx"), (BLACK, ""), (PURPLE, "\\\\\\")]
KINDS = {  # what becomes of an answer, in the order of `mistakes`, and the fill: SELECT and WHERE are the part of the query that is wrong
    "right": (BLUE, ""), "WHERE": (YELLOW, ""), "SELECT": (SKY, "///"), "SELECT + WHERE": (ORANGE, ""),
    "another part": ("#F2F2F2", ""), "does not run": (VERMILLION, ""), "no query": (BLACK, ""),
}  # fmt: skip


class Figure(MatplotlibFigure):
    """A figure with its alternative text, `words`. A notebook shows the image, which carries it, and the words folded below.

    The folded line is for JupyterLab and Colab, which have no way yet to hand an image's alternative text to a reader.
    """

    words = ""

    def _ipython_display_(self):
        from IPython.display import HTML, display

        png = io.BytesIO()
        self.savefig(png, format="png")
        image = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": self.words}
        display(image, metadata={"image/png": {"alt": self.words}}, raw=True)
        display(HTML(f"<details><summary>The plot in words</summary>{html.escape(self.words)}</details>"))


def _axis(height: float = 3.6, width: float = 7):
    """The axis of a new figure (inches) in the course's style."""
    import matplotlib.pyplot as plt

    plt.rc("figure", dpi=100)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("font", size=10)
    plt.rc("legend", frameon=False, fontsize=9)
    plt.rc("savefig", bbox="tight")
    plt.rc("hatch", linewidth=0.6)
    return plt.subplots(figsize=(width, height), FigureClass=Figure)[1]


def _finish(axis, title: str, words: str, **settings):
    """The axis' figure with title and alternative text; labels, limits and scales as `Axes.set` takes them."""
    axis.set(**settings)
    axis.set_title(title, loc="left", fontsize=11)
    axis.figure.words = f"{title}. {words}"
    axis.figure.tight_layout()
    return axis.figure


def accuracy_bars(rows: list[dict], title: str):
    """Horizontal bars of accuracy with 95 % intervals, one a scoreboard row, the first row on top; a live one is dark, a recorded one light."""
    axis = _axis(0.8 + 0.42 * len(rows))
    accuracy = [100 * r["accuracy"] for r in rows]
    errors = [[100 * max(r["accuracy"] - r["low"], 0) for r in rows], [100 * max(r["high"] - r["accuracy"], 0) for r in rows]]
    colours = [SKY if r["source"] == "recorded" else BLUE for r in rows]
    names = [r["stage"] + (" (recorded)" if r["source"] == "recorded" else "") for r in rows]
    bars = axis.barh(range(len(rows)), accuracy, xerr=errors, color=colours, height=0.6, error_kw={"elinewidth": 1.2, "capsize": 3})
    axis.bar_label(bars, fmt="{:.0f} %", padding=5)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    each = [f"{name} {100 * r['accuracy']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})" for name, r in zip(names, rows, strict=True)]
    words = f"Bars of execution accuracy with 95 % intervals: {', '.join(each)}."
    return _finish(axis, title, words, xlim=(0, 108), xlabel="execution accuracy, % (bars: 95 % interval)")


def family(kind: str) -> str:
    """The one of `KINDS` to which a kind of `scoring.Judge` belongs. Two parts may differ: SELECT and WHERE go before grouping and order."""
    if kind in ("right", "no query", "refused"):
        return "right" if kind == "right" else "no query"
    if kind.startswith("does not run"):
        return "does not run"
    parts = [part for part, words in (("SELECT", "what is computed"), ("WHERE", "the filter")) if words in kind]
    return " + ".join(parts) or "another part"


def mistakes(records_by_stage: dict[str, list[dict]], title: str):
    """Stacked bars: for each stage, the share of answers of each of `KINDS`, named in the bar, or beside it where it is too narrow."""
    axis = _axis(1 + 0.5 * len(records_by_stage), 8.6)
    words = []
    for place, (stage, records) in enumerate(records_by_stage.items()):
        counts, left, inside, beside = Counter(family(r["kind"]) for r in records), 0.0, [], []
        for kind in filter(counts.get, KINDS):
            share, (colour, hatch) = 100 * counts[kind] / len(records), KINDS[kind]
            axis.barh(place, share, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, height=0.76)
            name = f"{kind} {share:.0f} %" if share >= 0.5 else f"{kind} below 1 %"
            inside.append(name)
            letters = max(int(0.55 * share), 1)  # so many fit into the bar: tests/test_plots.py measures it
            label = textwrap.wrap(name.replace(" %", "\N{NO-BREAK SPACE}%"), letters, break_long_words=False)
            if len(label) <= 2 and max(map(len, label)) <= letters:
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch else None
                ink = "white" if colour in (BLACK, BLUE) else "black"
                axis.text(left + share / 2, place, "\n".join(label), ha="center", va="center", fontsize=8, color=ink, bbox=box)
            else:
                beside.append(name.replace(" ", "\N{NO-BREAK SPACE}"))
            left += share
        axis.text(101.5, place, textwrap.fill(", ".join(beside), 32), va="center", fontsize=8)
        words.append(f"{stage}: {', '.join(inside)}")
    axis.set_yticks(range(len(records_by_stage)), list(records_by_stage))
    axis.invert_yaxis()
    text = f"Stacked bars, what becomes of the answers (SELECT, WHERE: the part of the query that is wrong). {'; '.join(words)}."
    return _finish(axis, title, text, xlim=(0, 100), xlabel="share of answers, % (SELECT, WHERE: the part of the query that is wrong)")


def loss_curve(history: list[dict], title: str):
    """Training loss (nats per supervised token) against the step."""
    curve = ([h["step"] for h in history], [float(h["loss"]) for h in history])
    return lines({"loss": curve}, title, "step", "loss, nats per SQL token")


def sweep(points: list[dict], x: str, title: str, live: dict | None = None):
    """Accuracy against `x` on a log axis: recorded seeds as dots, their mean as a line, this run's own point as a star."""
    axis = _axis()
    places = sorted({p[x] for p in points})
    at = {place: [100 * p["accuracy"] for p in points if p[x] == place] for place in places}
    means = [sum(values) / len(values) for values in at.values()]
    axis.plot(places, means, "-", color=BLACK, linewidth=1.2, label="mean of the recorded seeds")
    axis.plot(
        [p[x] for p in points],
        [100 * p["accuracy"] for p in points],
        "o",
        color=SKY,
        markeredgecolor=BLACK,
        markersize=6,
        label="recorded, one seed each",
    )
    words = [f"{place}: {mean:.0f} % ({min(at[place]):.0f} to {max(at[place]):.0f})" for place, mean in zip(places, means, strict=True)]
    if live:
        axis.plot([live[x]], [100 * live["accuracy"]], "*", color=VERMILLION, markeredgecolor=BLACK, markersize=15, label="this run, live")
        words.append(f"this run, live, at {live[x]}: {100 * live['accuracy']:.0f} %")
    axis.set_xscale("log")
    axis.set_xticks(places, [str(p) for p in places])
    axis.minorticks_off()
    axis.legend()
    text = f"Execution accuracy by {x}, mean of the recorded seeds (lowest to highest): {', '.join(words)}."
    return _finish(axis, title, text, xlabel=x, ylabel="execution accuracy, %", ylim=(0, 100))


def histogram(values, levels: dict, title: str, x: str):
    """The distribution of `values` (1-D tensor), and under it a row of ticks for each named set of levels."""
    axis = _axis()
    numbers = values.numpy()
    density, edges, _ = axis.hist(numbers, bins=121, density=True, color=SKY)
    height = axis.get_ylim()[1]
    rows = []
    for i, (name, places) in enumerate(levels.items()):
        base = -height * (0.09 + 0.13 * i)
        axis.vlines(places, base - 0.03 * height, base + 0.03 * height, color=BLACK, linewidth=1.2)
        axis.text(1.03, base, name, va="center", fontsize=9, transform=axis.get_yaxis_transform())
        rows.append(f"{name}, {len(places)} from {min(places):.3g} to {max(places):.3g}")
    ticks = [tick for tick in axis.get_yticks() if 0 <= tick <= height]
    low, quarter, three, high = np.quantile(numbers, [0, 0.25, 0.75, 1])
    peak = edges[density.argmax() : density.argmax() + 2].mean()
    words = f"Histogram of {len(numbers):,} values of {x}: from {low:.3g} to {high:.3g}, half of them between {quarter:.3g} and {three:.3g}, densest near {peak:.2g}."
    words += f" Rows of ticks below it: {'; '.join(rows)}." if rows else ""
    return _finish(axis, title, words, xlabel=x, ylabel="density", yticks=ticks, ylim=(-height * (0.05 + 0.13 * len(levels)), None))


def bars(frame, title: str, x: str, unit: str = "{:.3g}", intervals=()):
    """Horizontal bars from a DataFrame: a group for each row, a bar for each column (colours and hatches, values beside).

    `intervals`: (low, high) for each row, drawn across a single column's bars.
    """
    rows, columns = frame.shape
    height = 0.19 * rows * columns + 0.22 * rows
    axis = _axis((1 if columns == 1 else 1.3) + height)
    step = 0.8 / columns
    for j, column in enumerate(frame.columns):
        places = [i - 0.4 + (j + 0.5) * step for i in range(rows)]
        colour, hatch = FILLS[j % len(FILLS)]
        axis.barh(places, frame[column], height=0.92 * step, color=colour, hatch=hatch, edgecolor="black", linewidth=0.4, label=str(column))
        ends = [high for _, high in intervals] or frame[column]
        for place, end, value in zip(places, ends, frame[column], strict=True):
            axis.text(end, place, " " + unit.format(value), va="center", fontsize=8)
    for i, (low, high) in enumerate(intervals):
        axis.plot([low, high], [i, i], "|-", color=ORANGE if columns == 1 else BLACK, linewidth=1.5, markersize=6)
    axis.set_yticks(range(rows), [str(name) for name in frame.index])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    if columns > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.55 / height), ncol=columns)
    spans = [f" ({unit.format(low)} to {unit.format(high)})" for low, high in intervals] or [""] * rows
    each = [
        f"{name}: " + ", ".join((f"{column} " if columns > 1 else "") + unit.format(row[column]) for column in frame.columns) + span
        for (name, row), span in zip(frame.iterrows(), spans, strict=True)
    ]
    return _finish(axis, title, f"Bars of {x}. {'; '.join(each)}.", xlabel=x)


def lines(series: dict, title: str, x: str, y: str, log: bool = False, floor: float | None = 0):
    """One line for each named (x values, y values) pair. `floor`: where a linear y axis begins (None: at the data)."""
    axis = _axis()
    words = []
    for i, (name, (across, up)) in enumerate(series.items()):
        colour, dash, marker = LINES[i % len(LINES)]
        every = max(1, len(up) // 8)
        axis.plot(across, up, color=colour, linestyle=dash, marker=marker, markersize=5, markevery=every, label=name, linewidth=1.6)
        words.append(f"{name} {_course(list(across), [float(v) for v in up])}")
    if len(series) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), handlelength=3.5)
    scale = {"yscale": "log"} if log else {"ylim": (floor, None)}
    return _finish(axis, title, f"Lines of {y} by {x}. {'; '.join(words)}.", xlabel=x, ylabel=y, **scale)


def _course(across: list, up: list[float]) -> str:
    """How a line runs, in words: both ends, and the extremes that lie well beyond them."""
    text = f"{up[0]:.3g} at {across[0]:.3g}, {up[-1]:.3g} at {across[-1]:.3g}"
    least = 0.1 * (max(up) - min(up))
    for what, extreme in (("lowest", min(up)), ("highest", max(up))):
        if min(abs(extreme - up[0]), abs(extreme - up[-1])) > least:
            text += f", {what} {extreme:.3g} at {across[up.index(extreme)]:.3g}"
    return text


def frontier(points: list[dict], title: str):
    """Accuracy against style, both in percent: one mark a point ({"label", "group", "style", "accuracy"}), one marker a group."""
    axis = _axis(4.2)
    words = []
    for i, group in enumerate(dict.fromkeys(p["group"] for p in points)):
        mine = [p for p in points if p["group"] == group]
        colour, _, marker = LINES[i % len(LINES)]
        place = ([100 * p["style"] for p in mine], [100 * p["accuracy"] for p in mine])
        size = 12 if marker == "o" else 7  # a point that lies on the first one leaves it to be seen
        axis.plot(*place, marker, linestyle="none", color=colour, markeredgecolor=BLACK, markersize=size, label=group)
        words.append(f"{group}: " + ", ".join(f"{p['label']} at {100 * p['style']:.0f} and {100 * p['accuracy']:.0f}" for p in mine))
    points = sorted(points, key=lambda p: p["style"])
    for i, p in enumerate(points):  # a label stands on the side where fewer points are near, or above; away from them in height, too
        near = [(j > i, q) for j, q in enumerate(points) if j != i and max(abs(q[of] - p[of]) for of in ("style", "accuracy")) < 0.05]
        more = 2 * sum(later for later, _ in near) - len(near)  # to the right of it than to the left
        higher = sum((p["accuracy"] > q["accuracy"]) - (p["accuracy"] < q["accuracy"]) for _, q in near)
        up = 1 if higher > 0 else -8 if higher < 0 else -3
        side = (
            {"xytext": (0, 9), "ha": "center"}
            if near and not more and not higher
            else {"xytext": (-8, up), "ha": "right"}
            if more > 0
            else {"xytext": (8, up)}
        )
        axis.annotate(str(p["label"]), (100 * p["style"], 100 * p["accuracy"]), textcoords="offset points", fontsize=8, **side)
    axis.margins(0.12)
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=5)
    text = f"Points, each with its house style and its execution accuracy in percent. {'; '.join(words)}."
    return _finish(axis, title, text, xlabel="house style, % of the paired rules kept by right answers", ylabel="execution accuracy, %")


def heat(frame, title: str, rows: str, columns: str):
    """A DataFrame of shares (0 to 1) as a map: a shade and its percentage a cell, darker the larger."""
    axis = _axis(1.2 + 0.3 * len(frame), 2.6 + 1.15 * frame.shape[1])
    axis.imshow(frame.to_numpy(float), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, (_, row) in enumerate(frame.iterrows()):
        for j, share in enumerate(row):
            axis.text(j, i, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8, color="white" if share > 0.5 else "black")
    axis.set_yticks(range(len(frame)), [str(name) for name in frame.index])
    axis.set_xticks(range(frame.shape[1]), [textwrap.fill(str(name), 12) for name in frame.columns])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    each = [f"{name}: " + ", ".join(f"{column} {100 * share:.0f} %" for column, share in row.items()) for name, row in frame.iterrows()]
    return _finish(axis, title, f"A map of shares, {rows} by {columns}. {'; '.join(each)}.")


def spans(rows: dict, title: str, x: str, unit: str = "{:.0f}"):
    """One line for each name: a dot at its value and its interval, {name: (value, low, high)}."""
    axis = _axis(0.9 + 0.36 * len(rows))
    for place, (value, low, high) in enumerate(rows.values()):
        axis.plot([low, high], [place, place], "|-", color=BLACK, linewidth=1.4, markersize=7)
        axis.plot(value, place, "o", color=BLUE, markersize=7)
        axis.text(high, place, "  " + unit.format(value), va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.margins(x=0.12)
    each = [f"{name} {unit.format(value)} ({unit.format(low)} to {unit.format(high)})" for name, (value, low, high) in rows.items()]
    return _finish(axis, title, f"Dots of {x} with their intervals: {', '.join(each)}.", xlabel=x)
