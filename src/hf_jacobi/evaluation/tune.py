"""
`tune`: the settings of Jacobi decoding that are fastest on this machine.

What a forward costs depends on the machine and on how many tokens it scores; how many tokens it yields depends on the
model, the text and the settings. Both are measured by themselves, tokens per second are predicted for every setting
from the two, and the best few are checked against AR.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from ..decoding.compat import cache_argument
from ..decoding.config import JacobiConfig
from ..decoding.costs import CostCurve
from ..decoding.draft_adapter import DraftAdapter
from ..decoding.errors import UsageError
from ..decoding.mixin import setting_of, unwrap
from .bench import pad, setup_of
from .measuring import AR, Method, compare, measure, now, race
from .pairs import fastest_pair


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 192  # tokens in the cache while forwards are timed
CHECKED = 3  # settings that are measured against AR
WORTHWHILE = 1.02  # times AR; less is noise
GRID: tuple[Mapping[str, Any], ...] = (
    {},
    *({"block_size": n, "adaptive": True} for n in (8, 32)),
    *({"block_size": n, "pool_size": pool} for n in (2, 4, 8, 16, 32) for pool in (0, 4)),
    *({"block_size": n, "pool_size": 0, "draft_init": "prompt"} for n in (8, 16, 32)),
    {"block_size": 32, "pool_size": 4, "draft_init": "prompt"},
    {"block_size": 64, "pool_size": 4},
    *({"block_size": n, "window": "block", "max_blocks": 2} for n in (16, 32)),
)
LARGEST = 64  # tokens of a row up to which costs are written into settings
Progress = Callable[[Iterable, str], Iterable]


@torch.inference_mode()
def measure_costs(model, sizes: Sequence[int] = SIZES, *, rows: int = 1, repeats: int = 5) -> CostCurve:
    """
    Times forwards over 1, 2, 4, ... tokens of each row after a cache of `CONTEXT` tokens.

    Args:
        model: a model; a draft-only adapter is on for half of the tokens, as when it drafts.
        sizes: the numbers of tokens.
        rows: of the batch.
        repeats: how often each is timed, in turn.

    Returns:
        what a forward takes by its tokens in each row, in seconds, the median.
    """
    inner = unwrap(model)
    room = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize
    sizes = [size for size in sizes if size <= room // 2]
    count = min(CONTEXT, room - max(sizes))
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    context = torch.randint(vocabulary, (rows, count), generator=draw).to(inner.device)
    cache, name = DynamicCache(config=inner.config), cache_argument(inner)
    inner(input_ids=context, **{name: cache}, use_cache=True, logits_to_keep=1)
    adapter = DraftAdapter.of(inner)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    with adapter.listening() if adapter else nullcontext():
        for repeat in range(repeats + 1):
            for size in sizes:
                ids, copied = context[:, :1].expand(rows, size), copy.deepcopy(cache)
                with adapter.on(size // 2) if adapter else nullcontext():
                    start = now(inner)
                    inner(input_ids=ids, **{name: copied}, use_cache=True)
                    if repeat:  # after a warm-up
                        times[size].append(now(inner) - start)
    return CostCurve(tuple((size, median(times[size])) for size in sizes))


def tune(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    base=None,
    grid: Sequence[Mapping[str, Any]] = GRID,
    present: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    progress: Progress = lambda items, title: items,
) -> dict[str, Any]:
    """
    Finds the fastest settings for one row at a time.

    Args:
        model: an enabled model. One with an adapter is tuned in its fastest form (`fastest_pair`).
        tokenizer: its tokenizer.
        prompts: token ids of texts like those that are to be fast.
        base: what decodes by AR; left out, what `fastest_pair` makes of the model.
        grid: the settings that are tried, each a dict of `JacobiConfig`'s; those that adapt themselves and name no
            `position_cost` at what is measured here.
        present: the settings that the checkpoint has, those of the generation config if left out. They are tried and
            checked too, and stay unless others are faster by more than noise; their seed stays in any case.
        batch_sizes: the rows together for which costs are measured, so that drafts adapt to them; the other settings
            are those for one row.
        max_new_tokens: how far the prompts are decoded.
        progress: wraps what is gone through, given a title.

    Returns:
        `decoding` (`"jacobi"`, or `"ar"` where no setting was faster) and `jacobi`, the settings; `speedup`, measured;
        `predicted` and `measured` tokens per second of the chosen settings; `costs`, what a forward takes: `tokens`
        (of each row), `seconds` (by batch size, over the first of these numbers) and `overhead` (seconds of a step
        beside its forward: drafting, accepting, masks; the median over the settings); `grid` (every setting with its
        tokens per forward and its prediction) and `checked` (the best few with AR); `setup`.

    Raises:
        `ValueError`: there are no prompts, or AR has no form that is fast (`fastest_pair`).
    """
    if not prompts or not all(prompts):
        raise UsageError("there are no prompts to tune for." if not prompts else "a prompt is empty: leave it out.")
    inputs = [pad([prompt], tokenizer) for prompt in prompts]
    inputs = [{name: rows.to(unwrap(model).device) for name, rows in one.items()} for one in inputs]
    model, writer = fastest_pair(model, base)
    measure(writer, inputs[0], AR, 8)  # warm-up
    curves = {
        rows: measure_costs(model, [size for size in SIZES if size <= max(16, SIZES[-1] // rows)], rows=rows)
        for rows in progress(sorted({1, *batch_sizes}), "costs")
    }
    cost = position_cost(curves)
    present = _changed(setting_of("jacobi", None, unwrap(model)) if present is None else present)
    if present is not None and JacobiConfig(**present).adapts:
        present["position_cost"] = cost  # the old one may be of another machine
    grid = _with_present([with_cost(settings, cost) for settings in grid], present)
    rows = [
        {"settings": settings, **_yield_of(model, inputs, settings, max_new_tokens)}
        for settings in progress(grid, "tokens per forward")
    ]
    forward = curves[1].cost
    beside = [row.pop("seconds_per_forward") - forward(row["positions_per_forward"]) for row in rows]
    overhead = max(0.0, median(beside))
    for row in rows:
        row["predicted"] = row["tokens_per_forward"] / (forward(row["positions_per_forward"]) + overhead)
    ranked = sorted(rows, key=lambda row: -row["predicted"])
    best = [row for place, row in enumerate(ranked) if place < CHECKED or row["settings"] == present]
    contestants = {"AR": (writer, AR)}
    contestants |= {str(row["settings"]): (model, Method("", "jacobi", row["settings"])) for row in best}
    figures = compare(list(progress(race(contestants, inputs, max_new_tokens), "checking")))
    winner = _winner(best, figures, present)
    found = figures[str(winner["settings"])]
    drafts = winner["tokens_per_forward"] > 1  # one that yields no more than AR is faster by chance alone
    faster = drafts and min(found["speedup"], found["median_speedup"]) >= WORTHWHILE
    return {
        "decoding": "jacobi" if faster else "ar",
        "jacobi": winner["settings"],
        "speedup": found["speedup"],
        "predicted": winner["predicted"],
        "measured": found["tokens_per_second"],
        "costs": {
            "tokens": [tokens for tokens, _ in curves[1].points],
            "seconds": {str(size): [seconds for _, seconds in curve.points] for size, curve in curves.items()},
            "overhead": overhead,
        },
        "grid": rows,
        "checked": figures,
        "setup": setup_of(model) | {"prompts": len(prompts), "max_new_tokens": max_new_tokens},
    }


def _changed(settings: Mapping[str, Any] | JacobiConfig | None) -> dict[str, Any] | None:
    """Of settings those that are not the default ones; `None` where there are none at all."""
    if settings is None:
        return None
    default = JacobiConfig().to_dict()
    settings = JacobiConfig.coerce(dict(settings) if isinstance(settings, Mapping) else settings).to_dict()
    return {name: value for name, value in settings.items() if value != default[name]}


def _with_present(grid: Sequence[Mapping[str, Any]], present: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A grid with the present settings in front, and with their seed, which changes sampled text and no speed."""
    if present is None:
        return [dict(settings) for settings in grid]
    seed = {name: value for name, value in present.items() if name == "seed"}
    others = [{**settings, **seed} for settings in grid]
    return [present, *(settings for settings in others if JacobiConfig(**settings) != JacobiConfig(**present))]


def _winner(rows: list[dict[str, Any]], figures: Mapping[str, Any], present: dict[str, Any] | None) -> dict[str, Any]:
    """The row that was fastest; the present one where that is as fast but for noise."""

    def pace(row) -> float:
        return figures[str(row["settings"])]["tokens_per_second"]

    fastest = max(rows, key=pace)
    kept = next((row for row in rows if row["settings"] == present), fastest)
    return kept if pace(fastest) < WORTHWHILE * pace(kept) else fastest


def position_cost(curves: Mapping[int, CostCurve]) -> list | dict:
    """`JacobiConfig.position_cost` as measured: `[positions, cost]` pairs, for several batch sizes by their number."""
    lists = {}
    for size, curve in curves.items():
        one = curve.points[0][1]
        lists[str(size)] = [[tokens, round(took / one, 3)] for tokens, took in curve.points if tokens <= LARGEST]
    return lists["1"] if set(lists) == {"1"} else lists


def with_cost(settings: Mapping[str, Any], cost: list | dict) -> dict[str, Any]:
    """Settings that adapt and name no `position_cost`, at this one; others as they are."""
    adapts = JacobiConfig(**settings).adapts and "position_cost" not in settings
    return {**settings, "position_cost": cost} if adapts else dict(settings)


def _yield_of(model, prompts, settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, float]:
    """What a forward yields and scores with some settings, and what it takes with all that is around it."""
    runs = [measure(model, prompt, Method("", "jacobi", settings), max_new_tokens) for prompt in prompts]
    forwards = sum(run.forwards[0] for run in runs)
    return {
        "tokens_per_forward": sum(run.count for run in runs) / forwards,
        "positions_per_forward": sum(run.positions for run in runs) / forwards,
        "seconds_per_forward": sum(run.seconds for run in runs) / forwards,
    }
