"""What can be asked: one entry an intent. Phrasings (phrasings/*.toml) supply the words, slots the filters.

Each intent has a SELECT in two house styles, over the rows that the slots of a phrasing select:
bare    what most people type;
styled  every house rule kept: readable aliases with units, one decimal, names beside codes, ORDER BY with LIMIT on lists.
`{w}` is the WHERE clause (with the intent's own condition, if it has one), `{k}` the number asked for (1 if none is).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Intent:
    name: str
    meaning: str
    bare: str
    styled: str
    where: str = ""  # the intent's own condition
    ordered: bool = False  # does the question ask for an order (a ranking of several rows)?


def _one(name, meaning, expression, alias, where="", decimals=True):
    """An intent whose answer is one number."""
    rounded = f"ROUND({expression}, 1)" if decimals else expression
    return Intent(name, meaning, f"SELECT {expression} FROM flights{{w}}", f"SELECT {rounded} AS {alias} FROM flights{{w}}", where)


def _top(name, meaning, columns, names, key, alias, direction=" DESC", where="", ordered=True):
    """An intent whose answer is the first k of a ranking."""
    group = columns if columns != "month, day" else "month, day"
    order = f"ORDER BY {key}{direction} LIMIT {{k}}"
    shown = f"ROUND({key}, 1)" if key.startswith("AVG") else key
    return Intent(
        name,
        meaning,
        f"SELECT {columns} FROM flights{{w}} GROUP BY {group} {order}",
        f"SELECT {names}, {shown} AS {alias} FROM flights{{w}} GROUP BY {group} ORDER BY {alias}{direction} LIMIT {{k}}",
        where,
        ordered,
    )


def _by(name, meaning, column, names, expression, alias, where=""):
    """An intent whose answer is one row a group, in no asked-for order."""
    shown = f"ROUND({expression}, 1)" if "AVG" in expression else expression
    return Intent(
        name,
        meaning,
        f"SELECT {column}, {expression} FROM flights{{w}} GROUP BY {column}",
        f"SELECT {names}, {shown} AS {alias} FROM flights{{w}} GROUP BY {column} ORDER BY {alias} DESC LIMIT 20",
        where,
    )


CANCELLED = "dep_time IS NULL"
INTENTS = {
    intent.name: intent
    for intent in [
        _one("count", "how many flights", "COUNT(*)", "flights", decimals=False),
        _one("count_late_departures", "how many flights left late (more than {delay} late where given)", "COUNT(*)", "late_flights", "dep_delay > {delay}", False),
        _one("count_late_arrivals", "how many flights arrived late (more than {delay} late where given)", "COUNT(*)", "late_flights", "arr_delay > {delay}", False),
        _one("count_cancelled", "how many flights were cancelled, never took off", "COUNT(*)", "cancelled_flights", CANCELLED, False),
        _one("count_on_time_departures", "how many flights left on time (or early)", "COUNT(*)", "on_time_flights", "dep_delay <= 0", False),
        _one("count_on_time_arrivals", "how many flights arrived on time (or early)", "COUNT(*)", "on_time_flights", "arr_delay <= 0", False),
        _one("count_early_departures", "how many flights left early, ahead of schedule", "COUNT(*)", "early_flights", "dep_delay < 0", False),
        _one("count_long_distance", "how many flights were longer than {miles} miles", "COUNT(*)", "flights", "distance > {miles}", False),
        _one("avg_departure_delay", "average departure delay, in minutes", "AVG(dep_delay)", "avg_dep_delay_min"),
        _one("avg_arrival_delay", "average arrival delay, in minutes", "AVG(arr_delay)", "avg_arr_delay_min"),
        _one("avg_air_time", "average time in the air, in minutes", "AVG(air_time)", "avg_air_time_min"),
        _one("avg_distance", "average distance flown, in miles", "AVG(distance)", "avg_distance_miles"),
        _one("max_departure_delay", "the longest departure delay, in minutes", "MAX(dep_delay)", "max_dep_delay_min", decimals=False),
        _one("max_arrival_delay", "the longest arrival delay, in minutes", "MAX(arr_delay)", "max_arr_delay_min", decimals=False),
        _one("max_distance", "the longest distance flown, in miles", "MAX(distance)", "max_distance_miles", decimals=False),
        _one("min_distance", "the shortest distance flown, in miles", "MIN(distance)", "min_distance_miles", decimals=False),
        _one("max_air_time", "the longest time in the air, in minutes", "MAX(air_time)", "max_air_time_min", decimals=False),
        _one("min_air_time", "the shortest time in the air, in minutes", "MIN(air_time)", "min_air_time_min", decimals=False),
        _one("total_distance", "total miles flown, all flights added up", "SUM(distance)", "total_distance_miles", decimals=False),
        _one("count_destinations", "how many different destinations", "COUNT(DISTINCT dest)", "destinations", decimals=False),
        _one("count_airlines", "how many different airlines", "COUNT(DISTINCT carrier)", "airlines", decimals=False),
        _one("pct_late_departures", "what percentage of flights left late (more than {delay} late where given)", "100.0 * AVG(dep_delay > {delay})", "late_pct"),
        _one("pct_late_arrivals", "what percentage of flights arrived late (more than {delay} late where given)", "100.0 * AVG(arr_delay > {delay})", "late_pct"),
        _one("pct_on_time_arrivals", "what percentage of flights arrived on time (or early)", "100.0 * AVG(arr_delay <= 0)", "on_time_pct"),
        _one("pct_cancelled", "what percentage of flights were cancelled", f"100.0 * AVG({CANCELLED})", "cancelled_pct"),
        _one("pct_airline", "what percentage of the flights are {airline}'s (the airline is asked about, not filtered on)", "100.0 * AVG({airline})", "share_pct"),
        _top("top_destinations", "the k destinations (airports) with the most flights", "dest", "dest, dest_city", "COUNT(*)", "flights"),
        _top("top_airlines", "the k airlines with the most flights", "carrier", "carrier, airline", "COUNT(*)", "flights"),
        _top("airlines_worst_departure_delay", "the k airlines with the worst (highest) average departure delay", "carrier", "carrier, airline", "AVG(dep_delay)", "avg_dep_delay_min"),
        _top("airlines_best_arrival_delay", "the k airlines with the best (lowest) average arrival delay", "carrier", "carrier, airline", "AVG(arr_delay)", "avg_arr_delay_min", ""),
        _top("destinations_worst_arrival_delay", "the k destinations with the worst average arrival delay", "dest", "dest, dest_city", "AVG(arr_delay)", "avg_arr_delay_min"),
        _top("busiest_months", "the (k) month(s) with the most flights", "month", "month", "COUNT(*)", "flights"),
        _top("busiest_hours", "the (k) hour(s) of the day with the most departures", "hour", "hour", "COUNT(*)", "flights"),
        _top("busiest_days", "the (k) date(s) with the most flights", "month, day", "month, day", "COUNT(*)", "flights"),
        _top("days_most_cancellations", "the (k) date(s) with the most cancelled flights", "month, day", "month, day", "COUNT(*)", "cancelled_flights", where=CANCELLED),
        _top("airlines_most_cancellations", "the k airlines with the most cancelled flights", "carrier", "carrier, airline", "COUNT(*)", "cancelled_flights", where=CANCELLED),
        _by("count_by_origin", "number of flights for each New York airport", "origin", "origin", "COUNT(*)", "flights"),
        _by("count_by_month", "number of flights for each month", "month", "month", "COUNT(*)", "flights"),
        _by("count_by_airline", "number of flights for each airline", "carrier", "carrier, airline", "COUNT(*)", "flights"),
        _by("delay_by_airline", "average departure delay for each airline", "carrier", "carrier, airline", "AVG(dep_delay)", "avg_dep_delay_min"),
        _by("delay_by_month", "average departure delay for each month", "month", "month", "AVG(dep_delay)", "avg_dep_delay_min"),
        _by("delay_by_origin", "average departure delay for each New York airport", "origin", "origin", "AVG(dep_delay)", "avg_dep_delay_min"),
        _by("delay_by_hour", "average departure delay for each hour of the day", "hour", "hour", "AVG(dep_delay)", "avg_dep_delay_min"),
        _by("cancelled_by_month", "number of cancelled flights for each month", "month", "month", "COUNT(*)", "cancelled_flights", CANCELLED),
        Intent(
            "list_airlines",
            "which airlines (all of them) fly there",
            "SELECT DISTINCT carrier FROM flights{w}",
            "SELECT DISTINCT carrier, airline FROM flights{w} ORDER BY airline LIMIT 20",
        ),
        Intent(
            "most_delayed_flight",
            "the single flight (carrier and flight number) that left latest",
            "SELECT carrier, flight FROM flights{w} ORDER BY dep_delay DESC LIMIT 1",
            "SELECT carrier, airline, flight, dep_delay AS dep_delay_min FROM flights{w} ORDER BY dep_delay_min DESC LIMIT 1",
        ),
        _one("count_both_late", "how many flights left late and arrived late too", "COUNT(*)", "late_flights", "dep_delay > 0 AND arr_delay > 0", False),
        _one("count_made_up", "how many flights left late but arrived on time or early", "COUNT(*)", "flights", "dep_delay > 0 AND arr_delay <= 0", False),
        _one("count_early_arrivals", "how many flights arrived early, ahead of schedule", "COUNT(*)", "early_flights", "arr_delay < 0", False),
        _one("count_short_distance", "how many flights were shorter than {miles} miles", "COUNT(*)", "flights", "distance < {miles}", False),
        _one("count_distance_between", "how many flights were between {low} and {high} miles long, ends included", "COUNT(*)", "flights", "distance BETWEEN {low} AND {high}", False),
        _one("count_planes", "how many different planes (tail numbers)", "COUNT(DISTINCT tailnum)", "planes", decimals=False),
        _one("total_air_time", "total minutes in the air, all flights added up", "SUM(air_time)", "total_air_time_min", decimals=False),
        _one("pct_on_time_departures", "what percentage of flights left on time (or early)", "100.0 * AVG(dep_delay <= 0)", "on_time_pct"),
        _one("min_departure_delay", "the earliest departure: the lowest departure delay, in minutes", "MIN(dep_delay)", "min_dep_delay_min", decimals=False),
        _top("quiet_months", "the (k) month(s) with the fewest flights", "month", "month", "COUNT(*)", "flights", ""),
        _top("quiet_days", "the (k) date(s) with the fewest flights", "month, day", "month, day", "COUNT(*)", "flights", ""),
        _top("rare_destinations", "the (k) destination(s) with the fewest flights", "dest", "dest, dest_city", "COUNT(*)", "flights", ""),
        _top("smallest_airlines", "the (k) airline(s) with the fewest flights", "carrier", "carrier, airline", "COUNT(*)", "flights", ""),
        _top("airlines_best_departure_delay", "the (k) airline(s) with the best (lowest) average departure delay", "carrier", "carrier, airline", "AVG(dep_delay)", "avg_dep_delay_min", ""),
        _top("airlines_worst_arrival_delay", "the (k) airline(s) with the worst (highest) average arrival delay", "carrier", "carrier, airline", "AVG(arr_delay)", "avg_arr_delay_min"),
        _top("destinations_best_arrival_delay", "the (k) destination(s) with the best (lowest) average arrival delay", "dest", "dest, dest_city", "AVG(arr_delay)", "avg_arr_delay_min", ""),
        _top("months_worst_departure_delay", "the (k) month(s) with the worst average departure delay", "month", "month", "AVG(dep_delay)", "avg_dep_delay_min"),
        _top("hours_worst_departure_delay", "the (k) hour(s) of the day with the worst average departure delay", "hour", "hour", "AVG(dep_delay)", "avg_dep_delay_min"),
        _top("origins_most_flights", "the New York airport with the most flights", "origin", "origin", "COUNT(*)", "flights"),
        _top("busiest_planes", "the (k) plane(s), by tail number, with the most flights", "tailnum", "tailnum", "COUNT(*)", "flights", where="tailnum IS NOT NULL"),
        _top("destinations_most_cancellations", "the (k) destination(s) with the most cancelled flights", "dest", "dest, dest_city", "COUNT(*)", "cancelled_flights", where=CANCELLED),
        _top("airlines_most_destinations", "the (k) airline(s) with the most different destinations", "carrier", "carrier, airline", "COUNT(DISTINCT dest)", "destinations"),
        _by("arrival_delay_by_airline", "average arrival delay for each airline", "carrier", "carrier, airline", "AVG(arr_delay)", "avg_arr_delay_min"),
        _by("arrival_delay_by_origin", "average arrival delay for each New York airport", "origin", "origin", "AVG(arr_delay)", "avg_arr_delay_min"),
        _by("cancelled_by_airline", "number of cancelled flights for each airline", "carrier", "carrier, airline", "COUNT(*)", "cancelled_flights", CANCELLED),
        _by("cancelled_by_origin", "number of cancelled flights for each New York airport", "origin", "origin", "COUNT(*)", "cancelled_flights", CANCELLED),
        _by("count_by_hour", "number of flights for each hour of the day", "hour", "hour", "COUNT(*)", "flights"),
        _by("distance_by_airline", "average distance for each airline", "carrier", "carrier, airline", "AVG(distance)", "avg_distance_miles"),
        _by("air_time_by_origin", "average time in the air for each New York airport", "origin", "origin", "AVG(air_time)", "avg_air_time_min"),
        _by("late_by_month", "number of flights that left late, for each month", "month", "month", "COUNT(*)", "late_flights", "dep_delay > 0"),
        _by("pct_late_by_airline", "percentage of flights that left late, for each airline", "carrier", "carrier, airline", "100.0 * AVG(dep_delay > 0)", "late_pct"),
        Intent(
            "list_destinations",
            "which destinations, all of them",
            "SELECT DISTINCT dest FROM flights{w}",
            "SELECT DISTINCT dest, dest_city FROM flights{w} ORDER BY dest_city LIMIT 200",
        ),
        Intent(
            "list_origins",
            "which of the New York airports",
            "SELECT DISTINCT origin FROM flights{w}",
            "SELECT DISTINCT origin FROM flights{w} ORDER BY origin LIMIT 20",
        ),
        Intent(
            "most_delayed_arrival",
            "the single flight (carrier and flight number) that arrived latest",
            "SELECT carrier, flight FROM flights{w} ORDER BY arr_delay DESC LIMIT 1",
            "SELECT carrier, airline, flight, arr_delay AS arr_delay_min FROM flights{w} ORDER BY arr_delay_min DESC LIMIT 1",
        ),
    ]
}  # fmt: skip
UNANSWERABLE = "unanswerable"  # the one more "intent": the data cannot answer, or it asks for a write
