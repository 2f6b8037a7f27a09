"""Chooses a checkpoint of a training: the fastest of those that keep their quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..decoding.mixin import unwrap
from ..evaluation.bench import pad
from ..evaluation.measuring import AR, Method, measure
from ..training.figures import Score, Tally
from .recipe import Choice


def _tell_nobody(done: int) -> None:
    pass


def decode(
    model,
    tokenizer,
    prompts: list[list[int]],
    method: Method,
    choice: Choice,
    tell: Callable[[int], Any] = _tell_nobody,
) -> list[tuple[list[int], int]]:
    """
    The completion of each prompt, and the number of forwards that it took.

    Args:
        model: an enabled model.
        tokenizer: its tokenizer.
        prompts: the token ids of each prompt.
        method: the decoding method.
        choice: gives the maximum number of new tokens and the batch size.
        tell: called with the number of prompts done.
    """
    table = getattr(unwrap(model).config.get_text_config(decoder=True), "max_position_embeddings", None)
    found: list[tuple[list[int], int]] = []
    for first in range(0, len(prompts), choice.batch_size):
        batch = prompts[first : first + choice.batch_size]
        width = max(map(len, batch))
        room = choice.max_new_tokens if table is None else max(1, min(choice.max_new_tokens, table - width))
        measured = measure(model, pad(batch, tokenizer, model.device), method, room)
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
    tell: Callable[[int], Any] = _tell_nobody,
) -> tuple[dict[str, float], list[list[int]]]:
    """
    The figures of `Tally` for a model on held-out prompts, and the model's AR completions.

    Args:
        model: an enabled model.
        tokenizer: its tokenizer.
        held_out: the prompts, each a row and its token ids.
        settings: `JacobiConfig` settings.
        choice: gives the maximum number of new tokens and the batch size.
        score: whether the completion of a row is correct.
        before: the AR completions before all training, by default those of this model.
        tell: called with the number of prompts done.
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
    """The quality of a checkpoint: its share of correct answers if there is a scoring function, else its agreement."""
    return point.get("score", point["agreement"])


def keeps(point: dict[str, Any], before: dict[str, Any], choice: Choice) -> bool:
    """Whether a checkpoint keeps the required quality, compared with the model before all training."""
    if "score" in point:
        return point["score"] >= before["score"] - choice.max_score_loss
    return point["agreement"] >= choice.min_agreement


def choose(points: Sequence[dict[str, Any]], before: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """
    The checkpoint to keep: of those that keep their quality and are nearly as fast as the fastest of them, the one
    with the highest quality. If none keeps its quality, the one with the highest quality.

    Args:
        points: the figures of the checkpoints.
        before: the figures of the model before all training.
        choice: defines which quality is kept and which speed is nearly as fast.
    """
    kept = [point for point in points if keeps(point, before, choice)]
    if not kept:
        return max(points, key=lambda point: (quality(point), point["tokens_per_forward"]))
    fastest = max(point["tokens_per_forward"] for point in kept)
    near = [point for point in kept if point["tokens_per_forward"] >= (1 - choice.near) * fastest]
    return max(near, key=lambda point: (quality(point), point["tokens_per_forward"]))
