"""The flights database, the questions asked of it, and the prompts that carry them to the model."""

import contextlib
import functools
import hashlib
import inspect
import itertools
import re
import sqlite3
from pathlib import Path

from helpers import jsonl, sql
from helpers.domain import Domain
from helpers.extract import extract_sql, reads_whole
from helpers.files import CourseError, building, told
from helpers.menu import choose
from helpers.runtime import DATA, cache_dir

QUESTIONS = DATA / "questions"
SPLITS = ("train", "validation", "test", "freeform", "unanswerable", "near_miss")
REFUSAL = "The flights data can't answer that."  # the one fixed form of a refusal
SYSTEM_PROMPT = "Answer with SQL."  # training moves the schema into the weights, so the prompt can be short

SCHEMA_PROMPT = f"""\
You turn questions about flights into one SQLite query. Answer with the query only.
Table flights: every flight that left New York City in 2013. Columns:
year, month (1-12), day, hour (0-23, of scheduled departure), minute,
dep_time, dep_delay (minutes, negative = early, NULL = cancelled), arr_time, arr_delay (minutes),
carrier (code, 'DL'), airline (full name, 'Delta Air Lines Inc.'), flight (number), tailnum,
origin ('JFK', 'EWR' = Newark, 'LGA' = LaGuardia), dest (airport code, 'LAX'), dest_city ('Los Angeles'),
air_time (minutes), distance (miles).
On time means a delay <= 0; cancelled means dep_time IS NULL; match an airline's name with LIKE 'Delta%'.
If the table can't answer, reply exactly: {REFUSAL}"""


# ---------------------------------------------------------------- the database


@functools.cache
def _version() -> str:
    """Eight hex digits that change when the data does, so that a cached database is never stale."""
    digest = hashlib.sha256()
    for name in ("flights", "airports"):
        digest.update((DATA / "nycflights" / f"{name}.parquet").read_bytes())
    return digest.hexdigest()[:8]


def database_path() -> Path:
    """The SQLite file (31 MB): every flight out of New York in 2013, built from Parquet on first use in a few seconds."""
    return _built(f"flights-{_version()}.db", lambda flights: flights)


def perturbed_paths() -> list[Path]:
    """Two small instances (30,000 flights each) on which a query that is right only by luck gives itself away.

    Rows are resampled with replacement, columns that belong together are shuffled against the others, and measured
    values stretched so that extremes move (see `perturb`), as test suites for text-to-SQL do (Zhong et al.
    2020, "Semantic Evaluation for Text-to-SQL with Distilled Test Suites"). Deterministic.
    """
    recipe = hashlib.sha256((inspect.getsource(perturb) + repr(BLOCKS)).encode()).hexdigest()[:4]
    return [_built(f"flights-{_version()}-{recipe}-{seed}.db", functools.partial(perturb, seed=seed)) for seed in (1, 2)]


# Columns of one block stay together, so that equal ways to ask (carrier = 'DL', airline LIKE 'Delta%') stay equal.
BLOCKS = (
    ("month", "day"),
    ("hour", "minute", "sched_dep_time"),
    ("carrier", "airline", "flight", "tailnum"),
    ("origin",),
    ("dest", "dest_city", "distance"),
    ("dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay", "air_time"),
)


def perturb(flights, seed: int, rows: int = 30_000):
    """A resampled copy of the flights frame: each block permuted by its own permutation, measured values stretched.

    Delays, air time and distance are multiplied by factors that depend on origin, carrier, month, hour and destination;
    in the second instance the factors' order is reversed. So the longest flight of all can't be JFK's in both, and a
    query that forgets the filter is found out.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    sample = flights.iloc[rng.integers(0, len(flights), rows)].reset_index(drop=True)
    for block in BLOCKS:
        order = rng.permutation(rows)
        for column in block:
            sample[column] = sample[column].iloc[order].array
    stretch = rng.uniform(0.98, 1.02, rows)
    for column in ("origin", "carrier", "month", "hour", "dest"):
        kinds = sorted(flights[column].unique())
        factors = np.random.default_rng(0).permutation(np.linspace(0.8, 1.25, len(kinds)))
        stretch *= sample[column].map(dict(zip(kinds, factors if seed % 2 else 1 / factors, strict=True))).to_numpy(float)
    for column in ("dep_delay", "arr_delay", "air_time", "distance"):
        sample[column] = (sample[column].astype("Float64") * stretch).round().astype("Int64")
    return sample


@functools.cache
def _built(name: str, change) -> Path:
    target = cache_dir() / name
    if target.is_file() and not _is_whole(target):
        with told(target.name):
            target.unlink()
    with building(target, need_bytes=150_000_000) as scratch:
        if scratch is not None:
            import pandas as pd

            frames = {n: pd.read_parquet(DATA / "nycflights" / f"{n}.parquet") for n in ("flights", "airports")}
            frames["flights"] = change(frames["flights"])
            with contextlib.closing(sqlite3.connect(scratch)) as connection:
                for table, frame in frames.items():
                    frame.to_sql(table, connection, index=False)
                connection.commit()
    return target


def _is_whole(database: Path) -> bool:
    """Whether a SQLite file is as long as its header says (SQLite's file format, 1.3): a copy that broke off is not."""
    with open(database, "rb") as file:
        head = file.read(100)
    size = int.from_bytes(head[16:18], "big")  # of a page, in bytes; 1 is 65,536
    return head[:16] == b"SQLite format 3\0" and database.stat().st_size == (65536 if size == 1 else size) * int.from_bytes(head[28:32], "big")


@functools.cache
def names() -> dict[str, str]:
    """Lower-cased airline, airport and (where it has one airport) city names, to their codes."""
    import pandas as pd

    flights = pd.read_parquet(DATA / "nycflights/flights.parquet", columns=["carrier", "airline", "dest", "dest_city"])
    airports = pd.read_parquet(DATA / "nycflights/airports.parquet", columns=["faa", "name"])
    served = set(flights["dest"]) | {"JFK", "EWR", "LGA"}
    found = {name.lower(): code for code, name in airports.itertuples(index=False) if code in served}
    found |= {name.lower(): code for code, name in flights[["carrier", "airline"]].drop_duplicates().itertuples(index=False)}
    single = flights[["dest_city", "dest"]].drop_duplicates().drop_duplicates("dest_city", keep=False)
    return found | {city.lower(): code for city, code in single.itertuples(index=False)}


FLIGHTS = Domain(database_path, SCHEMA_PROMPT, REFUSAL, SYSTEM_PROMPT, sql.TABLES, perturbed_paths, names)


# ---------------------------------------------------------------- the questions


def read_jsonl(path: str | Path, required=("question", "sql"), check_sql: bool = False, check=None, same=None, domain: Domain = FLIGHTS) -> list[dict]:
    """Reads JSON Lines whole or not at all (`jsonl.read`): every problem is listed with file, line, field and remedy (CourseError).

    With `check_sql`, each `sql` is run on the domain's database: in a process of its own, since anyone may have written it, read-only
    and bounded; and it must be one that the scorer would read whole in an answer. A `check` of your own is called with each row and
    raises CourseError; `same` says which rows may not stand together (`jsonl.read`).
    """
    with domain.worker() if check_sql else contextlib.nullcontext() as worker:

        def looked_at(row):
            if check_sql:
                check_readable(row["sql"], domain.refusal)
            if check:
                check(row)

        def run(row):
            if row["sql"] != domain.refusal:
                try:
                    worker.run(row["sql"])
                except sql.SqlError as error:
                    raise CourseError(f"field 'sql' doesn't run: {error}") from None

        return jsonl.read(path, required, looked_at, run if check_sql else None, same=same)


def check_readable(query: str, refusal: str = REFUSAL) -> None:
    """CourseError for a reference that could not be answered: a refusal in other letters, or SQL of which `extract_sql` reads a part."""
    if query == refusal:
        return
    if (size := len(query.encode())) > sql.Limits.sql_bytes:
        raise CourseError(f"field 'sql' has {size:,} bytes; a query may have {sql.Limits.sql_bytes:,}")
    if re.sub(r"[^a-z]", "", query.lower()) == re.sub(r"[^a-z]", "", refusal.lower()):
        raise CourseError(f"field 'sql' is the refusal in other letters; write it so: {refusal}")
    if not reads_whole(query):
        read = extract_sql(query)
        reads = f"only {read[:60]!r}" if read else "nothing"
        raise CourseError(f"field 'sql': of an answer like this the scorer reads {reads}; write one query that begins with SELECT or WITH, or exactly the refusal: {refusal}")


def load_questions(split: str | Path, half: str | None = None, domain: Domain = FLIGHTS):
    """A split by name (`train`, `validation`, `test`, `freeform`, `unanswerable`, `near_miss`) or your own JSON Lines file, about your own `domain` or the flights.

    Returns a `datasets.Dataset` with at least the columns question and sql. `half` keeps "development" or "final".
    """
    from datasets import Dataset

    name = str(split)
    rows = read_jsonl(QUESTIONS / f"{name}.jsonl" if name in SPLITS else split, check_sql=name not in SPLITS, domain=domain)
    if half and not any(row.get("half") == half for row in rows):
        raise CourseError(f"{Path(name).name} has no rows of the half {half!r}: leave `half` out, or write the field \"half\" in the file.")
    return Dataset.from_list([row for row in rows if not half or row["half"] == half])


def subset(questions, n: int = 100, seed: int = 0):
    """A fixed sample of n questions, as even over the intents, where they have such, as it goes (every notebook scores on the same one)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    queues: dict[str, list[int]] = {}
    for i in rng.permutation(len(questions)):
        queues.setdefault(questions[int(i)].get("intent") or "", []).append(int(i))
    rounds = itertools.zip_longest(*(queues[intent][::-1] for intent in sorted(queues)))  # one of each intent, then again
    chosen = [i for turn in rounds for i in turn if i is not None]
    return questions.select(sorted(chosen[:n]))


def words(question: str) -> tuple[str, ...]:
    """A question's words, whatever stands between them: two that differ by capitals and punctuation alone have the same."""
    return tuple(re.findall(r"\w+", question.lower()))


def ngrams(question: str, n: int = 3) -> set[tuple[str, ...]]:
    """The word n-grams of a question, lower-cased, punctuation dropped."""
    words = re.findall(r"[a-z0-9']+", question.lower())
    return set(zip(*(words[i:] for i in range(n)), strict=False))


# ---------------------------------------------------------------- the prompts


def chat(question: str, system: str = SYSTEM_PROMPT, shots=()) -> list[dict]:
    """The conversation that asks `question`: a system prompt, then `shots` (rows with question and sql), then it.

    For Gemma and Mistral (COURSE_MODEL) the system prompt begins the first user turn: Gemma's template refuses system
    messages, Mistral's puts them into the last turn if that is the user's, so that a prompt changes once it is answered.
    """
    roles = ["system", *["user", "assistant"] * len(shots), "user"]
    said = [system, *(shot[part] for shot in shots for part in ("question", "sql")), question]
    if choose().shape["model_type"] in ("gemma", "mistral"):
        roles, said = roles[1:], [f"{system}\n\n{said[1]}", *said[2:]]
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]


def prompt_completion(row: dict, system: str = SYSTEM_PROMPT) -> dict:
    """One training example in TRL's conversational prompt/completion form."""
    return {"prompt": chat(row["question"], system), "completion": [{"role": "assistant", "content": row["sql"]}]}
