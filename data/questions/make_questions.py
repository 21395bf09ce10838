"""Makes train, validation, test, unanswerable and near_miss (.jsonl) from phrasings/*.toml and intents.py.

    python data/questions/make_questions.py            # writes the files beside this script, and the datasheet's table
    python data/questions/make_questions.py --check    # makes them again in memory and compares, byte for byte

Deterministic: the same inputs give the same bytes. A question is kept only when its reference returns something (not
empty, not NULL, not a lone 0) and no tie decides its answer. `freeform.jsonl` isn't made here: its questions were written
one by one.
"""

import hashlib
import json
import random
import re
import sqlite3
import sys
import tomllib
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from intents import INTENTS, UNANSWERABLE  # noqa: E402

from helpers.flights import REFUSAL, SPLITS, database_path, ngrams, read_jsonl  # noqa: E402
from helpers.scoring import tie_variants  # noqa: E402

SIXTH = 6
STYLED_SHARE = 0.22  # of the training answers
TRAIN_PER_PHRASING = 3  # examples made from one training phrasing, with other values each
HELD_OUT = {  # values that no training or validation question has: only the test splits do
    "airline": ["Virgin America", "AirTran"],
    "dest": ["Seattle", "SEA", "Denver", "DEN", "Nashville", "BNA", "Salt Lake City", "SLC"],
    "month": [3, 10],
}
AIRLINES = {
    "9E": "Endeavor", "AA": "American", "AS": "Alaska", "B6": "JetBlue", "DL": "Delta", "EV": "ExpressJet",
    "F9": "Frontier", "FL": "AirTran", "HA": "Hawaiian", "MQ": "Envoy", "UA": "United", "US": "US Airways",
    "VX": "Virgin America", "WN": "Southwest", "YV": "Mesa",
}  # fmt: skip  # SkyWest (OO) has 32 flights: too few
ORIGINS = {"JFK": ["JFK", "JFK", "Kennedy"], "EWR": ["Newark", "Newark", "EWR"], "LGA": ["LaGuardia", "LaGuardia", "LGA"]}
MONTHS = "January February March April May June July August September October November December".split()
DELAYS = {15: ["15 minutes", "15 min"], 20: ["20 minutes"], 30: ["30 minutes", "half an hour"], 45: ["45 minutes", "45 min"],
          60: ["an hour", "60 minutes", "1 hour"], 90: ["90 minutes"], 120: ["two hours", "2 hours", "120 minutes"], 180: ["3 hours", "three hours"]}  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 10: "ten"}
MILES = [300, 500, 750, 1000, 1200, 1500, 2000, 2400]


def ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def clock(hour: int, rng: random.Random) -> str:
    if hour == 12 and rng.random() < 0.5:
        return "noon"
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    return rng.choice([f"{twelve} {half}", f"{twelve}{half}", f"{twelve} {half}", f"{hour}:00"])


def fill(phrasing: str, flight: dict, rng: random.Random) -> tuple[str, dict, list[str]] | None:
    """Fills the slots from one real flight (so that the answer isn't empty): question, values, SQL conditions."""
    conditions, values, text = [], {"delay": 0, "k": 1}, phrasing
    slots = re.findall(r"{(\w+)}", phrasing)

    def put(slot, words):
        nonlocal text
        text = text.replace("{" + slot + "}", str(words))

    if "airline" in slots:
        name = AIRLINES.get(flight["carrier"])
        if name is None:
            return None
        code = rng.random() < 0.2
        put("airline", flight["carrier"] if code else name)
        values["airline"] = f"carrier = '{flight['carrier']}'" if code else f"airline LIKE '{name}%'"
        values["held_airline"] = name
        conditions.append(values["airline"])
    if "origin" in slots:
        put("origin", rng.choice(ORIGINS[flight["origin"]]))
        conditions.append(f"origin = '{flight['origin']}'")
    if "dest" in slots:
        code = rng.random() < 0.4
        word = flight["dest"] if code else flight["dest_city"]
        put("dest", word)
        values["dest"] = word
        conditions.append(f"dest = '{word}'" if code else "dest_city = '{}'".format(word.replace("'", "''")))
    month = MONTHS[flight["month"] - 1]
    short = month if rng.random() < 0.8 else month[:3]
    if "month" in slots:
        put("month", short)
        conditions.append(f"month = {flight['month']}")
        values["month"] = {flight["month"]}
    if "months" in slots:
        first = rng.randint(max(1, flight["month"] - 3), flight["month"])
        last = rng.randint(max(first + 1, flight["month"]), min(12, flight["month"] + 3)) if flight["month"] < 12 else 12
        if first == last:
            return None
        a, b = MONTHS[first - 1], MONTHS[last - 1]
        put("months", rng.choice([f"{a} through {b}", f"{a} to {b}", f"{a}-{b}"]))
        conditions.append(f"month BETWEEN {first} AND {last}")
        values["month"] = {first, last}
    if "date" in slots:
        day = flight["day"]
        put("date", rng.choice([f"{short} {day}", f"{short} {ordinal(day)}", f"{month} {day}", f"the {ordinal(day)} of {month}", f"{day} {month}"]))
        conditions.append(f"month = {flight['month']} AND day = {day}")
        values["month"] = {flight["month"]}
    hour = flight["hour"]
    if "hour" in slots:
        put("hour", clock(hour, rng))
        conditions.append(f"hour = {hour}")
    if "before_hour" in slots:
        hour = min(max(hour + rng.randint(1, 3), 6), 22)
        put("before_hour", clock(hour, rng))
        conditions.append(f"hour < {hour}")
    if "after_hour" in slots:
        hour = max(min(hour - rng.randint(0, 2), 22), 7)
        put("after_hour", clock(hour, rng))
        conditions.append(f"hour >= {hour}")
    if "delay" in slots:
        values["delay"] = rng.choice(list(DELAYS))
        put("delay", rng.choice(DELAYS[values["delay"]]))
    if "miles" in slots:
        values["miles"] = rng.choice(MILES)
        put("miles", rng.choice([f"{values['miles']:,}", str(values["miles"])]) + rng.choice([" miles", " miles", " mi"]))
    if "k" in slots:
        values["k"] = rng.choice(list(NUMBERS))
        put("k", rng.choice([values["k"], NUMBERS[values["k"]]]))
    return text, values, conditions


def held_out(values: dict) -> bool:
    months = values.get("month", set())
    return values.get("held_airline") in HELD_OUT["airline"] or values.get("dest") in HELD_OUT["dest"] or bool(months & set(HELD_OUT["month"]))


def query(intent, values: dict, conditions: list[str], styled: bool) -> str:
    own = [intent.where.format(**values)] if intent.where else []
    if intent.name == "pct_airline":
        conditions = [c for c in conditions if c != values["airline"]]
    where = " WHERE " + " AND ".join(own + conditions) if own + conditions else ""
    return (intent.styled if styled else intent.bare).format(w=where, **values)


class Checker:
    """Runs references on a narrow copy in memory: is there an answer, and (with `ties`) does no tie decide it?

    Training questions are checked on every sixth flight: what has an answer there has one on all.
    """

    COLUMNS = "month, day, hour, dep_time, dep_delay, arr_delay, carrier, airline, flight, origin, dest, dest_city, air_time, distance"

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


def make(split: str, phrasings: dict[str, list[str]], plain: int, flights: list[dict], checker: Checker, again: float) -> list[dict]:
    """`plain` questions a phrasing, and for the share `again` of them one more, with held-out values (0: no such value at all)."""
    rng, rows, questions = random.Random(split), [], set()
    unseen = [
        f
        for f in flights
        if AIRLINES.get(f["carrier"]) in HELD_OUT["airline"] or f["dest_city"] in HELD_OUT["dest"] or f["month"] in HELD_OUT["month"]
    ]
    for name in sorted(phrasings):
        for number, phrasing in enumerate(phrasings[name]):
            made = 0
            wants = [False] * plain + [True] * (rng.random() < again)
            for _ in range(60):
                if made == len(wants) or (made and "{" not in phrasing):
                    break
                filled = fill(phrasing, rng.choice(unseen if wants[made] else flights), rng)
                if filled is None or (not again and held_out(filled[1])):
                    continue
                question, values, conditions = filled
                if split == "train" and rng.random() < 0.12:
                    question = question.lower()
                styled = split == "train" and rng.random() < STYLED_SHARE
                if name == UNANSWERABLE:
                    sql, ordered, style = REFUSAL, False, "bare"
                else:
                    intent = INTENTS[name]
                    reference = query(intent, values, conditions, styled=False)
                    if not checker.good(reference):
                        continue
                    sql = query(intent, values, conditions, styled)
                    ordered, style = intent.ordered and values["k"] > 1, "styled" if styled else "bare"
                if question.lower() in questions:
                    continue
                questions.add(question.lower())
                made += 1
                row = {"id": f"{split}-{len(rows) + 1:04d}", "question": question, "sql": sql, "intent": name, "phrasing": f"{name}/{number}"}
                if split == "train":
                    row["style"] = style
                else:
                    row["held_out"] = held_out(values)
                rows.append(row | {"ordered": ordered})
    return rows


def read(pattern: str) -> dict[str, list[str]]:
    merged: dict[str, list[str]] = {}
    for path in sorted((HERE / "phrasings").glob(pattern)):
        for name, phrasings in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if name not in INTENTS and name != UNANSWERABLE:
                raise SystemExit(f"{path.name}: no intent is called {name!r}")
            merged.setdefault(name, []).extend(phrasings)
    return merged


def table() -> str:
    """The datasheet's table: size and sha256 of each file, and how much of its wording training has already shown."""
    splits = {split: read_jsonl(HERE / f"{split}.jsonl") for split in SPLITS}
    seen = {gram for row in splits["train"] for gram in ngrams(row["question"])}
    exact = {" ".join(re.findall(r"\w+", row["question"].lower())) for row in splits["train"]}
    lines = ["| file | questions | phrasings | word triples seen in training | questions seen in training | sha256 |", "|---|---|---|---|---|---|"]
    for split, rows in splits.items():
        shares = [len(grams & seen) / len(grams) for row in rows if (grams := ngrams(row["question"]))]
        same = sum(" ".join(re.findall(r"\w+", row["question"].lower())) in exact for row in rows)
        overlap = "– | –" if split == "train" else f"{sum(shares) / len(shares):.0%} on average | {same}"
        phrasings = len({row.get("phrasing", row["id"]) for row in rows})
        digest = hashlib.sha256((HERE / f"{split}.jsonl").read_bytes()).hexdigest()
        lines.append(f"| questions/{split}.jsonl | {len(rows):,} | {phrasings:,} | {overlap} | `{digest}` |")
    for path in sorted((HERE.parent / "nycflights").glob("*.parquet")):
        lines.append(f"| nycflights/{path.name} | {len(pd.read_parquet(path)):,} rows | | | | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")
    return "\n".join(lines)


def main(check: bool) -> None:
    frame = pd.read_parquet(
        HERE.parent / "nycflights" / "flights.parquet", columns=["month", "day", "hour", "carrier", "origin", "dest", "dest_city"]
    )
    frame = frame.iloc[SIXTH - 1 :: SIXTH]  # rowids count from 1
    # some drawn evenly over the airlines, so that small ones are asked about too
    even = pd.concat([g.sample(300, random_state=0, replace=True) for _, g in frame.groupby("carrier")])
    flights = pd.concat([frame.sample(8000, random_state=0), even]).to_dict("records")
    checkers = {ties: Checker(ties) for ties in (False, True)}
    plan = {  # split: phrasing files, questions a phrasing, share asked once more with held-out values
        "train": ("train_*.toml", TRAIN_PER_PHRASING, 0.0),
        "validation": ("validation.toml", 1, 0.0),
        "test": ("test.toml", 1, 0.45),
        "unanswerable": ("unanswerable_test.toml", 1, 1.0),
        "near_miss": ("near_miss_test.toml", 1, 1.0),
    }
    stale = []
    for split, (pattern, plain, again) in plan.items():
        rows = make(split, read(pattern), plain, flights, checkers[split != "train"], again)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = HERE / f"{split}.jsonl"
        if not check:
            path.write_bytes(text.encode())
        elif path.read_bytes() != text.encode():
            stale.append(path.name)
        print(f"{split:13} {len(rows):5} questions, {len({r['phrasing'] for r in rows}):5} phrasings, {len({r['intent'] for r in rows}):3} intents")
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
    main(check="--check" in sys.argv[1:])
