"""`make interop-check`: every file of configs/ shown to its engine's own parser, a wrong key in each, and a few steps of `trl sft` on this machine.

TRL and Accelerate are installed. Axolotl's and LLaMA-Factory's wheels are fetched once, by pinned hash, into the course's cache, a folder for
each that no other program sees: their parsers need little of what their training does. Each engine is asked in a process of its own.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from importlib import import_module  # what an engine brings itself is imported by its name: the course doesn't depend on it
from pathlib import Path

from helpers import flights
from helpers.command import status
from helpers.dpo import DPORecipe
from helpers.files import CourseError, building
from helpers.recipes import SFTRecipe
from helpers.runtime import ROOT, cache_dir
from helpers.scaling import distributed, engines

AXOLOTL = {  # by the least Python that it asks for
    (3, 12): "axolotl==0.21.0 --hash=sha256:5db0468897d1f3a80fa2becc80dd4409f378ce887dcb2c98854dc70b38196391",
    (3, 11): "axolotl==0.19.0 --hash=sha256:f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc",
}
PINS = {  # what is fetched for each engine's parser
    "trl": [],
    "accelerate": [],
    "axolotl": [
        next(pin for least, pin in AXOLOTL.items() if sys.version_info >= least),
        "addict==2.4.0 --hash=sha256:249bb56bbfd3cdc2a004ea0ff4c2b6ddc84d53bc2194761636eb314d5cfa5dfc",
    ],
    "llamafactory": [
        "llamafactory==0.9.5 --hash=sha256:10776e9b259798bf65f6c5343f6298f0302e92e9cd47472abe29eef69e286c6a",
        "omegaconf==2.4.0 --hash=sha256:f141a664c777582405e3cc6e0545ecc79429e79f844995b1a6e71c35946a025c",
        "antlr4-python3-runtime==4.9.3 --hash=sha256:f224469b4168294902bb1efa80a8bf7855f24c99aef99cbefc1bcd3cce77881b",
    ],
}
MINUTES = 20  # at most, for one engine's answer or its fetching
TOLERANCE = 0.005  # nats: how far a loss of `trl sft` may be from the reference's


# ---------------------------------------------------------------- an environment for each engine


def environment(engine: str) -> Path | None:
    """The folder with the engine's pinned packages, fetched on first use; None where all is installed. CourseError without a network."""
    if not PINS[engine]:
        return None
    target = cache_dir() / "interop" / PINS[engine][0].split()[0]
    with building(target, need_bytes=100_000_000) as scratch:
        if scratch is not None:
            listed = scratch.parent / "pins.txt"
            listed.write_text("\n".join(PINS[engine]) + "\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check"]
            done = _run([*command, "--require-hashes", "--target", str(scratch), "-r", str(listed)], f"Fetching {engine}")
            if done.returncode or not scratch.exists():
                said = "its pinned sha256 differs: do not use it" if "DO NOT MATCH THE HASHES" in done.stderr else "is there a network? It is needed once"
                raise CourseError(f"{target.name} could not be fetched: {said}. The other engines are checked without it.")
    return target


def _run(command: list[str], what: str, given: str | None = None, **more) -> subprocess.CompletedProcess:
    """The finished program, with what it said; CourseError where it takes too long: then it is ended, and what it started too."""
    pipes = {"stdin": subprocess.PIPE if given else subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(command, text=True, encoding="utf-8", errors="replace", **pipes, **more)
    try:
        out, err = started.communicate(given, timeout=60 * MINUTES)
        return subprocess.CompletedProcess(command, started.returncode, out, err)
    except subprocess.TimeoutExpired:
        raise CourseError(f"{what} took more than {MINUTES} minutes and was stopped: run it again when the machine has less to do.") from None
    finally:
        if started.poll() is None:
            distributed.end(started)


# ---------------------------------------------------------------- the engines' own parsers, each in its own process


def parse_trl(name: str, path: Path) -> None:
    """TRL's parser for `trl sft` or `trl dpo`, which makes its own config objects; raises for a key that none of them has."""
    parser = import_module(f"trl.scripts.{'dpo' if '/dpo' in name else 'sft'}").make_parser()
    parser.parse_args_and_config(["--config", str(path), "--use_cpu", "true"])


def parse_accelerate(name: str, path: Path) -> None:
    """Accelerate's own loader, which refuses what it doesn't know; what is in fsdp_config it never looks at: those are compared with its plugin's fields."""
    config = import_module("accelerate.commands.config.config_args").load_config_from_file(str(path))
    known = {f"fsdp_{field}" for field in import_module("accelerate.utils").FullyShardedDataParallelPlugin.__dataclass_fields__}
    if strange := {key for key in config.fsdp_config or {} if key.replace("fsdp_offload_params", "fsdp_cpu_offload") not in known | {"fsdp_version"}}:
        raise ValueError(f"fsdp_config has no {', '.join(sorted(strange))}")


def parse_axolotl(name: str, path: Path) -> None:
    """Axolotl's schema. It takes keys that it doesn't know in silence: they are compared with its fields, the data's too."""
    schema, data = (import_module(f"axolotl.utils.schemas.{name}") for name in ("config", "datasets"))
    given = import_module("yaml").safe_load(path.read_text(encoding="utf-8"))
    source = (data.DPODataset if given.get("rl") else data.SFTDataset).model_fields
    strange = [*(given.keys() - schema.AxolotlInputConfig.model_fields.keys()), *(key for one in given["datasets"] for key in one.keys() - source.keys() - {"ds_type"})]
    if strange:
        raise ValueError(f"AxolotlInputConfig has no {', '.join(sorted(strange))}")
    schema.AxolotlInputConfig.model_validate(given)


def parse_llamafactory(name: str, path: Path) -> None:
    """LLaMA-Factory's parser of a run; dataset_info.json by its reader of that file, and a row of each kind by the converter that it names."""
    if path.suffix == ".json":
        _read_datasets(path)
        return
    get_train_args = import_module("llamafactory.hparams.parser").get_train_args
    get_train_args(import_module("yaml").safe_load(path.read_text(encoding="utf-8")) | {"use_cpu": True})


def _read_datasets(path: Path) -> None:
    """The list of data is read as LLaMA-Factory does. It takes columns that it doesn't know in silence: they are compared with its fields."""
    package = types.ModuleType("llamafactory.data")  # in place of its own, which needs all that training needs
    package.__path__ = [str(Path(importlib.util.find_spec("llamafactory").origin).parent / "data")]
    sys.modules["llamafactory.data"] = package
    read, convert = (import_module(f"llamafactory.data.{name}") for name in ("parser", "converter"))
    rows = engines.data_files(SFTRecipe(), [{"question": "How many?", "sql": "SELECT 1"}])
    rows |= engines.data_files(DPORecipe(), [{"prompt": "How many?", "chosen": "SELECT 1", "rejected": "SELECT 2"}] * 33)
    for dataset, about in json.loads(path.read_text(encoding="utf-8")).items():
        known = {*read.DatasetAttr.__dataclass_fields__, "columns", "tags", "file_name"}
        if strange := {**about, **about["columns"], **about["tags"]}.keys() - known:
            raise ValueError(f"a dataset has no {', '.join(sorted(strange))}")
        one = read.get_dataset_list([dataset], str(path.parent))[0]
        found = convert.DATASET_CONVERTERS[one.formatting](one, None)(json.loads(rows[one.dataset_name].splitlines()[0]))
        told = [found["_system"], *(turn["content"] for turn in found["_prompt"] + found["_response"])]
        if told != [flights.SYSTEM_PROMPT, "How many?", "SELECT 1", *["SELECT 2"] * about.get("ranking", False)]:
            raise ValueError(f"a row of {dataset} was read as {told}")


PARSERS = {"trl": parse_trl, "accelerate": parse_accelerate, "axolotl": parse_axolotl, "llamafactory": parse_llamafactory}


def parse(engine: str, texts: dict[str, str]) -> dict[str, str]:
    """In the engine's own process: what its parser says against each file, in one line; "" where it takes it."""
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, text) in enumerate(texts.items()):
            path = Path(folder) / str(number) / Path(name).name.split()[0]  # "… spoiled" is of the same kind
            path.parent.mkdir()
            path.write_text(text, encoding="utf-8")
            try:
                PARSERS[engine](name, path)
                said[name] = ""
            except (Exception, SystemExit) as error:
                said[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return said


def ask(engine: str, texts: dict[str, str]) -> dict[str, str]:
    """`parse`, in a process of its own that sees the engine's environment before everything else."""
    place = environment(engine)
    paths = [str(path) for path in (place, ROOT) if path]
    quiet = {"DISABLE_VERSION_CHECK": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = _run(
        [sys.executable, "-m", "course.interop", "--parse", engine], f"Asking {engine}", json.dumps(texts), cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | quiet,
    )  # fmt: skip
    if done.returncode or "\n@" not in f"\n{done.stdout}":
        raise CourseError(f"{engine}'s parser can't be asked here: {' '.join(done.stderr.split())[-300:]}")
    return json.loads(done.stdout.rsplit("@", 1)[1])


def spoiled(text: str) -> tuple[str, str]:
    """The file with a letter too many in its last key, and that key: what a parser must not take, and must name."""
    last = list(re.finditer(r'^ *"?(\w+)"?: ["\w]', text, re.M))[-1]
    return text[: last.end(1)] + "x" + text[last.end(1) :], last[1] + "x"


def files_of(engine: str, found: dict[str, str]) -> dict[str, str]:
    """Those of the files that the engine reads: its configs, LLaMA-Factory's list of data too."""
    return {name: text for name, text in found.items() if name.startswith(f"{engine}/") or (engine == "llamafactory" and name.endswith("dataset_info.json"))}


def check(engine: str, found: dict[str, str] | None = None) -> list[str]:
    """What is wrong with the engine's files (None: the committed ones); each is also shown with a wrong key, which the parser must refuse."""
    found = files_of(engine, found or {path.relative_to(engines.CONFIGS).as_posix(): path.read_text(encoding="utf-8") for path in committed()})
    worse = {f"{name} spoiled": spoiled(text) for name, text in found.items()}
    said = ask(engine, found | {name: text for name, (text, _) in worse.items()})
    wrong = [f"{name}: {said[name]}" for name in found if said[name]]
    return wrong + [f"{name}: the wrong key {key} wasn't refused by name ({said[name] or 'it was taken'})" for name, (_, key) in worse.items() if key not in said[name]]


def committed() -> list[Path]:
    return sorted([*engines.CONFIGS.glob("*/*.yaml"), *engines.CONFIGS.glob("data/*.json")])


# ---------------------------------------------------------------- a few steps of `trl sft`


def with_trl(folder: Path, steps: int = 3, rows: int = 2) -> list[float]:
    """The losses of `trl sft --config trl/sft.yaml` in a folder that `engines.write` made, with the cached model in the Hub's place and this machine's precision."""
    from helpers import models
    from helpers.runtime import device

    here = device()
    changes = {"model_name_or_path": models.model_path(), "model_revision": "main", "dtype": here.dtype_name, "output_dir": "out", "max_steps": steps}
    changes |= {"per_device_train_batch_size": rows, "logging_steps": 1, "save_steps": steps, "warmup_steps": 0, "optim": here.optimizer}
    changes |= {name: str(here.flags[name]).lower() for name in ("bf16", "fp16", "use_cpu")}
    words = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "trl.cli.main", "sft", "--config", "trl/sft.yaml", "--accelerate_config", "accelerate/1-gpu.yaml", *words]
    done = _run(command, "trl sft", cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")})
    if done.returncode:
        raise CourseError(f"trl sft stopped: {' '.join(done.stderr.split())[-600:]}")
    state = json.loads((folder / "out" / f"checkpoint-{steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def with_helpers(folder: Path, recipe: SFTRecipe, questions: list[dict], steps: int = 3, rows: int = 2) -> list[float]:
    """The losses of the same steps with the course's own settings and TRL's trainer, the adapter left in bfloat16 as the command line leaves it."""
    from trl import SFTTrainer

    from helpers import models, recipes, training

    changes = {"max_steps": steps, "per_device_train_batch_size": rows, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0, "pad_to_multiple_of": None}
    trainer = SFTTrainer(
        model=models.load_model(recipe.bits), args=training.sft_config(recipe, folder, **changes), train_dataset=recipes.training_set(questions),
        processing_class=models.load_tokenizer(), peft_config=recipes.lora_config(recipe),
    )  # fmt: skip
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def compare(steps: int = 3, examples: int = 24, recipe: SFTRecipe | None = None) -> tuple[list[float], list[float]]:
    """The losses of both on the recipe's first few examples."""
    from helpers import recipes

    recipe = recipe or SFTRecipe()
    questions = recipes.training_rows(recipe)[:examples]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        engines.write(Path(folder), recipe, questions)
        return with_trl(Path(folder), steps), with_helpers(Path(folder), recipe, questions, steps)


def run() -> int:
    """The exit status: 0 where every engine that could be had takes its files, and `trl sft` trains as the reference."""
    wrong = []
    for engine in PINS:
        try:
            found = check(engine)
        except CourseError as missing:
            found = [f"{engine}: {missing}"]
        said = f"{len(files_of(engine, {p.relative_to(engines.CONFIGS).as_posix(): '' for p in committed()}))} files taken, a wrong key refused in each"
        print(f"{(PINS[engine] or [engine])[0].split()[0]:22}", "; ".join(found) or said, flush=True)
        wrong += found
    theirs, ours = compare()
    off = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"trl sft, {len(theirs)} steps     losses {theirs}, reference {ours}: {off:.5f} apart", flush=True)
    return int(bool(wrong) or off > TOLERANCE)


def main() -> int:
    """Reads the command line. `--parse`: the process that an engine is asked in; its files come as JSON on the standard input."""
    parser = argparse.ArgumentParser(prog="python -m course.interop", description="Are the files of configs/ such as their engines take?")
    parser.add_argument("--parse", choices=list(PARSERS), help=argparse.SUPPRESS)
    engine = parser.parse_args().parse
    if engine:
        print("\n@" + json.dumps(parse(engine, json.load(sys.stdin))))
        return 0
    return run()


if __name__ == "__main__":
    sys.exit(status(main))
