"""Asking a model many questions, running its SQL, and saying how often it is right, with an interval."""

import copy
import functools
import itertools
import os
import re
import time
from dataclasses import dataclass

from helpers import sql as safe
from helpers.flights import REFUSAL, SYSTEM_PROMPT, chat, database_path, perturbed_paths
from helpers.runtime import DATA, CourseError

# ---------------------------------------------------------------- generation


def generate(model, tokenizer, conversations, max_new_tokens: int = 96, batch_size: int = 32, progress: str = "", temperature: float = 0) -> list[str]:
    """Answers to a list of chats (each a list of messages), in the order asked: greedy, or sampled at a `temperature`.

    Batched, padded on the left, sorted by length so that little is padding; stops at the end of the turn. What all
    prompts begin with (a schema, few-shot examples) is run through the model once and its key/value cache reused.
    In float32 the answers don't depend on the batch size (tested); in 16 bits a near-tie can fall either way.
    `progress` names the progress bar (none if empty).
    """
    import torch

    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in conversations]
    shared = _shared_prefix(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode(), _contiguous_head(model), progress_bar(len(prompts), progress) as bar:
        read = model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), use_cache=True, logits_to_keep=1) if shared else {}
        prefix = {name: read[name] for name in {"past_key_values", "cache"} & set(read)}  # its name before and from transformers 5.24 on
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            asked = [prompts[i] for i in batch]
            for i, answer in zip(batch, _generate_batch(model, tokenizer, asked, prefix, shared, max_new_tokens, **sampling), strict=True):
                answers[i] = answer
            bar.update(len(batch))
    return answers


def _contiguous_head(model):
    """Hands the LM head a contiguous tensor, within a `with`. The last position of each prompt is a strided slice, for which
    torch's CPU matmul copies the head's weights once a prompt: 1.8 GB for 32, and more than half of the time."""
    return model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def _shared_prefix(prompts: list[list[int]]) -> int:
    """How many leading tokens all prompts share (never a whole prompt); 0 where caching them isn't worth it."""
    shortest, longest = min(prompts), max(prompts)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shortest, longest, strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= 64 and len(prompts) > 1 else 0


def _generate_batch(model, tokenizer, prompts, prefix, shared, max_new_tokens, **sampling) -> list[str]:
    """`prefix` holds the key/value cache of the first `shared` tokens under its name in transformers; {} and 0 where none is kept."""
    import torch

    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    # cached tokens stand first, then the padding, then the rest
    ids = torch.tensor([p[:shared] + [pad] * (width - len(p)) + p[shared:] for p in prompts], device=model.device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * (len(p) - shared) for p in prompts], device=model.device)
    for name, kept in prefix.items():
        sampling[name] = copy.deepcopy(kept)
        sampling[name].batch_repeat_interleave(len(prompts))
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    return [t.strip() for t in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]


def progress_bar(total: int, label: str):
    """A progress bar that leaves nothing behind in a stored notebook (it is shown on a terminal or a live notebook)."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=label, disable=not label or os.environ.get("COURSE_PROGRESS") == "0", leave=False)


def extract_sql(answer: str) -> str:
    """The one rule for every model: the first ```fenced``` block if there is one, else from the first SELECT (or WITH … AS) on;
    then up to the first semicolon or blank line. "" when there is no query in the answer."""
    fence = re.search(r"```(?:\w+)?\s*\n?(.*?)(?:```|\Z)", answer, re.S)
    text = fence.group(1) if fence else answer
    start = re.search(r"\bSELECT\b|\bWITH\s+(RECURSIVE\s+)?\w+\s*(\([^)]*\)\s*)?AS\b", text, re.I)
    if not start:
        return ""
    query = re.match(r"(?:'(?:[^']|'')*'|\n(?!\s*\n)|[^;'\n])*", text[start.start() :]).group(0)
    return query.strip().rstrip("`").strip()


# ---------------------------------------------------------------- execution accuracy


def tie_variants(sql: str) -> list[str]:
    """The query with its final ORDER BY's ties broken one way and the other; [] if it doesn't end in an ORDER BY.

    When both return the same, no tie decides the answer.
    """
    match = re.fullmatch(r"(.*\bORDER BY [^()]*?(?:\([^()]*\))?[^()]*?)(\s+LIMIT \d+)?", sql.strip(), re.S | re.I)
    if not match:
        return []
    columns = len(re.match(r"SELECT (.*?) FROM", sql, re.S | re.I).group(1).split(", ")) if re.match(r"SELECT .*? FROM", sql, re.S | re.I) else 1
    return [match[1] + "".join(f", {i + 1} {way}" for i in range(columns)) + (match[2] or "") for way in ("ASC", "DESC")]


@functools.cache
def _names() -> dict[str, str]:
    """Lower-cased airline, airport and (where it has one airport) city names, to their codes."""
    import pandas as pd

    flights = pd.read_parquet(DATA / "nycflights/flights.parquet", columns=["carrier", "airline", "dest", "dest_city"])
    airports = pd.read_parquet(DATA / "nycflights/airports.parquet", columns=["faa", "name"])
    served = set(flights["dest"]) | {"JFK", "EWR", "LGA"}
    names = {name.lower(): code for code, name in airports.itertuples(index=False) if code in served}
    names |= {name.lower(): code for code, name in flights[["carrier", "airline"]].drop_duplicates().itertuples(index=False)}
    single = flights[["dest_city", "dest"]].drop_duplicates().drop_duplicates("dest_city", keep=False)
    return names | {city.lower(): code for city, code in single.itertuples(index=False)}


def _plain(value):
    return _names().get(value.strip().lower(), value.strip()) if isinstance(value, str) else value


def same_value(predicted, expected) -> bool:
    """Equal, or a number within rounding to one decimal of a fractional one, or a code's name in place of the code."""
    if isinstance(predicted, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(expected, int):
            return predicted == expected
        return abs(predicted - expected) <= 0.05 + 1e-9
    return _plain(predicted) == _plain(expected)


def same_result(predicted: list[tuple], expected: list[tuple], ordered: bool) -> bool:
    """The rule of execution accuracy, on two lists of rows.

    As many rows as expected; each expected column is found in a column of its own of the prediction; extra columns and
    aliases don't matter. Rows are compared as a list where the question asks for an order, else as a multiset. So a
    LIMIT counts when it changes the rows. Values: see `same_value`.
    """
    if len(predicted) != len(expected):
        return False
    if not expected:
        return True
    wide, narrow = len(predicted[0]), len(expected[0])
    if wide < narrow or wide > 25:
        return False
    found = [[p for p in range(wide) if _same_rows([[r[p]] for r in predicted], [[r[e]] for r in expected], ordered)] for e in range(narrow)]
    choices = itertools.islice(itertools.product(*found), 500)
    return any(len(set(c)) == narrow and _same_rows([[r[p] for p in c] for r in predicted], expected, ordered) for c in choices)


def _same_rows(predicted, expected, ordered) -> bool:
    def equal(a, b):
        return all(map(same_value, a, b))

    same = all(map(equal, predicted, expected))
    if same or ordered:
        return same
    left = list(predicted)
    for row in expected:
        match = next((i for i, other in enumerate(left) if equal(other, row)), None)
        if match is None:
            return False
        left.pop(match)
    return True


class Judge:
    """Execution accuracy on the real database and on two perturbed ones (test suites: Zhong et al. 2020, in Spider).

    A prediction is right when it returns what the reference returns on all three. An instance on which a tie decides
    the reference's answer is skipped there; on the real database either order of the tie is accepted.
    """

    def __init__(self):
        self.connections = [safe.connect(path) for path in (*perturbed_paths(), database_path())]
        self.references: dict[tuple[int, str], list[tuple]] = {}

    def _rows(self, which: int, sql: str) -> list[tuple]:
        if (which, sql) not in self.references:
            self.references[which, sql] = safe.execute(self.connections[which], sql).rows
        return self.references[which, sql]

    def agrees(self, which: int, sql: str, reference: str, ordered: bool) -> bool:
        """Does `sql` return what `reference` does on one instance (-1: the real one)? Raises SqlError if `sql` fails."""
        got = safe.execute(self.connections[which], sql).rows
        if same_result(got, self._rows(which, reference), ordered):
            return True
        ties = [self._rows(which, variant) for variant in tie_variants(reference)]
        if which == -1:
            return any(same_result(got, rows, ordered) for rows in ties)
        return any(rows != ties[0] for rows in ties)  # a tie decides: this instance can't tell

    def judge(self, answer: str, reference: str, ordered: bool = False, single: bool = False) -> dict:
        """Judges one answer: {"correct", "kind", "sql"}; with `single` also "single", right on the real database alone."""
        sql = extract_sql(answer)
        refused = REFUSAL.lower().rstrip(".") in answer.lower().replace("’", "'")

        def verdict(kind: str, lucky: bool = False) -> dict:
            return {"correct": kind == "right", "kind": kind, "sql": sql, "single": kind == "right" or lucky}

        if reference == REFUSAL:
            return verdict("right" if refused and not sql else "answered the unanswerable")
        if refused or not sql:
            return verdict("refused" if refused else "no query")
        if " ".join(sql.split()) == " ".join(reference.split()):
            return verdict("right")
        try:
            if all(self.agrees(i, sql, reference, ordered) for i in (0, 1, -1)):
                return verdict("right")
            return verdict(mistake(sql, reference), lucky=single and self.agrees(-1, sql, reference, ordered))
        except safe.SqlError as error:
            return verdict(f"does not run ({error.reason})")


def mistake(sql: str, reference: str) -> str:
    """Names what differs between a wrong query that runs and its reference: what is computed, the filter, or the rest."""

    def parts(query):
        flat = " ".join(query.split())
        where = re.search(r"\bWHERE\b(.*?)(\bGROUP BY\b|\bORDER BY\b|\bLIMIT\b|$)", flat, re.I)
        select = re.sub(r"\s+AS\s+\w+", "", re.split(r"\bFROM\b", flat, maxsplit=1, flags=re.I)[0], flags=re.I)
        tail = re.search(r"\b(GROUP BY|ORDER BY|LIMIT)\b.*", flat, re.I)
        conditions = frozenset(c.strip().lower() for c in re.split(r"\bAND\b", where[1], flags=re.I)) if where else frozenset()
        return select.lower(), conditions, tail[0].lower() if tail else ""

    compared = zip(("what is computed", "the filter", "the grouping or order"), parts(sql), parts(reference), strict=True)
    names = [name for name, ours, theirs in compared if ours != theirs]
    return "wrong: " + (" and ".join(names[:2]) if names else "the value")


@functools.cache
def judge() -> Judge:
    """One judge per process: it keeps the references' results."""
    return Judge()


def execution_accuracy(answers: list[str], questions, single: bool = False) -> list[dict]:
    """One dict a question: id, intent, phrasing, correct, kind, sql (what was run); the per-question record of a run."""
    return [
        {k: row.get(k) for k in ("id", "question", "intent", "phrasing")} | judge().judge(answer, row["sql"], bool(row.get("ordered")), single)
        for answer, row in zip(answers, questions, strict=True)
    ]


# ---------------------------------------------------------------- scores and intervals


@dataclass(frozen=True)
class Score:
    """A share with its 95 % interval: n questions, `correct` right, accuracy, low and high between 0 and 1."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.accuracy:.0%} ({self.low:.0%} to {self.high:.0%}, n = {self.n})"


def _strata(records) -> list[list[list[int]]]:
    """Positions of the questions by phrasing, and these by intent; a row without a phrasing is its own.

    Where an intent has a single phrasing its stratum has no spread to resample, so all phrasings then form one stratum.
    """
    phrasings: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        phrasings.setdefault(str(record.get("phrasing") or record.get("id") or i), []).append(i)
    intents: dict[str, list[list[int]]] = {}
    for cluster in phrasings.values():
        intents.setdefault(str(records[cluster[0]].get("intent")), []).append(cluster)
    thin = any(len(clusters) == 1 for clusters in intents.values())
    return [list(phrasings.values())] if thin else list(intents.values())


def _interval(values, strata, draws: int, seed: int) -> tuple[float, float]:
    """A 95 % interval of the mean of `values`: the quantiles over `draws` that resample phrasings within each intent."""
    import numpy as np

    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=float)
    total, count = np.zeros(draws), np.zeros(draws)
    for clusters in strata:
        sums = np.array([values[c].sum() for c in clusters])
        sizes = np.array([len(c) for c in clusters])
        picks = rng.integers(0, len(clusters), (draws, len(clusters)))
        total += sums[picks].sum(axis=1)
        count += sizes[picks].sum(axis=1)
    low, high = np.quantile(total / count, [0.025, 0.975])
    return float(low), float(high)


def score(records, draws: int = 2000, seed: int = 0) -> Score:
    """Accuracy with a 95 % bootstrap interval that resamples phrasings within intents, not single questions.

    Where all answers are right, or all wrong, nothing varies: the open end is then the exact binomial bound (Clopper and
    Pearson 1934) for as many trials as there are phrasings. `pooled` seeds count by their shares.
    """
    right = [float(r["correct"]) for r in records]
    if not right:
        raise CourseError("There is nothing to score: no questions.")
    strata = _strata(records)
    low, high = _interval(right, strata, draws, seed)
    bound = 0.025 ** (1 / sum(map(len, strata)))
    low, high = (bound if min(right) == 1 else low), (high if any(right) else 1 - bound)
    return Score(len(right), round(sum(right)), sum(right) / len(right), low, high)


def paired_difference(records_a, records_b, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of a minus accuracy of b on the same questions: (difference, low, high), a paired cluster bootstrap."""
    if [r["id"] for r in records_a] != [r["id"] for r in records_b]:
        raise CourseError("A paired comparison needs the same questions in the same order in both records.")
    gain = [float(a["correct"]) - float(b["correct"]) for a, b in zip(records_a, records_b, strict=True)]
    return sum(gain) / len(gain), *_interval(gain, _strata(records_a), draws, seed)


def pooled(runs: list[list[dict]]) -> list[dict]:
    """Several seeds' records of the same questions as one: `correct` becomes the share of seeds that had it right."""
    if any([r["id"] for r in run] != [r["id"] for r in runs[0]] for run in runs):
        raise CourseError("Pooling seeds needs the same questions in the same order in each run.")
    return [dict(rows[0], correct=sum(bool(r["correct"]) for r in rows) / len(rows)) for rows in zip(*runs, strict=True)]


def ask(model, tokenizer, questions, system: str = SYSTEM_PROMPT, shots=None, progress: str = "", **kwargs) -> tuple[list[str], float]:
    """Answers to a split's questions and the seconds it took. `shots` maps a question to its few-shot rows."""
    start = time.perf_counter()
    chats = [chat(q["question"], system, shots(q["question"]) if shots else ()) for q in questions]
    return generate(model, tokenizer, chats, progress=progress, **kwargs), time.perf_counter() - start
