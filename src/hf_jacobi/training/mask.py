"""
The noise-aware attention mask: which token of a packed row may see which (paper, section 3.2, figure 3).

One rule, `visible`, says it; FlexAttention compiles that rule, elsewhere it fills a dense mask.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from ..decoding.attention import LAYER_KINDS, AttentionMask
from ..decoding.compat import attention_of, is_stateful
from ..decoding.errors import UsageError
from ..decoding.support import has_own_mask


FLEX_MULTIPLE = 128  # rows are padded to it: FlexAttention's backward can return NaN for other lengths


@dataclass
class RowTensors:
    """
    What the mask depends on, for each token of a batch of packed rows, `[B, L]` each; see `pack_trajectories`.

    Attributes:
        seq_ids: which sample of the row; -1 for padding.
        block_ids: -1 for clean tokens, else the block.
        window_start: for a noisy token the position of its window's first token.
        position_ids: positions.
        copy_ids: which of several noisy copies of the same blocks a noisy token belongs to; other copies of other
            windows may share a number.
    """

    seq_ids: torch.Tensor
    block_ids: torch.Tensor
    window_start: torch.Tensor
    position_ids: torch.Tensor
    copy_ids: torch.Tensor

    @classmethod
    def of(cls, batch: dict[str, torch.Tensor]) -> RowTensors:
        """Out of a collated batch, in which a copy begins where positions do not go on."""
        positions = batch["position_ids"]
        begins = torch.zeros_like(positions)
        begins[:, 1:] = positions[:, 1:] <= positions[:, :-1]
        return cls(batch["seq_ids"], batch["block_ids"], batch["window_start"], positions, begins.cumsum(1))

    @property
    def noisy(self) -> torch.Tensor:
        """`[B, L]`, which tokens are noise."""
        return self.block_ids >= 0

    def take(self, rows: torch.Tensor, tokens: torch.Tensor) -> RowTensors:
        """
        Other rows, out of tokens of these.

        Args:
            rows: `[R, 1]`, the row that each takes its tokens from.
            tokens: `[R, T]`, their indices; padding where they are negative.
        """
        taken = {name: values[rows, tokens.clamp(min=0)] for name, values in vars(self).items()}
        absent = tokens < 0
        return RowTensors(**taken | {name: taken[name].masked_fill(absent, -1) for name in ("seq_ids", "block_ids")})


def visible(rows: RowTensors, batch, query, key) -> torch.Tensor:
    """
    Whether a token sees another one of its row. The only statement of the rule.

    A clean token sees the clean tokens up to itself. A noisy token sees the clean tokens before its window, and the
    noisy ones of its window up to itself: blocks of a window lie side by side, each position once, so these are the
    noisy blocks before its own, and its own as far as itself. Samples of a row see nothing of each other, nor do
    copies of noise. A padding token sees itself, as a softmax needs something to see.

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
    noise = noise & (rows.copy_ids[batch, query] == rows.copy_ids[batch, key])  # in place, FlexAttention cannot
    sequence = rows.seq_ids[batch, query]
    together = (sequence == rows.seq_ids[batch, key]) & (sequence >= 0)
    return (together & (text | noise)) | (query == key)


def dense_mask(rows: RowTensors, config: PreTrainedConfig, dtype: torch.dtype, first: int = 0):
    """
    The mask for SDPA and eager attention.

    Args:
        rows: the tokens.
        config: the text configuration of the model; layers with a window or chunks get masks of their own.
        dtype: the dtype that the model computes in.
        first: the first token whose view is wanted.

    Returns:
        `[B, 1, L - first, L]`, 0 where a token is seen and the lowest number elsewhere, or a dict of them by layer
        type. It is additive because SDPA would turn a boolean one into that in every layer, and keep each for the
        backward pass.
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
        A `BlockMask` that all heads share, or a dict of them by layer type.
    """
    sizes, length = rows.seq_ids.shape
    if length % FLEX_MULTIPLE:
        raise UsageError(f"FlexAttention trains on rows of a multiple of {FLEX_MULTIPLE} tokens, got {length}.")
    mask = AttentionMask(config, torch.float32, torch.zeros(1, dtype=torch.long))
    kinds = mask.layer_types or [mask.single_kind()]

    def block_mask(kind: str) -> BlockMask:
        def rule(batch, head, query, key):
            seen = visible(rows, batch, query, key)
            position, key_position = rows.position_ids[batch, query], rows.position_ids[batch, key]
            if kind == "sliding_attention":
                return seen & ((position - key_position < mask.sliding_window) | (query == key))
            if kind == "chunked_attention":
                return seen & (position // mask.chunk_size == key_position // mask.chunk_size)
            return seen

        # Built in the open: compiling it would cost more than the whole of it does, once per batch.
        return create_block_mask(rule, sizes, None, length, length, device=str(rows.seq_ids.device))

    masks = {kind: block_mask(kind) for kind in kinds}
    return masks if mask.layer_types else masks[kinds[0]]


def training_mask(rows: RowTensors, config: PreTrainedConfig, dtype: torch.dtype):
    """The mask for the attention that `config` names."""
    if attention_of(config) == "flex_attention":
        return flex_mask(rows, config)
    return dense_mask(rows, config, dtype)


def refuse_untrainable(model) -> None:
    """
    Raises `ValueError` for a model whose attention cannot keep noise out of the text.

    Args:
        model: the causal language model.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UsageError(f"Jacobi Forcing trains decoder-only models, but {name} is an encoder-decoder.")
    kinds = set(getattr(config, "layer_types", None) or ()) - set(LAYER_KINDS)
    if kinds or is_stateful(model):
        raise UsageError(
            f"Jacobi Forcing needs attention that a mask can restrict, but {name} has layers that carry a state "
            f"through the row ({', '.join(sorted(kinds)) or 'state-space'}), so noise would leak into the text."
        )
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if getattr(config, "alibi", False) or has_own_mask(model) or not takes_positions:
        raise UsageError(
            f"Jacobi Forcing tells each token its position and what it sees, but the attention of {name} counts "
            "places in the row (ALiBi, or a mask of its own)."
        )
    attention = attention_of(config)
    if attention not in ("sdpa", "eager", "flex_attention"):
        raise UsageError(
            f"Jacobi Forcing needs attention that takes a mask of its own, but {name} runs {attention!r}: load it "
            "with attn_implementation='sdpa' or, on a GPU, 'flex_attention'."
        )
    device = next(model.parameters()).device.type
    if attention == "flex_attention" and device == "cpu":
        raise UsageError(
            f"FlexAttention has no backward pass on a CPU: load {name} with attn_implementation='sdpa' to train here."
        )
