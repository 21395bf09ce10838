"""Judging in a process of its own against judging in this one: python benchmarks/judging.py [answers]  (a minute)

Answers that behave, as trained models write them: the recorded wrong and right ones can't be had back, so each reference of the
validation questions is judged as it is, styled otherwise (run on all three instances) and broken (mostly found out on the first).
Loading, too: the train split's 4,112 rows, and 200 own rows whose SQL is run. Rounds turn about; medians.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5


def answers(count: int) -> list[tuple[str, str, bool]]:
    """(answer, reference, ordered): never the reference's own text, which is right without being run."""
    from helpers import flights

    rows = [row for row in flights.load_questions("validation") if row["sql"] != flights.REFUSAL][:count]
    found = []
    for row in rows:
        found.append((row["sql"].replace("SELECT ", "SELECT  ", 1).replace(" FROM", "\nFROM /* */", 1), row["sql"], row["ordered"]))
        found.append((row["sql"].replace("JFK", "LGA").replace("AVG", "MAX").replace("COUNT(*)", "COUNT(dep_time)"), row["sql"], row["ordered"]))
    return found


class Here:
    """In place of `worker.Worker`: the query in this process."""

    def __init__(self, path, limits=None):
        from helpers import sql

        self.connection = sql.connect(path)

    def run(self, query, seconds=2.0):
        from helpers import sql

        return sql.execute(self.connection, query, sql.Limits(seconds=seconds))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()


def main(count: int) -> None:
    from helpers import domain, flights, scoring

    asked, worker = answers(count), domain.Worker
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.jsonl"
        rows = [row for row in flights.load_questions("validation") if row["sql"] != flights.REFUSAL][:200]
        own.write_text("".join(json.dumps({"question": r["question"], "sql": r["sql"]}) + "\n" for r in rows), encoding="utf-8")

        def judged():
            judge = scoring.Judge()
            with contextlib.ExitStack() as stack:
                for one in judge.workers:
                    stack.enter_context(one)
                    one.run("SELECT 1")  # the process is there
                start = time.perf_counter()
                verdicts = [judge.judge(*one)["kind"] for one in asked]
                return time.perf_counter() - start, verdicts

        def loaded():
            start = time.perf_counter()
            return len(flights.load_questions(own)), time.perf_counter() - start

        seconds, verdicts = {}, {}
        for _ in range(ROUNDS):
            for name, kind in (("here", Here), ("own process", worker)):
                domain.Worker = kind
                taken, verdicts[name] = judged()
                seconds.setdefault(f"judging, {name}", []).append(taken)
                seconds.setdefault(f"loading, {name}", []).append(loaded()[1])
        domain.Worker = worker
        assert verdicts["here"] == verdicts["own process"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for what in ("judging", "loading"):
        here, there = median[f"{what}, here"], median[f"{what}, own process"]
        print(f"{what}: here {here:.2f} s, in a process of its own {there:.2f} s ({there / here:.2f} times)")
    print(f"{len(asked)} answers, {sum(kind == 'right' for kind in verdicts['here'])} right; 200 rows")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 150)
