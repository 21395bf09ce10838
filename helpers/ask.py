"""`python -m helpers.ask "How many flights left JFK in July?"`: asks the model, runs its SQL safely, prints both.

--stage base|sft|dpo picks the model as it comes, fine-tuned, or tuned to the house style; --jsonl reads one question a line from standard input and
writes one JSON object a line: question, sql, columns, rows, error, notes (values in the query that the data doesn't have), confidence (0 to 1,
or null where none was measured).
"""

import argparse
import contextlib
import json
import math
import sys

from helpers import adapters, confidence, dense, dpo, flights, generation, jsonl, models, sql, unknown
from helpers.command import status
from helpers.extract import extract_sql
from helpers.menu import COURSE_MODEL, choose
from helpers.runtime import setup
from helpers.worker import Worker

MAX_QUESTION = 500  # characters


class Asker:
    """A loaded model and a worker process for its SQL. `stage`: base (the model as it comes), sft or dpo (notebooks 03 and 04)."""

    def __init__(self, stage: str = "sft"):
        setup()
        self.system = flights.SCHEMA_PROMPT if stage == "base" else flights.SYSTEM_PROMPT
        self.tokenizer = models.load_tokenizer()
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers
            self.model = models.load_model() if stage == "base" else adapters.load_adapter(dpo.main_adapter(stage))
        self.whole = contextlib.ExitStack()
        self.whole.enter_context(dense.written_out(self.model))  # once, not once a question
        self.worker = Worker(flights.database_path())
        self.calibration = confidence.recorded(stage) if choose().name == COURSE_MODEL else None

    def answer(self, question: str, length: int | None = None) -> dict:
        """{"question", "sql", "columns", "rows", "error", "notes", "confidence"}: error is None or one sentence, notes are sentences on values
        that the query names and no row has, confidence is the share of answers that were right where the model was so sure (None where
        that wasn't recorded). `length`: of a question that isn't here whole."""
        reply = {"question": question, "sql": "", "columns": [], "rows": [], "error": None, "notes": [], "confidence": None}
        if not question.strip():
            return reply | {"error": "The question is empty: type one, such as: How many flights left JFK in July?"}
        if (length := length or len(question)) > MAX_QUESTION:
            return reply | {"error": f"The question has {length:,} characters; the limit is {MAX_QUESTION}. Ask something shorter."}
        (text,), _ = generation.ask(self.model, self.tokenizer, [{"question": question}], self.system, logps=(logps := []))
        reply |= {"sql": extract_sql(text), "confidence": round(self.calibration(logps[0]), 2) if self.calibration else None}
        if not reply["sql"]:
            return reply | {"error": flights.REFUSAL if flights.REFUSAL[:-1] in text else "The model wrote no query; try other words."}
        try:
            result = self.worker.run(reply["sql"])
        except sql.SqlError as error:
            return reply | {"error": str(error)}
        notes = unknown.named(reply["sql"], self.worker)
        return reply | {"columns": result.columns, "rows": [[plain(value) for value in row] for row in result.rows], "notes": notes}

    def close(self) -> None:
        self.worker.close()
        self.whole.close()


def plain(value):
    """A value of SQLite's as JSON knows it: a blob as SQLite writes one, X'00FF', and an infinity as the text "inf"."""
    if isinstance(value, bytes):
        return f"X'{value.hex().upper()}'"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(reply: dict, limit: int = 20) -> str:
    """The reply as a person reads it: the SQL, then the rows or the error. Control characters are written out, so that no answer steers a
    terminal or breaks the table."""
    lines = [sql.printable(reply["sql"], keep="\n\t")] if reply["sql"] else []
    said = reply.get("confidence")
    sure = [] if said is None else [f"Confidence: {said:.0%} (on the validation questions so many of the answers that it was so sure of were right)."]
    if reply["error"]:
        return "\n".join([*lines, sql.printable(reply["error"]), *(sure if reply["error"] == flights.REFUSAL else ())])
    rows = [reply["columns"]] + [["" if v is None else v for v in row] for row in reply["rows"][:limit]]
    cells = [[sql.printable(str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if len(reply["rows"]) > limit:
        lines.append(f"… {len(reply['rows']) - limit} more rows")
    lines += [f"Note: {sql.printable(note)}." for note in reply.get("notes", ())]
    return "\n".join([*lines, *sure])


def answer(chosen) -> int:
    """Answers the one question, or each line of standard input."""
    with contextlib.closing(Asker(chosen.stage)) as asker:
        if not chosen.jsonl:
            reply = asker.answer(chosen.question)
            print(show(reply))
            return 1 if reply["error"] else 0
        for raw in jsonl.lines(sys.stdin.buffer):
            question = raw.decode("utf-8-sig", errors="replace").rstrip("\r\n")
            reply = asker.answer(question, getattr(raw, "length", None))
            print(json.dumps(reply, allow_nan=False), flush=True)  # ASCII, for any code page
    return 0


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.ask", description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", help="a question in plain English")
    parser.add_argument("--stage", choices=["base", *dpo.main_runs()], default="sft", help="as it comes, fine-tuned, or in the house style (trained if need be)")
    parser.add_argument("--jsonl", action="store_true", help="one question a line from standard input, one JSON object a line out")
    chosen = parser.parse_args(arguments)
    if not chosen.jsonl and not chosen.question:
        parser.error("give a question in quotes, or --jsonl with questions on standard input")
    return status(answer, chosen)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
