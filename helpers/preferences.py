"""Answers judged by the house rules, and the preference pairs of notebook 04 made of them.

    python -m helpers.preferences make     # samples (a quarter of an hour on 2 cores) and writes data/preferences/*.jsonl
    python -m helpers.preferences check    # judges every committed pair again: right, wrong, styled as it says?

For each of `QUESTIONS` training questions the model of notebook 03 answers `SAMPLES` times at temperature 1; each answer
is run and judged. From the same samples come
style.jsonl         two right answers, one in the house style by `house.PAIRED`, the other less so
correctness.jsonl   a right and a wrong answer
off_policy.jsonl    the pairs of style.jsonl, the chosen answer rewritten in a form that the model never writes
Sampling rounds differently on another processor, so a new run gives other pairs of the same kind; these are committed.
"""

import argparse
import json
import random
import sys

import sqlglot
from sqlglot import exp

from helpers import adapters, dpo, flights, generation, house, intervals, models, scoring, sql, training
from helpers.command import status
from helpers.domain import Domain
from helpers.files import write_whole
from helpers.flights import FLIGHTS
from helpers.house import share
from helpers.runtime import setup

QUESTIONS, SAMPLES, TEMPERATURE, SEED = 1000, 4, 1.0, 0


# ---------------------------------------------------------------- style


def judged(row: dict, answers: list[str], domain: Domain = FLIGHTS) -> list[dict]:
    """The different ones of several answers to a question: {"answer", "correct", "kept", "style"} each.

    `kept` tells which rules of `house.RULES` a right answer keeps, of those that apply; `style` is the share kept of
    `house.PAIRED`, the only rules by which pairs are made. A wrong answer has no style: {} and 0.
    """
    found = []
    for answer in dict.fromkeys(answers):
        verdict = scoring.judge(domain).judge(answer, row["sql"], bool(row.get("ordered")))
        kept = rules_kept(verdict["sql"], domain=domain) if verdict["correct"] else {}
        found.append({"answer": answer, "correct": verdict["correct"], "kept": kept, "style": share(kept, house.PAIRED) if kept else 0.0})
    return found


def rules_kept(query: str, which: int = -1, domain: Domain = FLIGHTS) -> dict[str, bool]:
    """The house rules that apply to a query, each kept or not; {} if it doesn't run (a refusal) or none applies.

    `which` instance of `scoring.judge` gives the result: -1 the real database, 0 a small one (many times faster).
    A slow machine must not change a style: the time limit is far beyond that of scoring, and passing it is an error (SqlError).
    """
    try:
        return house.kept(query, scoring.judge(domain).run(which, query, seconds=60))
    except sql.SqlError as error:
        if error.reason == "time":
            raise
        return {}


def with_style(records: list[dict], domain: Domain = FLIGHTS) -> list[dict]:
    """Per-question records (`scoring.execution_accuracy`) with `kept`, the house rules of each right answer; a wrong one has none."""
    return [r | {"kept": rules_kept(r["sql"], domain=domain) if r["correct"] and r["sql"] else {}} for r in records]


def style_scores(records: list[dict], rules=tuple(house.RULES)) -> list[float]:
    """For each question the share of the `rules` that its answer keeps; 0 where the answer is wrong (no less than a right one that keeps none)."""
    return [share(r.get("kept", {}), rules) if r["correct"] else 0.0 for r in records]


def wins(runs: list[list[dict]], others: list[list[dict]], rules=tuple(house.RULES)) -> tuple[intervals.Score | None, dict[str, int]]:
    """Style of one system against another, on the questions that both answer rightly: (win rate without ties, the counts).

    `runs` and `others` hold one list of records a seed; the larger share of the `rules` kept wins. The interval resamples
    phrasings; all seeds' answers to a phrasing stay together. None instead of a rate where every comparison is a tie.
    """
    counts, decided = {"win": 0, "tie": 0, "loss": 0, "not both right": 0}, []
    for mine, theirs in zip(runs, others, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if not (a["correct"] and b["correct"]):
                counts["not both right"] += 1
                continue
            gain = share(a.get("kept", {}), rules) - share(b.get("kept", {}), rules)
            counts["tie" if not gain else "win" if gain > 0 else "loss"] += 1
            if gain:
                decided.append(a | {"correct": gain > 0})
    return (intervals.score(decided) if decided else None), counts


# ---------------------------------------------------------------- pairs


def pair(row: dict, chosen: dict, rejected: dict) -> dict:
    """One line of a preference file."""
    return {"id": row["id"], "intent": row["intent"], "prompt": row["question"], "chosen": chosen["answer"], "rejected": rejected["answer"]}


def style_pair(row: dict, answers: list[str]) -> dict | None:
    """Of a question's right answers the one that keeps most of the paired rules, against the one that keeps fewest; None at a tie."""
    right = [a for a in judged(row, answers) if a["correct"] and a["kept"]]
    best, worst = (f(right, key=lambda a: a["style"], default=None) for f in (max, min))
    return pair(row, best, worst) if right and best["style"] > worst["style"] else None


def correctness_pair(row: dict, answers: list[str]) -> dict | None:
    """A right answer against a wrong one, the first sampled of each; None if all are right or all wrong."""
    found = judged(row, answers)
    right, wrong = ([a for a in found if a["correct"] is which] for which in (True, False))
    return pair(row, right[0], wrong[0]) if right and wrong else None


def questions() -> list[dict]:
    """The training questions that are asked: answerable, as even over the intents as it goes, never those of validation or test."""
    train = flights.load_questions("train").filter(lambda row: row["sql"] != flights.REFUSAL)
    return list(flights.subset(train, QUESTIONS, SEED))


def sample(rows: list[dict]) -> list[list[str]]:
    """`SAMPLES` answers to each question from the SFT model at `TEMPERATURE`."""
    model, tokenizer = adapters.load_adapter(training.sft_adapter()), models.load_tokenizer()
    chats = [flights.chat(row["question"]) for row in rows for _ in range(SAMPLES)]
    answers = generation.generate(model, tokenizer, chats, batch_size=64, temperature=TEMPERATURE, progress="sampling")
    return [answers[i : i + SAMPLES] for i in range(0, len(answers), SAMPLES)]


def foreign(query: str) -> str:
    """The same query on many lines, with an alias for the table before each column: right, styled, and never written by the model."""
    tree = sqlglot.parse_one(query, dialect="sqlite")
    names = {c.alias_or_name for c in tree.selects if isinstance(c, exp.Alias)}
    for table in tree.find_all(exp.Table):
        table.set("alias", exp.TableAlias(this=exp.to_identifier("f")))
    for column in tree.find_all(exp.Column):
        if column.name not in names:
            column.set("table", exp.to_identifier("f"))
    return tree.sql(dialect="sqlite", pretty=True)


def off_policy_pair(row: dict) -> dict:
    return row | {"chosen": foreign(scoring.extract_sql(row["chosen"]))}


def write(name: str, pairs: list[dict]) -> None:
    random.Random(SEED).shuffle(pairs)
    write_whole(dpo.PREFERENCES / f"{name}.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs))
    print(f"{name}: {len(pairs)} pairs", flush=True)


def problems() -> list[str]:
    """What is wrong with the committed pairs, judged anew."""
    rows, found = {r["id"]: r for r in flights.load_questions("train")}, []
    for name in dpo.CONSTRUCTIONS:
        for number, pair in enumerate(dpo.load_pairs(name), 1):
            row = rows.get(pair["id"], {})
            if row.get("question") != pair["prompt"]:
                found.append(f"{name} line {number}: not a training question")
                continue
            chosen, rejected = (judged(row, [pair[side]])[0] for side in ("chosen", "rejected"))
            good = chosen["style"] > rejected["style"] and rejected["correct"] if name != "correctness" else not rejected["correct"]
            if not (chosen["correct"] and good):
                found.append(f"{name} line {number}: chosen {chosen}, rejected {rejected}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.preferences", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "check"])
    return status(command, parser.parse_args().command)


def command(what: str) -> int:
    setup(SEED)
    if what == "check":
        found = problems()
        print("\n".join(found) or "every pair is as it says")
        return bool(found)
    rows = questions()
    answers = sample(rows)
    style = [p for row, own in zip(rows, answers, strict=True) if (p := style_pair(row, own))]
    write("style", style)
    write("correctness", [p for row, own in zip(rows, answers, strict=True) if (p := correctness_pair(row, own))])
    write("off_policy", [off_policy_pair(p) for p in dpo.load_pairs("style")])
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
