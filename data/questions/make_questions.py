"""Makes train, validation, test, unanswerable and near_miss (.jsonl) from phrasings/*.toml, values.py and intents.py.

    python data/questions/make_questions.py                   # writes the files beside this script, and the datasheet's table
    python data/questions/make_questions.py --check           # makes them again in memory and compares, byte for byte
    python data/questions/make_questions.py --second FOLDER   # writes the second edition, which no run has been recorded with yet

Deterministic: the same inputs give the same bytes. A question is kept only when its reference returns something (not
empty, not NULL, not a lone 0) and no tie decides its answer; one with invented values has no result, and needs none: it is
only trained on. In the second edition no training question has `RUN` words in a row of a question that models are scored on.
`freeform.jsonl` isn't made here: its questions were written one by one.
"""

import hashlib
import json
import random
import re
import sqlite3
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from intents import INTENTS, UNANSWERABLE  # noqa: E402
from values import AIRLINES, GROUPS, HELD_OUT, NAMED, NICKNAMES, fill  # noqa: E402

from helpers.flights import REFUSAL, SPLITS, database_path, ngrams, read_jsonl, words  # noqa: E402
from helpers.scoring import tie_variants  # noqa: E402

SIXTH = 6
LEAST = 75  # training questions a kind with real values, at least; half as many with invented ones
ENDING_SHARE = 0.25  # of the training questions get one more filter at their end
TYPO_SHARE = 0.08  # of them a misspelt word or two
RUN = 5  # words in a row that a training question may not share with a held-out one
# Kinds that trained models got wrong most often on validation (three runs: below 70 %, below 85 %) get twice and 1.5 times the questions in
# the second edition; so do, with 1.5, those that can't be answered, which validation has none of: else they would be fewer than before.
HARDEST = """airlines_best_arrival_delay airlines_most_cancellations busiest_planes cancelled_by_month count_cancelled count_early_arrivals
    count_late_arrivals count_late_departures count_made_up count_on_time_arrivals count_on_time_departures count_short_distance list_airlines
    min_departure_delay months_worst_departure_delay most_delayed_arrival origins_most_flights pct_late_arrivals quiet_months""".split()
HARD = """unanswerable air_time_by_origin airlines_best_departure_delay airlines_worst_arrival_delay arrival_delay_by_origin cancelled_by_airline count
    count_airlines count_both_late count_by_hour count_destinations count_early_departures delay_by_origin destinations_most_cancellations
    destinations_worst_arrival_delay list_destinations max_air_time max_arrival_delay max_distance min_air_time pct_airline
    pct_late_departures pct_on_time_departures""".split()
INVENT = 0.8  # of the slots that can hold an invented value, in a question made for that


def query(intent, values: dict, conditions: list[str], styled: bool) -> str:
    """The reference: the intent's SELECT over the rows that its own condition and the slots' select."""
    own = [intent.where.format(**values)] if intent.where else []
    if intent.name == "pct_airline":
        conditions = [c for c in conditions if c != values["airline"]]
    where = " WHERE " + " AND ".join(own + conditions) if own + conditions else ""
    return (intent.styled if styled else intent.bare).format(w=where, **values)


class Checker:
    """Runs references on a narrow copy in memory: is there an answer, and (with `ties`) does no tie decide it?

    Training questions are checked on every sixth flight: what has an answer there has one on all.
    """

    COLUMNS = "month, day, hour, dep_time, dep_delay, arr_delay, carrier, airline, flight, tailnum, origin, dest, dest_city, air_time, distance"

    def __init__(self, ties: bool):
        self.ties = ties
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("ATTACH ? AS source", (str(database_path()),))
        rows = "" if ties else f"WHERE rowid % {SIXTH} = 0"
        self.connection.execute(f"CREATE TABLE main.flights AS SELECT {self.COLUMNS} FROM source.flights {rows}")
        for columns in ("month, day", "dest, month", "dest_city, month", "carrier, month"):
            self.connection.execute(f"CREATE INDEX [{columns}] ON flights ({columns})")
        self.known: dict[str, bool] = {}

    def good(self, sql: str) -> bool:
        if sql not in self.known:
            rows = self.connection.execute(sql).fetchall()
            good = bool(rows) and any(value not in (None, 0) for value in rows[0]) and len(rows) <= 60
            variants = tie_variants(sql) if good and self.ties else []
            self.known[sql] = good and len({str(self.connection.execute(v).fetchall()) for v in variants}) <= 1
        return self.known[sql]


@dataclass(frozen=True)
class Pass:
    """One way through a set of phrasings: how many questions each gives, and with which values."""

    split: str  # the file that gets them
    files: str  # of phrasings
    seed: str
    plain: int = 1  # questions a phrasing
    least: int = 0  # questions a kind, at least: one of few phrasings gets more of each
    again: float = 0.0  # the share of phrasings asked once more, with values held out for `held`
    held: str = "test"
    never: tuple[str, ...] = ()  # splits whose held-out values no question may have
    wide: bool = True  # values written in all the ways of `values`, or only in the first edition's
    invent: float = 0.0  # of the slots that can take an invented value
    endings: float = 0.0  # of the questions get a further filter at their end
    typos: float = 0.0  # of the questions get a misspelt word or two
    nicknames: float = NICKNAMES  # of the places that have other names are called by one
    styled: float = 0.22  # of the training answers
    hard: bool = False  # hard kinds are asked more often

    @property
    def training(self) -> bool:
        return self.split == "train"

    def times(self, name: str) -> int:
        """How many questions each phrasing of a kind gives."""
        return 2 * self.plain if self.hard and name in HARDEST else 3 * self.plain // 2 if self.hard and name in HARD else self.plain


FIRST = [
    Pass("train", "train_*.toml", "train", 3, never=("test",), wide=False),
    Pass("validation", "validation.toml", "validation", never=("test",), wide=False),
    Pass("test", "test.toml", "test", again=0.45, wide=False),
    Pass("unanswerable", "unanswerable_test.toml", "unanswerable", again=1.0, wide=False),
    Pass("near_miss", "near_miss_test.toml", "near_miss", again=1.0, wide=False),
]
TRAINED = Pass(
    "train", "train_*.toml more_*.toml", "train", 2, LEAST, never=("test", "validation"), endings=ENDING_SHARE, typos=TYPO_SHARE,
    nicknames=0.6, styled=0.09, hard=True,
)  # fmt: skip
SECOND = [  # the held-out questions of the first edition, word for word, and more after them
    TRAINED,
    replace(TRAINED, seed="train, invented", least=LEAST // 2, invent=INVENT),
    FIRST[1],
    Pass("validation", "validation.toml", "validation, held out", 0, again=0.35, held="validation", never=("test",)),
    Pass("validation", "validation_more.toml", "validation, more", again=0.35, held="validation", never=("test",)),
    FIRST[2],
    Pass("test", "test_more.toml", "test, more", again=0.35),
    *FIRST[3:],
]


def kinds_of(name: str, phrasing: str) -> set[str]:
    """The groups of slots that a phrasing has, or that its intent rules out: what is asked for isn't filtered on as well."""
    found = {group for group, slots in GROUPS.items() if any("{" + slot + "}" in phrasing for slot in slots)}
    asked = {"airline": "airline", "origin": "origin", "destination": "dest", "month": "time", "day": "time", "hour": "hour", "distance": "size", "plane": "plane"}
    found |= {group for word, group in asked.items() if word in name}
    where = INTENTS[name].bare + INTENTS[name].where
    return found | ({"late"} if "delay" in where or "dep_time" in where else set())


def ended(name: str, phrasing: str, endings: dict[str, list[str]], rng: random.Random) -> str:
    """The phrasing with one more filter at its end, of a kind that it doesn't have."""
    taken = kinds_of(name, phrasing)
    group = rng.choice([g for g in GROUPS if g not in taken] or [None])
    slots = [slot for slot in GROUPS[group] if slot in endings] if group else []
    if not slots:
        return phrasing
    body, mark = re.fullmatch(r"(.*?)([.?!]*)", phrasing.strip()).groups()
    return f"{body}{rng.choice([' ', ' ', ', '])}{rng.choice(endings[rng.choice(slots)])}{mark}"


def misspelt(phrasing: str, rng: random.Random) -> str:
    """One or two words with a letter dropped, doubled, or changed for its neighbour; never a slot."""
    words = phrasing.split(" ")
    long = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
    for i in rng.sample(long, min(len(long), rng.randint(1, 2))):
        at = rng.randint(1, len(words[i]) - 2)
        a, b, c = words[i][:at], words[i][at], words[i][at + 1 :]
        words[i] = rng.choice([a + c, a + b + b + c, a + c[0] + b + c[1:]])
    return " ".join(words)


def real(conditions: list[str], there: set[str]) -> bool:
    """Is one of the conditions' texts a value of the data, or the beginning of one?"""
    said = {text.strip("%").lower() for condition in conditions for text in re.findall(r"'([^']*)'", condition)}
    return bool(said & there) or any(value.startswith(text) for text in said if len(text) > 3 for value in there)


def make(step: Pass, rows: list[dict], flights: list[dict], checkers: dict[bool, Checker], there: set[str], held: set[str]) -> None:
    """Adds a pass's questions to the rows of its file. `there`: every text of the data, which no invented value may be; `held`: the
    splits whose held-out values training never shows."""
    rng, phrasings, endings = random.Random(step.seed), read(step.files), read("endings.toml", checked=False)
    questions = {row["question"].lower() for row in rows}
    away, prefix = HELD_OUT[step.held], "more/" if "_more" in step.files else ""
    unseen = [f for f in flights if AIRLINES.get(f["carrier"]) in away["airline"] or f["dest_city"] in away["dest"] or f["month"] in away["month"]]
    for name in sorted(phrasings):
        for number, phrasing in enumerate(phrasings[name]):
            if step.invent and (name == UNANSWERABLE or not set(re.findall(r"{(\w+)}", phrasing)) & NAMED):
                continue
            made = 0
            wants = [False] * max(step.times(name), -(-step.least // len(phrasings[name]))) + [True] * (rng.random() < step.again)
            for _ in range(max(60, 20 * len(wants))):
                if made == len(wants) or (made and "{" not in phrasing):
                    break
                text = phrasing
                if step.endings and name != UNANSWERABLE and rng.random() < step.endings:
                    text = ended(name, text, endings, rng)
                if step.typos and rng.random() < step.typos:
                    text = misspelt(text, rng)
                flight = rng.choice(unseen if wants[made] else flights)
                other = rng.choice(flights) if step.wide else None
                done = fill(text, flight, rng, step.wide, step.invent, other, step.nicknames)
                if done is None or any(done.held(split) for split in step.never) or (wants[made] and step.plain == 0 and not done.held(step.held)):
                    continue
                if step.invent and (not done.made or real(done.made, there)):
                    continue
                question = done.text
                if step.training and rng.random() < 0.12:
                    question = question.lower()
                styled = step.training and rng.random() < step.styled
                if name == UNANSWERABLE:
                    sql, ordered, style = REFUSAL, False, "bare"
                else:
                    intent = INTENTS[name]
                    reference = query(intent, done.values, done.conditions, styled=False)
                    if not step.invent and not checkers[not step.training].good(reference):
                        continue
                    sql = query(intent, done.values, done.conditions, styled)
                    ordered, style = intent.ordered and done.values["k"] > 1, "styled" if styled else "bare"
                if question.lower() in questions:
                    continue
                questions.add(question.lower())
                made += 1
                row = {"id": f"{step.split}-{len(rows) + 1:04d}", "question": question, "sql": sql, "intent": name, "phrasing": f"{name}/{prefix}{number}"}
                if step.training:
                    row |= {"style": style} | ({"invented": bool(step.invent)} if step.wide else {})
                else:
                    row["held_out"] = any(done.held(split) for split in held)
                rows.append(row | {"ordered": ordered})


def read(pattern: str, checked: bool = True) -> dict[str, list[str]]:
    merged: dict[str, list[str]] = {}
    for path in sorted(path for part in pattern.split() for path in (HERE / "phrasings").glob(part)):
        for name, phrasings in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if checked and name not in INTENTS and name != UNANSWERABLE:
                raise SystemExit(f"{path.name}: no intent is called {name!r}")
            merged.setdefault(name, []).extend(phrasings)
    return merged


def table() -> str:
    """The datasheet's table: size and sha256 of each file, and how much of its wording training has already shown."""
    splits = {split: read_jsonl(HERE / f"{split}.jsonl") for split in SPLITS}
    seen = {gram for row in splits["train"] for gram in ngrams(row["question"])}
    exact = {words(row["question"]) for row in splits["train"]}
    lines = ["| file | questions | phrasings | word triples seen in training | questions seen in training | sha256 |", "|---|---|---|---|---|---|"]
    for split, rows in splits.items():
        shares = [len(grams & seen) / len(grams) for row in rows if (grams := ngrams(row["question"]))]
        same = sum(words(row["question"]) in exact for row in rows)
        overlap = "– | –" if split == "train" else f"{sum(shares) / len(shares):.0%} on average | {same}"
        phrasings = len({row.get("phrasing", row["id"]) for row in rows})
        digest = hashlib.sha256((HERE / f"{split}.jsonl").read_bytes()).hexdigest()
        lines.append(f"| questions/{split}.jsonl | {len(rows):,} | {phrasings:,} | {overlap} | `{digest}` |")
    for path in sorted((HERE.parent / "nycflights").glob("*.parquet")):
        lines.append(f"| nycflights/{path.name} | {len(pd.read_parquet(path)):,} rows | | | | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")
    return "\n".join(lines)


def apart(rows: list[dict], others: list[dict]) -> list[dict]:
    """The rows that share no `RUN` words in a row with the others, and are none of them if they have fewer: what is scored wasn't trained
    on, in part either (Brown et al. 2020 did so with 13 words; these questions are shorter)."""
    held = {run for row in others for run in ngrams(row["question"], RUN)} | {words(row["question"]) for row in others}
    return [row for row in rows if not (ngrams(row["question"], RUN) | {words(row["question"])}) & held]


def build(passes: list[Pass]) -> dict[str, str]:
    """The files of an edition, by split, as their text."""
    columns = ["month", "day", "hour", "carrier", "airline", "flight", "tailnum", "origin", "dest", "dest_city"]
    frame = pd.read_parquet(HERE.parent / "nycflights" / "flights.parquet", columns=columns)
    there = {str(value).lower() for name in ("carrier", "airline", "tailnum", "dest", "dest_city") for value in frame[name].unique()}
    frame = frame.iloc[SIXTH - 1 :: SIXTH]  # rowids count from 1
    # some drawn evenly over the airlines, so that small ones are asked about too
    even = pd.concat([g.sample(300, random_state=0, replace=True) for _, g in frame.groupby("carrier")])
    flights = pd.concat([frame.sample(8000, random_state=0), even]).to_dict("records")
    checkers = {ties: Checker(ties) for ties in (False, True)}
    held = {split for step in passes if step.training for split in step.never}
    files: dict[str, list[dict]] = {}
    for step in passes:
        make(step, files.setdefault(step.split, []), flights, checkers, there, held)
    if passes is SECOND:
        scored = [row for split, rows in files.items() if split != "train" for row in rows] + read_jsonl(HERE / "freeform.jsonl")
        files["train"] = [row | {"id": f"train-{number:04d}"} for number, row in enumerate(apart(files["train"], scored), 1)]
    for split, rows in files.items():
        print(f"{split:13} {len(rows):5} questions, {len({r['phrasing'] for r in rows}):5} phrasings, {len({r['intent'] for r in rows}):3} intents")
    return {split: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for split, rows in files.items()}


def main(check: bool) -> None:
    stale = []
    for split, text in build(FIRST).items():
        path = HERE / f"{split}.jsonl"
        if not check:
            path.write_bytes(text.encode())
        elif path.read_bytes() != text.encode():
            stale.append(path.name)
    sheet = HERE.parent / "README.md"
    old = sheet.read_text(encoding="utf-8")
    new = re.sub(r"(?<=<!-- table -->\n).*?(?=\n<!-- end -->)", lambda _: table(), old, flags=re.S)
    if not check:
        sheet.write_bytes(new.encode())
    elif new != old:
        stale.append(sheet.name)
    if stale:
        raise SystemExit(f"not what the script makes: {', '.join(stale)}; run this script and commit the files")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--second"]:
        for split, text in build(SECOND).items():
            (Path(sys.argv[2]) / f"{split}.jsonl").write_bytes(text.encode())
    else:
        main(check="--check" in sys.argv[1:])
