"""README's commands where something is wrong around them: each ends in a sentence and a status, none in a traceback."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import strangers
from helpers import models, recipes, vetting
from helpers.runtime import ROOT

ENVIRONMENTS = {  # what is set, and what is said: in place of FILE stands a file
    "COURSE_CACHE": ("FILE", "a file stands where its folder should be"),
    "COURSE_RUNS": ("FILE", "a file stands where its folder should be"),
    "COURSE_PROFILE": ("nonsense", "COURSE_PROFILE=nonsense can't be had here: there is t4"),
    "COURSE_MODEL": ("nonsense", "Unknown model 'nonsense': the menu has SmolLM2-135M-Instruct"),
}
NEEDS = {  # command: which of these it meets
    "helpers.ask hello": tuple(ENVIRONMENTS),
    "helpers.ask --jsonl --stage dpo": tuple(ENVIRONMENTS),
    "helpers.doctor": ("COURSE_CACHE", "COURSE_PROFILE", "COURSE_MODEL"),
    "course run": tuple(ENVIRONMENTS),
    "course run --fresh": ("COURSE_RUNS", "COURSE_PROFILE", "COURSE_MODEL"),
    "course catch-up 00": ("COURSE_CACHE", "COURSE_MODEL"),
    "course catch-up 04": tuple(ENVIRONMENTS),
    "course.kit build": ("COURSE_RUNS", "COURSE_PROFILE", "COURSE_MODEL"),
    "course.kit check": ("COURSE_RUNS", "COURSE_PROFILE", "COURSE_MODEL"),
    "course.recording hours": ("COURSE_PROFILE", "COURSE_MODEL"),
}
WORDS = {  # a command with words that it doesn't know: the status and what is said
    "helpers.ask": (2, "give a question in quotes"),
    "helpers.ask --stage best hello": (2, "invalid choice: 'best'"),
    "helpers.doctor nowhere.jsonl": (1, "Can't read nowhere.jsonl"),
    "helpers.doctor README.md": (1, "README.md was not loaded"),
    "helpers.doctor --test x.jsonl": (2, "name the file to be looked at"),
    "helpers.doctor nowhere.jsonl --domain nowhere.toml": (1, "Can't read nowhere.toml"),
    "helpers.doctor nowhere.jsonl --domain README.md": (1, "README.md is not TOML"),
    "helpers.convert": (2, "the following arguments are required: file"),
    "helpers.convert nowhere.json": (1, "nowhere.json is no file"),
    "helpers.convert .": (1, "is no file"),
    "helpers.audit": (2, "the following arguments are required: folder"),
    "helpers.audit nowhere": (1, "There is no folder nowhere"),
    "course": (2, "the following arguments are required: command"),
    "course fly": (2, "invalid choice: 'fly'"),
    "course catch-up": (1, "There is no notebook '': STEP can be 00, 01"),
    "course catch-up 99": (1, "There is no notebook '99'"),
    "course catch-up ../03": (1, "There is no notebook '../03'"),
    "course notebooks 99_nothing": (1, "There is no notebook '99_nothing': there are 00_start_here"),
    "course refresh 99_nothing": (1, "There is no notebook '99_nothing'"),
    "course.kit build --platform amiga": (1, "There is no kit for 'amiga'"),
    "course.kit build --python 2.7": (1, "There is no kit for Python '2.7'"),
    "course.recording run nonsense": (1, "There is no sweep 'nonsense'"),
}
ADAPTERS = {  # what stands in runs/ (or, the last, in a kit) in place of SFT's adapter, and what is said
    "half a config": ({vetting.CONFIG: b'{"r": 8', vetting.WEIGHTS: b""}, "adapter_config.json"),
    "a list": ({vetting.CONFIG: b"[]", vetting.WEIGHTS: b""}, "adapter_config.json"),
    "a kit whose manifest lists nothing": ({vetting.CONFIG: b"{}", vetting.WEIGHTS: b"", "../../../manifest.json": b"[]"}, "is damaged: copy the kit again"),
}
OTHERS = {  # commands of README that aren't tried so, and why
    "make lab": "JupyterLab's own", "make test": "pytest's own; the notebooks command stands for it", "make help": "prints the Makefile",
    "make colab-check": "needs an hour", "make newest-check": "needs an hour", "make laptop-check": "needs an hour", "make gpu-check": "needs a GPU",
    "make kit-check": "course.kit check", "make catch-up": "course catch-up", "make kit": "course.kit build", "make course": "course run",
    "make configs": "tests/test_engines.py compares what it writes",
    "make test-notebooks": "course notebooks", "make bench": "benchmarks", "make sweeps": "course.recording run", "course test": "pytest's own",
}  # fmt: skip


def tries(folder: Path) -> list[tuple]:
    """(module, its words, environment, status, what is said) of each try; makes what they meet in `folder`."""
    folder.mkdir()
    file = folder / "a file"
    file.write_text("x", encoding="utf-8")
    found = []

    def add(command, environment, status, says):
        module, *words = command.split(" ")
        found.append((module, words, {"COURSE_RUNS": str(folder / "runs"), "COURSE_KIT": str(folder / "none"), "COURSE_PROFILE": ""} | environment, status, says))

    for command, names in NEEDS.items():
        for name in names:
            value, says = ENVIRONMENTS[name]
            add(command, {name: str(file) if value == "FILE" else value}, 1, says)
    for command, (status, says) in WORDS.items():
        add(command, {}, status, says)
    run = recipes.SFTRecipe().folder().name
    for number, (name, (files, says)) in enumerate(ADAPTERS.items()):
        kit = "kit" in name
        place = folder / f"adapter {number}" / ("adapters" if kit else "") / run / "adapter"
        place.mkdir(parents=True)
        for path, content in files.items():
            (place / path).write_bytes(content)
        add("helpers.ask hello", {"COURSE_KIT" if kit else "COURSE_RUNS": str(folder / f"adapter {number}")}, 1, says)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each try is a fork of one process")
def test_no_command_of_the_readme_ends_in_a_traceback(tmp_path):
    commands = tries(tmp_path / "met")
    wrong = []
    for (module, words, environment, status, says), (ended, said) in zip(commands, strangers.tried(strangers.COMMAND, ROOT, [one[:3] for one in commands]), strict=True):
        if ended != "ended" or "Traceback" in said or "\x1b" in said or not said.endswith(f"STATUS {status}\n") or says not in said:
            wrong.append(f"{module} {' '.join(words)} {environment}: {ended}: {said[-500:]}")
    assert not wrong, "\n".join(wrong)
    assert len(commands) >= 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each try is a fork of one process")
def test_whatever_is_converted_ends_in_a_sentence(tmp_path):
    import test_jsonl  # not above: the benchmark imports this file, and sees the tests as a package

    files = {**{name: content for name, (content, _) in test_jsonl.REFUSED.items()}, "zeros": bytes(10_000), "noise": bytes(range(256)) * 40}
    cases = []
    for number, content in enumerate(files.values()):
        (tmp_path / f"{number}.json").write_bytes(content)
        cases.append(("helpers.convert", [str(tmp_path / f"{number}.json")], {}))
    for name, (ended, said) in zip(files, strangers.tried(strangers.COMMAND, ROOT, cases), strict=True):
        assert ended == "ended" and "Traceback" not in said and "\x1b" not in said and re.search(r"STATUS [01]\n$", said), (name, ended, said)


def test_every_command_of_the_readme_is_tried_or_said_to_be_another():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"\bmake [a-z-]+(?=[ `=\n])", text)) | set(re.findall(r"-m ((?:course|helpers)\.\w+|course [a-z-]+)", text))
    left = {c for c in commands - set(OTHERS) if not any(f"{one} ".startswith(f"{c} ") for one in (*NEEDS, *WORDS))}
    assert not left and len(commands) > 10, left


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
@pytest.mark.parametrize(("command", "when"), [("course run", "cell 3/"), ("helpers.doctor", "disk "), ("course catch-up 04", "training it")])
def test_ctrl_c_ends_every_command_in_a_sentence(command, when, tmp_path):
    models.model_path()  # not what is waited for here
    environment = os.environ | {"COURSE_RUNS": str(tmp_path), "COURSE_PROGRESS": "0", "COURSE_KIT": str(tmp_path / "none"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split()], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = ""
    while when not in said and (letter := process.stdout.read(1)):
        said += letter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    # Python ends by the signal where Ctrl-C came within an exec of text (a dataclass' methods), though it was caught; to a shell both are 130
    assert process.returncode in (130, -signal.SIGINT) and err.rstrip().splitlines()[-1].startswith("Stopped."), err
    assert "Traceback" not in out + err and "pending" not in err, err
