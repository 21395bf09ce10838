"""Plots: readable in colour, by the colour-blind, in grey and by ear. What they show, and that no label lies over another."""

import itertools

import matplotlib
import nbformat
import pytest

matplotlib.use("Agg")  # before pyplot

import pandas as pd  # noqa: E402

from helpers import plots, scoreboard  # noqa: E402
from helpers.runtime import ROOT  # noqa: E402

ROWS = [
    {"stage": "zero-shot", "accuracy": 0.05, "low": 0.02, "high": 0.1, "source": "live"},
    {"stage": "sft", "accuracy": 0.75, "low": 0.7, "high": 0.8, "source": "recorded"},
]
POINTS = [{"rank": rank, "accuracy": accuracy} for rank, accuracy in ((1, 0.2), (1, 0.4), (16, 0.5), (16, 0.5))]
ANSWERS = [{"kind": kind} for kind in ["right"] * 6 + ["wrong: the filter and the grouping or order"] * 3 + ["does not run (syntax)"]]
MARKS = [{"label": "1", "group": group, "style": 0.25, "accuracy": 0.5} for group in ("DPO", "control")]
CURVES = {"chosen": ([0, 8, 24], [-2.0, -9.5, -1.0]), "rejected": ([0, 8, 24], [-2.0, -3.0, -4.0])}
TABLE = pd.DataFrame({"MB": [538.0, 110.0], "predicted": [538.0, 111.0]}, index=["float32", "NF4"])


class Tensor(list):
    def numpy(self):
        import numpy

        return numpy.array(self)


DRAW = {
    "Before. Bars of execution accuracy with 95 % intervals: zero-shot 5 % (2 to 10), sft (recorded) 75 % (70 to 80).": lambda: plots.accuracy_bars(
        ROWS, "Before"
    ),
    "Kinds. Stacked bars, what becomes of the answers (SELECT, WHERE: the part of the query that is wrong). "
    "sft: right 60 %, WHERE 30 %, does not run 10 %.": lambda: plots.mistakes({"sft": ANSWERS}, "Kinds"),
    "It falls. Lines of loss, nats per SQL token by step. loss 2 at 10, 0.5 at 20.": lambda: plots.loss_curve(
        [{"step": 10, "loss": "2.0"}, {"step": 20, "loss": "0.5"}], "It falls"
    ),
    "Ranks. Execution accuracy by rank, mean of the recorded seeds (lowest to highest): 1: 30 % (20 to 40), 16: 50 % (50 to 50), "
    "this run, live, at 8: 45 %.": lambda: plots.sweep(POINTS, "rank", "Ranks", {"rank": 8, "accuracy": 0.45}),
    "W. Histogram of 5 values of weight: from -1 to 1, half of them between -0.5 and 0, densest near 0. Rows of ticks below it: "
    "NF4, 3 from -1 to 1.": lambda: plots.histogram(Tensor([-1, -0.5, 0, 0, 1]), {"NF4": [-1, 0, 1]}, "W", "weight"),
    "Memory. Bars of MB. float32: MB 538, predicted 538; NF4: MB 110, predicted 111.": lambda: plots.bars(TABLE, "Memory", "MB"),
    "Ratio. Bars of ratio. float32: 538 (530 to 540); NF4: 110 (100 to 120).": lambda: plots.bars(
        TABLE[["MB"]], "Ratio", "ratio", intervals=[(530, 540), (100, 120)]
    ),
    "Sides. Lines of nats by step. chosen -2 at 0, -1 at 24, lowest -9.5 at 8; rejected -2 at 0, -4 at 24.": lambda: plots.lines(
        CURVES, "Sides", "step", "nats", floor=None
    ),
    "Frontier. Points, each with its house style and its execution accuracy in percent. DPO: 1 at 25 and 50; control: 1 at 25 and 50.": (
        lambda: plots.frontier(MARKS, "Frontier")
    ),
}


@pytest.fixture(autouse=True)
def close():
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("words", DRAW, ids=[words[:12] for words in DRAW])
def test_a_plot_has_labelled_axes_and_says_what_it_shows(words):
    figure = DRAW[words]()
    assert figure.words == words
    assert figure.axes[0].get_xlabel() and words.startswith(figure.axes[0].get_title(loc="left") + ". ")


def test_what_is_drawn():
    assert [t.get_text() for t in plots.accuracy_bars(ROWS, "t").axes[0].get_yticklabels()] == ["zero-shot", "sft (recorded)"]
    lines = plots.lines(CURVES, "t", "step", "nats", floor=None).axes[0]
    assert lines.get_ylim()[0] < -9.4 and [t.get_text() for t in lines.get_legend().get_texts()] == ["chosen", "rejected"]
    assert {tuple(*line.get_xydata()) for line in plots.frontier(MARKS, "t").axes[0].get_lines()} == {(25.0, 50.0)}
    bars = plots.mistakes({"sft": ANSWERS}, "t").axes[0]
    assert [round(bar.get_width()) for bar in bars.patches] == [60, 30, 10]
    assert [t.get_text().replace("\xa0", " ") for t in bars.texts] == ["right 60 %", "WHERE 30 %", "does not run 10 %"]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("right", "right"), ("no query", "no query"), ("refused", "no query"), ("does not run (time)", "does not run"), ("wrong: the filter", "WHERE"),
        ("wrong: what is computed and the filter", "SELECT + WHERE"), ("wrong: what is computed and the grouping or order", "SELECT"),
        ("wrong: the grouping or order", "another part"), ("wrong: the value", "another part"), ("answered the unanswerable", "another part"),
    ],
)  # fmt: skip
def test_families_of_kinds(kind, family):
    assert plots.family(kind) == family and family in plots.KINDS


# ---------------------------------------------------------------- by eye

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def grey(colour: str) -> float:
    """How light a colour prints, 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def alike(fills) -> list:
    """Pairs of (colour, hatch) that print alike: the same hatch, and less than a tenth between the greys."""
    return [(a, b) for a, b in itertools.combinations(fills, 2) if a[1] == b[1] and abs(grey(a[0]) - grey(b[0])) < 0.09]


def test_no_difference_is_in_colour_alone():
    assert alike([("#0072B2", ""), ("#D55E00", ""), ("#E69F00", ""), ("#56B4E9", "")]) == [(("#E69F00", ""), ("#56B4E9", ""))]  # so it can fail
    assert alike(plots.FILLS) == alike(plots.KINDS.values()) == alike([(plots.BLUE, ""), (plots.SKY, "")]) == []
    for which in (1, 2):  # dash, marker
        assert len({line[which] for line in plots.LINES}) == len(plots.LINES)
    used = {fill[0] for fill in [*plots.LINES, *plots.FILLS, *plots.KINDS.values()]}
    assert used - OKABE_ITO == {"#F2F2F2"} and len(plots.KINDS) <= 7


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure (labels, ticks, legends) that lie over each other."""
    figure.canvas.draw()
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other) and one.width and other.width]


def recorded() -> dict:
    return {name: {run["stage"]: run["splits"]["test"]["records"] for run in scoreboard.recorded(name)} for name in ("baselines", "preference")}


def test_no_label_lies_over_another():
    figures = [draw() for draw in DRAW.values()] + [plots.mistakes(records, "t") for records in recorded().values()]
    figures.append(plots.lines({f"a line with a long name, number {i}": curve for i, curve in enumerate(CURVES.values())}, "t", "step", "nats"))
    figures.append(plots.accuracy_bars([r for r in scoreboard.recorded_rows() if r["split"] == "test"], "t"))
    for figure in figures:
        assert overlaps(figure) == [], figure.words
    figures[0].axes[0].xaxis.labelpad = -12  # over the ticks' labels
    assert overlaps(figures[0]) != []


def test_names_fit_into_their_bars():
    for records in recorded().values():
        figure = plots.mistakes(records, "t")
        figure.canvas.draw()
        axis = figure.axes[0]
        bars = [bar.get_window_extent() for bar in axis.patches]
        inside = [t for t in axis.texts if t.get_position()[0] < 100 and t.get_text()]
        assert len(inside) >= len(records)
        for text in inside:
            box = text.get_window_extent()
            assert any(b.x0 <= box.x0 and box.x1 <= b.x1 and b.y0 <= box.y0 and box.y1 <= b.y1 for b in bars), text.get_text()


# ---------------------------------------------------------------- by ear

CELLS = ["from helpers import plots", "plots.loss_curve([{'step': 1, 'loss': 2}, {'step': 2, 'loss': 1}], 'A < B');"]


@pytest.mark.slow
def test_a_notebook_shows_one_image_with_its_text():
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    image, folded = notebook.cells[1].outputs
    text = "A < B. Lines of loss, nats per SQL token by step. loss 2 at 1, 1 at 2."
    assert image.metadata == {"image/png": {"alt": text}} and image.data["text/plain"] == text and image.data["image/png"].startswith("iVBORw0KGgo")
    assert "image/png" not in folded.data and "<details><summary>" in folded.data["text/html"] and "A &lt; B. Lines" in folded.data["text/html"]


def test_a_plot_is_saved_without_a_notebook(tmp_path):
    plots.loss_curve([{"step": 1, "loss": 2}], "t").savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
