"""Packed rows become batches: padded on the left, so that noise stays last."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..trajectories.packing import COLUMNS


FILL = {"block_ids": -1, "labels": -100, "seq_ids": -1, "twin_ids": -1}


@dataclass
class PackedCollator:
    """
    Collates packed rows.

    Args:
        pad_token_id: what fills `input_ids`.
        multiple: lengths are padded to a multiple of this.

    Example:

    ```python
    >>> batch = PackedCollator(pad_token_id=0)([packed[0], packed[1]])
    >>> batch["input_ids"].shape  # [2, L], as every other entry
    ```
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """A batch: for each of the columns of `pack_trajectories` an integer tensor `[B, L]`."""
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple
        batch = {}
        for column in COLUMNS:
            fill = self.pad_token_id if column == "input_ids" else FILL.get(column, 0)
            padded = [[fill] * (length - len(row[column])) + list(row[column]) for row in rows]
            batch[column] = torch.tensor(padded, dtype=torch.long)
        padding = torch.tensor([[length - len(row["input_ids"])] for row in rows])
        batch["twin_ids"] = torch.where(batch["twin_ids"] >= 0, batch["twin_ids"] + padding, -1)
        return batch
