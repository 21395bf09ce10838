"""Times: what the stored notebooks took when they were executed (`make refresh`), kept and written wherever times are told: `make timings`."""

import json
import re
import sys
import textwrap
from dataclasses import dataclass

from course.lessons import NOTEBOOKS, all_notebooks
from helpers import times
from helpers.command import status
from helpers.files import CourseError, write_whole
from helpers.runtime import ROOT

FAST, SLOW = "bfloat16", "float32"  # the two kinds of processor, by what the course computes in
SPARE = 0.25  # of two hours, kept free: rooms are slower than rehearsals


@dataclass(frozen=True)
class Block:
    """A row of a plan: minutes of talk, and those of what runs and of what is solved meanwhile.

    `run`: the notebook whose running time is waited for. `behind`: the one that runs while this is going on. `solve`: numbers of exercises.
    """

    what: str
    talk: int
    run: str = ""
    behind: str = ""
    solve: tuple[str, ...] = ()


TWO_HOURS = (
    Block("Opening: the job, the rule, machines", 8),
    Block("00 · Start here", 8, run="00_start_here", solve=("00.1",)),
    Block("03, started early: Run All", 3, behind="03_sft_with_trl"),
    Block("Demonstration of 01 and 02, while 03 trains", 12, behind="03_sft_with_trl"),
    Block("03 · SFT with TRL", 12, solve=("03.1",)),
    Block("Break", 5),
    Block("04 · DPO", 13, run="04_dpo"),
    Block("Close, feedback form", 7),
)
ONE_DAY = (
    Block("Opening: the job, the rule, machines", 15),
    Block("00 · Start here", 25, run="00_start_here", solve=("00.1", "00.2")),
    Block("Break", 15),
    Block("01 · Quantized loading", 30, run="01_quantized_loading", solve=("01.1", "01.2")),
    Block("02 · LoRA injection", 30, run="02_lora_injection", solve=("02.1", "02.2")),
    Block("03, started: Run All", 5, behind="03_sft_with_trl"),
    Block("Lunch, while 03 trains", 60, behind="03_sft_with_trl"),
    Block("03 · SFT with TRL", 30, solve=("03.1", "03.2")),
    Block("Break", 15),
    Block("04 · DPO", 40, run="04_dpo", solve=("04.1", "04.2")),
    Block("Your own questions, your own preferences", 60),
    Block("Close, feedback form", 15),
)


def lessons() -> list[str]:
    return [name for name in all_notebooks() if "/" not in name]


def noted() -> dict[str, dict]:
    """The kept runs, renewed by what `make refresh` noted in the notebooks; a kind's rates are its best, as load only lowers them."""
    runs, seen = times.kept(), {}
    for name in lessons():
        note = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["metadata"].get("measured", {})
        if note.get("kind") == "cpu":  # notes without a kind are older than these rates
            seen.setdefault(note["dtype"], {})[name] = note
    for dtype, notes in seen.items():
        some = next(iter(notes.values()))
        rates = {rate: max(note["rates"][rate] for note in notes.values()) for rate in some["rates"]}
        took = runs.get(dtype, {}).get("seconds", {}) | {name: note["seconds"] for name, note in notes.items()}
        runs[dtype] = {"machine": some["machine"], "cores": some["cores"], "rates": rates, "seconds": dict(sorted(took.items()))}
    return runs


def told(dtype: str) -> dict[str, tuple[int, str]]:
    """Minutes of each lesson on a kind of processor, rounded (at least 1), and whether they were measured or are an estimate from its rates."""
    run, rates = noted()[dtype], times.kept_rates(noted()[dtype], dtype)
    works, found = times.lessons(), {}
    for name in lessons():
        took, how = run["seconds"].get(name), "measured"
        if took is None:
            took, how = times.seconds(works[name], rates), "estimate"
        found[name] = max(1, round(took / 60)), how
    return found


def running(dtype: str = FAST) -> dict[str, int]:
    """The minutes alone."""
    return {name: minutes for name, (minutes, _) in told(dtype).items()}


def whole(dtype: str) -> int:
    """Minutes of `make course`: the lessons and the exam."""
    return round(sum(running(dtype).values()) + times.seconds(times.exam(), times.kept_rates(noted()[dtype], dtype)) / 60)


def exercises() -> dict[str, int]:
    """Minutes that each exercise's card gives it, by number."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
        found |= {number: int(minutes) for number, minutes in re.findall(r"### (\d\d\.\d) · [^\n]+\n\n\*[\w-]+, (\d+) minutes\.\*", text)}
    return found


def clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120)


def plan(blocks: tuple[Block, ...], of: int | None = None) -> str:
    """A plan as a table; CourseError where it takes more than `of` minutes less the spare, or a notebook doesn't get done behind the talk."""
    fast, slow, solving = running(FAST), running(SLOW), exercises()

    def length(block: Block) -> int:
        return block.talk + (fast[block.run] if block.run else 0) + sum(solving[number] for number in block.solve)

    start, lines = 0, ["| from | to | what | talk | waiting | exercises |", "|---|---|---|---|---|---|"]
    for block in blocks:
        end = start + length(block)
        solve = f"{', '.join(block.solve)}: {sum(solving[n] for n in block.solve)}" if block.solve else ""
        lines.append(f"| {clock(start)} | {clock(end)} | {block.what} | {block.talk} | {fast[block.run] if block.run else ''} | {solve} |")
        start = end
    late = ""
    for name in sorted({block.behind for block in blocks} - {""}):
        meanwhile = sum(length(block) for block in blocks if block.behind == name)
        if fast[name] > meanwhile:
            raise CourseError(f"{name} takes {fast[name]} minutes, longer than what goes on meanwhile: make that longer in course/timings.py.")
        if slow[name] > meanwhile:
            late += f", and {name[:2]} is over {slow[name] - meanwhile} minutes late: let them take its adapter from a kit"
    if of and start > of * (1 - SPARE):
        raise CourseError(f"The plan takes {start} of {of} minutes, and a quarter is to be spare: shorten it in course/timings.py.")
    spare = f" of {of}; {of - start} to spare" if of else ""
    more = sum(slow[block.run] - fast[block.run] for block in blocks if block.run)
    waiting = "*Waiting* is for the notebook to run, on two cores with fast bfloat16, as told below."
    return "\n".join([*lines, "", wrapped(f"Minutes; {start} in all{spare}. {waiting} Machines without it wait {more} minutes more{late}.")])


def table() -> str:
    """The lessons' minutes on both kinds of processor and those of their exercises."""
    lines = ["| notebook | running, fast bfloat16 | running, without | all three exercises |", "|---|---|---|---|"]
    fast, slow, solving = told(FAST), told(SLOW), exercises()
    for name in fast:
        solved = sum(m for number, m in solving.items() if number.startswith(name[:2]))
        runs = " | ".join(f"{minutes}{' (estimate)' * (how == 'estimate')}" for minutes, how in (fast[name], slow[name]))
        lines.append(f"| [{name}](notebooks/{name}.ipynb) | {runs} | {solved} |")
    how = "Running: on two cores, measured when notebooks were executed whole, where no estimate is named. Without: processors that compute in float32"
    return "\n".join([*lines, "", wrapped(f"Minutes. {how}, as most laptops'. Exercises: an estimate.")])


def sentence(fast: tuple[int, str], slow: tuple[int, str]) -> str:
    """What a notebook's first cell says of its time."""
    minutes = f"{fast[0]} minute{'s' * (fast[0] > 1)}"
    return f"**Time.** {minutes} of computing on two CPU cores with fast bfloat16 ({fast[1]}), {slow[0]} without, as on most laptops ({slow[1]})."


def renewed() -> dict:
    """Every file that keeps or tells times, with its text as it should be: the kept runs, README, WORKSHOP.md, the notebooks."""
    texts = {times.KEPT: json.dumps(noted(), indent=1) + "\n"}
    readme, workshop = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "WORKSHOP.md"))
    fast, slow = told(FAST), told(SLOW)
    for name in fast:
        path = NOTEBOOKS / f"{name}.ipynb"
        said = sentence(fast[name], slow[name])
        texts[path] = re.sub(r"\*\*Time\.\*\* [^\n]*?(?= On a T4)", lambda _, said=said: said, path.read_text(encoding="utf-8"))
        minutes = f"{fast[name][0]} | {slow[name][0]}"
        readme = re.sub(rf"(\| \[[^|]+\]\(notebooks/{name}\.ipynb\) \|[^|]+\|) \d+ \| \d+ (\|)", rf"\1 {minutes} \2", readme)
    both = f"{whole(FAST)} minutes on two cores with fast bfloat16, {whole(SLOW)} without"
    readme, workshop = (re.sub(r"\d+ minutes on two cores with fast bfloat16, \d+ without", both, text) for text in (readme, workshop))
    for mark, block in (("timings", table()), ("plan: two hours", plan(TWO_HOURS, 120)), ("plan: one day", plan(ONE_DAY))):
        workshop = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda match, block=block: f"{match[1]}{block}\n{match[2]}", workshop, flags=re.S)
    return texts | {ROOT / "README.md": readme, ROOT / "WORKSHOP.md": workshop}


def main() -> None:
    for path, text in renewed().items():
        if path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
            print(f"times renewed in {path.relative_to(ROOT).as_posix()}")
    fast, slow = running(FAST), running(SLOW)
    print("; ".join(f"{name[:2]}: {minutes} or {slow[name]} min" for name, minutes in fast.items()))


if __name__ == "__main__":
    sys.exit(status(main))
