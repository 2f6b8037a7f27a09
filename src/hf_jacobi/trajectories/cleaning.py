"""Decides which completions to drop, and where to cut those that loop."""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np


REPEATS = 4
LEAST_SPAN = 32


def repetition_start(
    tokens: list[int], repeats: int = REPEATS, least_span: int = LEAST_SPAN
) -> tuple[int, int] | None:
    """
    Finds the loop in which a text ends, if any.

    Args:
        tokens: the text, without an end-of-sequence token.
        repeats: how many consecutive repetitions count as a loop.
        least_span: minimum tokens of all repetitions together; short runs are common in tables and code.

    Returns:
        where the loop begins and the length of the piece that repeats (the shortest one), or `None`.
    """
    text = np.asarray(tokens)
    for period in range(1, len(text) // repeats + 1):
        differs = np.flatnonzero(text[period:] != text[:-period])
        start = int(differs[-1]) + 1 if len(differs) else 0
        span = len(text) - start
        if span >= max(least_span, repeats * period):
            return start, period
    return None


def clean(
    tokens: list[int],
    eos_tokens: list[int],
    *,
    repetition: str,
    overlong: str,
    empty: str,
    counts: MutableMapping[str, int],
) -> list[int] | None:
    """
    Returns the part of a completion to keep.

    Args:
        tokens: the completion, its end-of-sequence token included if it has one.
        eos_tokens: the end-of-sequence tokens.
        repetition: `"cut"` after the first round of a loop that the text ends in, `"drop"` or `"keep"`.
        overlong: `"keep"` or `"drop"` text that reached the limit without an end.
        empty: `"drop"` or `"keep"` a completion that holds only an end token.
        counts: incremented under the name of each finding.

    Returns:
        the tokens kept, or `None` if the completion is dropped.
    """
    ended = bool(tokens) and tokens[-1] in eos_tokens
    body = tokens[:-1] if ended else tokens
    if not body:
        counts["empty"] += 1
        return None if empty == "drop" or not tokens else tokens
    if not ended:
        counts["overlong"] += 1
        if overlong == "drop":
            return None
    loop = repetition_start(body)
    if loop is not None:
        counts["repetitive"] += 1
        if repetition == "drop":
            return None
        if repetition == "cut":
            return body[: sum(loop)]
    return tokens
