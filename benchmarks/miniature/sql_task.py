"""Questions to SQL with a worked plan, like HumanEval in form; scored by running the query on a filled database."""

from __future__ import annotations

import functools
import random
import sqlite3

from .problems import Problem


CITIES = ("Berlin", "Cairo", "Lima", "Oslo", "Paris", "Rome")
TABLES = {
    "orders": {
        "product": ("chair", "desk", "lamp", "shelf", "sofa"),
        "city": CITIES,
        "channel": ("phone", "shop", "web"),
        "quantity": (1, 20),
        "price": (5, 99),
    },
    "employees": {
        "department": ("design", "law", "sales", "support", "tools"),
        "city": CITIES,
        "level": ("junior", "lead", "senior"),
        "salary": (20, 99),
        "age": (18, 65),
    },
    "books": {
        "genre": ("art", "crime", "poetry", "science", "travel"),
        "city": CITIES,
        "language": ("Arabic", "English", "Spanish"),
        "pages": (40, 900),
        "year": (1950, 2020),
    },
    "players": {
        "position": ("center", "goal", "guard", "wing"),
        "city": CITIES,
        "league": ("first", "second", "third"),
        "goals": (0, 40),
        "matches": (1, 60),
    },
    "flights": {
        "airline": ("Aero", "Condor", "Falcon", "Swift"),
        "city": CITIES,
        "class": ("business", "economy", "first"),
        "distance": (100, 990),
        "seats": (20, 300),
    },
}
REGIONS = ("north", "south", "east", "west")
ROWS = 240
COMPARE = (
    ("{column} is over {value}", "{column} > {value}"),
    ("{column} is under {value}", "{column} < {value}"),
    ("{column} is at least {value}", "{column} >= {value}"),
    ("{column} is at most {value}", "{column} <= {value}"),
)
EQUAL = (
    ("{column} is {value}", "{column} = '{value}'"),
    ("{column} is not {value}", "{column} <> '{value}'"),
)
AGGREGATE = (
    ("the total {column}", "SUM({column})"),
    ("the average {column}", "AVG({column})"),
    ("the largest {column}", "MAX({column})"),
    ("the smallest {column}", "MIN({column})"),
    ("the number of rows", "COUNT(*)"),
)


@functools.cache
def database() -> sqlite3.Connection:
    """The tables, filled from a fixed seed, and `cities`, which names each city's region."""
    draw = random.Random("miniature")
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    for table, columns in TABLES.items():
        connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        for _ in range(ROWS):
            row = [
                draw.randint(*values) if isinstance(values[0], int) else draw.choice(values)
                for values in columns.values()
            ]
            connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    connection.execute("CREATE TABLE cities (city, region, people)")
    for index, city in enumerate(CITIES):
        connection.execute("INSERT INTO cities VALUES (?, ?, ?)", (city, REGIONS[index % 4], 5 + 7 * index))
    connection.commit()
    connection.execute("PRAGMA query_only = ON")
    return connection


def run(query: str) -> list[tuple] | None:
    """The rows of a query, or `None` if it is invalid; stopped after a second's worth of work."""
    connection = database()
    connection.set_progress_handler(lambda: 1, 5_000_000)
    try:
        rows = connection.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None
    finally:
        connection.set_progress_handler(None, 0)
    return [tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in rows]


def make(draw: random.Random) -> Problem:
    """A question that has an answer: its query returns at least one row."""
    while True:
        problem = _propose(draw)
        if run(problem.answer):
            return problem


def _propose(draw: random.Random) -> Problem:
    table = draw.choice(list(TABLES))
    columns = TABLES[table]
    texts = [column for column, values in columns.items() if not isinstance(values[0], int)]
    numbers = [column for column in columns if column not in texts]
    joined = draw.random() < 0.3
    conditions, key = [], [table, str(joined)]
    for column in draw.sample(numbers, draw.choice((1, 1, 2))):
        low, high = columns[column]
        value = draw.randint(low + (high - low) // 5, high - (high - low) // 5)
        conditions.append([part.format(column=column, value=value) for part in draw.choice(COMPARE)])
    group, *others = draw.sample(texts, len(texts))
    if draw.random() < 0.5:
        column = draw.choice(others)
        value = draw.choice(columns[column])
        conditions.append([part.format(column=column, value=value) for part in draw.choice(EQUAL)])
    if joined:
        value = draw.choice(REGIONS)
        conditions.append([part.format(column="region", value=value) for part in EQUAL[0]])
    draw.shuffle(conditions)
    key += [asked for asked, _ in conditions]
    asked_where = " and ".join(asked for asked, _ in conditions)
    where = " AND ".join(condition for _, condition in conditions)
    source = f"{table} JOIN cities USING (city)" if joined else table
    plan = [f"The rows come from {table}{' joined with cities' if joined else ''}."]
    plan.append(f"Keep the rows where {asked_where}.")
    descending = draw.random() < 0.5
    order = "largest first" if descending else "smallest first"
    direction = "DESC" if descending else "ASC"
    limit = draw.choice((0, 1, 2, 3, 5))
    least = 0
    if draw.random() < 0.7:
        column = draw.choice(numbers)
        asked, expression = (part.format(column=column) for part in draw.choice(AGGREGATE))
        least = draw.choice((0, 0, 2, 3, 4))
        question = f"For each {group} show {asked}, where {asked_where}."
        plan.append(f"Make one group for each {group}.")
        plan.append(f"For each group show {group} and {asked}.")
        lines = [f"SELECT {group}, {expression} AS result", f"FROM {source}", f"WHERE {where}", f"GROUP BY {group}"]
        if least:
            question += f" Leave out groups of fewer than {least} rows."
            plan.append(f"Keep the groups of at least {least} rows.")
            lines.append(f"HAVING COUNT(*) >= {least}")
        question += f" Sort by {asked}, {order}."
        plan.append(f"Sort by {asked}, {order}.")
        lines.append(f"ORDER BY result {direction}, {group}")
    else:
        shown = draw.sample(list(columns), draw.choice((2, 3)))
        by = draw.choice(numbers)
        listed = " and ".join(shown)
        question = f"Show {listed} of the rows where {asked_where}. Sort by {by}, {order}."
        plan.append(f"Show {listed}.")
        plan.append(f"Sort by {by}, {order}.")
        rest = [column for column in shown if column != by]
        lines = [f"SELECT {', '.join(shown)}", f"FROM {source}", f"WHERE {where}"]
        lines.append(f"ORDER BY {', '.join([f'{by} {direction}', *rest])}")
        key += shown + [by]
    if limit:
        question += f" Only the first {limit}."
        plan.append(f"Only the first {limit}.")
        lines.append(f"LIMIT {limit}")
    key += [question, str(least), str(limit)]
    schema = f"Table {table}: {', '.join(columns)}." + (" Table cities: city, region, people." if joined else "")
    query = "\n".join(lines) + ";"
    completion = "\n".join(f"-- {line}" for line in plan) + "\n" + query
    return Problem("sql", " ".join(key), f"{schema} {question}\nQuery:\n", completion, query)


def is_solved(problem: Problem, text: str) -> bool:
    """Whether the query at a completion's end returns the reference's rows, in the same order."""
    return run(text) == run(problem.answer)
