"""
`tune` finds the settings of Jacobi decoding that are fastest on this machine.

The cost of a forward depends on the machine and on the number of tokens that it scores; its yield in tokens depends on
the model, the text and the settings. Both are measured separately and give a prediction of the tokens per second with
each setting. The best few settings are then measured against AR.
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

from ..decoding.compat import CACHE, cache_argument, renamed_cache
from ..decoding.config import JacobiConfig
from ..decoding.costs import CostCurve
from ..decoding.draft_adapter import DraftAdapter
from ..decoding.mixin import setting_of, unwrap
from .bench import WORTHWHILE, check_prompts, pad, setup_of
from .measuring import AR, Method, compare, measure, now, race
from .pairs import fastest_pair


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 192  # tokens in the cache while forwards are timed
CHECKED = 3  # settings that are measured against AR
GRID: tuple[Mapping[str, Any], ...] = (
    {},
    *({"block_size": n, "adaptive": True} for n in (8, 32)),
    *({"block_size": n, "pool_size": pool} for n in (2, 4, 8, 16, 32) for pool in (0, 4)),
    *({"block_size": n, "pool_size": 0, "draft_init": "prompt"} for n in (8, 16, 32)),
    {"block_size": 32, "pool_size": 4, "draft_init": "prompt"},
    {"block_size": 64, "pool_size": 4},
    *({"block_size": n, "window": "block", "max_blocks": 2} for n in (16, 32)),
)
LARGEST = 64  # tokens of a row; costs of more are not written into settings
Progress = Callable[[Iterable, str], Iterable]


@torch.inference_mode()
def measure_costs(model, sizes: Sequence[int] = SIZES, *, rows: int = 1, repeats: int = 5) -> CostCurve:
    """
    Times forwards over 1, 2, 4, ... tokens of each row, after `CONTEXT` tokens in the cache.

    Args:
        model: a model. A draft-only adapter is on for half of the tokens, as while it drafts.
        sizes: the numbers of tokens per row.
        rows: the number of rows.
        repeats: how many times each size is timed; the sizes take turns.

    Returns:
        The median time of a forward in seconds, by its number of tokens per row.
    """
    inner = unwrap(model)
    room = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize
    sizes = [size for size in sizes if size <= room // 2]
    count = min(CONTEXT, room - max(sizes))
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(0)
    context = torch.randint(vocabulary, (rows, count), generator=draw).to(inner.device)
    name = cache_argument(inner)

    def forward(ids: torch.Tensor, cache: DynamicCache, **settings: Any) -> None:
        inner(**renamed_cache({"input_ids": ids, CACHE: cache, "use_cache": True, **settings}, name))

    cache = DynamicCache(config=inner.config)
    forward(context, cache, logits_to_keep=1)
    adapter = DraftAdapter.of(inner)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    with adapter.listening() if adapter else nullcontext():
        for repeat in range(repeats + 1):
            for size in sizes:
                ids, copied = context[:, :1].expand(rows, size), copy.deepcopy(cache)
                with adapter.on(size // 2) if adapter else nullcontext():
                    start = now(inner)
                    forward(ids, copied)
                    if repeat:  # the first round is a warm-up
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
        model: an enabled model. A model with an adapter is tuned in its fastest form (`fastest_pair`).
        tokenizer: its tokenizer.
        prompts: token ids of prompts like those that the model will get.
        base: the model that decodes by AR, by default the second of `fastest_pair(model)`.
        grid: the settings to try, each a dict of `JacobiConfig` settings. Adaptive settings without a `position_cost`
            use the cost measured here.
        present: the checkpoint's present settings, by default those of the generation config. They are always tried
            and measured, and are kept unless others are faster by more than noise; their seed is always kept.
        batch_sizes: the batch sizes for which costs are measured, so that drafts adapt to them. The other settings are
            chosen for one row.
        max_new_tokens: the maximum number of new tokens per prompt.
        progress: wraps each iterable, given a title.

    Returns:
        `decoding` (`"jacobi"`, or `"ar"` if no setting was faster) and `jacobi`, the chosen settings; `speedup` over
        AR, measured (above 1 is faster); `predicted` and `measured` tokens per second of the chosen settings; `costs`,
        with `tokens` (per row), `seconds` (of a forward over them, by batch size; larger batches have fewer entries)
        and `overhead` (seconds that a step takes outside its forward, for drafting, acceptance and masks; the median
        over the settings); `grid`, every setting with its tokens per forward and its prediction; `checked`, the
        figures of AR and the best few settings; and `setup`.

    Raises:
        `ValueError`: there are no prompts, or the model has no fast form for AR (`fastest_pair`).
    """
    check_prompts(prompts)
    inputs = [pad([prompt], tokenizer, unwrap(model).device) for prompt in prompts]
    model, writer = fastest_pair(model, base)
    measure(writer, inputs[0], AR, 8)  # warm-up
    curves = _measure_curves(model, progress(sorted({1, *batch_sizes}), "costs"))
    cost = position_cost(curves)
    current = _changed(setting_of("jacobi", None, unwrap(model)) if present is None else present)
    if current is not None and JacobiConfig(**current).adapts:
        current["position_cost"] = cost  # the old one can come from another machine
    tried = _with_present([with_cost(settings, cost) for settings in grid], current)
    rows, overhead = _predict(model, inputs, progress(tried, "tokens per forward"), curves[1], max_new_tokens)
    best = _best(rows, current)
    contestants = {"AR": (writer, AR)}
    contestants |= {str(row["settings"]): (model, Method("", "jacobi", row["settings"])) for row in best}
    figures = compare(list(progress(race(contestants, inputs, max_new_tokens), "checking")))
    winner = _winner(best, figures, current)
    found = figures[str(winner["settings"])]
    return {
        "decoding": "jacobi" if _is_worthwhile(winner, found) else "ar",
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


def _measure_curves(model, batch_sizes: Iterable[int]) -> dict[int, CostCurve]:
    """The costs of forwards by batch size; the larger the batch, the fewer tokens per row."""
    return {
        rows: measure_costs(model, [size for size in SIZES if size <= max(16, SIZES[-1] // rows)], rows=rows)
        for rows in batch_sizes
    }


def _predict(
    model, inputs, grid: Iterable[dict[str, Any]], curve: CostCurve, max_new_tokens: int
) -> tuple[list[dict[str, Any]], float]:
    """
    Each setting with its yield and its predicted tokens per second, and the overhead of a step in seconds.

    Args:
        curve: the seconds of a forward by its number of tokens.
    """
    rows: list[dict[str, Any]] = [
        {"settings": settings, **_yield_of(model, inputs, settings, max_new_tokens)} for settings in grid
    ]
    outside = [row.pop("seconds_per_forward") - curve.cost(row["positions_per_forward"]) for row in rows]
    overhead = max(0.0, median(outside))
    for row in rows:
        row["predicted"] = row["tokens_per_forward"] / (curve.cost(row["positions_per_forward"]) + overhead)
    return rows, overhead


def _best(rows: list[dict[str, Any]], present: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows that are measured: those with the highest predictions, and that of the present settings."""
    ranked = sorted(rows, key=lambda row: -row["predicted"])
    return [row for place, row in enumerate(ranked) if place < CHECKED or row["settings"] == present]


def _is_worthwhile(row: Mapping[str, Any], figures: Mapping[str, Any]) -> bool:
    """Whether a setting is faster than AR by more than noise."""
    if row["tokens_per_forward"] <= 1:  # without a gain per forward, a speed-up is chance
        return False
    return min(figures["speedup"], figures["median_speedup"]) >= WORTHWHILE


def _changed(settings: Mapping[str, Any] | JacobiConfig | None) -> dict[str, Any] | None:
    """The settings that differ from the defaults; `None` for no settings."""
    if settings is None:
        return None
    default = JacobiConfig().to_dict()
    settings = JacobiConfig.coerce(dict(settings) if isinstance(settings, Mapping) else settings).to_dict()
    return {name: value for name, value in settings.items() if value != default[name]}


def _with_present(grid: Sequence[Mapping[str, Any]], present: dict[str, Any] | None) -> list[dict[str, Any]]:
    """
    A grid that starts with the present settings and uses their table of n-grams, and their seed, which affects sampled
    text but not speed.
    """
    if present is None:
        return [dict(settings) for settings in grid]
    kept = {name: value for name, value in present.items() if name in ("seed", "ngram_table")}
    others = [{**settings, **kept} for settings in grid]
    return [present, *(settings for settings in others if JacobiConfig(**settings) != JacobiConfig(**present))]


def _winner(rows: list[dict[str, Any]], figures: Mapping[str, Any], present: dict[str, Any] | None) -> dict[str, Any]:
    """The fastest row, or the row of the present settings if no other is faster by more than noise."""

    def pace(row) -> float:
        return figures[str(row["settings"])]["tokens_per_second"]

    fastest = max(rows, key=pace)
    kept = next((row for row in rows if row["settings"] == present), fastest)
    return kept if pace(fastest) < WORTHWHILE * pace(kept) else fastest


def position_cost(curves: Mapping[int, CostCurve]) -> list | dict:
    """The measured `JacobiConfig.position_cost`: `[positions, cost]` pairs, or such pairs by batch size."""
    lists = {}
    for size, curve in curves.items():
        one = curve.points[0][1]
        lists[str(size)] = [[tokens, round(took / one, 3)] for tokens, took in curve.points if tokens <= LARGEST]
    return lists["1"] if set(lists) == {"1"} else lists


def with_cost(settings: Mapping[str, Any], cost: list | dict) -> dict[str, Any]:
    """The settings, with this `position_cost` if they are adaptive and have none."""
    adapts = JacobiConfig(**settings).adapts and "position_cost" not in settings
    return {**settings, "position_cost": cost} if adapts else dict(settings)


def _yield_of(model, prompts, settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, float]:
    """Tokens, positions and seconds per forward with some settings; the seconds include the work between forwards."""
    runs = [measure(model, prompt, Method("", "jacobi", settings), max_new_tokens) for prompt in prompts]
    forwards = sum(run.forwards[0] for run in runs)
    return {
        "tokens_per_forward": sum(run.count for run in runs) / forwards,
        "positions_per_forward": sum(run.positions for run in runs) / forwards,
        "seconds_per_forward": sum(run.seconds for run in runs) / forwards,
    }
