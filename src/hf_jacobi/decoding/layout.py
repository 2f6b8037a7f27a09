"""Lays the drafts of all sequences into the rows of a batch: ids, positions, slots, visibility."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .drafting import Draft


@dataclass
class StepInputs:
    """
    One forward over the drafts of all sequences. B sequences, Q nodes each (shorter drafts are padded), S slots.

    Attributes:
        input_ids: `[B, Q]`.
        position_ids: `[B, Q]`, counted as the model does, without the left padding.
        slots: `[B, Q]`, the cache slot of each token.
        places: `[B, Q]`, the index in its sequence of each token.
        visible: `[B, Q, S]` bool, which slots each token may attend to; `None` when each sees all there are (one token
            a row, no padding, rows of equal length).
        key_places: `[B, S]`, the index of the token in each slot; `None` with `visible`.
        uniform: whether all sequences write the same slots.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor | None
    key_places: torch.Tensor | None
    uniform: bool


def lay_out(
    drafts: list[Draft],
    starts: list[int],
    offsets: list[int],
    key_valid: torch.Tensor | None,
    device: torch.device,
    copies: int = 0,
) -> StepInputs:
    """
    Lays one draft per sequence into the rows of a batch.

    Args:
        drafts: one per sequence.
        starts: the slot of each draft's node 0, which is also its index in the sequence.
        offsets: position minus slot, per sequence (minus the left padding).
        key_valid: `[B, P]` bool, false for the padding of the prompt; `None` when there is none.
        device: where the tensors go.
        copies: how many columns the drafts have that stand a second time at the end of each row; a copy sees the
            committed text and itself, never the draft. 0 for none.
    """
    draft_width = max(len(draft) for draft in drafts)
    ids = [draft.tokens + [0] * (draft_width - len(draft)) for draft in drafts]
    depths = [draft.depths + [0] * (draft_width - len(draft)) for draft in drafts]
    if copies:
        ids = [row + _fitted(draft.tokens[: draft.chain_length], copies) for row, draft in zip(ids, drafts)]
        depths = [
            row + [min(depth, draft.chain_length - 1) for depth in range(copies)] for row, draft in zip(depths, drafts)
        ]
    width = draft_width + copies
    uniform = len(set(starts)) == 1
    start = torch.tensor(starts, device=device).unsqueeze(1)
    slots = start + torch.arange(width, device=device)
    places = start + torch.tensor(depths, device=device)
    positions = places + torch.tensor(offsets, device=device).unsqueeze(1)
    visible = key_places = None
    if width > 1 or key_valid is not None or not uniform:
        total = max(starts) + width
        within = torch.arange(total, device=device) - start  # [B, S], slot relative to node 0
        ancestors = torch.from_numpy(np.stack([_ancestors(draft, draft_width, copies) for draft in drafts])).to(device)
        in_draft = (within >= 0) & (within < width)
        index = within.clamp(0, width - 1)
        draft_part = ancestors.gather(2, index.unsqueeze(1).expand(-1, width, -1)) & in_draft.unsqueeze(1)
        committed = within < 0
        if key_valid is not None:
            committed[:, : key_valid.shape[1]] &= key_valid
        visible = draft_part | committed.unsqueeze(1)
        key_places = torch.where(in_draft, places.gather(1, index), within + start)
    return StepInputs(torch.tensor(ids, device=device), positions, slots, places, visible, key_places, uniform)


def _fitted(tokens: list[int], length: int) -> list[int]:
    return tokens + [0] * (length - len(tokens))


def _ancestors(draft: Draft, width: int, copies: int = 0) -> np.ndarray:
    """`[Q, Q]` bool, Q = width + copies: row i marks node i and its ancestors; a padding node marks itself."""
    rows = np.eye(width + copies, dtype=bool)
    rows[width:, width:] = np.tri(copies, dtype=bool)
    length = draft.chain_length
    rows[:length, :length] = np.tri(length, dtype=bool)
    for node in range(length, len(draft)):
        rows[node] |= rows[draft.parents[node]]
    return rows
