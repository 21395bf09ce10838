"""The app's logic without a page: what is charted, said and refused; the desk; the fence; a Space's folder. test_browser.py has the page."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import app
from benchmarks.crowd import Canned
from helpers import adapters, ask, dpo, flights, vetting
from helpers.files import CourseError
from helpers.runtime import ROOT
from helpers.shipping import space, web


def reply(columns=(), rows=(), **more):
    found = {"question": "q", "sql": "SELECT 1", "columns": list(columns), "rows": [list(row) for row in rows]}
    return found | {"error": None, "notes": [], "confidence": None} | more


# ---------------------------------------------------------------- the chart


@pytest.mark.parametrize(
    ("columns", "rows", "kind"),
    [
        (["month", "flights"], [(1, 27004), (2, 24951), (3, 28834)], "line"),
        (["hour", "delay"], [(5, 1.5), (6, -2.5), (22, 0)], "line"),
        (["month", "flights"], [(7, 29425), (8, 29327), (10, 28889)], "line"),
        (["month", "flights"], [(7, 29425), (8, 29327), (3, 28834)], "bars"),  # the busiest first: a rank, not a course of time
        (["month", "flights"], [(1, 27004), (2, 24951)], "bars"),  # two points are no line
        (["month", "flights"], [(n, 1) for n in range(13)], "bars"),  # no month of a year
        (["dest_city", "n"], [("Boston", 3), (None, 2)], "bars"),
        (["carrier", "airline", "n"], [("DL", "Delta", 3), ("UA", "United", 2)], "bars"),
        (["n"], [(3,), (4,)], None),
        (["origin", "n"], [("JFK", 3)], None),  # one row
        (["origin", "n"], [], None),
        (["origin", "dest"], [("JFK", "LAX"), ("EWR", "SFO")], None),
        (["carrier", "flight"], [("UA", 1545), ("AA", 1141)], None),  # a number that measures nothing
        (["origin", "month"], [("JFK", 1), ("LGA", 2)], None),
        (["origin", "delay"], [("JFK", 3.0), ("LGA", None)], None),
        (["origin", "delay"], [("JFK", 3.0), ("LGA", float("inf"))], None),
        (["origin", "late"], [("JFK", 3), ("LGA", "inf")], None),  # as `ask.plain` writes an infinity
        (["origin", "n"], [("JFK", 3), ("JFK", 2)], None),  # two bars of one name
        (["distance", "n"], [(229.5, 3), (1400.5, 2)], None),  # numbers against numbers
        (["a", "b", "c", "n"], [(1, 2, 3, 4), (2, 3, 4, 5)], None),
    ],
)
def test_what_suits_a_result(columns, rows, kind):
    assert web.chart_kind(columns, rows) == kind


def test_a_chart_is_an_image_that_says_in_words_what_it_shows():
    bars = web.chart(reply(["origin", "n"], [("JFK", 111279), ("<b>&\"$x_{", 1)]))
    assert bars.startswith('<img alt="n by origin. Bars of n. JFK: 111,279; &lt;b&gt;&amp;&quot;') and bars.count("<") == 1
    assert ' src="data:image/png;base64,iVBOR' in bars
    line = web.chart(reply(["month", "delay"], [(1, -3.0), (2, 4.5), (3, 2.0)]))
    assert "delay by month. Lines of delay by month. delay -3 at 1, 2 at 3, highest 4.5 at 2." in line
    many = web.chart(reply(["dest", "n"], [(f"A{n}", n) for n in range(60)]))
    assert "n by dest, the first 25 of 60 rows" in many and "A24: 24." in many and "A25" not in many
    assert web.chart(reply(["origin", "n"], [("JFK", 1), ("LGA", 2)], error="no")) == web.chart(reply(["n"], [(1,)])) == ""


def test_charts_leave_no_figure_behind():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    web.chart(reply(["origin", "n"], [("JFK", 1), ("LGA", 2)]))
    assert plt.get_fignums() == before


def test_a_plot_takes_any_text_for_a_name():
    assert web.label("a $x$ \\frac") == "a \\$x\\$ \\\\frac"
    assert web.label("x" * 50) == "x" * 39 + "…"
    assert web.label("two\nlines\x1b[2J") == "two lines\\\\x1b[2J"  # the escape is written out, and matplotlib shows its backslash
    assert web.chart(reply(["$\\frac", "$\\n$"], [("$\\alpha", 1), ("\x1b]0;", 2)])).startswith("<img")


# ---------------------------------------------------------------- what is said


def test_what_is_said_of_a_reply():
    assert web.said(reply(["n"], [(1,)])) == ["1 row."]
    assert web.said(reply(["n"], [(1,), (2,)], confidence=0.834, notes=["no airline is called 'Jet Green'"])) == [
        "2 rows.",
        "Note: no airline is called 'Jet Green'.",
        "Confidence: 83% (on the validation questions so many of the answers that it was so sure of were right).",
    ]
    assert web.said(reply(["n"], [])) == ["No rows: nothing in the data fits this query."]
    assert web.said(reply(["n"], [(1,)] * 201)) == ["201 rows. The table shows the first 200."]
    assert web.said(reply(["n"], [(1,)] * 1000)) == ["1,000 rows, the most that a query gives; there may be more. The table shows the first 200."]
    assert web.said(reply(error="a\x1b[2J", confidence=0.9)) == ["a\\x1b[2J"]
    assert web.said(reply(error=flights.REFUSAL, confidence=0.9))[1].startswith("Confidence: 90%")


def test_the_terminal_and_the_app_say_the_same_of_confidence():
    one = reply(["n"], [(1,)], confidence=0.5)
    assert web.said(one)[-1] == ask.show(one).splitlines()[-1]


def test_nothing_that_is_said_is_markup():
    assert web.told(["<script>alert(1)</script>", "a & b"]) == '<div role="status"><p>&lt;script&gt;alert(1)&lt;/script&gt;</p><p>a &amp; b</p></div>'


def test_the_table_has_texts():
    found = web.table(reply(["a\x1b", "n"], [("x\x1b[2J", None), (1, 2.5)] * 150))
    assert found["headers"] == ["a\\x1b", "n"] and found["data"][:2] == [["x\\x1b[2J", ""], ["1", "2.5"]] and len(found["data"]) == 200


def test_the_limits_are_those_that_hold():
    text = web.limits()
    assert all(part in text for part in ("500 characters", "flights and airports", "2 seconds", "1,000 rows", "20 may wait"))


# ---------------------------------------------------------------- the desk


def test_a_stage_without_its_adapter_says_so_and_trains_nothing(monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing may be loaded or trained")

    monkeypatch.setattr(ask, "Asker", never)
    monkeypatch.setattr(dpo, "main_adapter", never)
    desk = web.Desk()
    assert desk.first() == "base" and web.missing("base") is None
    assert desk.answer("How many?", "sft")["error"] == "The SFT model isn't here: run notebook 03 (or make catch-up STEP=04), then ask again. Until then, take base."
    assert "notebook 04 (or make catch-up STEP=05)" in desk.answer("How many?", "dpo")["error"]
    assert desk.answer("How many?", "../../etc")["error"] == "There is no model '../../etc': take base, sft, dpo."
    folder = dpo.main_runs()["sft"][0].folder() / "adapter"
    folder.mkdir(parents=True)
    for name in (vetting.CONFIG, vetting.WEIGHTS):
        (folder / name).touch()
    assert desk.first() == "sft" and web.missing("sft") is None


def test_a_model_is_loaded_once_and_kept():
    made = []

    def make(stage):
        made.append(stage)
        return Canned(stage)

    desk = web.Desk(make)
    desk.load("base")
    notes = [desk.answer("how many", stage)["notes"] for stage in ("base", "dpo", "base", "dpo")]
    assert made == ["base", "dpo"] and notes == [["asked of base"], ["asked of dpo"]] * 2
    desk.close()
    assert desk.answer("how many", "base")["rows"] and made[2:] == ["base"]  # anew
    desk.close()


@pytest.mark.parametrize(
    ("question", "stage", "says"),
    [("x" * 501, "base", "The question has 501 characters; the limit is 500."), (None, "base", "A question is a text"), ({"a": 1}, "base", "A question is a text"), ("x", ["base"], "A question is a text")],
)
def test_what_is_no_question_is_refused_before_a_model_is_loaded(question, stage, says):
    found = web.Desk(lambda stage: pytest.fail("loaded")).answer(question, stage)
    assert says in found["error"] and len(found["question"]) <= 500


def test_hostile_sql_of_the_model_is_refused():
    desk = web.Desk(Canned)
    assert "Only SELECT from flights and airports is allowed here" in desk.answer("drop it all", "base")["error"]
    desk.close()


def test_what_breaks_is_told_without_a_word_of_this_machine(capsys):
    class Broken:
        def answer(self, question):
            raise RuntimeError("/home/me/secret")

    found = web.Desk(lambda stage: Broken()).answer("how many", "base")
    assert found["error"] == "Something broke while answering. It is in the app's log; ask another question."
    assert "/home/me/secret" in capsys.readouterr().err
    refused = web.Desk(lambda stage: (_ for _ in ()).throw(CourseError("Do this next."))).answer("how many", "base")
    assert refused["error"] == "Do this next."


def test_one_question_is_answered_at_a_time():
    busy = threading.Lock()

    class Alone(Canned):
        def answer(self, question):
            assert busy.acquire(blocking=False), "two at a time"
            time.sleep(0.02)
            busy.release()
            return reply()

    desk, found = web.Desk(Alone), []
    threads = [threading.Thread(target=lambda: found.append(desk.answer("how many", "base"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one["error"] for one in found] == [None] * 8


@pytest.mark.parametrize(("there", "says"), [(None, "it isn't installed"), (SimpleNamespace(__version__="5.50.0"), "Gradio 5.50.0 is installed")])
def test_without_its_gradio_the_app_says_what_to_install(monkeypatch, capsys, there, says):
    monkeypatch.setitem(sys.modules, "gradio", there)
    assert app.main(["--port", "1"]) == 1
    assert capsys.readouterr().err == f"\nThe app needs Gradio 6, and {says}: pip install -c constraints.txt -e '.[app]', then start again.\n"


# ---------------------------------------------------------------- the fence


def through(fence, body: list[bytes], length: bytes | None = None):
    """The status and headers that come back through a fence before an app that reads the whole body."""
    parts, sent = list(body), []

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    asyncio.run(fence({"type": "http", "headers": [(b"content-length", length)] if length else []}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


async def reads(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


def test_a_body_beyond_the_limit_is_refused_told_or_not():
    fence = web.Fence(reads, policy="default-src 'self'", body=10)
    assert through(fence, [b"12345", b"67890"], b"10") == (200, {b"content-security-policy": b"default-src 'self'", b"x-content-type-options": b"nosniff"})
    for body, length in (([b"x"], b"11"), ([b"12345", b"67890", b"1"], None), ([b"x"], b"-1"), ([b"x"], b"many")):
        assert through(fence, body, length)[0] == 413
    assert b"content-security-policy" not in through(web.Fence(reads, policy=""), [b""])[1]


# ---------------------------------------------------------------- a Space


def test_every_version_of_a_space_has_one_source():
    pins = space.versions()
    lines = space.requirements().splitlines()
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu" and f"gradio=={pins['gradio']}" in lines and f"torch=={pins['torch']}" in lines
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines[1:])
    assert not any(line.startswith(("pydantic", "playwright", "jupyter")) for line in lines)
    zero = space.requirements("zero-a10g").splitlines()
    assert "torch" in zero and "--extra" not in zero[0]


def test_the_card_says_how_to_run_it():
    from huggingface_hub import SpaceCard

    card = SpaceCard(space.card(["base", "sft"]))
    assert card.data.to_dict() | {"emoji": "", "title": ""} == {
        "title": "", "emoji": "", "colorFrom": "blue", "colorTo": "gray", "sdk": "gradio", "sdk_version": space.versions()["gradio"], "python_version": "3.11",
        "app_file": "app.py", "license": "apache-2.0", "models": ["HuggingFaceTB/SmolLM2-135M-Instruct"], "suggested_hardware": "cpu-basic", "pinned": False,
        "short_description": "Questions about flights, answered with SQL",
    }  # fmt: skip
    assert "Models here: base, sft." in card.text and str(ROOT) not in card.content
    assert len(card.data.to_dict()["short_description"]) <= 60  # as the Hub has it


@pytest.fixture
def adapter():
    """A file in place of SFT's trained adapter: what it holds is vetted elsewhere."""
    folder = dpo.main_runs()["sft"][0].folder() / "adapter"
    folder.mkdir(parents=True)
    for name in (vetting.CONFIG, vetting.WEIGHTS):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_a_space_is_whole_and_stands_alone(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(vetting, "check", lambda folder: None)
    listed = space.write(tmp_path / "space")
    names = {line.split("  ")[0] for line in listed}
    assert {"app.py", "README.md", "requirements.txt", "LICENSE", "helpers/shipping/web.py", f"runs/{adapter.parent.name}/adapter/{vetting.WEIGHTS}"} <= names
    assert not any(re.search(r"course/|tests/|\.pyc|dpo-|\.git", name) for name in names)
    # From that folder alone, nothing of this one: the app is there, SFT's adapter is the recipe's, and the data are found
    program = "import app; from helpers import web, scoreboard, flights; print(web.missing('sft'), 'notebook 04' in web.missing('dpo'), len(scoreboard.recorded('sft')) > 2, flights.database_path().name)"
    environment = {k: v for k, v in os.environ.items() if k not in ("COURSE_RUNS", "PYTHONPATH")} | {"COURSE_KIT": "none"}
    done = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path[0:0] = ['.']; {program}"], cwd=tmp_path / "space", env=environment, capture_output=True, text=True)
    assert done.stdout == f"None True True {flights.database_path().name}\n", done.stderr[-1000:]
    with pytest.raises(CourseError, match="space/ is there already"):
        space.write(tmp_path / "space")


def test_a_space_that_cannot_be_written_leaves_nothing(tmp_path, adapter):
    with pytest.raises(CourseError, match="was not loaded"):  # the adapter is no adapter: nothing is handed on
        space.write(tmp_path / "space")
    with pytest.raises(CourseError, match="There is no recipe for 'a100'"):
        space.write(tmp_path / "space", "a100")
    assert not (tmp_path / "space").exists()


def test_a_full_disk_leaves_no_half_space(small_disk):
    place = small_disk(2)
    with pytest.raises(CourseError, match="No space to make space"):
        space.write(place / "space")
    assert not (place / "space").exists()


def test_the_command_lists_what_would_go(tmp_path, capsys):
    assert space.main([str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert "app.py  " in out and "without sft: its adapter isn't in runs/" in out and "Nothing was sent." in out
    assert adapters.is_adapter(tmp_path / "mine") is False
    assert space.main([str(tmp_path / "mine")]) == 1
