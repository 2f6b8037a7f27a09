"""Collates packed rows into batches, padded on the left so that noise stays last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..trajectories.packing import COLUMNS
from .losses import Targets, find_targets
from .mask import RowTensors
from .text_once import Split, split_tokens
from .windows import segments


FILL = {"block_ids": -1, "labels": -100, "seq_ids": -1, "twin_ids": -1}  # of padding; other columns get 0
PLAN = "plan"  # the entry of a batch that holds its `Plan`


@dataclass
class Plan:
    """
    What the training needs to know of a batch, read from its columns once, on the host.

    Attributes:
        targets: the tokens that the losses read.
        noisy_tokens: the number of noisy tokens of each row.
        segments: what the windowed attention takes in place of a mask, if it runs; stays on the host.
        split: which tokens go into which forward, if the text runs once for all noise.
    """

    targets: Targets
    noisy_tokens: list[int]
    segments: torch.Tensor | None = None
    split: Split | None = None

    def to(self, device: torch.device | str, **others) -> Plan:
        """The plan with the tensors that the device reads on it; data loaders call this."""
        split = self.split and self.split.to(device, **others)
        return replace(self, targets=self.targets.to(device, **others), split=split)

    def pin_memory(self) -> Plan:
        """The plan with these tensors in pinned memory; data loaders call this."""
        return replace(self, targets=self.targets.pin_memory(), split=self.split and self.split.pin_memory())


@dataclass
class Planner:
    """
    Makes the [`Plan`] of a batch.

    Args:
        within_block: see `find_targets`.
        windowed: whether the windowed attention runs.
        text_once: whether the text runs once for all noise, in a forward of its own.
    """

    within_block: bool = False
    windowed: bool = False
    text_once: bool = False

    def __call__(self, batch: dict[str, torch.Tensor | Any]) -> Plan:
        """The plan of collated rows, `[B, L]` each."""
        rows = RowTensors.of(batch)
        return Plan(
            find_targets(batch, self.within_block),
            (batch["block_ids"] >= 0).sum(1).tolist(),
            segments(rows) if self.windowed else None,
            split_tokens(rows, windowed=self.windowed).to(batch["block_ids"].device) if self.text_once else None,
        )


@dataclass
class PackedCollator:
    """
    Collates packed rows.

    Args:
        pad_token_id: the token that pads `input_ids`.
        multiple: lengths are padded to a multiple of this.
        as_drafts: cut each noisy block down to what a draft-only adapter meets when decoding; see `cut_to_drafts`.
        check: raises an error if one of the rows of a batch is wrong; for data read from a stream.
        planner: makes the entry `PLAN` of a batch, without which the training would read from its device.

    Example:

    ```python
    >>> batch = PackedCollator(pad_token_id=0)([packed[0], packed[1]])
    >>> batch["input_ids"].shape  # [2, L], as every other entry
    ```
    """

    pad_token_id: int
    multiple: int = 1
    as_drafts: bool = False
    check: Callable[[list[dict]], None] | None = None
    planner: Planner | None = None

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor | Any]:
        """A batch: an integer tensor `[B, L]` for each column of `pack_trajectories`, and the plan."""
        if self.check is not None:
            self.check(rows)
        if self.as_drafts:
            rows = [cut_to_drafts(row) for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple
        batch: dict[str, torch.Tensor | Any] = {}
        for column in COLUMNS:
            fill = self.pad_token_id if column == "input_ids" else FILL.get(column, 0)
            padded = [[fill] * (length - len(row[column])) + list(row[column]) for row in rows]
            batch[column] = torch.tensor(padded, dtype=torch.long)
        padding = torch.tensor([[length - len(row["input_ids"])] for row in rows])
        batch["twin_ids"] = torch.where(batch["twin_ids"] >= 0, batch["twin_ids"] + padding, -1)
        if self.planner is not None:
            batch[PLAN] = self.planner(batch)
        return batch


def cut_to_drafts(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """
    A packed row whose noisy blocks look like drafts of a draft-only adapter.

    A block becomes its last correct token and the wrong ones after it, and sees all text before that token: when
    decoding, the base model commits whatever has converged. Blocks without a wrong token vanish.

    Args:
        row: a row as `pack_trajectories` returns it.
    """
    clean = [index for index, block in enumerate(row["block_ids"]) if block < 0]
    result = {column: [row[column][index] for index in clean] for column in COLUMNS}
    previous = None
    for index, (block, twin) in enumerate(zip(row["block_ids"], row["twin_ids"])):
        if block < 0 or twin < 0:
            continue
        # The wrong tokens of a block are adjacent; those of another copy are not.
        here = (row["seq_ids"][index], block, row["position_ids"][index] - index)
        if here != previous:
            previous = here
            newest = twin - 1
            if row["position_ids"][index] == 0:  # no token precedes it: a text without a prompt
                previous = None
                continue
            start = row["position_ids"][newest]
            _append(result, row["input_ids"][newest], start, block, start, row["seq_ids"][index], -1)
        _append(result, row["input_ids"][index], row["position_ids"][index], block, start, row["seq_ids"][index], twin)
    return result


def _append(
    row: dict[str, list[int]], token: int, position: int, block: int, start: int, sequence: int, twin: int
) -> None:
    """Appends a noisy token to a row."""
    for column, value in zip(COLUMNS, (token, position, block, start, -100, sequence, twin)):
        row[column].append(value)
