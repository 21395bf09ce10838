"""What stands in the slots of a phrasing: every way of writing a value gives its condition, invented values are nobody's, held-out ones are kept."""

import random
import re
import sqlite3
import sys
import tomllib

import pytest

from helpers import flights

sys.path.insert(0, str(flights.QUESTIONS))
import make_questions  # noqa: E402
import values  # noqa: E402
from intents import INTENTS  # noqa: E402

FLIGHT = {"month": 7, "day": 4, "hour": 17, "carrier": "DL", "airline": "Delta Air Lines Inc.", "flight": 1545, "tailnum": "N14228", "origin": "LGA",
          "dest": "BOS", "dest_city": "Boston"}  # fmt: skip
OTHER = FLIGHT | {"dest": "ORD", "dest_city": "Chicago", "month": 8}


def filled(phrasing, seeds=200, **more):
    """All that a phrasing becomes with these draws: {words: conditions}."""
    found = {}
    for seed in range(seeds):
        done = values.fill(phrasing, FLIGHT, random.Random(seed), other=OTHER, **more)
        if done is not None:
            found[done.text] = done.conditions
    return found


@pytest.mark.parametrize(
    ("phrasing", "words", "conditions"),
    [
        ("{airline}", "Delta Air Lines", ["airline LIKE 'Delta%'"]),
        ("{airline}", "DL", ["carrier = 'DL'"]),
        ("{not_origin}", "Kennedy", ["origin != 'JFK'"]),
        ("{not_dest}", "Beantown", ["dest_city != 'Boston'"]),
        ("{dests}", "Boston or Chicago", ["dest_city IN ('Boston', 'Chicago')"]),
        ("{dests}", "BOS or ORD", ["dest IN ('BOS', 'ORD')"]),
        ("{origins}", "JFK or Newark", ["origin IN ('JFK', 'EWR')"]),
        ("{airlines}", "Delta or United", ["(airline LIKE 'Delta%' OR airline LIKE 'United%')"]),
        ("{flight_number}", "DL1545", ["carrier = 'DL' AND flight = 1545"]),
        ("{flight_number}", "Delta flight 1545", ["airline LIKE 'Delta%' AND flight = 1545"]),
        ("{tail}", "N14228", ["tailnum = 'N14228'"]),
        ("{date}", "2013-07-04", ["month = 7 AND day = 4"]),
        ("{date}", "7/4/13", ["month = 7 AND day = 4"]),
        ("{date}", "July the 4th", ["month = 7 AND day = 4"]),
        ("{month}", "month 7", ["month = 7"]),
        ("{holiday}", "New Year's Eve", ["month = 12 AND day = 31"]),
        ("{season}", "winter", ["month IN (12, 1, 2)"]),
        ("{season}", "Q3", ["month BETWEEN 7 AND 9"]),
        ("{dep_over}", "two and a half hours", ["dep_delay > 2.5 * 60"]),
        ("{dep_over}", "three hours", ["dep_delay > 3 * 60"]),
        ("{date}", "Labor Day", ["month = 9 AND day = 2"]),
        ("{arr_over}", "half an hour", ["arr_delay > 30"]),
    ],
)
def test_a_value_is_written_in_many_ways_and_means_one_condition(phrasing, words, conditions):
    assert filled(phrasing, 3000)[words] == conditions


def test_conditions_stand_in_one_order_whatever_the_words():
    for conditions in filled("{after_hour} {dest} {tail} {airline} {origin}").values():
        assert [re.sub("dest_city", "dest", c.split()[0]) for c in conditions] in (["carrier", "tailnum", "origin", "dest", "hour"], ["airline", "tailnum", "origin", "dest", "hour"])


def test_hours_and_miles_are_told_as_they_are_meant():
    for text, (condition,) in filled("{hours}").items():
        first, last = (sum(map(int, hour.split(" + "))) for hour in re.fullmatch(r"hour BETWEEN ([\d +]+) AND ([\d +]+)", condition).groups())
        assert 5 <= first <= 17 <= last <= 23 and " and " in text
    for seed in range(50):
        done = values.fill("between {two_miles}", FLIGHT, random.Random(seed))
        if done:
            assert done.values["low"] < done.values["high"] and str(done.values["high"]) in done.text.replace(",", "")


def test_nicknames_are_used_as_often_as_asked():
    for share in (0.0, 1.0):
        said = [values.fill("{dest}", FLIGHT | {"dest": "LAX", "dest_city": "Los Angeles"}, random.Random(seed), nicknames=share) for seed in range(200)]
        assert {one.text for one in said} == ({"LAX", "LA", "L.A."} if share else {"LAX", "Los Angeles"})
        assert {condition for one in said for condition in one.conditions} == {"dest = 'LAX'", "dest_city = 'Los Angeles'"}


def test_hard_kinds_are_kinds_each_in_one_list():
    assert not set(make_questions.HARD) & set(make_questions.HARDEST)
    assert {*make_questions.HARD, *make_questions.HARDEST} <= {*make_questions.INTENTS, make_questions.UNANSWERABLE}


def test_what_would_need_a_sum_is_left_to_sql():
    assert [values.later(*told) for told in ((17, "5 pm"), (17, "17:00"), (12, "12 pm"), (9, "9am"), (23, "11pm"))] == ["12 + 5", "17", "12", "9", "12 + 11"]
    hours = filled("{after_hour}")
    assert hours["4 pm"] == ["hour >= 12 + 4"] and hours["16:00"] == ["hour >= 16"]
    delays = {text: condition for text, (condition,) in filled("{dep_over}").items()}
    assert all(("* 60" in condition) == bool(re.search(r"\dh|hours|hrs", text)) for text, condition in delays.items()) and any("* 60" in c for c in delays.values())
    assert all(eval(condition.split("> ")[1]) >= 1 for condition in delays.values())


def test_an_invented_value_is_no_value_of_the_data_and_stands_in_both():
    with sqlite3.connect(flights.database_path()) as connection:
        texts = {str(v).lower() for column in ("carrier", "airline", "tailnum", "dest", "dest_city") for (v,) in connection.execute(f"SELECT DISTINCT {column} FROM flights")}
    connection.close()
    kept = 0
    for slot in sorted(values.NAMED):
        for seed in range(100):
            done = values.fill("{" + slot + "}", FLIGHT, random.Random(seed), invent=1.0, other=OTHER)
            if done is None or make_questions.real(done.made, texts):
                continue
            kept += 1
            for text in re.findall(r"'([^']+)'", done.conditions[0]):
                plain = text.strip("%")
                assert plain.lower() not in texts and plain.lower() in done.text.lower(), (done.text, done.conditions)
    assert kept > 800
    assert make_questions.real(["dest = 'BOS'"], texts) and make_questions.real(["airline LIKE 'delta%'"], texts) and not make_questions.real(["dest = 'QQQ'"], texts)


def test_held_out_values_are_known_by_every_slot_that_can_name_them():
    for slot, flight, held in [
        ("airline", {"carrier": "VX"}, "test"), ("flight_number", {"carrier": "FL"}, "test"), ("dest", {"dest": "SEA", "dest_city": "Seattle"}, "test"),
        ("not_dest", {"dest": "DEN", "dest_city": "Denver"}, "test"), ("month", {"month": 10}, "test"), ("date", {"month": 3}, "test"),
        ("airline", {"carrier": "F9"}, "validation"), ("dest", {"dest": "TPA", "dest_city": "Tampa"}, "validation"), ("month", {"month": 6}, "validation"),
    ]:  # fmt: skip
        done = values.fill("{" + slot + "}", FLIGHT | flight, random.Random(0))
        assert done.held(held) and not done.held({"test": "validation", "validation": "test"}[held]), slot
    assert not values.fill("{airline} {dest} {date}", FLIGHT, random.Random(0)).held("test")
    away = set().union(*(held["month"] for held in values.HELD_OUT.values()))
    assert not {month for month, _ in values.HOLIDAYS} & away  # when a holiday is can't be copied
    assert not {month for months in values.SEASONS.values() for month in months} & values.HELD_OUT["test"]["month"]


def test_a_slot_that_nobody_knows_is_named():
    with pytest.raises(SystemExit, match="no slot is called {'colour'}: {colour} planes"):
        values.fill("{colour} planes", FLIGHT, random.Random(0))


def test_an_ending_is_of_a_kind_that_the_question_lacks():
    endings = make_questions.read("endings.toml", checked=False)
    assert set(endings) <= {slot for slots in values.GROUPS.values() for slot in slots}
    assert all("{" + slot + "}" in text for slot, texts in endings.items() for text in texts)
    for seed in range(200):
        text = make_questions.ended("count_by_month", "Flights of {airline} from {origin}, by month?", endings, random.Random(seed))
        assert text.endswith("?") and text != "Flights of {airline} from {origin}, by month?"
        added = set(re.findall(r"{(\w+)}", text)) - {"airline", "origin"}
        assert len(added) == 1 and not added & {"month", "months", "date", "holiday", "season", "airlines", "not_airline", "flight_number", "origins", "not_origin"}
    assert not any("{dep_over}" in make_questions.ended("count_late_departures", "late ones", endings, random.Random(s)) for s in range(200))


def test_training_questions_share_no_long_run_of_words_with_what_is_scored():
    rows = [{"question": q} for q in ("How many flights left for Boston today", "flights left, for BOSTON in may!", "left for Boston in June", "how many", "how")]
    assert make_questions.apart(rows, [{"question": "which flights left for Boston in May"}, {"question": "How many?"}]) == [rows[0], rows[2], rows[4]]
    assert make_questions.apart(rows, []) == rows


def test_a_typo_leaves_slots_alone():
    texts = {make_questions.misspelt("How many flights left {origin} late", random.Random(seed)) for seed in range(50)}
    assert len(texts) > 10 and all("{origin}" in text and text.startswith("How many ") for text in texts)


def test_every_phrasing_of_both_editions_can_be_filled():
    for path in sorted((flights.QUESTIONS / "phrasings").glob("*.toml")):
        for name, phrasings in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for phrasing in phrasings:
                if path.stem != "endings":
                    done = next(d for seed in range(100) if (d := values.fill(phrasing, FLIGHT, random.Random(seed), other=OTHER)))
                    assert "{" not in done.text, phrasing
                    if name in INTENTS:
                        sqlite3.complete_statement(make_questions.query(INTENTS[name], done.values, done.conditions, styled=True))
