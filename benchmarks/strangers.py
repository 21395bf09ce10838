"""What strangers hand the course, tried on it: python benchmarks/strangers.py now|before [ROOT]  (`before`: another checkout of the course)

The inputs are those of the tests: files of questions (tests/test_jsonl.py), adapters (tests/test_vetting.py), manifests of a kit
(tests/test_kit.py), README's commands (tests/test_readme.py), SQL in a learner's file, results that steer a terminal. Each is
tried in a fork of its own, with 20 seconds, and comes to one of OUTCOMES. The counts are written into data/results/strangers.json; docs/strangers.md is made of them (`table`).
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
OUTCOMES = ("right", "one sentence", "traceback", "taken in silence", "hung", "raw escapes")
SECONDS = 20
RECORD, TABLE = HERE / "data" / "results" / "strangers.json", HERE / "docs" / "strangers.md"
KINDS = {  # of input, and whether it is good (then it must be right) or bad (then refused in one sentence)
    "bad JSON Lines": "one sentence",
    "fields that nobody uses": "right",
    "SQL that no time limit stops": "one sentence",
    "bad adapters": "one sentence",
    "bad manifests of a kit": "one sentence",
    "results that steer a terminal": "right",
    "results that JSON doesn't know": "right",
    "README's commands where something is wrong": "one sentence",
}

DRIVER = """
import contextlib, io, json, os, sys, tempfile, time, traceback
from pathlib import Path
try:
    from helpers.files import CourseError
except ImportError:
    from helpers.runtime import CourseError

def said(error):
    print("SAID", ascii(str(error)) if "\\x1b" not in str(error) else "\\x1b")

PART

def attempt(arguments, seconds):
    with tempfile.TemporaryFile() as heard:
        child = os.fork()
        if not child:
            sys.stdout.flush()
            os.dup2(heard.fileno(), 1), os.dup2(heard.fileno(), 2)
            try:
                one(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        end = time.monotonic() + seconds
        while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(0.01)
        if not ended:
            os.kill(child, 9), os.waitpid(child, 0)
            return "hung", ""
        heard.seek(0)
        return "ended", heard.read().decode(errors="replace")

print("RESULT" + json.dumps([attempt(arguments, SECONDS) for arguments in json.loads(Path(sys.argv[1]).read_text())]))
"""
QUESTIONS = """
from helpers import flights
import datasets
def one(path):
    try:
        print("READ", len(list(flights.load_questions(path))))
    except CourseError as error:
        said(error)
"""
ADAPTER = """
from helpers import adapters, models
import peft, safetensors.torch, transformers
def one(folder):
    try:
        adapters.load_adapter(Path(folder), bits=16)
    except CourseError as error:
        said(error)
"""
KIT = """
from helpers import adapters
def one(kit, folder):
    os.environ["COURSE_KIT"] = kit
    try:
        adapters.have_adapter(Path(folder))
    except CourseError as error:
        said(error)
"""
ASK = """
from helpers import ask, flights, generation
try:
    from helpers.worker import Worker
except ImportError:
    from helpers.sql import Worker
class Asker(ask.Asker):
    def __init__(self, stage):
        self.system, self.tokenizer, self.model, self.whole = "", None, None, contextlib.ExitStack()
        self.worker, self.calibration = Worker(flights.database_path()), None
def one(query, *arguments):
    generation.generate = lambda *_, **__: [query]
    ask.Asker = Asker
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"what?\\n"))
    ask.main(list(arguments))
"""
COMMAND = """
import importlib
import course.kit, course.runner, datasets, helpers.ask, helpers.doctor, peft, torch, transformers, trl
def one(module, words, environment):
    os.environ.update(environment)
    sys.argv, sys.stdin = [module, *words], open(os.devnull)
    try:
        status = importlib.import_module("course.runner" if module == "course" else module).main()
    except ModuleNotFoundError:
        status = "absent"
    except SystemExit as ended:
        status = ended.code
    print(f"STATUS {status}")
"""


def tried(code: str, root: Path, cases: list[list[str]]) -> list[tuple[str, str]]:
    """For each case's arguments "ended" or "hung", and what was printed, each in a fork of one process in the course at `root`."""
    environment = os.environ | {"COURSE_PROGRESS": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root), "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        code = DRIVER.replace("PART", code).replace("SECONDS", str(SECONDS))
        done = subprocess.run([sys.executable, "-c", code, str(Path(folder) / "cases.json")], cwd=root, env=environment, capture_output=True, text=True)
    if "RESULT" not in done.stdout:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.split("RESULT")[-1])


def outcome(status: str, said: str) -> str:
    if status == "hung":
        return "hung"
    if "Traceback" in said:
        return "traceback"
    if "\x1b" in said:
        return "raw escapes"
    return "one sentence" if "SAID" in said else "taken in silence"


def questions(root: Path, folder: Path):
    from tests import test_jsonl

    for name, (content, _) in test_jsonl.REFUSED.items():
        yield "bad JSON Lines", name, content
    for more in ({"n": 10**24}, {"deep": [[[1]]]}, {"\ud800": 1}, {"note": "a\ud800"}, {"note": [1, "a"]}):
        yield "fields that nobody uses", str(ascii(more)), test_jsonl.second(**more) + test_jsonl.second(question="y", **dict.fromkeys(more, "x")).split(b"\n", 1)[1]
    for text in (test_jsonl.SLOW, "SELECT trim(printf('%.99000c', 'a'), printf('%.8000c', 'b') || 'a')" + ", trim(printf('%.99000c', 'a'), printf('%.8000c', 'b') || 'a')" * 20):
        yield "SQL that no time limit stops", text[:30], test_jsonl.second(sql=text)


def adapter_folders(folder: Path):
    """Each bad adapter of the tests, made in turn in `folder`, from an untrained one of the whole model."""
    import torch
    from peft import get_peft_model

    from helpers import adapters, models, recipes, runtime
    from tests import test_vetting

    runtime.setup()
    made = {"lora": adapters.export_adapter(get_peft_model(models.load_model(16, torch.float32), recipes.peft_config(recipes.SFTRecipe())), folder / "lora")}
    for name, (fields, _) in test_vetting.CONFIGS.items():
        yield name, lambda place, fields=fields: test_vetting.changed(made, place, **fields)
    for name, (change, metadata, _) in test_vetting.WEIGHTS.items():
        yield name, lambda place, change=change, metadata=metadata: test_vetting.reweighed(made, place, change, metadata)
    for name, (change, _) in test_vetting.FOLDERS.items():
        yield name, lambda place, change=change: test_vetting.files(made, place, change)


def run(root: Path) -> dict[str, dict[str, int]]:
    """Counts of outcomes by kind of input, tried on the course at `root`."""
    from tests import test_kit, test_readme

    counts = {kind: collections.Counter() for kind in KINDS}

    def note(kind, name, found):
        counts[kind][found] += 1
        if found != KINDS[kind]:
            print(f"{kind}, {ascii(name)}: {found}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = list(questions(root, folder))
        for number, (_, _, content) in enumerate(files):
            (folder / f"q{number}").mkdir()
            (folder / f"q{number}" / "mine.jsonl").write_bytes(content)
        found = tried(QUESTIONS, root, [[str(folder / f"q{number}" / "mine.jsonl")] for number in range(len(files))])
        for (kind, name, _), (status, said) in zip(files, found, strict=True):
            result = outcome(status, said)
            note(kind, name, "right" if KINDS[kind] == "right" and result == "taken in silence" else result)

        names, cases = [], []
        for number, (name, make) in enumerate(adapter_folders(folder)):
            (folder / str(number)).mkdir()
            names.append(name)
            cases.append([str(make(folder / str(number)))])
        for name, answer in zip(names, tried(ADAPTER, root, cases), strict=True):
            note("bad adapters", name, outcome(*answer))

        cases = []
        for number, text in enumerate(test_kit.MANIFESTS.values()):
            adapter = folder / f"kit{number}" / "adapters" / "sft-0" / "adapter"
            adapter.mkdir(parents=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (adapter / file).write_text("{}", encoding="utf-8")
            text = text.replace("NAME", "adapters/sft-0/adapter/adapter_config.json")
            (folder / f"kit{number}" / "manifest.json").write_text(text, encoding="utf-8")
            cases.append([str(folder / f"kit{number}"), str(folder / f"runs{number}" / "sft-0" / "adapter")])
        for name, answer in zip(test_kit.MANIFESTS, tried(KIT, root, cases), strict=True):
            note("bad manifests of a kit", name, outcome(*answer))

        steering = ["SELECT char(27)||'[2J'", "SELECT 1 AS `\x1b[2J`", "SELECT `\x1b[2J` FROM flights", "SELECT char(155)||'2J'", "SELECT char(8238)||'abc'"]
        for query, (_, said) in zip(steering, tried(ASK, root, [[query, "what?"] for query in steering]), strict=True):
            clean = not {"\x1b", "\x9b", "\u202e"} & set(said)
            note("results that steer a terminal", query, "traceback" if "Traceback" in said else "right" if clean else "raw escapes")
        unknown = ["SELECT x'00ff'", "SELECT 9e999", "SELECT -9e999"]
        for query, (_, said) in zip(unknown, tried(ASK, root, [[query, "--jsonl"] for query in unknown]), strict=True):
            try:
                json.loads(said.strip().splitlines()[0], parse_constant=lambda word: 1 / 0)
                note("results that JSON doesn't know", query, "right")
            except (ValueError, IndexError, ZeroDivisionError):
                note("results that JSON doesn't know", query, "traceback" if "Traceback" in said else "taken in silence")
        commands = test_readme.tries(folder / "met")
        for (module, words, *_), (status, said) in zip(commands, tried(COMMAND, root, [one[:3] for one in commands]), strict=True):
            left = said.strip().split("STATUS ")[-1]
            if left == "absent":  # a command that came later
                continue
            ended = "SAID" if left in ("1", "2") else ""
            note("README's commands where something is wrong", " ".join([module, *words]), outcome(status, said + ended))
    return {kind: {name: counts[kind][name] for name in OUTCOMES if counts[kind][name]} for kind in KINDS}


def table(record: dict) -> str:
    """docs/strangers.md."""
    lines = ["| what strangers hand it | tried | it should be | before | now |", "|---|---|---|---|---|"]

    def told(counts):
        return ", ".join(f"{name} {count}" for name, count in counts.items())

    for kind, wanted in KINDS.items():
        now = record["now"][kind]
        lines.append(f"| {kind} | {sum(now.values())} | {wanted} | {told(record['before'][kind])} | {told(now)} |")
    head = (
        "# What strangers hand the course\n\n"
        "Files, adapters, kits and queries that are damaged, mistaken or hostile, each tried in a process of its own\n"
        "(`python benchmarks/strangers.py now`). The inputs stand in the tests: tests/test_jsonl.py, tests/test_vetting.py,\n"
        "tests/test_kit.py, tests/test_readme.py; tests/hostile.sql.jsonl has 293 queries that the SQL worker stood before, and stands.\n"
        f"Before: {record['commit']}.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def main(which: str, root: str = "") -> None:
    place = Path(root or HERE).resolve()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record[which] = run(place)
    if which == "before":
        record["commit"] = subprocess.run(["git", "log", "-1", "--format=%h of %cs"], cwd=place, capture_output=True, text=True, check=True).stdout.strip()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(record[which], indent=1))
    if {"before", "now"} <= record.keys():
        TABLE.write_text(table(record), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main(*sys.argv[1:])
