"""
Attention over packed rows without a dense mask: one causal call for each text, and one for each window's noise.

A dense mask makes attention score every pair of tokens of a row. A text of T tokens and its noise make 4 T^2 pairs,
of which about T^2 are visible; calls for each segment score hardly more than those. The attention is registered with
transformers under `WINDOWED`, and takes a short table of segments in place of the mask.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from ..decoding.attention import layer_kinds
from ..decoding.compat import attending_by, attention_of, looks_attention_up
from ..decoding.errors import UsageError
from .mask import RowTensors


WINDOWED = "jacobi_windows"
UNUSUAL = ("softcap", "s_aux", "position_bias")  # arguments that some models pass and SDPA ignores
FIELDS = 5  # row; start and end of the queries; start and end of the text that they see before themselves


def segments(rows: RowTensors) -> torch.Tensor:
    """
    Cuts rows into segments: the text of each sample, and each window of noise.

    Args:
        rows: the tokens, in the layout of `pack_trajectories`: the text and each window of a sample are contiguous.

    Returns:
        `[1, 1, S, 5]`, int64: for each segment its row, its start and end, and the start and end of the text that it
        sees before itself (-1 for padding). It has four dimensions because transformers accepts such masks unchanged.
    """
    copies = rows.copy_ids * rows.noisy
    keys = torch.stack([rows.seq_ids, rows.noisy.long(), rows.window_start, copies])
    changes = torch.ones_like(rows.seq_ids, dtype=torch.bool)
    changes[:, 1:] = (keys[:, :, 1:] != keys[:, :, :-1]).any(0)
    starts = changes.nonzero()
    table = []
    text_start: dict[tuple[int, int], int] = {}
    bounds = [*starts.tolist(), [-1, -1]]
    length = rows.seq_ids.shape[1]
    values = keys[:, starts[:, 0], starts[:, 1]].T.tolist()
    positions = rows.position_ids[starts[:, 0], starts[:, 1]].tolist()
    for (row, start), (next_row, next_start), (sequence, noisy, window, _), position in zip(
        bounds, bounds[1:], values, positions
    ):
        end = next_start if next_row == row else length
        if sequence < 0:
            table.append([row, start, end, -1, -1])
        elif not noisy:
            text_start[row, sequence] = start - position
            table.append([row, start, end, start, start])
        else:
            first = text_start[row, sequence]
            table.append([row, start, end, first, first + window])
    return torch.tensor(table, dtype=torch.long).view(1, 1, -1, FIELDS)


@torch.compiler.disable  # segments differ from batch to batch
def windowed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The attention function, with the parameters that transformers passes.

    Args:
        module: the attention module.
        query, key, value: `[B, heads, L, D]`; key and value have fewer heads with grouped queries.
        attention_mask: the result of `segments`.
        dropout, scaling: as in SDPA.

    Returns:
        `[B, L, heads, D]`, with zeros at padding, and `None`.
    """
    if unknown := [name for name in UNUSUAL if kwargs.get(name) is not None]:
        raise UsageError(f"the windowed attention does not support {', '.join(unknown)}: use 'eager' attention.")
    grouped = key.shape[1] != query.shape[1]
    outputs = []
    for row, table in _by_row(attention_mask).items():
        # Split once and concatenate: each slice would fill a tensor of zeros in the backward pass.
        queries = query[row].split([end - start for start, end, _, _ in table], dim=1)
        cuts = sorted({point for segment in table for point in segment if point >= 0})
        sizes = [end - start for start, end in pairwise(cuts)]
        keys, values = key[row].split(sizes, dim=1), value[row].split(sizes, dim=1)
        pieces = []
        for (start, end, text_start, text_end), own_query in zip(table, queries):
            if text_start < 0:
                pieces.append(own_query.new_zeros(*own_query.shape[:2], value.shape[-1]))
                continue
            seen = [*range(cuts.index(text_start), cuts.index(text_end)), *range(cuts.index(start), cuts.index(end))]
            before = text_end - text_start
            piece = scaled_dot_product_attention(
                own_query.unsqueeze(0),
                torch.cat([keys[index] for index in seen], 1).unsqueeze(0),
                torch.cat([values[index] for index in seen], 1).unsqueeze(0),
                attn_mask=_causal_after(end - start, before, query.device) if before else None,
                dropout_p=dropout,
                is_causal=not before,
                scale=scaling,
                enable_gqa=grouped,
            )
            pieces.append(piece[0])
        outputs.append(torch.cat(pieces, 1))
    return torch.stack(outputs).transpose(1, 2).contiguous(), None


def _by_row(table: torch.Tensor) -> dict[int, list[list[int]]]:
    """The segments of each row, without the row number."""
    rows: dict[int, list[list[int]]] = {}
    for row, *segment in table.view(-1, FIELDS).tolist():
        rows.setdefault(row, []).append(segment)
    return rows


@lru_cache(maxsize=64)
def _causal_after(queries: int, before: int, device: torch.device) -> torch.Tensor:
    """`[queries, before + queries]` bool: each query sees the tokens before all queries, and queries up to itself."""
    return torch.ones(queries, before + queries, dtype=torch.bool, device=device).tril(before)


def can_be_windowed(model: PreTrainedModel) -> bool:
    """
    Whether a model that uses SDPA can use this attention instead: it looks its attention up in transformers' registry,
    and each of its layers attends to the whole text (a sliding window or chunks need the dense mask).
    """
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) != "sdpa" or not looks_attention_up(model):
        return False
    return layer_kinds(config) == ["full_attention"]


@contextmanager
def attending_by_windows(model: PreTrainedModel):
    """While this is open, the model uses the windowed attention."""
    with attending_by(model, WINDOWED):
        yield


AttentionInterface.register(WINDOWED, windowed_attention)
