"""
The noise-aware attention mask: which token of a packed row sees which (paper, section 3.2, figure 3).

`visible` states the rule. FlexAttention compiles it; for other attention it fills a dense mask.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel

from ..decoding.attention import LAYER_KINDS, AttentionMask, layer_kinds, layer_overlay, named_kinds
from ..decoding.compat import attention_of, is_stateful
from ..decoding.errors import UsageError
from ..decoding.support import has_own_mask


FLEX_MULTIPLE = 128  # rows are padded to it: for other lengths FlexAttention's backward can return NaN


@dataclass
class RowTensors:
    """
    The properties of each token of a batch of packed rows that the mask depends on, `[B, L]` each.

    See `pack_trajectories`.

    Attributes:
        seq_ids: the sample within the row; -1 for padding.
        block_ids: the block of a noisy token; -1 for clean tokens.
        window_start: for a noisy token, the position of its window's first token.
        position_ids: positions.
        copy_ids: the noisy copy of its blocks that a noisy token belongs to. It tells copies of one window apart;
            copies of different windows can share a number.
    """

    seq_ids: torch.Tensor
    block_ids: torch.Tensor
    window_start: torch.Tensor
    position_ids: torch.Tensor
    copy_ids: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, Any]) -> RowTensors:
        """The tensors of a collated batch, in which a copy begins where positions stop increasing."""
        positions = batch["position_ids"]
        begins = torch.zeros_like(positions)
        begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
        return cls(batch["seq_ids"], batch["block_ids"], batch["window_start"], positions, begins.cumsum(1))

    @property
    def noisy(self) -> torch.Tensor:
        """`[B, L]`, true for noisy tokens."""
        return self.block_ids >= 0

    def take(self, rows: torch.Tensor, tokens: torch.Tensor) -> RowTensors:
        """
        New rows made of tokens of these.

        Args:
            rows: `[R, 1]`, the row that each new row takes its tokens from.
            tokens: `[R, T]`, their indices; negative for padding.
        """
        taken = {name: values[rows, tokens.clamp(min=0)] for name, values in vars(self).items()}
        absent = tokens < 0
        return RowTensors(**taken | {name: taken[name].masked_fill(absent, -1) for name in ("seq_ids", "block_ids")})


def visible(rows: RowTensors, batch: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """
    Whether a token sees another token of its row: the only statement of the rule.

    A clean token sees the clean tokens up to itself. A noisy token sees the clean tokens before its window, and the
    noisy tokens of its window up to itself. A window holds each position once, so these are the noisy blocks before
    its own, and its own block up to itself. Samples of a row do not see each other, nor do noisy copies. A padding
    token sees itself, because a softmax needs at least one entry.

    Args:
        rows: the tokens.
        batch, query, key: indices, of any shapes that broadcast.

    Returns:
        bool, of the shape that the indices broadcast to.
    """
    clean_query, clean_key = rows.block_ids[batch, query] < 0, rows.block_ids[batch, key] < 0
    window, key_window = rows.window_start[batch, query], rows.window_start[batch, key]
    position, key_position = rows.position_ids[batch, query], rows.position_ids[batch, key]
    text = clean_key & torch.where(clean_query, key_position <= position, key_position < window)
    noise = ~clean_query & ~clean_key & (key_window == window) & (key_position <= position)
    noise = noise & (rows.copy_ids[batch, query] == rows.copy_ids[batch, key])  # FlexAttention does not support `&=`
    sequence = rows.seq_ids[batch, query]
    together = (sequence == rows.seq_ids[batch, key]) & (sequence >= 0)
    return (together & (text | noise)) | (query == key)


def dense_mask(
    rows: RowTensors, config: PreTrainedConfig, dtype: torch.dtype, first: int = 0
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    The mask for SDPA and eager attention.

    Args:
        rows: the tokens.
        config: the text configuration of the model; layers with a window or chunks get masks of their own.
        dtype: the dtype that the model computes in.
        first: the index of the first query.

    Returns:
        `[B, 1, L - first, L]`, 0 where a token is seen and the lowest number elsewhere, or a dict of such masks by
        layer type. SDPA would convert a boolean mask to this in every layer, and keep each for the backward pass.
    """
    length = rows.seq_ids.shape[1]
    device = rows.seq_ids.device
    batch = torch.arange(rows.seq_ids.shape[0], device=device).view(-1, 1, 1)
    tokens = torch.arange(length, device=device)
    mask = AttentionMask(config, dtype, torch.zeros(rows.seq_ids.shape[0], dtype=torch.long, device=device))
    mask.additive = True
    seen = visible(rows, batch, tokens[first:].view(1, -1, 1), tokens.view(1, 1, -1))
    return mask(seen, rows.position_ids[:, first:], rows.position_ids)


def flex_mask(rows: RowTensors, config: PreTrainedConfig) -> BlockMask | dict[str, BlockMask]:
    """
    The mask for FlexAttention.

    Args:
        rows: the tokens; L must be a multiple of `FLEX_MULTIPLE`.
        config: the text configuration of the model.

    Returns:
        A `BlockMask` that all heads share, or a dict of such masks by layer type.
    """
    sizes, length = rows.seq_ids.shape
    if length % FLEX_MULTIPLE:
        raise UsageError(f"FlexAttention needs rows whose length is a multiple of {FLEX_MULTIPLE}, got {length}.")
    no_padding = torch.zeros(sizes, dtype=torch.long, device=rows.seq_ids.device)

    def block_mask(kind: str) -> BlockMask:
        overlay = layer_overlay(kind, config, no_padding)

        def rule(batch, head, query, key):
            seen = visible(rows, batch, query, key)
            if overlay is None:
                return seen
            return seen & overlay(batch, head, rows.position_ids[batch, query], rows.position_ids[batch, key])

        # Not compiled: compilation would cost more than building a mask once per batch.
        return create_block_mask(rule, sizes, None, length, length, device=str(rows.seq_ids.device))

    masks = {kind: block_mask(kind) for kind in layer_kinds(config)}
    return masks if named_kinds(config) else next(iter(masks.values()))


def training_mask(
    rows: RowTensors, config: PreTrainedConfig, dtype: torch.dtype
) -> torch.Tensor | BlockMask | dict[str, torch.Tensor] | dict[str, BlockMask]:
    """The mask for the attention that `config` names."""
    if attention_of(config) == "flex_attention":
        return flex_mask(rows, config)
    return dense_mask(rows, config, dtype)


def refuse_untrainable(model: PreTrainedModel) -> None:
    """
    Raises `ValueError` for a model whose attention cannot keep noise out of the text.

    Args:
        model: the causal language model.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UsageError(f"Jacobi Forcing trains decoder-only models, but {name} is an encoder-decoder.")
    kinds = set(layer_kinds(config)) - set(LAYER_KINDS)
    if kinds or is_stateful(model):
        raise UsageError(
            f"Jacobi Forcing needs attention that a mask can restrict, but {name} has layers that carry a state "
            f"through the row ({', '.join(sorted(kinds)) or 'state-space'}), through which noise would leak into the "
            "text: use a model with attention only."
        )
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if getattr(config, "alibi", False) or has_own_mask(model) or not takes_positions:
        raise UsageError(
            f"Jacobi Forcing sets the position of each token and what it sees, but the attention of {name} uses "
            "places in the row instead (ALiBi, or a mask of its own): use another model."
        )
    attention = attention_of(config)
    if attention not in ("sdpa", "eager", "flex_attention"):
        raise UsageError(
            f"Jacobi Forcing needs attention that takes any mask, but {name} uses {attention!r}: load it with "
            "attn_implementation='sdpa' or, on a GPU, 'flex_attention'."
        )
    device = next(model.parameters()).device.type
    if attention == "flex_attention" and device == "cpu":
        raise UsageError(
            f"FlexAttention has no backward pass on a CPU: load {name} with attn_implementation='sdpa' to train here."
        )
