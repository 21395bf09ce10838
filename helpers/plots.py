"""Plots made from a run's own numbers: labelled axes with units, readable in grey, a label on what is recorded."""

import functools


@functools.cache
def _pyplot():
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.6),
            "figure.dpi": 100,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 10,
            "savefig.bbox": "tight",
        }
    )
    return plt


def _finish(figure, title: str):
    figure.axes[0].set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    return figure


def accuracy_bars(rows: list[dict], title: str):
    """Horizontal bars of accuracy with 95 % intervals, one a scoreboard row, the first row on top."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.42 * len(rows)))
    places = range(len(rows))
    accuracy = [100 * r["accuracy"] for r in rows]
    errors = [[100 * max(r["accuracy"] - r["low"], 0) for r in rows], [100 * max(r["high"] - r["accuracy"], 0) for r in rows]]
    colours = ["0.35" if r["stage"] == "sft" else "0.7" for r in rows]
    axis.barh(places, accuracy, xerr=errors, color=colours, height=0.6, error_kw={"elinewidth": 1, "capsize": 3})
    axis.set_yticks(places, [r["stage"] + (" (recorded)" if r["source"] == "recorded" else "") for r in rows])
    for place, value, high in zip(places, accuracy, errors[1], strict=True):
        axis.text(value + high + 1.5, place, f"{value:.0f} %", va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, 108)
    axis.set_xlabel("execution accuracy, % (bars: 95 % interval)")
    return _finish(figure, title)


def mistakes(records_by_stage: dict[str, list[dict]], title: str):
    """Stacked bars: for each stage, the share of answers of each kind, right ones first."""
    from collections import Counter

    plt = _pyplot()
    counts = {stage: Counter(r["kind"] for r in records) for stage, records in records_by_stage.items()}
    kinds = sorted({k for c in counts.values() for k in c}, key=lambda k: (k != "right", -sum(c[k] for c in counts.values())))
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.42 * len(counts) + 0.16 * len(kinds)))
    hatches = ["", "//", "..", "xx", "\\\\", "++", "oo", "--", "**"]
    left = [0.0] * len(counts)
    for i, kind in enumerate(kinds):
        share = [100 * c[kind] / max(sum(c.values()), 1) for c in counts.values()]
        grey = str(0.3 + 0.65 * i / max(len(kinds) - 1, 1))
        axis.barh(list(counts), share, left=left, color=grey, edgecolor="black", linewidth=0.4, hatch=hatches[i % len(hatches)], label=kind)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("share of answers, %")
    axis.legend(loc="upper center", bbox_to_anchor=(0.42, -0.3), ncol=2, frameon=False, fontsize=8)
    return _finish(figure, title)


def loss_curve(history: list[dict], title: str):
    """Training loss (nats per supervised token) against the step."""
    plt = _pyplot()
    figure, axis = plt.subplots()
    axis.plot([h["step"] for h in history], [float(h["loss"]) for h in history], color="0.2", marker=".", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per SQL token")
    axis.set_ylim(bottom=0)
    return _finish(figure, title)


def sweep(points: list[dict], x: str, title: str, live: dict | None = None):
    """Accuracy against `x` on a log axis: recorded seeds as dots, their mean as a line, this run's own point as a star."""
    plt = _pyplot()
    figure, axis = plt.subplots()
    places = sorted({p[x] for p in points})
    axis.plot([p[x] for p in points], [100 * p["accuracy"] for p in points], "o", color="0.6", markersize=5, label="recorded, one seed each")
    means = [sum(100 * p["accuracy"] for p in points if p[x] == place) / sum(p[x] == place for p in points) for place in places]
    axis.plot(places, means, "-", color="0.2", linewidth=1.2, label="mean of the recorded seeds")
    if live:
        axis.plot([live[x]], [100 * live["accuracy"]], "*", color="black", markersize=12, label="this run, live")
    axis.set_xscale("log")
    axis.set_xticks(places, [str(p) for p in places])
    axis.minorticks_off()
    axis.set_xlabel(x)
    axis.set_ylabel("execution accuracy, %")
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, fontsize=9)
    return _finish(figure, title)
