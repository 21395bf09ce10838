"""The app in a real, headless browser: asked by keyboard, looked at by axe, with hostile words, and by ten people at once.

It takes Playwright's Python package and a Chromium of the system's (Debian's package; .ci/run installs both); without, it is skipped. A model's
answers are canned queries (benchmarks/crowd.py) that really run, but for one test, which asks the base model: none of these trains one.
"""

import os
import shutil
import socket

import pytest

from benchmarks import crowd
from helpers import dpo
from helpers.files import CourseError
from helpers.shipping import web

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
IN_GRADIO: dict[str, str] = {}  # serious findings of axe that stand, by their rule, with the reason


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio", reason="Gradio isn't installed: pip install -c constraints.txt -e '.[app]'")


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright isn't installed: pip install -c constraints.txt -e '.[browser]'")
    if not (found := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip("no Chromium here: on Debian, apt-get install chromium")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def started(gradio):
    """A function that starts the app over a desk and gives its address; all are ended after the file."""
    import app

    running = []

    def start(desk) -> str:
        page = app.build(desk)
        running.append((page, desk))
        return app.serve(page, web.free_port(), background=True)

    yield start
    for page, desk in running:
        page.close()
        desk.close()


@pytest.fixture(scope="module")
def address(started):
    return started(web.Desk(crowd.Canned))


@pytest.fixture
def page(chromium, address):
    """A page of the app; `page.met` has what it asked for elsewhere, and the errors and dialogs that it met."""
    page = chromium.new_page(viewport={"width": 1000, "height": 800})
    page.met = []
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or page.met.append(request.url))
    page.on("pageerror", lambda error: page.met.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (page.met.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.get_by_label("Your question").wait_for()
    yield page
    page.close()


def ask(page, question):
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def findings(page) -> list[str]:
    """What axe finds serious or critical, and no reason stands for."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical") and v["id"] not in IN_GRADIO]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found]


def test_a_question_by_keyboard_gives_sql_rows_and_chart(page):
    page.locator("body").click(position={"x": 5, "y": 5})
    box = page.get_by_label("Your question")
    for _ in range(10):
        if box.evaluate("one => one === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type("flights in each month")
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("12 rows.").wait_for()
    page.get_by_role("gridcell", name="29425").wait_for()
    chart = page.get_by_role("img", name="flights by month. Lines of flights by month. flights 2.7e+04 at 1")
    chart.wait_for()
    assert chart.evaluate("one => one.complete && one.naturalWidth > 300")
    assert "SELECT month, COUNT(*) AS flights FROM flights" in page.locator(".cm-content").inner_text()
    assert page.get_by_text("Confidence: 50%").count() == 1
    ask(page, "how many")  # one number: the chart goes
    page.get_by_role("gridcell", name="1458").wait_for()
    chart.wait_for(state="detached")
    assert page.met == []  # nothing from another place, no error


def test_a_reader_without_eyes_or_mouse_finds_the_way(page):
    assert findings(page) == []
    page.get_by_role("radio", name="base").focus()
    page.keyboard.press("Tab")  # Gradio gives each radio a name of its own: a tab stop each, and no arrow keys
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('input[value=dpo]').checked && !document.querySelector('input[value=base]').checked")
    page.get_by_role("button", name="Which five").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('textarea').value.startsWith('Which five')")
    ask(page, "each airline")
    page.get_by_text("Note: asked of dpo.").wait_for()
    page.get_by_role("img", name="avg_dep_delay_min by airline. Bars").wait_for()
    assert findings(page) == []
    assert page.get_by_role("status").first.evaluate("one => one.innerText").startswith("16 rows.")


def test_the_look_for_findings_can_fail(page):
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button style=\"color: #ccc; background: #ddd\">Hard to read</button><img src=\"x\">')")
    assert [one.split(":")[0] for one in findings(page)] == ["color-contrast", "image-alt"]


def test_markup_is_shown_as_text_in_question_rows_and_names(page):
    question = "markup <script>document.title = 'stolen'</script><img src=x onerror=alert(1)>"
    ask(page, question)
    page.get_by_role("gridcell", name="<script>document.title").wait_for()
    page.get_by_role("columnheader", name="<b>name</b>").wait_for()
    page.get_by_role("img", name="Bars of n. <img src=x").wait_for()
    assert page.get_by_label("Your question").input_value() == question
    page.wait_for_timeout(300)  # an image's error comes late
    assert page.title() == "Ask the flights" and page.locator("img[src=x]").count() == 0 and page.met == []


def test_what_is_refused_gets_a_sentence(page):
    ask(page, "drop'; DROP TABLE flights; --")
    page.get_by_text("Only SELECT from flights and airports is allowed here").wait_for()
    assert page.get_by_role("grid").count() == 0
    ask(page, "x" * 501)
    page.get_by_text("The question has 501 characters; the limit is 500. Ask something shorter.").wait_for()
    ask(page, "thousands of rows")
    page.get_by_text("1,000 rows, the most that a query gives; there may be more. The table shows the first 200.").wait_for()


def test_a_model_that_is_not_here_is_not_trained(chromium, started, monkeypatch):
    monkeypatch.setattr(dpo, "main_adapter", lambda stage: pytest.fail("trained"))
    page = chromium.new_page()
    page.goto(started(web.Desk()))
    page.get_by_label("SFT").check()
    ask(page, "how many")
    page.get_by_text("The SFT model isn't here: run notebook 03 (or make catch-up STEP=04), then ask again.").wait_for()
    page.close()


def test_whoever_comes_to_a_full_queue_is_told(chromium, started, monkeypatch):
    from gradio_client import Client

    monkeypatch.setattr(web, "WAITING", 1)
    address = started(web.Desk(lambda stage: crowd.Canned(stage, pause=4)))
    page = chromium.new_page()
    page.goto(address)
    page.get_by_label("Your question").wait_for()
    client = Client(address, verbose=False, analytics_enabled=False)
    first = client.submit("how many", "base", api_name="/ask")
    while first.status().code.name not in ("PROCESSING", "ITERATING"):
        page.wait_for_timeout(50)
    second = client.submit("how many", "base", api_name="/ask")
    page.wait_for_timeout(500)
    ask(page, "how many")
    page.get_by_text("This application is currently busy. Please try again.").first.wait_for()
    assert first.result()["rows"] == second.result()["rows"] == [[1458]]  # none of those that waited is lost
    client.close()
    page.close()


def test_ten_people_at_once_and_none_is_lost(gradio):
    with crowd.running() as (process, address):
        found = crowd.crowd(process, address, people=10, seconds=float(os.environ.get("COURSE_CROWD_SECONDS", 9)), stage="base", questions=["how many"])
    third, end = found["memory_mb"]
    assert found["lost"] == 0 and found["answered"] >= 30 and not found["problems"], found
    assert end < third + 30, f"{third:.0f} MB, then {end:.0f}"  # 60 s with a model: python benchmarks/crowd.py


def test_the_base_model_answers_in_the_page(chromium, started):
    """Whatever it writes (it was trained for nothing of this): SQL with rows, or a sentence that says why not."""
    page = chromium.new_page()
    page.set_default_timeout(600_000)
    page.goto(started(web.Desk()))
    ask(page, "How many flights left JFK in July?")
    page.wait_for_function("document.querySelector('[role=status]')?.innerText.length > 5")
    said = page.get_by_role("status").first.inner_text()
    assert said.split()[-1].endswith((".", ")")) and "Something broke" not in said
    page.close()


def test_a_port_that_is_taken_is_named(gradio, monkeypatch):
    import app

    page = app.build(web.Desk(crowd.Canned))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CourseError, match=rf"^Port {port} is in use, by another app perhaps: end that one, or take another: make app PORT={port + 1}\.$"):
            app.serve(page, port, background=True)
    page.close()


def test_requests_that_no_page_makes_are_refused(address):
    import httpx

    big = httpx.post(f"{address}gradio_api/call/ask", json={"data": ["x" * 200_000, "base"]})
    assert big.status_code == 413 and "at most 100,000 bytes" in big.text
    assert httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"more than a byte")}).status_code == 413
    assert httpx.get(f"{address}gradio_api/file=/etc/passwd").status_code == 403
    assert "connect-src 'self'" in httpx.get(address).headers["content-security-policy"]
    assert list(httpx.get(f"{address}gradio_api/info").json()["named_endpoints"]) == ["/ask"]
