"""The arms of notebook 04 side by side: its tables and curves, made of recorded runs with their per-question records.

A run is what `scoreboard.recorded` gives; `runs` is {arm: its runs, one a seed}, as `by_arm` makes it. Tables are
DataFrames with one row an arm (or a point of a grid). Accuracy, style and refusals are means over the seeds, their
intervals those of `intervals`: phrasings are resampled, and all seeds' answers to one phrasing stay together.
"""

from collections.abc import Callable
from dataclasses import asdict

from helpers import house, intervals, preferences

MARGIN = 0.05  # of accuracy: "not worse" is a difference whose interval lies above minus this


# ---------------------------------------------------------------- one run


def curve(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of what a history logged as `name`: loss, rewards/margins, probe/chosen or probe/rejected (nats, pairs kept aside)."""
    logged = [h for h in history if name in h]
    return [h["step"] for h in logged], [float(h[name]) for h in logged]


def moved(run: dict, side: str) -> float:
    """How far the log-probability of the `chosen` or `rejected` answers kept aside went from first to last step: nats, mean over pairs."""
    values = curve(run["history"], f"probe/{side}")[1]
    return values[-1] - values[0]


def style(records: list[dict], rules) -> float:
    """The mean share of these `rules` that right answers keep, over those to which one of them applies (nan: there is none)."""
    kept = [r["kept"] for r in records if r["correct"] and set(r.get("kept", ())) & set(rules)]
    return sum(house.share(k, rules) for k in kept) / len(kept) if kept else float("nan")


def by_rule(records: list[dict]):
    """A Series: for each house rule, the share of right answers that keep it, of those to which it applies."""
    import pandas as pd

    kept = pd.DataFrame([r.get("kept", {}) for r in records if r["correct"]])
    return kept.reindex(columns=list(house.RULES)).astype(float).mean()


def right(records: list[dict]) -> list[float]:
    """For each question 1 if its answer is right, else 0."""
    return [float(r["correct"]) for r in records]


def refused(records: list[dict]) -> list[float]:
    """For each question 1 if it was refused, rightly (the unanswerable) or wrongly, else 0."""
    return [float(r["kind"] == "refused" or (r["intent"] == "unanswerable" and r["correct"])) for r in records]


# ---------------------------------------------------------------- points of a grid


def search(points: list[dict], taken=()):
    """A row for each recorded run of a grid, numbered: its settings, and on validation accuracy, style by the paired rules, the
    house score (a wrong answer counts 0), and how far chosen and rejected moved (nats). An arrow marks the recipes `taken`."""
    import pandas as pd

    rows = []
    for number, run in enumerate(points, 1):
        recipe, records = run["recipe"], run["splits"]["validation"]["records"]
        by_dpo = recipe["method"] == "dpo"
        scores = preferences.style_scores(records, house.PAIRED)
        rows.append({
            "#": number, "arm": run["stage"], "pairs": recipe["pairs"], "learning rate": f"{recipe['learning_rate']:.0e}",
            "β": f"{recipe['beta']:g}" if by_dpo else "", "SFT term": f"{recipe['sft_weight']:g}" if by_dpo else "",
            "accuracy": intervals.score(records).accuracy, "style": style(records, house.PAIRED), "house score": sum(scores) / len(scores),
            "chosen": moved(run, "chosen"), "rejected": moved(run, "rejected"), "taken": "←" if recipe in map(asdict, taken) else "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def marks(table, start: dict) -> list[dict]:
    """The points for `plots.frontier`: the run that all start from, and each row of a `search` table."""
    records = start["splits"]["validation"]["records"]
    first = {"label": "start", "group": "SFT", "style": style(records, house.PAIRED), "accuracy": intervals.score(records).accuracy}
    groups = {"dpo": "DPO", "control": "control"}
    rest = [
        {
            "label": row["#"],
            "group": groups.get(row["arm"], row["arm"]) + (", taken" if row["taken"] else ""),
            "style": row["style"],
            "accuracy": row["accuracy"],
        }
        for row in table.to_dict("records")
    ]
    return [first, *rest]


# ---------------------------------------------------------------- arms, over their seeds

Runs = dict[str, list[dict]]


def by_arm(recorded: list[dict]) -> Runs:
    """{arm: its runs, one a seed}, in the order of the record."""
    runs: Runs = {}
    for run in recorded:
        runs.setdefault(run["stage"], []).append(run)
    return runs


def records_of(runs: list[dict], split: str) -> list[list[dict]]:
    """The per-question records of each seed on a split."""
    return [run["splits"][split]["records"] for run in runs]


def mean(runs: list[dict], split: str, value: Callable) -> list[dict]:
    """One record a question: `correct` is the mean over the seeds of `value`(records), as `right` or `refused` give it."""
    seeds = records_of(runs, split)
    return [dict(r, correct=sum(v) / len(v)) for r, v in zip(seeds[0], zip(*map(value, seeds), strict=True), strict=True)]


def share(runs: list[dict], split: str, value: Callable) -> intervals.Score:
    """The mean of `value` over questions and seeds, with its interval."""
    return intervals.score(mean(runs, split, value))


def difference(ours: list[dict], theirs: list[dict], split: str, value: Callable) -> tuple[float, float, float]:
    """Mean of `value` of one arm minus another's on the same questions: (difference, low, high)."""
    return intervals.paired_difference(mean(ours, split, value), mean(theirs, split, value))


def points(values) -> str:
    """(difference, low, high) as text, in percentage points: "-1.7 (-3.4 to -0.2)"."""
    middle, low, high = (100 * v for v in values)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def verdict(low: float, high: float) -> str:
    """The course's rule for a difference of accuracies by its interval."""
    return "not worse" if low > -MARGIN else "worse" if high < 0 else "inconclusive"


def table(runs: Runs, row: Callable):
    """A DataFrame of `row`(that arm's runs), a dict, for each arm."""
    import pandas as pd

    return pd.DataFrame({arm: row(mine) for arm, mine in runs.items()}).T


def accuracy(runs: Runs, split: str, base: str = "sft"):
    """Execution accuracy of each arm with its interval, that of each seed, and the difference from `base` with the verdict."""

    def row(mine):
        gain = difference(mine, runs[base], split, right)
        seeds = " ".join(f"{intervals.score(records).accuracy:.0%}" for records in records_of(mine, split))
        against = {f"minus {base.upper()}": points(gain), "verdict": verdict(*gain[1:])} if mine is not runs[base] else {}
        return {"accuracy": str(share(mine, split, right)), "each seed": seeds} | against

    return table(runs, row).fillna("")


def win_rates(ours: list[dict], theirs: list[dict], split: str) -> tuple:
    """Style against one run of another arm where both are right (`preferences.wins`): (rate by all rules, rate by the held-out ones, counts)."""
    mine = records_of(ours, split)
    base = records_of(theirs, split) * len(mine)
    (rate, counts), (held, _) = (preferences.wins(mine, base, rules) for rules in (tuple(house.RULES), house.HELD_OUT))
    return rate, held, counts


def styles(runs: Runs, split: str, base: str = "sft"):
    """Style of each arm's right answers, by the paired and by the held-out rules, and its wins over `base`, question by question."""

    def row(mine):
        everything = [r for records in records_of(mine, split) for r in records]
        rate, held, counts = win_rates(mine, runs[base], split)
        rates = {"win rate": rate, "win rate, held out": held}
        text = {name: f"{r.accuracy:.0%} ({r.low:.0%} to {r.high:.0%})" if r else "" for name, r in rates.items()}
        shares = {"paired rules": style(everything, house.PAIRED), "held out": style(everything, house.HELD_OUT)}
        shares = {name: "–" if value != value else f"{value:.0%}" for name, value in shares.items()}  # nan: no such rule applies
        return shares | {"win / tie / loss": " / ".join(map(str, list(counts.values())[:3]))} | text

    return table(runs, row)


def rules(runs: Runs, split: str):
    """The share of right answers that keep each house rule, of those to which it applies, all seeds together."""
    return table(runs, lambda mine: by_rule([r for records in records_of(mine, split) for r in records]))


def refusals(runs: Runs):
    """How often each arm refuses what can't be answered, and what can: shares with intervals."""
    names = {"unanswerable: refused": "unanswerable", "near-miss: wrongly refused": "near_miss"}
    return table(runs, lambda mine: {name: str(share(mine, split, refused)) for name, split in names.items()})


def cost(runs: Runs):
    """What training took, mean over the seeds: tokens in the steps, and seconds with loading and watching."""
    trained = {arm: mine for arm, mine in runs.items() if "tokens" in mine[0]}
    names = {"tokens trained on": "tokens", "seconds": "train_seconds"}
    return table(trained, lambda mine: {name: sum(run[of] for run in mine) / len(mine) for name, of in names.items()})


def endings(runs: Runs):
    """How training ended: loss, margin and reward accuracy on the training pairs (last five steps, all seeds; of DPO alone), the
    log-probabilities of the pairs kept aside at start and end (nats), and accuracy on `test`."""
    names = {"loss": "loss", "margin": "rewards/margins", "reward accuracy": "rewards/accuracies"}

    def average(values):
        return sum(values) / len(values) if values else float("nan")

    def row(mine):
        own = {name: [v for run in mine for v in curve(run["history"], of)[1][-5:]] for name, of in names.items()}
        own = {name: average(values if own["margin"] else []) for name, values in own.items()}
        sides = {side: [curve(run["history"], f"probe/{side}")[1] for run in mine] for side in ("chosen", "rejected")}
        ends = {f"{side}, {when}": average([v[i] for v in values]) for side, values in sides.items() for when, i in (("start", 0), ("end", -1))}
        return own | ends | {"accuracy": share(mine, "test", right).accuracy}

    return table({arm: mine for arm, mine in runs.items() if curve(mine[0].get("history", []), "loss")[0]}, row)
