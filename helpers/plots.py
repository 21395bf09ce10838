"""Plots made from a run's own numbers: labelled axes with units, readable in grey, a label on what is recorded."""

from collections import Counter


def _axis(height: float = 3.6):
    """The axis of a new figure, 7 inches wide, in the course's style."""
    import matplotlib.pyplot as plt

    plt.rc("figure", dpi=100)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("font", size=10)
    plt.rc("legend", frameon=False, fontsize=9)
    plt.rc("savefig", bbox="tight")
    return plt.subplots(figsize=(7, height))[1]


def _finish(axis, title: str, **settings):
    """The axis' figure with its title; labels, limits and scales as `Axes.set` takes them."""
    axis.set(**settings)
    axis.set_title(title, loc="left", fontsize=11)
    axis.figure.tight_layout()
    return axis.figure


def accuracy_bars(rows: list[dict], title: str):
    """Horizontal bars of accuracy with 95 % intervals, one a scoreboard row, the first row on top."""
    axis = _axis(0.8 + 0.42 * len(rows))
    accuracy = [100 * r["accuracy"] for r in rows]
    errors = [[100 * max(r["accuracy"] - r["low"], 0) for r in rows], [100 * max(r["high"] - r["accuracy"], 0) for r in rows]]
    colours = ["0.35" if r["stage"] in ("sft", "dpo") else "0.7" for r in rows]
    bars = axis.barh(range(len(rows)), accuracy, xerr=errors, color=colours, height=0.6, error_kw={"elinewidth": 1, "capsize": 3})
    axis.bar_label(bars, fmt="{:.0f} %", padding=5)
    axis.set_yticks(range(len(rows)), [r["stage"] + (" (recorded)" if r["source"] == "recorded" else "") for r in rows])
    axis.invert_yaxis()
    return _finish(axis, title, xlim=(0, 108), xlabel="execution accuracy, % (bars: 95 % interval)")


def mistakes(records_by_stage: dict[str, list[dict]], title: str):
    """Stacked bars: for each stage, the share of answers of each kind, right ones first."""
    counts = {stage: Counter(r["kind"] for r in records) for stage, records in records_by_stage.items()}
    kinds = sorted({k for c in counts.values() for k in c}, key=lambda k: (k != "right", -sum(c[k] for c in counts.values())))
    axis = _axis(1.6 + 0.42 * len(counts) + 0.16 * len(kinds))
    hatches = ["", "//", "..", "xx", "\\\\", "++", "oo", "--", "**"]
    left = [0.0] * len(counts)
    for i, kind in enumerate(kinds):
        share = [100 * c[kind] / max(sum(c.values()), 1) for c in counts.values()]
        grey = str(0.3 + 0.65 * i / max(len(kinds) - 1, 1))
        axis.barh(list(counts), share, left=left, color=grey, edgecolor="black", linewidth=0.4, hatch=hatches[i % len(hatches)], label=kind)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.invert_yaxis()
    axis.legend(loc="upper center", bbox_to_anchor=(0.42, -0.3), ncol=2, fontsize=8)
    return _finish(axis, title, xlabel="share of answers, %")


def loss_curve(history: list[dict], title: str):
    """Training loss (nats per supervised token) against the step."""
    curve = ([h["step"] for h in history], [float(h["loss"]) for h in history])
    return lines({"loss": curve}, title, "step", "loss, nats per SQL token")


def sweep(points: list[dict], x: str, title: str, live: dict | None = None):
    """Accuracy against `x` on a log axis: recorded seeds as dots, their mean as a line, this run's own point as a star."""
    axis = _axis()
    places = sorted({p[x] for p in points})
    axis.plot([p[x] for p in points], [100 * p["accuracy"] for p in points], "o", color="0.6", markersize=5, label="recorded, one seed each")
    means = [sum(100 * p["accuracy"] for p in points if p[x] == place) / sum(p[x] == place for p in points) for place in places]
    axis.plot(places, means, "-", color="0.2", linewidth=1.2, label="mean of the recorded seeds")
    if live:
        axis.plot([live[x]], [100 * live["accuracy"]], "*", color="black", markersize=12, label="this run, live")
    axis.set_xscale("log")
    axis.set_xticks(places, [str(p) for p in places])
    axis.minorticks_off()
    axis.legend()
    return _finish(axis, title, xlabel=x, ylabel="execution accuracy, %", ylim=(0, 100))


def histogram(values, levels: dict, title: str, x: str):
    """The distribution of `values` (1-D tensor), and under it a row of ticks for each named set of levels."""
    axis = _axis()
    axis.hist(values.numpy(), bins=121, density=True, color="0.75")
    height = axis.get_ylim()[1]
    for i, (name, places) in enumerate(levels.items()):
        base = -height * (0.09 + 0.13 * i)
        axis.vlines(places, base - 0.03 * height, base + 0.03 * height, color="black", linewidth=1.2)
        axis.text(1.03, base, name, va="center", fontsize=9, transform=axis.get_yaxis_transform())
    ticks = [tick for tick in axis.get_yticks() if 0 <= tick <= height]
    return _finish(axis, title, xlabel=x, ylabel="density", yticks=ticks, ylim=(-height * (0.05 + 0.13 * len(levels)), None))


def bars(frame, title: str, x: str, unit: str = "{:.3g}", intervals=()):
    """Horizontal bars from a DataFrame: a group for each row, a bar for each column (greys and hatches, values beside).

    `intervals`: (low, high) for each row, drawn across a single column's bars.
    """
    rows, columns = frame.shape
    height = 0.17 * rows * columns + 0.22 * rows
    axis = _axis(0.9 + height)
    step = 0.8 / columns
    hatches = ["", "///", "...", "xxx", "++", "oo"]
    for j, column in enumerate(frame.columns):
        places = [i - 0.4 + (j + 0.5) * step for i in range(rows)]
        shade = str(0.35 + 0.5 * j / max(columns - 1, 1))
        axis.barh(places, frame[column], height=0.92 * step, color=shade, hatch=hatches[j % 6], edgecolor="black", linewidth=0.4, label=str(column))
        ends = [high for _, high in intervals] or frame[column]
        for place, end, value in zip(places, ends, frame[column], strict=True):
            axis.text(end, place, " " + unit.format(value), va="center", fontsize=8)
    for i, (low, high) in enumerate(intervals):
        axis.plot([low, high], [i, i], "|-", color="black", linewidth=1, markersize=6)
    axis.set_yticks(range(rows), [str(name) for name in frame.index])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    if columns > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.5 / height), ncol=columns)
    return _finish(axis, title, xlabel=x)


def lines(series: dict, title: str, x: str, y: str, log: bool = False, floor: float | None = 0):
    """One line for each named (x values, y values) pair, told apart by dash and grey. `floor`: where a linear y axis begins (None: at the data)."""
    axis = _axis()
    for i, (name, (across, up)) in enumerate(series.items()):
        axis.plot(across, up, ["-", "--", ":", "-."][i % 4], color=str(0.1 + 0.5 * i / max(len(series) - 1, 1)), label=name, linewidth=1.5)
    if len(series) > 1:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    scale = {"yscale": "log"} if log else {"ylim": (floor, None)}
    return _finish(axis, title, xlabel=x, ylabel=y, **scale)


def frontier(points: list[dict], title: str):
    """Accuracy against style, both in percent: one mark a point ({"label", "group", "style", "accuracy"}), one marker a group."""
    axis = _axis(4.2)
    for i, group in enumerate(dict.fromkeys(p["group"] for p in points)):
        mine = [p for p in points if p["group"] == group]
        place = ([100 * p["style"] for p in mine], [100 * p["accuracy"] for p in mine])
        axis.plot(*place, "os^*Dv"[i % 6], color=str(0.15 * (i % 5)), markersize=9 if "os^*Dv"[i % 6] in "o*" else 6, label=group)
    points = sorted(points, key=lambda p: p["style"])
    for i, p in enumerate(points):  # a label stands on the side where fewer points are near, or above
        near = [j > i for j, q in enumerate(points) if j != i and max(abs(q[of] - p[of]) for of in ("style", "accuracy")) < 0.05]
        more = 2 * sum(near) - len(near)  # to the right of it than to the left
        side = {"xytext": (0, 6), "ha": "center"} if near and not more else {"xytext": (-7, -3), "ha": "right"} if more > 0 else {"xytext": (7, -3)}
        axis.annotate(str(p["label"]), (100 * p["style"], 100 * p["accuracy"]), textcoords="offset points", fontsize=7.5, **side)
    axis.margins(0.12)
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncol=5)
    return _finish(axis, title, xlabel="house style, % of the paired rules kept by right answers", ylabel="execution accuracy, %")
