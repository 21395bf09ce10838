"""What may stand in a phrasing's slots: values of one real flight, other names for them, and invented values that no table has.

A slot is a filter. `fill` puts words into a phrasing and tells the SQL conditions, in one fixed order; what would need a sum is left
to SQL: 5 pm is `12 + 5`, three hours of delay are `3 * 60`. Values of `HELD_OUT` are never trained on: those of "test" stand in the
test splits only, those of "validation" there and in validation.

In this order: tables of values; filling a phrasing; the first edition's words; all the words; invented values.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from elsewhere import AFTER, BEFORE, BEGINNINGS, CARRIERS, CITIES, CODES, ENDINGS, SECOND, STEMS, places

MONTHS = "January February March April May June July August September October November December".split()
AIRLINES = {
    "9E": "Endeavor", "AA": "American", "AS": "Alaska", "B6": "JetBlue", "DL": "Delta", "EV": "ExpressJet",
    "F9": "Frontier", "FL": "AirTran", "HA": "Hawaiian", "MQ": "Envoy", "UA": "United", "US": "US Airways",
    "VX": "Virgin America", "WN": "Southwest", "YV": "Mesa",
}  # fmt: skip  # SkyWest (OO) has 32 flights: too few
FULL = {"American": ["American Airlines"], "Alaska": ["Alaska Airlines"], "JetBlue": ["JetBlue Airways", "Jetblue"], "Delta": ["Delta Air Lines", "Delta Airlines"],
        "United": ["United Airlines"], "Southwest": ["Southwest Airlines"], "Hawaiian": ["Hawaiian Airlines"], "Frontier": ["Frontier Airlines"],
        "Endeavor": ["Endeavor Air"], "Envoy": ["Envoy Air"], "Mesa": ["Mesa Airlines"], "AirTran": ["AirTran Airways"]}  # fmt: skip
ORIGINS = {"JFK": ["JFK", "JFK", "Kennedy"], "EWR": ["Newark", "Newark", "EWR"], "LGA": ["LaGuardia", "LaGuardia", "LGA"]}
PLACES = {  # what people also call a place: a city, or one airport of it
    "Las Vegas": ["Vegas", "Sin City"], "Philadelphia": ["Philly"], "Chicago": ["Chi-Town"], "San Francisco": ["SF", "San Fran"], "Los Angeles": ["LA", "L.A."],
    "Washington": ["DC", "Washington DC", "D.C."], "Atlanta": ["ATL town", "Hotlanta"], "New Orleans": ["NOLA"], "Boston": ["Beantown"], "Detroit": ["Motor City"],
    "Fort Lauderdale": ["Ft. Lauderdale"], "St. Louis": ["Saint Louis", "St Louis"], "Minneapolis": ["the Twin Cities"], "Honolulu": ["Hawaii's Honolulu"],
    "ORD": ["O'Hare"], "MDW": ["Midway"], "IAD": ["Dulles"], "DCA": ["Reagan National"], "ATL": ["Hartsfield"], "BOS": ["Logan"],
}  # fmt: skip
DELAYS = {15: ["15 minutes", "15 min"], 20: ["20 minutes"], 30: ["30 minutes", "half an hour"], 45: ["45 minutes", "45 min"],
          60: ["an hour", "60 minutes", "1 hour"], 90: ["90 minutes"], 120: ["two hours", "2 hours", "120 minutes"], 180: ["3 hours", "three hours"]}  # fmt: skip
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 10: "ten"}
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
MILES = [300, 500, 750, 1000, 1200, 1500, 2000, 2400]
HOLIDAYS = {
    (1, 1): ["New Year's Day", "new years day"], (2, 14): ["Valentine's Day", "valentines day"], (5, 27): ["Memorial Day"], (7, 4): ["the Fourth of July", "Independence Day"],
    (9, 2): ["Labor Day"], (11, 11): ["Veterans Day"], (11, 28): ["Thanksgiving", "Thanksgiving Day"], (12, 24): ["Christmas Eve"], (12, 25): ["Christmas", "Christmas Day"],
    (12, 31): ["New Year's Eve", "new years eve"],
}  # fmt: skip  # none in a month that is held out: when a holiday is can't be read in the question
SEASONS = {
    "summer": (6, 8), "the summer": (6, 8), "fall": (9, 11), "autumn": (9, 11), "winter": (12, 1, 2), "the winter months": (12, 1, 2),
    "the second quarter": (4, 6), "Q2": (4, 6), "the third quarter": (7, 9), "Q3": (7, 9),
}  # fmt: skip  # none that begins or ends with a month held out for test
HOLIDAY_SHARE = 0.08  # of the dates are said by a holiday's name
NICKNAMES = 0.3  # of the places that have other names are called by one
HELD_OUT = {
    "test": {
        "airline": {"Virgin America", "AirTran"},
        "dest": {"Seattle", "SEA", "Denver", "DEN", "Nashville", "BNA", "Salt Lake City", "SLC"},
        "month": {3, 10},
    },
    "validation": {"airline": {"Frontier"}, "dest": {"Tampa", "TPA", "Cleveland", "CLE", "Buffalo", "BUF"}, "month": {6}},
}
GROUPS = {  # slots of one kind, and the order of their conditions in a query; a phrasing has one of each at most
    "airline": ("airline", "airlines", "not_airline", "flight_number"),
    "plane": ("tail",),
    "origin": ("origin", "origins", "not_origin"),
    "dest": ("dest", "dests", "not_dest"),
    "time": ("month", "months", "date", "holiday", "season"),
    "hour": ("hour", "before_hour", "after_hour", "hours"),
    "size": ("over_miles", "under_miles"),
    "late": ("dep_over", "arr_over"),
}
NAMED = {"airline", "airlines", "not_airline", "flight_number", "tail", "dest", "dests", "not_dest", "month", "date"}  # slots for invented values


def later(hour: int, words: str) -> str:
    """An hour of the day as it was said: 17 as `12 + 5` where the words say 5 pm, else the number."""
    return f"12 + {hour - 12}" if hour > 12 and "pm" in words else str(hour)


def ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def clock(hour: int, rng: random.Random) -> str:
    if hour == 12 and rng.random() < 0.5:
        return "noon"
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    return rng.choice([f"{twelve} {half}", f"{twelve}{half}", f"{twelve} {half}", f"{hour}:00"])


# ---------------------------------------------------------------- filling a phrasing


@dataclass
class Filled:
    """A phrasing with its slots filled: the words, each slot's conditions, and what the query's own parts take."""

    text: str
    conditions: list[str] = field(default_factory=list)  # in the order of GROUPS
    values: dict = field(default_factory=lambda: {"delay": 0, "k": 1})
    names: set = field(default_factory=set)  # (kind, value) of each value that a split may hold out
    other: dict | None = None  # a second flight, for the second of two places
    nicknames: float = NICKNAMES
    made: list[str] = field(default_factory=list)  # conditions with an invented value

    def held(self, split: str) -> bool:
        """Does it use a value that `split` keeps for itself?"""
        return any(value in HELD_OUT[split][kind] for kind, value in self.names)


def fill(
    phrasing: str, flight: dict, rng: random.Random, wide: bool = True, invent: float = 0.0, other: dict | None = None, nicknames: float = NICKNAMES
) -> Filled | None:
    """Fills the slots from one real flight, so that the answer isn't empty; None where that flight doesn't fit.

    `wide` draws from all the ways in which people write a value (the first edition of each split had fewer). With `invent`, each slot
    of `NAMED` gets an invented value with that probability; with `nicknames` a place that has another name is called by it.
    """
    done = Filled(phrasing, other=other or flight, nicknames=nicknames)
    slots = set(re.findall(r"{(\w+)}", phrasing))
    order = [slot for group in GROUPS.values() for slot in group] + ["delay", "miles", "two_miles", "k"]
    if unknown := slots - set(order):
        raise SystemExit(f"no slot is called {unknown}: {phrasing}")
    for slot in order:
        if slot == "month" and not wide:  # drawn for every question of the first edition
            month = MONTHS[flight["month"] - 1]
            done.values["short"] = month if rng.random() < 0.8 else month[:3]
        if slot in slots:
            made = bool(invent) and slot in NAMED and rng.random() < invent
            found = (_invented if made else _wide if wide else _narrow)(slot, flight, rng, done)
            if found is None:
                return None
            words, *conditions = found
            done.made += conditions if made else []
            done.text = done.text.replace("{" + slot + "}", str(words))
            done.conditions += conditions
    return done


def _like(name: str) -> str:
    """The pattern that matches an airline by the name that was said."""
    return re.sub(r" (Airlines|Air Lines|Airways)$", "", name) if name != "US Airways" else name


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"


# ---------------------------------------------------------------- the first edition's words


def _narrow(slot: str, flight: dict, rng: random.Random, done: Filled):
    """The first edition's words: (words, conditions …). Its draws are kept, so that the questions made by it stay as they are."""
    month = MONTHS[flight["month"] - 1]
    if slot == "airline":
        name = AIRLINES.get(flight["carrier"])
        if name is None:
            return None
        code = rng.random() < 0.2
        done.values["airline"] = f"carrier = '{flight['carrier']}'" if code else f"airline LIKE '{name}%'"
        done.names.add(("airline", name))
        return flight["carrier"] if code else name, done.values["airline"]
    if slot == "origin":
        return rng.choice(ORIGINS[flight["origin"]]), f"origin = '{flight['origin']}'"
    if slot == "dest":
        code = rng.random() < 0.4
        word = flight["dest"] if code else flight["dest_city"]
        done.names.add(("dest", word))
        return word, f"dest = '{word}'" if code else f"dest_city = {_quoted(word)}"
    if slot == "month":
        done.names.add(("month", flight["month"]))
        return done.values["short"], f"month = {flight['month']}"
    if slot == "months":
        return _months(flight, rng, done)
    if slot == "date":
        day, short = flight["day"], done.values["short"]
        done.names.add(("month", flight["month"]))
        words = rng.choice([f"{short} {day}", f"{short} {ordinal(day)}", f"{month} {day}", f"the {ordinal(day)} of {month}", f"{day} {month}"])
        return words, f"month = {flight['month']} AND day = {day}"
    if slot in ("hour", "before_hour", "after_hour"):
        return _hour(slot, flight, rng)
    if slot == "delay":
        done.values["delay"] = rng.choice(list(DELAYS))
        return (rng.choice(DELAYS[done.values["delay"]]),)
    if slot == "miles":
        done.values["miles"] = rng.choice(MILES)
        return (rng.choice([f"{done.values['miles']:,}", str(done.values["miles"])]) + rng.choice([" miles", " miles", " mi"]),)
    if slot == "k":
        done.values["k"] = rng.choice(list(NUMBERS))
        return (rng.choice([done.values["k"], NUMBERS[done.values["k"]]]),)
    raise SystemExit(f"the first edition has no slot {slot!r}")


def _months(flight, rng, done):
    first = rng.randint(max(1, flight["month"] - 3), flight["month"])
    last = rng.randint(max(first + 1, flight["month"]), min(12, flight["month"] + 3)) if flight["month"] < 12 else 12
    if first == last:
        return None
    a, b = MONTHS[first - 1], MONTHS[last - 1]
    done.names |= {("month", first), ("month", last)}
    return rng.choice([f"{a} through {b}", f"{a} to {b}", f"{a}-{b}"]), f"month BETWEEN {first} AND {last}"


def _hour(slot, flight, rng):
    hour = flight["hour"]
    if slot == "hour":
        return clock(hour, rng), f"hour = {hour}"
    if slot == "before_hour":
        hour = min(max(hour + rng.randint(1, 3), 6), 22)
        return clock(hour, rng), f"hour < {hour}"
    hour = max(min(hour - rng.randint(0, 2), 22), 7)
    return clock(hour, rng), f"hour >= {hour}"


# ---------------------------------------------------------------- all the words


def _duration(rng: random.Random) -> tuple[str, str]:
    """Minutes as SQL, and how people say them."""
    if rng.random() < 0.5:
        minutes = rng.choice([*DELAYS, 30, 60, 120])
        words = rng.choice(DELAYS[minutes])
        return f"{minutes // 60} * 60" if "hours" in words else str(minutes), words
    if rng.random() < 0.4:
        hours = rng.randint(2, 7)
        return f"{hours} * 60", rng.choice([f"{hours} hours", f"{WORDS[hours]} hours", f"{hours} hrs", f"{hours}h"])
    if rng.random() < 0.2:
        return rng.choice([("90", "an hour and a half"), ("15", "a quarter of an hour"), ("2.5 * 60", "two and a half hours"), ("1.5 * 60", "1.5 hours"), ("75", "an hour and a quarter"), ("1", "a minute")])
    minutes = rng.randint(3, 250) if rng.random() < 0.5 else 5 * rng.randint(1, 40)
    return str(minutes), f"{minutes} " + rng.choice(["minutes", "minutes", "min", "mins"])


def _miles(rng: random.Random) -> tuple[int, str]:
    miles = rng.choice([rng.choice(MILES), 50 * rng.randint(3, 50), 100 * rng.randint(2, 26), rng.randint(150, 2600)])
    return miles, rng.choice([f"{miles:,}", str(miles)]) + rng.choice([" miles", " miles", " mi"])


def _airline(carrier: str, rng: random.Random) -> tuple[str, str] | None:
    """An airline as somebody says it: words, condition."""
    name = AIRLINES.get(carrier)
    if name is None:
        return None
    if rng.random() < 0.2:
        return carrier, f"carrier = '{carrier}'"
    said = rng.choice(FULL[name]) if name in FULL and rng.random() < 0.25 else name
    return said, f"airline LIKE '{name}%'"


def _place(flight: dict, rng: random.Random, nicknames: float) -> tuple[str, str]:
    code = rng.random() < 0.3
    word = flight["dest"] if code else flight["dest_city"]
    said = rng.choice(PLACES[word]) if word in PLACES and rng.random() < nicknames else word
    return said, f"dest = '{word}'" if code else f"dest_city = {_quoted(word)}"


def _either(a: tuple[str, str], b: tuple[str, str], rng: random.Random) -> tuple[str, str] | None:
    """Two values, either one: words, and IN (…) for two equalities, OR for two patterns."""
    words = a[0] + rng.choice([" or ", " or ", " or ", " and "]) + b[0]
    (column, one), (other, two) = (re.split(r" (?:=|LIKE) ", condition) for condition in (a[1], b[1]))
    if column != other or one == two:
        return None
    return words, f"({a[1]} OR {b[1]})" if column == "airline" else f"{column} IN ({one}, {two})"


def _said(slot: str, one: tuple[str, str], second: Callable[[], tuple[str, str]], rng: random.Random) -> tuple[str, str] | None:
    """What a slot says of a value: it, it or a second one (`dests`), or any but it (`not_dest`)."""
    if slot.startswith("not_"):
        return one[0], one[1].replace(" LIKE ", " NOT LIKE ").replace(" = ", " != ")
    return _either(one, second(), rng) if slot.endswith("s") else one


def _date(month: int, day: int, rng: random.Random) -> str:
    """The ways in which people in the United States write a date of 2013."""
    long = MONTHS[month - 1]
    short = "Sept" if month == 9 and rng.random() < 0.5 else long[:3]
    words = f"{long} {day}", f"{long} {ordinal(day)}", f"{day} {long}", f"the {ordinal(day)} of {long}", f"{ordinal(day)} of {long}", f"{short} {day}", f"{short} {ordinal(day)}"
    numbers = f"{month}/{day}", f"{month}/{day}/2013", f"{month:02}/{day:02}", f"2013-{month:02}-{day:02}", f"{month}/{day}/13"
    return rng.choice(words + (f"{long} {day}, 2013", f"{long} the {ordinal(day)}", f"{short}. {day}") if rng.random() < 0.7 else numbers)


def _wide(slot: str, flight: dict, rng: random.Random, done: Filled):
    """All the ways in which people write a value: (words, conditions …)."""
    carriers = list(AIRLINES)
    if slot in ("airline", "airlines", "not_airline"):
        carrier = flight["carrier"] if slot != "not_airline" else rng.choice(carriers)
        if (one := _airline(carrier, rng)) is None:
            return None
        done.names.add(("airline", AIRLINES[carrier]))
        done.values["airline"] = one[1]
        if slot == "airlines":
            carrier = rng.choice(carriers)
            done.names.add(("airline", AIRLINES[carrier]))
        return _said(slot, one, lambda: _airline(carrier, rng), rng)
    if slot == "flight_number":
        if flight["carrier"] not in AIRLINES:
            return None
        return _number(flight["carrier"], AIRLINES[flight["carrier"]], flight["flight"], rng, done)
    if slot == "tail":
        return (flight["tailnum"], f"tailnum = '{flight['tailnum']}'") if isinstance(flight["tailnum"], str) else None
    if slot == "origins":
        a, b = rng.sample(sorted(ORIGINS), 2)
        return _either((rng.choice(ORIGINS[a]), f"origin = '{a}'"), (rng.choice(ORIGINS[b]), f"origin = '{b}'"), rng)
    if slot == "not_origin":
        a = rng.choice(sorted(ORIGINS))
        return rng.choice(ORIGINS[a]), f"origin != '{a}'"
    if slot in ("dest", "dests", "not_dest"):
        one = _place(flight, rng, done.nicknames)
        done.names |= {("dest", flight["dest"]), ("dest", flight["dest_city"])}
        if slot == "dests":
            done.names |= {("dest", done.other["dest"]), ("dest", done.other["dest_city"])}
        return _said(slot, one, lambda: _place(done.other, rng, done.nicknames), rng)
    month, day = flight["month"], flight["day"]
    if slot == "month":
        done.names.add(("month", month))
        long = MONTHS[month - 1]
        said = rng.choices([long, "Sept" if month == 9 else long[:3], f"{long} 2013", f"month {month}"], [70, 15, 8, 7])[0]
        return said, f"month = {month}"
    if slot == "date":
        if rng.random() < HOLIDAY_SHARE:
            return _wide("holiday", flight, rng, done)
        done.names.add(("month", month))
        return _date(month, day, rng), f"month = {month} AND day = {day}"
    if slot == "holiday":
        (month, day), names = rng.choice(sorted(HOLIDAYS.items()))
        done.names.add(("month", month))
        return rng.choice(names), f"month = {month} AND day = {day}"
    if slot == "season":
        season, months = rng.choice(sorted(SEASONS.items()))
        return season, f"month BETWEEN {months[0]} AND {months[1]}" if len(months) == 2 else f"month IN {months}"
    if slot == "hours":
        first = max(5, min(20, flight["hour"] - rng.randint(0, 2)))
        last = min(23, max(flight["hour"], first + rng.randint(1, 4)))
        seed = rng.random()
        words = [clock(hour, random.Random(seed)) for hour in (first, last)]
        return " and ".join(words), f"hour BETWEEN {later(first, words[0])} AND {later(last, words[1])}"
    if slot in ("hour", "before_hour", "after_hour"):
        words, condition = _hour(slot, flight, rng)
        return words, re.sub(r"\d+$", lambda hour: later(int(hour[0]), words), condition)
    if slot in ("dep_over", "arr_over"):
        minutes, words = _duration(rng)
        return words, f"{slot[:3]}_delay > {minutes}"
    if slot in ("over_miles", "under_miles"):
        miles, words = _miles(rng)
        return words, f"distance {'>' if slot[0] == 'o' else '<'} {miles}"
    if slot == "delay":
        done.values["delay"], words = _duration(rng)
        return (words,)
    if slot == "miles":
        done.values["miles"], words = _miles(rng)
        return (words,)
    if slot == "two_miles":
        (low, _), (high, words) = sorted([_miles(rng), _miles(rng)])
        if low == high:
            return None
        done.values |= {"low": low, "high": high}
        return (f"{low:,} and {words}" if "," in words else f"{low} and {words}",)
    if slot == "k":
        done.values["k"] = k = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 3, 5, 10])
        return (WORDS[k] if k < len(WORDS) and rng.random() < 0.5 else k,)
    if slot == "months":
        return _months(flight, rng, done)
    return _narrow(slot, flight, rng, done)


def _number(carrier: str, name: str, number: int, rng: random.Random, done: Filled):
    """A flight's number as people say it, with its airline or (a real airline's, or a number above all that there are) alone."""
    done.names.add(("airline", name))
    alone = carrier in AIRLINES or number > 8500
    code, like, only = f"carrier = '{carrier}' AND flight = {number}", f"airline LIKE '{_like(name)}%' AND flight = {number}", f"flight = {number}"
    return rng.choice(
        [(f"{carrier} {number}", code), (f"{carrier}{number}", code), (f"flight {carrier} {number}", code), (f"{name} flight {number}", like), (f"{name} {number}", like),
         *[(f"flight {number}", only), (f"flight number {number}", only), (f"flight no. {number}", only)] * alone]
    )  # fmt: skip


# ---------------------------------------------------------------- invented values


def invented_airline(rng: random.Random) -> tuple[str, str]:
    """An airline that no row has: from elsewhere, a code, or a name made of parts."""
    if rng.random() < 0.5:
        name = rng.choice(CARRIERS)
        return name, f"airline LIKE '{_like(name)}%'"
    if rng.random() < 0.4:
        while (code := rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") + rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789")) in AIRLINES or code == "OO":
            pass
        return code, f"carrier = '{code}'"
    name = f"{rng.choice(BEGINNINGS)} {rng.choice(SECOND)}".strip()
    name = name if rng.random() < 0.7 else f"{rng.choice(STEMS)}{rng.choice(['air', 'jet', 'wings', 'ia', 'is', 'aero'])}"
    return name, f"airline LIKE '{_like(name)}%'"


def invented_place(rng: random.Random) -> tuple[str, str]:
    """A place, or an airport's code, that no row has: from elsewhere, or made up."""
    if rng.random() < 0.35:
        code = rng.choice(CODES) if rng.random() < 0.6 else "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3))
        return code, f"dest = '{code}'"
    if (kind := rng.random()) < 0.7:
        city = rng.choice(CITIES if kind < 0.3 else places())
        return city, f"dest_city = '{city}'"
    city = rng.choice(BEFORE) + rng.choice(STEMS) + rng.choice(ENDINGS) + rng.choice(AFTER)
    return city, f"dest_city = '{city}'"


def _invented(slot: str, flight: dict, rng: random.Random, done: Filled):
    """Words and conditions with a value that no table has: to be copied, since it can't have been learnt."""
    if slot in ("airline", "airlines", "not_airline"):
        one = invented_airline(rng)
        done.values["airline"] = one[1]
        return _said(slot, one, lambda: invented_airline(rng), rng)
    if slot == "flight_number":
        airline = invented_airline(rng)
        code = airline[0] if airline[1].startswith("carrier") else rng.choice("ABCDEFG") + rng.choice("XYZQW")
        return _number(code, airline[0] if code != airline[0] else f"{rng.choice(BEGINNINGS)} Air", rng.randint(1, 9999), rng, done)
    if slot == "tail":
        tail = f"N{rng.randint(1, 999)}{''.join(rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ') for _ in range(rng.randint(0, 2)))}"
        return tail, f"tailnum = '{tail}'"
    if slot in ("dest", "dests", "not_dest"):
        return _said(slot, invented_place(rng), lambda: invented_place(rng), rng)
    if slot == "month":
        month = rng.randint(13, 99)
        return rng.choice([f"month {month}", f"the {ordinal(month)} month", f"month number {month}"]), f"month = {month}"
    if rng.random() < 0.5:  # a date of a month that there is, but for the held-out ones
        month, day = rng.choice([m for m in range(1, 13) if not any(m in held["month"] for held in HELD_OUT.values())]), rng.randint(32, 99)
        return _date(month, day, rng), f"month = {month} AND day = {day}"
    month, day = rng.randint(13, 99), rng.randint(1, 99)
    return rng.choice([f"{month}/{day}", f"{month}/{day}/2013", f"2013-{month:02}-{day:02}", f"day {day} of month {month}"]), f"month = {month} AND day = {day}"
