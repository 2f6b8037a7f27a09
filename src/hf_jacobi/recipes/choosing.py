"""Which checkpoint of a training is taken: the fastest of those that keep their quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..decoding.mixin import unwrap
from ..evaluation.measuring import AR, Method, measure
from ..training.figures import Score, Tally
from .recipe import Choice


def decode(
    model, tokenizer, prompts: list[list[int]], method: Method, choice: Choice, tell: Callable[[int], Any] = bool
) -> list[tuple[list[int], int]]:
    """
    The text of each prompt, and in how many forwards it came about.

    Args:
        model: an enabled model.
        tokenizer: its tokenizer.
        prompts: their tokens.
        method: how they are decoded.
        choice: how far, and how many together.
        tell: called with how many are done.
    """
    table = getattr(unwrap(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    found = []
    for first in range(0, len(prompts), choice.batch_size):
        batch = prompts[first : first + choice.batch_size]
        width = max(map(len, batch))
        room = choice.max_new_tokens if table is None else max(1, min(choice.max_new_tokens, table - width))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        measured = measure(model, {"input_ids": ids, "attention_mask": mask}, method, room)
        found += zip(measured.tokens, measured.forwards)
        tell(len(found))
    return found


def figures_of(
    model,
    tokenizer,
    held_out: Sequence[tuple[Any, list[int]]],
    settings: dict[str, Any],
    choice: Choice,
    score: Score | None,
    before: list[list[int]] | None = None,
    tell: Callable[[int], Any] = bool,
) -> tuple[dict[str, float], list[list[int]]]:
    """
    What `Tally` says of a model on held-out prompts, and its texts one token at a time.

    Args:
        model: an enabled model.
        tokenizer: its tokenizer.
        held_out: the prompts, each a row and its tokens.
        settings: of `JacobiConfig`.
        choice: how far, and how many together.
        score: whether the text of a row is right.
        before: the texts before all training; those of this model if left out.
        tell: called with how many are done.
    """
    prompts = [ids for _, ids in held_out]
    plain = [text for text, _ in decode(model, tokenizer, prompts, AR, choice)]
    drafted = decode(model, tokenizer, prompts, Method("Jacobi", "jacobi", settings), choice, tell)
    tally = Tally(score is not None)
    for (row, _), (text, forwards), own, old in zip(held_out, drafted, plain, before or plain):
        is_right = score is not None and bool(score(row, tokenizer.decode(text, skip_special_tokens=True)))
        tally.add(text, forwards, own, old, is_right)
    return tally.figures(), plain


def quality(point: dict[str, Any]) -> float:
    """What counts as quality: the share of right answers where there is a scoring function, else the agreement."""
    return point.get("score", point["agreement"])


def keeps(point: dict[str, Any], before: dict[str, Any], choice: Choice) -> bool:
    """Whether a checkpoint is as good as is asked, compared with the model before all training."""
    if "score" in point:
        return point["score"] >= before["score"] - choice.max_score_loss
    return point["agreement"] >= choice.min_agreement


def choose(points: Sequence[dict[str, Any]], before: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """
    The best among the fastest and those nearly as fast, of all that keep their quality; where none does, the best.

    Args:
        points: the figures of the checkpoints.
        before: those of the model before all training.
        choice: what counts as kept, and as nearly as fast.
    """
    kept = [point for point in points if keeps(point, before, choice)]
    if not kept:
        return max(points, key=lambda point: (quality(point), point["tokens_per_forward"]))
    fastest = max(point["tokens_per_forward"] for point in kept)
    near = [point for point in kept if point["tokens_per_forward"] >= (1 - choice.near) * fastest]
    return max(near, key=lambda point: (quality(point), point["tokens_per_forward"]))
