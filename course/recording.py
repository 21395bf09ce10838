"""`make sweeps`: runs what costs hours and records it per question in data/results/, hashed to its recipe.

`run [SWEEP]` does what is missing or stale, after it has told the hours; `hours [SWEEP]` tells those of everything; `check`
re-runs a recorded point drawn at random and compares; `stale` names what isn't current. A point that fails is named at the
end, with its log, and stops no other.
"""

import argparse
import contextlib
import json
import random
import sys
from pathlib import Path

from course import measure, sweeps
from helpers import intervals, scoreboard, times
from helpers.command import status
from helpers.files import CourseError, alone, write_whole
from helpers.runtime import setup

# Of accuracy, between two runs of one recipe: 16-bit rounding alone (another processor, other threads) sends training
# another way, and the standard error of a paired difference on 100 questions is about 5 points; twice that.
TOLERANCE = 0.10


def run(only: str | None = None) -> None:
    """Runs what is missing or stale, writing after each point, so that an interrupt loses what is running at most."""
    failed = {}
    tell(only)
    while todo := {name: place for name, place in missing(only).items() if name not in failed}:  # anew: `methods` follows from what `search` found
        with contextlib.closing(measure.results(todo)) as found:
            for name, record in found:
                sweep, point = todo[name]
                said = f"{sweep}: {point['stage']} seed {point['seed']} {point.get('recipe') or ''}".rstrip()
                if isinstance(record, str):
                    failed[name] = f"{said}: {record}"
                    print(f"FAILED {failed[name]}", flush=True)
                    continue
                keep(record)
                for ending in ("json", "json.lock", "log"):
                    (measure.folder() / f"{name}.{ending}").unlink(missing_ok=True)
                print(f"done {said}", flush=True)
    if failed:
        raise CourseError("\n".join([f"{len(failed)} failed; the other points are recorded, but for what follows from these:", *failed.values()]))


def missing(only: str | None = None) -> dict[str, tuple[str, dict]]:
    """Points without a current record, each once: its hash, then its sweep and itself. What another sweep has is copied before."""
    found, points, have = {}, sweeps.plan(), {sweep: by_key(sweep) for sweep in sweeps.plan()}
    anywhere = {name: run for runs in have.values() for name, run in runs.items()}
    for sweep in points:
        current = {sweeps.key(sweep, p): p for p in points[sweep]} if only in (None, sweep) else {}
        if any(name in anywhere and name not in have[sweep] for name in current):
            with alone(place(sweep)):
                write(sweep, current, anywhere | by_key(sweep))
        for name, point in current.items():
            if name not in anywhere:
                found.setdefault(name, (sweep, point))
    return found


def by_key(sweep: str) -> dict[str, dict]:
    """A sweep's recorded runs by their hashes."""
    return {run["key"]: run for run in scoreboard.recorded(sweep)}


def keep(record: dict) -> None:
    """Writes the record into the file of each sweep that has its point."""
    for sweep, points in sweeps.plan().items():
        current = {sweeps.key(sweep, p): p for p in points}
        if record["key"] in current:
            with alone(place(sweep)):
                write(sweep, current, by_key(sweep) | {record["key"]: record})


def place(sweep: str) -> Path:
    return scoreboard.RESULTS / f"{sweep}.json"


def write(sweep: str, points: dict[str, dict], found: dict[str, dict]) -> None:
    """A sweep's file: of its points, those that were found, one a line."""
    runs = ",\n".join(json.dumps(found[name] | {"stage": point["stage"]}) for name, point in points.items() if name in found)
    write_whole(place(sweep), "{\n" + f'"sweep": "{sweep}",\n"runs": [\n{runs}\n]\n' + "}\n")


# ---------------------------------------------------------------- hours


def to_come(only: str | None = None) -> list[tuple[str, dict]]:
    """Stand-ins for the points that aren't planned before a search is done: as many, with the first settings of its grid."""
    rest = {"methods": [(method, recipe) for method, (recipe, _) in sweeps.METHODS.items() if sweeps.chosen_rate(method) is None]}
    rest["preference"] = [("dpo", sweeps.PREFERENCE["dpo"][0])] * 5 if len(sweeps.preference_arms()) == 1 else []
    wanted = [(sweep, arm) for sweep, arms in rest.items() if only in (None, sweep) for arm in arms]
    return [(sweep, {"stage": stage, "seed": seed, "recipe": recipe}) for sweep, (stage, recipe) in wanted for seed in sweeps.SEEDS]


def hours(points: list[tuple[str, dict]]) -> tuple[dict[str, float], int, int]:
    """Estimated hours of each sweep's points here, how many run at a time, and the threads of each."""
    import torch

    at_once, threads = measure.side_by_side(len(points))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    at = times.rates.__wrapped__()
    torch.set_num_threads(before)
    found = dict.fromkeys(sweep for sweep, _ in points)
    return {sweep: sum(measure.estimate(s, p, at) for s, p in points if s == sweep) / at_once / 3600 for sweep in found}, at_once, threads


def tell(only: str | None = None, everything: bool = False) -> None:
    """Says how long the missing points will take here, or `everything` anew, sweep by sweep."""
    if everything:
        every = [(sweep, point) for sweep, found in sweeps.plan().items() if only in (None, sweep) for point in found]
        points = list({sweeps.key(*place): place for place in reversed(every)}.values())[::-1]  # of equals the first
    else:
        points = list(missing(only).values())
    points += to_come(only)
    if not points:
        print("every recorded run is current", flush=True)
        return
    each, at_once, threads = hours(points)
    for sweep, value in each.items():
        print(f"  {sweep:20}{sum(s == sweep for s, _ in points):4} points{value:7.1f} hours")
    how = f"{at_once} at a time with {threads} {'threads' if threads > 1 else 'thread'} each"
    print(f"{len(points)} points, {how}: about {sum(each.values()):.1f} hours on this machine (estimate)", flush=True)


# ---------------------------------------------------------------- commands


def check() -> int:
    """Re-runs a recorded point drawn at random and compares accuracy on validation: 0 within TOLERANCE, else 1."""
    sweep, point = random.choice([(sweep, p) for sweep, points in sweeps.plan().items() for p in points])
    recorded = next((r for r in scoreboard.recorded(sweep) if r["key"] == sweeps.key(sweep, point)), None)
    if recorded is None:
        raise CourseError(f"{sweep} has no current record: run make sweeps first.")
    print(f"re-running {sweep}: {point}", flush=True)
    again = measure.run_point(sweep, point)
    split = next(iter(again["splits"]))  # validation, or the first that is asked
    a, b = (intervals.score(r["splits"][split]["records"]).accuracy for r in (recorded, again))
    ok = abs(a - b) <= TOLERANCE
    print(f"recorded {a:.1%}, again {b:.1%}: {'within' if ok else 'OUTSIDE'} {TOLERANCE:.0%}", flush=True)
    return 0 if ok else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.recording", description=__doc__)
    parser.add_argument("command", choices=["run", "hours", "check", "stale"])
    parser.add_argument("sweep", nargs="?")
    chosen = parser.parse_args(arguments)
    return status(command, chosen.command, chosen.sweep, left="What was finished is kept: run the same command to go on.")


def command(what: str, only: str | None) -> int | None:
    setup()
    if only and only not in sweeps.plan():
        raise CourseError(f"There is no sweep {only!r}: {', '.join(sweeps.plan())}.")
    if what == "check":
        return check()
    if what == "stale":
        print("\n".join(sweeps.stale()) or "every recorded run is current")
    elif what == "hours":
        tell(only, everything=True)
    else:
        run(only)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows can't say every letter
    sys.exit(main())
