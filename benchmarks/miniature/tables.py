"""The miniature's tables: the figures they need, and their layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Method

from .recipes import METHODS, MR, in_blocks, sliding
from .results import Results


RACED = 40  # problems of each task that are timed
SCANNED = 50  # problems of each task on which settings of decoding are compared
COMPARED_ON = 100  # problems of each task on which trainings are compared
WHOLE = (AR, sliding(16))  # are measured on all problems; the others of table 1, which write the same text, on PART
PART = 150
MAIN_ROWS: tuple[tuple[str, str, Method], ...] = (
    ("AR", "base", AR),
    ("prompt lookup (transformers)", "base", PROMPT_LOOKUP),
    ("untrained, sliding window of 32, recycling", "base", sliding(32, pool=4)),
    ("CLLM, blocks of 16", "cllm", in_blocks(16)),
    ("CLLM, MR", "cllm", MR),
    ("CLLM, sliding window of 16", "cllm", sliding(16)),
    ("CLLM, sliding window of 32", "cllm", sliding(32)),
    ("Jacobi Forcing, blocks of 16", "forcing", in_blocks(16)),
    ("Jacobi Forcing, MR", "forcing", MR),
    ("Jacobi Forcing, sliding window of 16", "forcing", sliding(16)),
    ("Jacobi Forcing, sliding window of 32", "forcing", sliding(32)),
    ("Jacobi Forcing, sliding window of 32, recycling", "forcing", sliding(32, pool=4)),
    ("Jacobi Forcing, linear noise, blocks of 16", "forcing-linear", in_blocks(16)),
    ("Jacobi Forcing, linear noise, MR", "forcing-linear", MR),
    ("Jacobi Forcing, linear noise, sliding window of 16", "forcing-linear", sliding(16)),
    ("draft-only adapter, sliding window of 16", "draft", sliding(16)),
    ("draft-only adapter, sliding window of 16, recycling", "draft", sliding(16, pool=4)),
)
TITLES = {
    "schedules": "Table 2: noise schedules (window of 4)",
    "windows": "Table 3: window size (1 is clean context); mixed are rows of random-w1 and of linear-w4, shuffled",
    "adapters": "Table 6: what is trained",
}
COMPARED = {
    "schedules": ("linear-w4", "random-w4", "reverse-w4"),
    "windows": ("random-w1", "random-w4", "linear-w4", "linear-w8", "linear-w16", "mixed-w4"),
    "adapters": ("linear-w4", "lora", "draft-short"),
}
N_OF = {
    "random-w1": 16,
    "linear-w4": 16,
    "random-w1-n32": 32,
    "linear-w4-n32": 32,
    "random-w1-n64": 64,
    "linear-w4-n64": 64,
}
SIZES, POOLS = (8, 16, 32, 64), (0, 2, 4, 8)
FLIGHTS, RATIOS = (1, 2, 3, 4), (0.5, 0.7, 0.85, 1.0)


def main_table(results: Results, trained: Sequence[str]) -> dict[str, Any]:
    """Table 1. Prompt lookup takes one row at a time: its quality is AR's, and only the race measures its speed."""
    chosen = [row for row in MAIN_ROWS if row[1] in ("base", *trained)]
    name = " ".join(("main", *trained))
    race = results.race(name, [(model, method) for _, model, method in chosen], min(RACED, results.count))
    rows = {}
    for title, model, method in chosen:
        timed = race[f"{model}: {method.name}"]
        rows[title] = {"race": timed | {"ar_tokens_per_second": race["base: AR"]["tokens_per_second"]}}
        if method is not PROMPT_LOOKUP:
            count = results.count if method in WHOLE else min(PART, results.count)
            rows[title] |= results.quality(model, method, count)
    return rows


def comparison(results: Results, recipes: tuple[str, ...]) -> dict[str, Any]:
    """Tables 2, 3 and 6: recipes with the same budget, each decoded in several ways."""
    count = min(COMPARED_ON, results.count)
    return {recipe: {method.name: results.quality(recipe, method, count) for method in METHODS} for recipe in recipes}


def by_block_size(results: Results) -> dict[str, Any]:
    """Jacobi Forcing against CLLM with the same budget: trained and decoded in blocks of n, K = 1 and 2."""
    count = min(COMPARED_ON, results.count)
    return {
        recipe: {f"K={k}": results.quality(recipe, in_blocks(n, blocks=k), count) for k in (1, 2)}
        for recipe, n in N_OF.items()
    }


def grid(results: Results, model: str) -> dict[str, Any]:
    """Tables 4 and 5: tokens per forward by block size and pool, and by K and r."""

    def scan(method: Method) -> float:
        return results.quality(model, method, min(SCANNED, results.count))["both"]["tokens_per_forward"]

    return {
        "pools": {str(n): {str(pool): scan(in_blocks(n, pool=pool)) for pool in POOLS} for n in SIZES},
        "sliding": {str(n): {str(pool): scan(sliding(n, pool=pool)) for pool in POOLS} for n in SIZES},
        "flights": {
            str(k): {str(ratio): scan(in_blocks(16, blocks=k, ratio=ratio)) for ratio in RATIOS} for k in FLIGHTS
        },
    }


def markdown(head: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in lines)


def render(figures: dict[str, Any]) -> str:
    """All tables for which figures exist, as `README.md` beside this file shows them."""
    parts = []
    if "main" in figures:
        parts += ["### Table 1: ways of decoding", _main(figures["main"])]
    for name, title in TITLES.items():
        if name in figures:
            parts += [f"### {title}", _comparison(figures[name])]
    if "block_sizes" in figures:
        parts += ["### Jacobi Forcing against CLLM by block size, same budget", _comparison(figures["block_sizes"])]
    if "grid" in figures:
        grid = figures["grid"]
        parts += ["### Table 4: block size and pool, tokens per forward (Jacobi Forcing, linear noise)"]
        parts += [
            "In blocks:",
            _grid("n", "pool", grid["pools"]),
            "Sliding window:",
            _grid("n", "pool", grid["sliding"]),
        ]
        parts += [
            "### Table 5: K and r, tokens per forward, blocks of 16 (Jacobi Forcing, linear noise)",
            _grid("K", "r", grid["flights"]),
        ]
    return "\n\n".join(parts) + "\n"


def _main(rows: dict[str, Any]) -> str:
    head = [
        "decoding",
        "TPF math",
        "TPF sql",
        "TPF",
        "solved math",
        "solved sql",
        "same text as base",
        "problems",
        "TPS",
        "speed-up",
    ]
    lines = []
    for title, row in rows.items():
        race = row["race"]
        cells = [title, "", "", f"{race['tokens_per_forward']:.2f}", "", "", "", ""]
        if "both" in row:
            cells[1:4] = [f"{row[task]['tokens_per_forward']:.2f}" for task in ("math", "sql", "both")]
            cells[6:8] = [f"{100 * row['both']['identical']:.1f}%", row["both"]["problems"]]
            if row["both"]["problems"] == rows["AR"]["both"]["problems"]:  # otherwise another row shows it
                cells[4:6] = [f"{100 * row[task]['solve_rate']:.1f}%" for task in ("math", "sql")]
        same_race = race["ar_tokens_per_second"] == rows["AR"]["race"]["tokens_per_second"]
        # From another day, only the ratio can be compared.
        pace = f"{race['tokens_per_second']:.0f}" if same_race else ""
        lines.append([*cells, pace, f"{race['speedup']:.2f}x"])
    return markdown(head, lines)


def _comparison(recipes: dict[str, Any]) -> str:
    methods = list(next(iter(recipes.values())))
    head = ["trained", "solved math", "solved sql", "same text as base", *(f"TPF {method}" for method in methods)]
    lines = []
    for recipe, found in recipes.items():
        first = found[methods[0]]
        solved = [f"{100 * first[task]['solve_rate']:.1f}%" for task in ("math", "sql")]
        same = f"{100 * first['both']['identical']:.1f}%"
        speeds = [f"{found[method]['both']['tokens_per_forward']:.2f}" for method in methods]
        lines.append([recipe, *solved, same, *speeds])
    return markdown(head, lines)


def _grid(row: str, column: str, values: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(values.values())))
    head = [f"{row} \\ {column}", *columns]
    return markdown(head, [[key, *(f"{line[name]:.2f}" for name in columns)] for key, line in values.items()])
