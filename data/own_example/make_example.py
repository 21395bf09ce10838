"""The second domain's database, byte for byte the same rows each time: python data/own_example/make_example.py  (CC0)

A made-up neighbourhood tool library: every tool that it lent out in 2024, one table. No real person, place or tool is meant.
"""

import contextlib
import datetime
import random
import sqlite3
from pathlib import Path

DATABASE = Path(__file__).parent / "tool_library.db"
TOOLS = {  # tool: category, deposit in euros, fee in euros a day
    "hedge trimmer": ("garden", 40, 2.5), "lawn mower": ("garden", 60, 3.0), "wheelbarrow": ("garden", 20, 1.0), "leaf blower": ("garden", 35, 2.0),
    "cordless drill": ("power", 50, 2.5), "circular saw": ("power", 70, 3.5), "belt sander": ("power", 45, 2.5), "pressure washer": ("power", 80, 4.0),
    "tile cutter": ("hand", 30, 1.5), "socket set": ("hand", 25, 1.0), "extension ladder": ("hand", 40, 2.0),
    "pasta machine": ("kitchen", 15, 1.0), "ice cream maker": ("kitchen", 30, 1.5), "fruit press": ("kitchen", 35, 2.0),
    "family tent": ("camping", 90, 4.5), "camping stove": ("camping", 20, 1.0), "kayak": ("camping", 120, 6.0),
}  # fmt: skip
MEMBERS = ["Amal Haddad", "Bea Novak", "Chidi Eze", "Dora Lind", "Emil Kraus", "Farah Aziz", "Goran Ilic", "Hana Sato", "Ivo Marin", "June Park"]
MEMBERS += ["Kofi Mensah", "Lena Vogt", "Mateo Cruz", "Nora Dahl", "Omar Said", "Petra Kos", "Quinn Reed", "Rosa Lima", "Sven Berg", "Tilda Moss"]
DISTRICTS = ["North", "Mill Lane", "Harbour", "Old Town", "Riverside"]
SEASON = {"garden": (4, 5, 6, 7, 8, 9, 10), "camping": (5, 6, 7, 8, 9)}
LOANS, ALLOWED = 620, 7  # how many; days that one may last


def rows(seed: int = 2024):
    """The loans in the order of their days, as the table has them."""
    rng = random.Random(seed)
    homes = {member: rng.choice(DISTRICTS) for member in MEMBERS}
    found = []
    for _ in range(LOANS):
        tool = rng.choice(list(TOOLS))
        category, deposit, daily = TOOLS[tool]
        month = rng.choice(SEASON.get(category, range(1, 13)))
        day = datetime.date(2024, month, rng.randint(1, 28))
        member = rng.choice(MEMBERS)
        kept = rng.choice([1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 7, 9, 14])
        late = max(0, kept - ALLOWED)
        out = month == 12 and day.day > 20 and rng.random() < 0.5  # not yet back
        rating = rng.choice([None, None, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5])
        fee = round(daily * kept + 2 * late, 2)
        found.append([tool, category, member, homes[member], day, None if out else kept, None if out else late, None if out else fee, deposit, None if out else rating])
    found.sort(key=lambda row: (row[4], row[0], row[2]))
    for number, (tool, category, member, district, day, *rest) in enumerate(found, 1):
        yield (number, tool, category, member, district, day.isoformat(), day.month, f"{day:%a}", *rest)


def make(path: Path = DATABASE) -> None:
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TABLE loans (loan_id INTEGER PRIMARY KEY, tool TEXT, category TEXT, member TEXT, district TEXT, out_date TEXT, month INTEGER, "
            "weekday TEXT, days_kept INTEGER, days_late INTEGER, fee REAL, deposit INTEGER, rating INTEGER)"
        )
        connection.executemany(f"INSERT INTO loans VALUES ({', '.join('?' * 13)})", rows())
        connection.commit()


if __name__ == "__main__":
    make()
