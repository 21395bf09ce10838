"""What a file of your own is like, told before anything is trained on it: rows, lengths, repeats, overlap with a test file, minutes here."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from helpers import dpo, flights, generation, jsonl, prefix, recipes, sql, times, training
from helpers.domain import Domain
from helpers.extract import extract_sql
from helpers.files import CourseError
from helpers.flights import FLIGHTS
from helpers.models import load_tokenizer

FEW = 20  # questions of a test file: an interval over fewer says next to nothing
OFTEN = 20  # times that the main recipe may read each row; fewer rows than that are trained on with the description in the prompt
SHOWN = 3  # rows that are named


def examine(path: str | Path, domain: Domain = FLIGHTS, test: str | Path | None = None) -> dict[str, str]:
    """What a JSON Lines file of questions, or of preference pairs, is like: a word for each thing looked at, and what was found.

    `test`: a file that a model trained on `path` will be scored on (the flights have the course's own). CourseError where one of the
    files can't be loaded, with every line that is wrong; nothing is changed.
    """
    return (_pairs if _holds_pairs(Path(path)) else _questions)(Path(path), domain, test)


def _holds_pairs(path: Path) -> bool:
    """Whether the first row says that it is a preference pair, or half of one; all else is left to the loader."""
    try:
        with path.open("rb") as file:
            first = next((line for line in jsonl.lines(file) if line.strip()), b"{}")
        return bool({"chosen", "rejected"} & json.loads(first.decode("utf-8-sig")).keys())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


# ---------------------------------------------------------------- questions


def _questions(path: Path, domain: Domain, test) -> dict[str, str]:
    held = _held(path, domain, test)
    rows, tokenizer, recipe = list(flights.load_questions(path, domain=domain)), load_tokenizer(), recipes.SFTRecipe()
    asked = domain
    if few := domain != FLIGHTS and _reads(recipe, rows) > OFTEN:  # as notebooks 03 and 04 train on so few
        recipe, asked = recipes.few_rows(len(rows)), replace(domain, system_prompt=domain.schema_prompt)
    ids = [training.row_ids(row, tokenizer, asked) for row in rows]
    answers = [len(tokenizer(row["sql"])["input_ids"]) for row in rows]
    refusals = sum(row["sql"] == domain.refusal for row in rows)
    kinds = len({row["sql"] for row in rows} - {domain.refusal})
    prompt = f"the description's {len(tokenizer(asked.system_prompt)['input_ids'])} included" if few else "the prompt included"
    return {
        "rows": f"{len(rows):,} questions: {len(rows) - refusals:,} with one of {kinds:,} queries, {refusals:,} refusals"
        + ("" if refusals else "; a model that never sees one answers everything"),
        "lengths": _lengths([len(one) for one in ids], recipe.max_length, prompt),
        "answers": f"up to {max(answers)} tokens; a model may write {generation.longest(rows, tokenizer)} when asked these",
        "results": "; ".join(_results(name, asked_for, domain) for name, asked_for in [(path.name, rows), *(held.items() if test else ())]),
        "alike": _alike(rows),
        "overlap": _overlap([row["question"] for row in rows], held),
        "training": _training(ids, recipe, few),
    }


def _named(numbers: list[int]) -> str:
    return f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:SHOWN]))}{' …' if len(numbers) > SHOWN else ''}"


def _results(name: str, rows, domain: Domain) -> str:
    """Which references return nothing that tells a right answer from one with a wrong value: no row, NULL or a lone 0."""
    empty = []
    with domain.worker() as worker:
        for number, row in enumerate(rows, 1):
            if row["sql"] != domain.refusal and not any(value not in (None, 0) for found in worker.run(row["sql"]).rows for value in found):
                empty.append(number)
    told = f"{name}: {_named(empty)} give nothing, NULL or a lone 0, as a query with a wrong value does: ask for something that is there"
    return told if empty else f"every query of {name} returns something"


def _lengths(tokens: list[int], limit: int, prompt: str = "the prompt included") -> str:
    long = [f"row {number} ({count})" for number, count in enumerate(tokens, 1) if count > limit]
    told = f"{min(tokens)} to {max(tokens)} tokens a row, {prompt}; max_length is {limit}"
    return f"{told}: {'all fit' if not long else f'{len(long)} do not: ' + ', '.join(long[:5]) + ('' if len(long) < 6 else ' …')}"


def _alike(rows: list[dict]) -> str:
    """Questions that differ by capitals and punctuation alone, and whether their answers do."""
    by_words = defaultdict(list)
    for number, row in enumerate(rows, 1):
        by_words[flights.words(row["question"])].append((number, row["sql"]))
    groups = [group for group in by_words.values() if len(group) > 1]
    if not groups:
        return "no two questions have the same words"
    odd = next((group for group in groups if len({sql for _, sql in group}) > 1), None)
    told = f"{len(groups)} questions come more than once, but for capitals and punctuation (rows {groups[0][0][0]} and {groups[0][1][0]}, for one)"
    return told + (f"; rows {odd[0][0]} and {odd[1][0]} ask the same and have different answers" if odd else "")


def _held(path: Path, domain: Domain, test) -> dict:
    """The questions that a model trained on `path` is scored on, by their file's name: those of `test`, else the flights' own."""
    if test and Path(test).resolve() == path.resolve():
        raise CourseError(f"{path.name} is its own test file: score on questions that were never trained on.")
    own = [split for split in flights.SPLITS if split != "train"] if domain == FLIGHTS else []
    return {Path(name).name: flights.load_questions(name, domain=domain) for name in ([test] if test else own)}


def _overlap(questions: list[str], held: dict) -> str:
    """How much of the test files stands in the questions that are trained on: whole ones, and word triples."""
    if not held:
        return "no test file was named (--test FILE): keep some questions aside that are never trained on"
    trained, triples, told = {flights.words(question) for question in questions}, set().union(*map(flights.ngrams, questions)), []
    for name, rows in held.items():
        asked = rows["question"]
        same = [number for number, question in enumerate(asked, 1) if flights.words(question) in trained]
        shares = [len(found & triples) / len(found) for question in asked if (found := flights.ngrams(question))]
        seen = f"{sum(shares) / len(shares):.0%} of its word triples" if shares else "no word triples"
        few = f" (only {len(asked)} questions: an interval over so few is wide)" if len(asked) < FEW else ""
        told.append(f"{len(same)} of {len(asked)} questions of {name} stand in it{f' ({_named(same)}): take them out' if same else ''}, and {seen}{few}")
    return "; ".join(told)


def _reads(recipe, rows) -> float:
    """How often a recipe reads each row."""
    return recipe.steps * recipe.batch_size / len(rows)


def _training(ids: list[list[int]], recipe, few: bool) -> str:
    """How often the recipe would read the rows, and how long it takes here with rows of their length."""
    own = sum(map(len, ids)) / len(ids) - (prefix.shared_length(ids) if len(ids) > 1 else 0)
    told = times.spell(times.seconds(times.sft(recipe) * (own / times.ROW_TOKENS)))
    told = f"{recipe.steps} steps of {recipe.batch_size} read each row {_reads(recipe, ids):.1f} times, {told} on this machine"
    if few:
        return f"{told} (recipes.few_rows, with the description in the prompt, from notebook 03's adapter)"
    return told + ("; that is often for so few: take fewer steps (recipes.few_rows), and look at a test file" if _reads(recipe, ids) > OFTEN else "")


# ---------------------------------------------------------------- preference pairs


def _pairs(path: Path, domain: Domain, test) -> dict[str, str]:
    pairs, tokenizer, recipe = dpo.load_pairs(path), load_tokenizer(), dpo.DPORecipe()
    tokens = {side: [len(dpo.encode(tokenizer, pair["prompt"], pair[side], domain)[0]) for pair in pairs] for side in ("chosen", "rejected")}
    longer = sum(a > b for a, b in zip(tokens["chosen"], tokens["rejected"], strict=True)) / len(pairs)
    reads = recipe.steps * recipe.batch_size / len(pairs)
    return {
        "rows": f"{len(pairs):,} pairs on {len({pair['prompt'] for pair in pairs}):,} prompts",
        "lengths": _lengths([max(both) for both in zip(*tokens.values(), strict=True)], recipe.max_length),
        "answers": _sides(pairs, domain),
        "overlap": _overlap([pair["prompt"] for pair in pairs], _held(path, domain, test)),
        "bias": f"the chosen answer is the longer one in {longer:.0%}" + ("; DPO may learn length instead of what you mean" if longer > 0.8 else ""),
        "training": f"{recipe.steps} steps of {recipe.batch_size} pairs read each {reads:.1f} times, {times.spell(times.seconds(times.dpo(recipe)))} on this machine",
    }


def _sides(pairs: list[dict], domain: Domain) -> str:
    """Which pairs have a side that is no query the database runs, nor the refusal: a wrong answer may be that, a chosen one not."""
    broken = {"chosen": [], "rejected": []}
    with domain.worker() as worker:
        for side, numbers in broken.items():
            for number, pair in enumerate(pairs, 1):
                try:
                    if not domain.refuses(pair[side]):
                        worker.run(extract_sql(pair[side]))
                except sql.SqlError:
                    numbers.append(number)
    told = [f"{len(numbers)} {side} answers don't run ({_named(numbers)})" for side, numbers in broken.items() if numbers]
    return "; ".join(told) or "all run"
