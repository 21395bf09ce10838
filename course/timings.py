"""Times: what the stored notebooks took when they were executed (`make refresh`), written wherever times are told: `make timings`."""

import json
import re
from dataclasses import dataclass

from course.runner import NOTEBOOKS, all_notebooks
from helpers.runtime import ROOT, CourseError, write_whole

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


def measured() -> dict[str, int]:
    """Minutes that each lesson took, rounded (at least 1), as `make refresh` noted them; CourseError where a notebook has no note."""
    minutes = {}
    for name in all_notebooks():
        if "/" not in name:
            noted = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["metadata"].get("measured")
            if not noted:
                raise CourseError(f"{name} doesn't say how long it took: run make refresh NOTEBOOK={name} with nothing else running.")
            minutes[name] = max(1, round(noted["seconds"] / 60))
    return minutes


def exercises() -> dict[str, int]:
    """Minutes that each exercise's card gives it, by number."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")
        found |= {number: int(minutes) for number, minutes in re.findall(r"### (\d\d\.\d) · [^\n]+\n\n\*[\w-]+, (\d+) minutes\.\*", text)}
    return found


def clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def plan(blocks: tuple[Block, ...], of: int | None = None) -> str:
    """A plan as a table; CourseError where it takes more than `of` minutes less the spare, or a notebook doesn't get done behind the talk."""
    running, solving = measured(), exercises()

    def length(block: Block) -> int:
        return block.talk + (running[block.run] if block.run else 0) + sum(solving[number] for number in block.solve)

    start, lines = 0, ["| from | to | what | talk | waiting | exercises |", "|---|---|---|---|---|---|"]
    for block in blocks:
        end = start + length(block)
        solve = f"{', '.join(block.solve)}: {sum(solving[n] for n in block.solve)}" if block.solve else ""
        lines.append(f"| {clock(start)} | {clock(end)} | {block.what} | {block.talk} | {running[block.run] if block.run else ''} | {solve} |")
        start = end
    for name in {block.behind for block in blocks} - {""}:
        if running[name] > sum(length(block) for block in blocks if block.behind == name):
            raise CourseError(f"{name} takes {running[name]} minutes, longer than what goes on meanwhile: make that longer in course/timings.py.")
    if of and start > of * (1 - SPARE):
        raise CourseError(f"The plan takes {start} of {of} minutes, and a quarter is to be spare: shorten it in course/timings.py.")
    spare = f" of {of}; {of - start} to spare" if of else ""
    return "\n".join([*lines, "", f"Minutes; {start} in all{spare}. *Waiting* is for the notebook to run, as measured below."])


def table() -> str:
    """The lessons' measured minutes and those of their exercises."""
    lines = ["| notebook | running, minutes | all three exercises, minutes |", "|---|---|---|"]
    solving = exercises()
    for name, minutes in measured().items():
        solved = sum(m for number, m in solving.items() if number.startswith(name[:2]))
        lines.append(f"| [{name}](notebooks/{name}.ipynb) | {minutes} | {solved} |")
    return "\n".join([*lines, "", "Running: as measured when the stored outputs were made, on two cores with fast bfloat16. Exercises: an estimate."])


def renewed() -> dict:
    """Every file that tells times, with its text as it should be: README, WORKSHOP.md, the notebooks."""
    texts = {}
    readme, workshop = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "WORKSHOP.md"))
    for name, minutes in measured().items():
        path = NOTEBOOKS / f"{name}.ipynb"
        told = f"**Time.** {minutes} minute{'s' * (minutes > 1)} of computing"
        texts[path] = re.sub(r"\*\*Time\.\*\* \d+ minutes? of computing", told, path.read_text(encoding="utf-8"))
        readme = re.sub(rf"(\| \[[^|]+\]\(notebooks/{name}\.ipynb\) \|[^|]+\|) \d+ (\|)", rf"\1 {minutes} \2", readme)
    for mark, block in (("timings", table()), ("plan: two hours", plan(TWO_HOURS, 120)), ("plan: one day", plan(ONE_DAY))):
        workshop = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", lambda match, block=block: f"{match[1]}{block}\n{match[2]}", workshop, flags=re.S)
    return texts | {ROOT / "README.md": readme, ROOT / "WORKSHOP.md": workshop}


def main() -> None:
    for path, text in renewed().items():
        if path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
            print(f"times renewed in {path.relative_to(ROOT).as_posix()}")
    print("; ".join(f"{name[:2]}: {minutes} min" for name, minutes in measured().items()))


if __name__ == "__main__":
    main()
