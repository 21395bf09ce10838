"""What the app (app.py) does, without its page: a desk that answers with any of the stages, what is drawn and said of a reply, and a fence.

Nothing here knows Gradio, so that the app's rules are tested without a browser.
"""

import base64
import html
import io
import math
import re
import socket
import sys
import threading
import traceback

from helpers import adapters, ask, dpo, flights, plots, sql, worker
from helpers.files import CourseError

STAGES = {"base": "base: as it comes", "sft": "SFT: fine-tuned", "dpo": "DPO: in the house style"}
MADE_BY = {"sft": ("03", "make catch-up STEP=04"), "dpo": ("04", "make catch-up STEP=05")}  # a stage's notebook, and the command that trains it
EXAMPLES = (
    "How many flights left JFK in July?",
    "Average departure delay for each airline?",
    "How many flights were there in each month?",
    "Which five destinations have the most flights?",
    "How many passengers did United carry?",
)
WAITING = 20  # questions that may wait; the next one is told to come again
SHOWN = 200  # rows in the app's table, of the 1,000 that a query may give
BARS = 25  # rows that are drawn as bars
TIMES = {"month": 12, "day": 31, "hour": 24}  # columns that are a line's x where they rise, and how many there can be
NAMES = {"year", "minute", "flight", "tailnum", "dep_time", "arr_time", "sched_dep_time", "sched_arr_time", *TIMES}  # numbers that measure nothing
BODY = 100_000  # bytes of one request: a question has 500 characters
POLICY = (  # a browser's orders: nothing from another place. Gradio compiles its templates, and styles them, on the page
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)


# ---------------------------------------------------------------- the desk


def missing(stage: str) -> str | None:
    """Why a stage can't be asked, in one sentence; None where it can. Nothing is trained for it."""
    if stage not in STAGES:
        return f"There is no model {stage!r}: take {', '.join(STAGES)}."
    if stage == "base" or adapters.have_adapter(dpo.main_runs()[stage][0].folder() / "adapter"):
        return None
    notebook, command = MADE_BY[stage]
    return f"The {stage.upper()} model isn't here: run notebook {notebook} (or {command}), then ask again. Until then, take base."


class Desk:
    """Answers one question at a time, with the model of any stage, loaded when it is first asked for and kept (0.3 GB each in bfloat16).

    `make`: what makes an Asker of a stage (tests hand in a quick one).
    """

    def __init__(self, make=None):
        self._make, self._askers, self._lock = make or _asker, {}, threading.Lock()

    def first(self) -> str:
        """The stage to begin with: SFT where its adapter is there."""
        return "base" if missing("sft") else "sft"

    def load(self, stage: str) -> None:
        """Loads a stage's model now, once. Raises CourseError."""
        with self._lock:
            self._asker(stage)

    def _asker(self, stage: str):
        if stage not in self._askers:
            self._askers[stage] = self._make(stage)
        return self._askers[stage]

    def answer(self, question: str, stage: str = "sft") -> dict:
        """`Asker.answer`'s reply. It always comes: what can't be answered has its sentence in `error`, and nothing of this machine in it."""
        text = question if isinstance(question, str) else ""
        reply = {"question": text[: ask.MAX_QUESTION], "sql": "", "columns": [], "rows": [], "error": None, "notes": [], "confidence": None}
        if not isinstance(question, str) or not isinstance(stage, str):
            return reply | {"error": "A question is a text, and so is a model's name."}
        if len(text) > ask.MAX_QUESTION:  # before a model is loaded for it, and not sent back whole
            return reply | {"error": ask.TOO_LONG.format(length=len(text), limit=ask.MAX_QUESTION)}
        with self._lock:
            try:
                return self._asker(stage).answer(question)
            except CourseError as error:
                return reply | {"error": str(error)}
            except Exception:  # whoever asks gets a sentence; whoever runs the app finds the rest in its log
                traceback.print_exc(file=sys.stderr)
                return reply | {"error": "Something broke while answering. It is in the app's log; ask another question."}

    def close(self) -> None:
        """Ends the processes for strangers' SQL and lets the models go; a later question loads them anew."""
        with self._lock:
            for asker in self._askers.values():
                asker.close()
            self._askers.clear()


def _asker(stage: str):
    if why := missing(stage):
        raise CourseError(why)
    return ask.Asker(stage)


def free_port() -> int:
    """A port of this machine that nothing listens on now, for an app that needs no number of its own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ---------------------------------------------------------------- what is said and shown


def limits() -> str:
    """The app's limits, in words."""
    most = worker.LIMITS
    return (
        f"A question has at most {ask.MAX_QUESTION} characters. The model's SQL is trusted as little as a stranger's: it only reads the tables "
        f"{' and '.join(sql.TABLES)}, in a process of its own, for at most {most.seconds:g} seconds, and gives at most {most.rows:,} rows. "
        f"One question is answered at a time, and {WAITING} may wait. A model this small is often wrong: read the SQL."
    )


def said(reply: dict) -> list[str]:
    """The sentences on a reply: the error, or how many rows there are; then the notes and the confidence. Control characters are written out."""
    if reply["error"]:
        sure = ask.sure(reply) if reply["error"] == flights.REFUSAL else []
        return [sql.printable(reply["error"]), *sure]
    count, most = len(reply["rows"]), worker.LIMITS.rows
    rows = "No rows: nothing in the data fits this query." if not count else f"{count:,} row{'s' * (count > 1)}."
    if count >= most:
        rows = f"{count:,} rows, the most that a query gives; there may be more."
    if count > SHOWN:
        rows += f" The table shows the first {SHOWN}."
    return [rows, *(f"Note: {sql.printable(note)}." for note in reply["notes"]), *ask.sure(reply)]


def told(sentences: list[str]) -> str:
    """Sentences as HTML that a screen reader reads out when they change; whatever is in them is shown as text."""
    return f'<div role="status">{"".join(f"<p>{html.escape(one)}</p>" for one in sentences)}</div>'


def table(reply: dict) -> dict:
    """Columns and the first rows for a table, as texts: {"headers": [...], "data": [[...], ...]}; a NULL is empty."""
    cells = [["" if value is None else sql.printable(str(value), keep="\n\t") for value in row] for row in reply["rows"][:SHOWN]]
    return {"headers": [sql.printable(str(name)) for name in reply["columns"]], "data": cells}


# ---------------------------------------------------------------- the chart


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def chart_kind(columns: list[str], rows: list) -> str | None:
    """What suits a result: "line" (a number over rising months, days or hours), "bars" (a number for each name), or None.

    The last column is the number, and measures something; before it stand one or two that name the row. One row is no chart.
    """
    if not 2 <= len(columns) <= 3 or len(rows) < 2 or columns[-1].lower() in NAMES or not all(is_number(row[-1]) for row in rows):
        return None
    if len(columns) == 2 and (most := TIMES.get(columns[0].lower())):
        across = [row[0] for row in rows]
        if all(is_number(x) for x in across) and 3 <= len(rows) <= most and all(a < b for a, b in zip(across, across[1:], strict=False)):
            return "line"
    names = [row[:-1] for row in rows]
    if any(isinstance(name, float) for row in names for name in row) or len({str(name) for name in names}) < len(rows):
        return None
    return "bars"


def label(text, most: int = 40) -> str:
    """A text for a plot: one line, cut, and without the dollars between which matplotlib reads formulas."""
    text = sql.printable(" ".join(str(text).split()))
    return re.sub(r"([$\\])", r"\\\1", text if len(text) <= most else text[: most - 1] + "…")


_drawing = threading.Lock()  # pyplot is one for all threads


def chart(reply: dict) -> str:
    """The chart of a reply as an HTML image (PNG) with its words as alternative text; "" where none suits."""
    columns, rows = reply["columns"], reply["rows"]
    kind = None if reply["error"] else chart_kind(columns, rows)
    if kind is None:
        return ""
    import matplotlib.pyplot as plt
    import pandas as pd

    what = label(columns[-1])
    with _drawing:
        if kind == "line":
            up = [row[1] for row in rows]
            series = {what: ([row[0] for row in rows], up)}
            figure = plots.lines(series, f"{what} by {columns[0].lower()}", columns[0].lower(), what, floor=None if min(up) < 0 else 0)
        else:
            names = [label(" ".join("NULL" if name is None else str(name) for name in row[:-1])) for row in rows[:BARS]]
            first = f", the first {BARS} of {len(rows):,} rows" if len(rows) > BARS else ""
            frame = pd.DataFrame({what: [row[-1] for row in rows[:BARS]]}, index=names)
            figure = plots.bars(frame, f"{what} by {label(' and '.join(columns[:-1]))}{first}", what, unit="{:,.6g}")
        png = io.BytesIO()
        figure.savefig(png, format="png")
        plt.close(figure)  # pyplot would keep it
    return f'<img alt="{html.escape(figure.words)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'


# ---------------------------------------------------------------- the fence


class Fence:
    """ASGI middleware before the app's routes: a request of more than `BODY` bytes is refused (413), and every answer carries `policy`."""

    def __init__(self, app, policy: str = POLICY, body: int = BODY):
        self.app, self.policy, self.body = app, policy, body

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen, began = 0, False

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body:
                raise _TooLarge
            return message

        async def with_policy(message):
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                extra = [(b"content-security-policy", self.policy.encode())] if self.policy else []
                message = message | {"headers": [*message.get("headers", []), *extra, (b"x-content-type-options", b"nosniff")]}
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if not length.isdigit() or int(length) > self.body:
                raise _TooLarge
            await self.app(scope, counted, with_policy)
        except _TooLarge:
            if not began:
                text = f"A request has at most {self.body:,} bytes here; this one has more.".encode()
                await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain; charset=utf-8")]})
                await send({"type": "http.response.body", "body": text})


class _TooLarge(Exception):
    pass
