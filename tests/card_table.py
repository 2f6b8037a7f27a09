"""What a reader sees on a model card: the figures of its table and of its metadata."""

from __future__ import annotations

import re

import yaml


Figures = dict[tuple[str, str], dict[str, float]]  # (data, decoding) -> metric -> figure


def table_of(card: str) -> Figures:
    """The table under the heading of the figures, with metrics named as in evaluations."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    first = next(index for index, line in enumerate(lines) if line.startswith("| data | decoding |"))
    columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    rows = rows[: next((index for index, row in enumerate(rows) if len(row) != len(columns)), None)]
    names = [column.replace(" ", "_") for column in columns]
    return {
        (row[0], row[1]): {name: float(cell.replace(",", "")) for name, cell in zip(names[2:], row[2:]) if cell}
        for row in rows
    }


def metadata_of(card: str) -> Figures:
    """The same figures from `model-index`, which the Hub reads."""
    found: Figures = {}
    for result in yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])["model-index"][0]["results"]:
        for metric in result["metrics"]:
            decoding = re.search(r" \((.*)\)$", metric["name"])[1]
            found.setdefault((result["dataset"]["name"], decoding), {})[metric["type"]] = metric["value"]
    return found
