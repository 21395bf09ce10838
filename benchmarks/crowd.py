"""Many people at the app at once: python benchmarks/crowd.py [SECONDS] [PEOPLE] [STAGE]  (60, 10; base, sft, dpo, or canned: no model)

Each asks again as soon as the last question is answered, through Gradio's client, as a page does. Every request must be answered or clearly
refused, and the app's memory stay where it was after the first third.
python benchmarks/crowd.py picture [STAGE]  makes README's picture of the app, in a Chromium of the system's: docs/app.png
"""

import collections
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
START = 300  # seconds that the app has for its start, model and all
CANNED = {  # a word of the question: the query that stands for a model's answer
    "month": "SELECT month, COUNT(*) AS flights FROM flights GROUP BY month ORDER BY month",
    "airline": "SELECT airline, ROUND(AVG(dep_delay), 1) AS avg_dep_delay_min FROM flights GROUP BY airline ORDER BY 2 DESC",
    "markup": "SELECT '<script>document.title = ''stolen''</script>' AS `<b>name</b>`, 1 AS n UNION SELECT '<img src=x onerror=alert(1)>', 2",
    "drop": "DROP TABLE flights",
    "thousands": "SELECT month, day, hour, flight FROM flights LIMIT 1200",
    "": "SELECT COUNT(*) AS n FROM airports",
}


class Canned:
    """In place of `ask.Asker`, where the model isn't the subject: queries from `CANNED`, which run as a model's do."""

    def __init__(self, stage: str, pause: float = 0.0):
        from helpers import flights
        from helpers.worker import Worker

        self.stage, self.pause, self.worker = stage, pause, Worker(flights.database_path())

    def answer(self, question: str) -> dict:
        from helpers import sql

        time.sleep(self.pause)
        query = next(query for word, query in CANNED.items() if word in question)
        reply = {"question": question, "sql": query, "columns": [], "rows": [], "error": None, "notes": [], "confidence": 0.5}
        try:
            found = self.worker.run(query, seconds=20)
        except sql.SqlError as error:
            return reply | {"error": str(error)}
        return reply | {"columns": found.columns, "rows": [list(row) for row in found.rows], "notes": [f"asked of {self.stage}"]}

    def close(self) -> None:
        self.worker.close()


@contextlib.contextmanager
def running(stage: str = "canned", pause: float = 0.0):
    """The app in a process of its own, with `Canned` or a real model: its process and address; ended at the end."""
    from helpers.shipping import web

    port = web.free_port()
    command = [sys.executable, str(Path(__file__)), "serve", str(port), stage, str(pause)]
    process = subprocess.Popen(command, cwd=HERE, env=os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    try:
        for _ in range(10 * START):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None:
                raise SystemExit("The app ended before it began.")
            time.sleep(0.1)
        yield process, f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def serve(port: str, stage: str, pause: str) -> None:
    import app
    from helpers.shipping import web

    desk = web.Desk((lambda name: Canned(name, float(pause))) if stage == "canned" else None)
    if stage != "canned":
        desk.load(stage)
    app.serve(app.build(desk), int(port))


def memory(process) -> float:
    """MB that a process and its children hold."""
    import psutil

    root = psutil.Process(process.pid)
    return sum(one.memory_info().rss for one in (root, *root.children(recursive=True))) / 1e6


def crowd(process, address: str, people: int, seconds: float, stage: str, questions, least: int = 3) -> dict:
    """So many people at the app for so long, with `least` questions each: {"asked", "answered", "refused", "lost", "seconds": of each answer, "memory_mb": at a third, at the end}."""
    from gradio_client import Client

    counts, waits, problems, held = collections.Counter(), [], [], []
    clients = [Client(address, verbose=False, analytics_enabled=False) for _ in range(people)]
    until = time.monotonic() + seconds

    def person(number, client):
        turn = number
        while time.monotonic() < until or turn - number < least:
            turn, began, counts["asked"] = turn + 1, time.monotonic(), counts["asked"] + 1
            try:
                reply = client.predict(questions[turn % len(questions)], stage, api_name="/ask")
                counts["answered"] += bool(reply["sql"] or reply["error"])
                waits.append(time.monotonic() - began)
            except Exception as error:  # told below; the full queue's own words are a clear refusal
                if "Queue is full" in str(error):
                    counts["refused"] += 1
                    time.sleep(0.5)
                else:
                    problems.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=person, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    while counts["answered"] < people and any(thread.is_alive() for thread in threads):  # a slow machine: everybody had an answer
        time.sleep(0.1)
    held.append(memory(process))
    for thread in threads:
        thread.join()
    held.append(memory(process))
    for client in clients:
        client.close()
    found = {name: counts[name] for name in ("asked", "answered", "refused")}
    return found | {"lost": found["asked"] - found["answered"] - found["refused"], "seconds": waits, "memory_mb": held, "problems": problems}


def picture(stage: str = "sft", question: str = "How many flights were there in each month?") -> None:
    """docs/app.png: the page after a question, 900 pixels wide."""
    import shutil

    from playwright.sync_api import sync_playwright

    with running(stage) as (_, address), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.set_default_timeout(1000 * START)
        page.goto(address)
        page.get_by_label("Your question").fill(question)
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('[role=status]')?.innerText.length > 5")
        page.wait_for_timeout(3000)  # the chart is drawn, the bars of waiting are gone
        page.screenshot(path=HERE / "docs" / "app.png", full_page=True)
        print(page.get_by_role("status").first.inner_text())


def main(seconds: str = "60", people: str = "10", stage: str = "base") -> None:
    from helpers.shipping import web

    questions = list(CANNED) if stage == "canned" else list(web.EXAMPLES)
    with running(stage) as (process, address):
        found = crowd(process, address, int(people), float(seconds), stage if stage in web.STAGES else "sft", questions)
    waits, (third, end) = found.pop("seconds"), found.pop("memory_mb")
    print(f"{people} people for {seconds} s, {stage}: {found}")
    print(f"answers after {statistics.median(waits):.1f} s in the middle, {max(waits):.1f} s at most; memory {third:,.0f} MB after a third, {end:,.0f} MB at the end")
    if found["lost"] or end > 1.1 * third:
        raise SystemExit("Lost requests, or memory that grew by more than a tenth.")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    command = {"serve": serve, "picture": picture}.get(sys.argv[1] if sys.argv[1:] else "")
    command(*sys.argv[2:]) if command else main(*sys.argv[1:])
