"""What a file of your own is like, told before anything is trained on it: rows, lengths, repeats, overlap with a test file, minutes here."""

import json
import re
from collections import defaultdict
from pathlib import Path

from helpers import dpo, flights, generation, jsonl, prefix, recipes, times, training
from helpers.domain import Domain
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.models import load_tokenizer

FEW = 20  # questions of a test file: an interval over fewer says next to nothing


def examine(path: str | Path, domain: Domain = FLIGHTS, test: str | Path | None = None) -> dict[str, str]:
    """What a JSON Lines file of questions, or of preference pairs, is like: a word for each thing looked at, and what was found.

    `test`: a file that a model trained on `path` will be scored on (the flights have the course's own). CourseError where one of the
    files can't be loaded, with every line that is wrong; nothing is changed.
    """
    return _pairs(Path(path), domain) if _holds_pairs(Path(path)) else _questions(Path(path), domain, test)


def _holds_pairs(path: Path) -> bool:
    """Whether the first row says that it is a preference pair; all else is left to the loader."""
    try:
        with path.open("rb") as file:
            first = next((line for line in jsonl.lines(file) if line.strip()), b"{}")
        return {"chosen", "rejected"} <= json.loads(first.decode("utf-8-sig")).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


# ---------------------------------------------------------------- questions


def _questions(path: Path, domain: Domain, test) -> dict[str, str]:
    rows, tokenizer, recipe = list(flights.load_questions(path, domain=domain)), load_tokenizer(), recipes.SFTRecipe()
    ids = [training.row_ids(row, tokenizer, domain) for row in rows]
    answers = [len(tokenizer(row["sql"])["input_ids"]) for row in rows]
    refusals = sum(row["sql"] == domain.refusal for row in rows)
    kinds = len({row["sql"] for row in rows} - {domain.refusal})
    return {
        "rows": f"{len(rows):,} questions: {len(rows) - refusals:,} with one of {kinds:,} queries, {refusals:,} refusals"
        + ("" if refusals else "; a model that never sees one answers everything"),
        "lengths": _lengths([len(one) for one in ids], recipe.max_length),
        "answers": f"up to {max(answers)} tokens; a model may write {generation.longest(rows, tokenizer)} when asked these",
        "alike": _alike(rows),
        "overlap": _overlap(rows, path, domain, test),
        "training": _training(ids, recipe),
    }


def _lengths(tokens: list[int], limit: int) -> str:
    long = [f"row {number} ({count})" for number, count in enumerate(tokens, 1) if count > limit]
    told = f"{min(tokens)} to {max(tokens)} tokens a row, the prompt included; max_length is {limit}"
    return f"{told}: {'all fit' if not long else f'{len(long)} do not: ' + ', '.join(long[:5]) + ('' if len(long) < 6 else ' …')}"


def _words(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.lower()))


def _alike(rows: list[dict]) -> str:
    """Questions that differ by capitals and punctuation alone, and whether their answers do."""
    by_words = defaultdict(list)
    for number, row in enumerate(rows, 1):
        by_words[_words(row["question"])].append((number, row["sql"]))
    groups = [group for group in by_words.values() if len(group) > 1]
    if not groups:
        return "no two questions have the same words"
    odd = next((group for group in groups if len({sql for _, sql in group}) > 1), None)
    told = f"{len(groups)} questions come more than once, but for capitals and punctuation (rows {groups[0][0][0]} and {groups[0][1][0]}, for one)"
    return told + (f"; rows {odd[0][0]} and {odd[1][0]} ask the same and have different answers" if odd else "")


def _overlap(rows: list[dict], path: Path, domain: Domain, test) -> str:
    """How much of a test file stands in the rows: whole questions, and word triples."""
    if test is None and domain != FLIGHTS:
        return "no test file was named (--test FILE): keep some questions aside that are never trained on"
    names = [test] if test else [split for split in flights.SPLITS if split != "train"]
    if test and Path(test).resolve() == path.resolve():
        raise CourseError(f"{path.name} is its own test file: score on questions that were never trained on.")
    trained, triples, told = {_words(row["question"]) for row in rows}, set().union(*(flights.ngrams(row["question"]) for row in rows)), []
    for name in names:
        questions = [row["question"] for row in flights.load_questions(name, domain=domain)]
        same = sum(_words(question) in trained for question in questions)
        shares = [len(found & triples) / len(found) for question in questions if (found := flights.ngrams(question))]
        seen = f"{sum(shares) / len(shares):.0%} of its word triples" if shares else "no word triples"
        few = f" (only {len(questions)} questions: an interval over so few is wide)" if len(questions) < FEW else ""
        told.append(f"{same} of {len(questions)} questions of {Path(name).name} stand in it, and {seen}{few}")
    return "; ".join(told)


def _training(ids: list[list[int]], recipe) -> str:
    """How often the main recipe would read the rows, and how long it takes here with rows of their length."""
    own = sum(map(len, ids)) / len(ids) - (prefix.shared_length(ids) if len(ids) > 1 else 0)
    reads = recipe.steps * recipe.batch_size / len(ids)
    told = times.spell(times.seconds(times.sft(recipe) * (own / times.ROW_TOKENS)))
    many = "; that is often for so few: take fewer steps (recipes.few_rows), and look at a test file" if reads > 20 else ""
    return f"{recipe.steps} steps of {recipe.batch_size} read each row {reads:.1f} times, {told} on this machine{many}"


# ---------------------------------------------------------------- preference pairs


def _pairs(path: Path, domain: Domain) -> dict[str, str]:
    pairs, tokenizer, recipe = dpo.load_pairs(path), load_tokenizer(), dpo.DPORecipe()
    tokens = {side: [len(dpo.encode(tokenizer, pair["prompt"], pair[side], domain)[0]) for pair in pairs] for side in ("chosen", "rejected")}
    longer = sum(a > b for a, b in zip(tokens["chosen"], tokens["rejected"], strict=True)) / len(pairs)
    reads = recipe.steps * recipe.batch_size / len(pairs)
    return {
        "rows": f"{len(pairs):,} pairs on {len({pair['prompt'] for pair in pairs}):,} prompts",
        "lengths": _lengths([max(both) for both in zip(*tokens.values(), strict=True)], recipe.max_length),
        "bias": f"the chosen answer is the longer one in {longer:.0%}" + ("; DPO may learn length instead of what you mean" if longer > 0.8 else ""),
        "training": f"{recipe.steps} steps of {recipe.batch_size} pairs read each {reads:.1f} times, {times.spell(times.seconds(times.dpo(recipe)))} on this machine",
    }
