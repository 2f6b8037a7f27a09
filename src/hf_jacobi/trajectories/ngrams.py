"""Builds a table of n-grams from text that a model wrote: guesses for its next texts, which cost no forward."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..decoding.errors import UsageError, check_range
from ..decoding.files import read_json, write_whole
from ..decoding.ngram_table import FORMAT, LEVELS, LONGEST, MASK, MULTIPLIER, TABLE
from .pieces import token_array
from .prompts import only_prompts


COLUMNS = PROMPT, COMPLETION = "prompt_ids", "completion_ids"
MOST_DISCOUNT = 0.9  # of a count, for small data


@dataclass(frozen=True)
class Order:
    """
    What followed the contexts of one length.

    Attributes:
        pairs: `[P]` the key of each context with a token that followed it, in rising order.
        chances: `[P]` the chance of that token.
        keys: `[C]` the key of each context, in rising order.
        tokens, best: `[C]` the likeliest token after each context, and its chance.
        counts: `[C]` how often each context occurred.
        shorter: `[C]` the place of the context without its first token in the order below.
    """

    pairs: np.ndarray
    chances: np.ndarray
    keys: np.ndarray
    tokens: np.ndarray
    best: np.ndarray
    counts: np.ndarray
    shorter: np.ndarray

    @property
    def levels(self) -> np.ndarray:
        """`[C]` the chances `best` in steps of 1 / `LEVELS`."""
        return np.minimum(self.best * LEVELS, LEVELS - 1).astype(np.int64)


def build_ngram_table(
    rows: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    order: int = 4,
    max_entries: int | None = 500_000,
) -> Path:
    """
    Builds the table from which `JacobiConfig(ngram_table=...)` drafts.

    For every context of 1 to `order` tokens it keeps the likeliest next token and its chance, by interpolated absolute
    discounting (Ney, Essen and Kneser, 1994). Contexts that add nothing to shorter ones are left out.

    Args:
        rows: texts of the model that is to use the table, such as the trajectories that `collect_trajectories` wrote:
            `prompt_ids` and `completion_ids` of each, of which the completions are counted.
        output_dir: the folder that receives `ngrams.npz`: that of the checkpoint, or any other.
        order: the length of the longest context, from 1 to 8.
        max_entries: the largest number of contexts, those seen most often, about 8 bytes each. `None` for no limit.

    Returns:
        The file.

    Raises:
        `ValueError`: an argument is out of range, or the rows are not such texts.

    Example:

    ```python
    >>> build_ngram_table(collect_trajectories(model, tokenizer, prompts), "checkpoint")
    >>> model.generate(**inputs, decoding="jacobi", jacobi_config={"ngram_table": "checkpoint"})
    ```
    """
    check_range("`order`", order, 1, LONGEST, whole=True)
    check_range("`max_entries`", max_entries, 1, whole=True, optional=True)
    folder = Path(output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name the folder that is to hold {TABLE}.")
    contexts, tokens = _targets(rows, order)
    _check_vocabulary(folder, int(tokens.max()))
    keys, following, levels = _entries(count_orders(contexts, tokens), max_entries)
    if not len(keys):
        raise UsageError(
            f"the text has no context that is often followed by the same token ({len(tokens)} tokens were counted): "
            "give more or longer texts."
        )
    content = io.BytesIO()
    np.savez_compressed(
        content,
        keys=keys,
        tokens=following.astype(np.int32),
        levels=levels.astype(np.uint8),
        format=np.array(FORMAT),
        order=np.array(order),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TABLE, content.getvalue())
    return folder / TABLE


def _check_vocabulary(folder: Path, largest: int) -> None:
    """Refuses tokens that the model of a checkpoint does not have; `largest` is the largest of them."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    size = (config.get("text_config") or config).get("vocab_size")
    if isinstance(size, int) and largest >= size:
        raise UsageError(
            f"the texts have tokens up to {largest}, and the vocabulary of {folder} ends at {size - 1}: give texts of "
            "this model."
        )


def _targets(rows: Iterable[Mapping[str, Any]], order: int) -> tuple[np.ndarray, np.ndarray]:
    """`[T, order]` the tokens before each token of the completions, -1 before the start, and `[T]` these tokens."""
    contexts, tokens = [], []
    rows = only_prompts(rows, PROMPT, COMPLETION)
    for number, row in enumerate(rows):
        missing = [name for name in COLUMNS if not isinstance(row, Mapping) or not _is_list(row.get(name))]
        if missing:
            raise UsageError(
                f"row {number} has no list `{missing[0]}`: give rows of `{PROMPT}` and `{COMPLETION}`, as "
                "`hf-jacobi collect` writes them."
            )
        prompt = token_array(row[PROMPT], f"`{PROMPT}` of row {number}")[-order:]
        text = token_array(row[COMPLETION], f"`{COMPLETION}` of row {number}")
        if len(text):
            whole = np.concatenate([np.full(order - len(prompt), -1), prompt, text])
            contexts.append(np.lib.stride_tricks.sliding_window_view(whole, order)[: len(text)])
            tokens.append(text)
    if not tokens:
        raise UsageError("there is no text to count: give rows whose `completion_ids` are not empty.")
    return np.concatenate(contexts).astype(np.int64), np.concatenate(tokens).astype(np.int64)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def keys_of(contexts: np.ndarray) -> np.ndarray:
    """`[T]` the keys of contexts `[T, L]`, as `key_of` computes them."""
    keys = np.full(len(contexts), contexts.shape[1], np.uint64)
    for column in contexts.T:
        keys = (keys * np.uint64(MULTIPLIER) + column.astype(np.uint64) + np.uint64(1)) & np.uint64(MASK)
    return keys.astype(np.int64)


def count_orders(contexts: np.ndarray, tokens: np.ndarray) -> list[Order]:
    """
    Counts what followed contexts of each length, from the empty one up.

    Args:
        contexts: `[T, order]` the tokens before each token, -1 before the start of a text.
        tokens: `[T]` the tokens.
    """
    seen, counts = np.unique(tokens, return_counts=True)
    likeliest = [counts.argmax()]
    empty, shares = np.zeros(1, np.int64), counts / len(tokens)
    orders = [Order(keys_of(seen[:, None]), shares, empty, seen[likeliest], shares[likeliest], empty, empty)]
    for length in range(1, contexts.shape[1] + 1):
        inside = contexts[:, -length] >= 0
        if not inside.any():
            break
        orders.append(_count(contexts[inside, -length:], tokens[inside], orders[-1]))
    return orders


def _count(contexts: np.ndarray, tokens: np.ndarray, below: Order) -> Order:
    """Counts contexts `[T, L]` with the tokens `[T]` after them; `below` is the order of length L - 1."""
    whole = np.concatenate([contexts, tokens[:, None]], axis=1)
    pairs, first, times = np.unique(keys_of(whole), return_index=True, return_counts=True)
    keys, one, context = np.unique(keys_of(contexts[first]), return_index=True, return_inverse=True)
    counts, kinds = np.bincount(context, times), np.bincount(context)
    once, twice = (times == 1).sum(), (times == 2).sum()
    discount = min(once / max(1, once + 2 * twice), MOST_DISCOUNT)
    left = discount * kinds / counts  # the share of each context that its shorter context distributes
    of_shorter = below.chances[np.searchsorted(below.pairs, keys_of(whole[first, 1:]))]
    chances = (times - discount) / counts[context] + left[context] * of_shorter

    following = tokens[first]
    ranked = np.lexsort((following, -chances, context))
    likeliest = ranked[np.searchsorted(context[ranked], np.arange(len(keys)))]
    shorter = np.searchsorted(below.keys, keys_of(contexts[first[one], 1:]))
    unseen = left * below.best[shorter]
    is_unseen = unseen > chances[likeliest]
    best_tokens = np.where(is_unseen, below.tokens[shorter], following[likeliest])
    return Order(pairs, chances, keys, best_tokens, np.maximum(unseen, chances[likeliest]), counts, shorter)


def _entries(orders: list[Order], most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys, tokens and levels of the contexts to keep, at most `most`, in rising order of their keys."""
    kept = [[np.zeros(0, np.int64)] * 4]
    for below, order in pairwise(orders):
        tokens, levels = below.tokens[order.shorter], below.levels[order.shorter]
        if below is orders[0]:  # no table holds the empty context
            tokens, levels = np.full_like(tokens, -1), np.zeros_like(levels)
        differs = (order.tokens != tokens) | (order.levels != levels)
        keep = differs & ((order.levels > 0) | (levels > 0))
        kept.append([column[keep] for column in (order.keys, order.tokens, order.levels, order.counts)])
    keys, tokens, levels, counts = (np.concatenate(column) for column in zip(*kept))
    chosen = np.lexsort((keys, -levels, -counts))[:most]
    chosen = chosen[np.argsort(keys[chosen])]
    return keys[chosen], tokens[chosen], levels[chosen]
