"""The miniature's tables: which figures they take, and how they are written."""

from __future__ import annotations

from typing import Any

from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Method

from .recipes import METHODS, MR, in_blocks, sliding
from .results import Results


RACED = 40  # problems of each task that are timed
SCANNED = 50  # problems of each task on which settings of decoding are compared
MAIN_ROWS: tuple[tuple[str, str, Method], ...] = (
    ("AR", "base", AR),
    ("prompt lookup (transformers)", "base", PROMPT_LOOKUP),
    ("untrained, sliding window with recycling", "base", sliding(32, pool=4)),
    ("CLLM, in blocks", "cllm", in_blocks(16)),
    ("CLLM, sliding window", "cllm", sliding(32)),
    ("Jacobi Forcing, in blocks", "forcing", in_blocks(16)),
    ("Jacobi Forcing, MR", "forcing", MR),
    ("Jacobi Forcing, sliding window", "forcing", sliding(32)),
    ("Jacobi Forcing, sliding window with recycling", "forcing", sliding(32, pool=4)),
    ("draft-only adapter, sliding window", "draft", sliding(32)),
    ("draft-only adapter, sliding window with recycling", "draft", sliding(32, pool=4)),
)
BLOCKS = {n: in_blocks(n) for n in (16, 32, 64)}
COMPARED = {
    "schedules": ("linear-w8", "random-w8", "reverse-w8"),
    "windows": ("random-w1", "linear-w4", "linear-w8", "linear-w16"),
    "adapters": ("linear-w8", "lora", "draft-short"),
}
N_OF = {
    "random-w1": 16,
    "linear-w8": 16,
    "random-w1-n32": 32,
    "linear-w8-n32": 32,
    "random-w1-n64": 64,
    "linear-w8-n64": 64,
}
SIZES, POOLS = (8, 16, 32, 64), (0, 2, 4, 8)
FLIGHTS, RATIOS = (1, 2, 3, 4), (0.5, 0.7, 0.85, 1.0)


def main_table(results: Results) -> dict[str, Any]:
    """Table 1. Prompt lookup takes one row at a time, so its quality is AR's and its speed is of the race alone."""
    race = results.race("main", [(model, method) for _, model, method in MAIN_ROWS], RACED)
    rows = {}
    for title, model, method in MAIN_ROWS:
        timed = race[f"{model}: {method.name}"]
        rows[title] = {"race": timed}
        if method is not PROMPT_LOOKUP:
            rows[title] |= results.quality(model, method)
    return rows


def comparison(results: Results, recipes: tuple[str, ...]) -> dict[str, Any]:
    """Tables 2, 3 and 6: recipes on the same budget, each decoded in several ways."""
    return {recipe: {method.name: results.quality(recipe, method) for method in METHODS[1:]} for recipe in recipes}


def by_block_size(results: Results) -> dict[str, Any]:
    """Jacobi Forcing against CLLM, same budget: trained on blocks of n, decoded in blocks of n, K = 1 and 2."""
    return {
        recipe: {f"K={k}": results.quality(recipe, in_blocks(n, blocks=k)) for k in (1, 2)}
        for recipe, n in N_OF.items()
    }


def grid(results: Results, model: str) -> dict[str, Any]:
    """Tables 4 and 5: tokens per forward by block size and pool, and by K and r."""

    def scan(method: Method) -> float:
        return results.quality(model, method, SCANNED)["both"]["tokens_per_forward"]

    return {
        "pools": {n: {pool: scan(in_blocks(n, pool=pool)) for pool in POOLS} for n in SIZES},
        "sliding": {n: {pool: scan(sliding(n, pool=pool)) for pool in POOLS} for n in SIZES},
        "flights": {k: {ratio: scan(in_blocks(16, blocks=k, ratio=ratio)) for ratio in RATIOS} for k in FLIGHTS},
    }
