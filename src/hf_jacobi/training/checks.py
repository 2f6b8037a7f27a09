"""What cannot be trained on, refused before the training begins, with what to do about it."""

from __future__ import annotations

from itertools import groupby, islice
from typing import Any

from ..decoding.errors import UsageError
from ..trajectories.packing import COLUMNS


LOOKED_AT = 64  # rows


def check_data(name: str, dataset, model, block_size: int | None) -> None:
    """
    Raises `ValueError` for data that are not packed, or do not fit the model.

    Args:
        name: of the argument, for the message.
        dataset: the data.
        model: the causal language model.
        block_size: what the blocks are expected to have, if anything.
    """
    rows = list(islice(dataset, LOOKED_AT))
    if not rows:
        raise UsageError(f"`{name}` is empty: collect trajectories and pack them first.")
    if "trajectories" in rows[0]:
        raise UsageError(f"`{name}` holds trajectories: pass what pack_trajectories makes of them.")
    if missing := [column for column in COLUMNS if column not in rows[0]]:
        raise UsageError(f"`{name}` lacks the columns {missing}: pass what pack_trajectories returns.")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= vocabulary:
        raise UsageError(
            f"`{name}` holds token {largest}, but {type(model).__name__} knows {vocabulary}: it was collected with "
            "another tokenizer."
        )
    table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(max(row["position_ids"]) for row in rows) + 1
    if table is not None and longest > table:
        raise UsageError(f"`{name}` has texts of {longest} tokens, but {type(model).__name__} has {table} positions.")
    found = block_size_of(rows)
    if block_size is not None and (found > block_size or (found < block_size and _has_whole_blocks(rows))):
        raise UsageError(f"`{name}` has blocks of {found} tokens, but block_size={block_size}: make them agree.")


def block_size_of(rows) -> int | None:
    """The length of the blocks of packed rows: that of the longest; `None` without rows."""
    longest = 0
    for row in islice(rows or [], LOOKED_AT):
        noisy = [key for key in zip(row["seq_ids"], row["block_ids"]) if key[1] >= 0]
        longest = max([longest, *(len(list(block)) for _, block in groupby(noisy))])
    return longest or None


def _has_whole_blocks(rows) -> bool:
    """Whether a text has several blocks: only the last one may be short."""
    return any(block > 0 for row in rows for block in row["block_ids"])


def check_tokenizer(tokenizer: Any, model) -> None:
    """Raises `ValueError` for a tokenizer of another model: one with many tokens that the model does not have."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) > vocabulary + 8:  # some models leave out a token or two that their tokenizer has
        raise UsageError(
            f"the tokenizer makes {len(tokenizer)} tokens, but {type(model).__name__} knows {vocabulary}: pass the "
            "tokenizer of this model."
        )
