"""The mask of a step, one for each kind of layer, and the attention function that uses it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from .compat import (
    attention_of,
    chunked_overlay,
    flash_kernel,
    looks_attention_up,
    own_attention,
    register_attention,
    registered_attention,
    sliding_window_overlay,
)


MASKED_ATTENTIONS = ("sdpa", "eager")
CHAIN_ATTENTION = "flash_attention_2"  # takes the ends of rows instead of a mask, which suffices without branches
LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
ALL_ROWS = (slice(None), None, None)  # index of `[B]` that gives `[B, 1, 1]`


def named_kinds(config: PreTrainedConfig) -> list[str] | None:
    """The layer types that a (text) configuration names, each once, sorted; `None` if it names none."""
    return sorted(set(config.layer_types)) if getattr(config, "layer_types", None) else None


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """The kinds of attention layers of a model, each once: those it names, or the one that transformers infers."""
    if (named := named_kinds(config)) is not None:
        return named
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"]
    return ["full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"]


def layer_overlay(
    kind: str, config: PreTrainedConfig, left_padding: torch.Tensor
) -> Callable[..., torch.Tensor] | None:
    """
    What a kind of layer adds to the causal mask: its window or its chunks.

    Args:
        kind: one of `LAYER_KINDS`.
        config: the text configuration of the model.
        left_padding: `[B]`, the number of padding tokens that each row begins with; chunks are counted from there.

    Returns:
        a mask function of transformers, from (batch index, head index, index of the query, index of the key) to bool;
        `None` for full attention. It indexes `left_padding` by the batch index (`ALL_ROWS` for all rows at once).
    """
    if kind == "sliding_attention":
        return sliding_window_overlay(config.sliding_window)
    if kind == "chunked_attention":
        return chunked_overlay(config.attention_chunk_size, left_padding)
    return None


class AttentionMask:
    """
    Builds the 4D masks of a model.

    A 4D mask replaces the mask that the model would have made itself, so windows and chunks are applied here. They are
    measured by indices in the sequence, not by slots, which would count the branches of a row twice.

    Args:
        config: the text configuration of the model.
        dtype: the dtype that the model computes in.
        left_padding: `[B]`, the number of padding tokens that each row begins with; chunks are counted from there.
        groups: how many times a mask repeats the queries, one copy below the other (`fold_groups`).
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, left_padding: torch.Tensor, groups: int = 1):
        self.config = config
        self.left_padding = left_padding
        self.groups = groups
        # Eager attention adds the mask, so a boolean one would do nothing. SDPA would convert one in every layer.
        self.additive = attention_of(config) == "eager" or groups > 1
        # Added where a token sees another, and where it does not.
        self.seen, self.unseen = torch.tensor(
            [0.0, torch.finfo(dtype).min], dtype=dtype, device=left_padding.device
        ).unbind()
        self.layer_types, self.kinds = named_kinds(config), layer_kinds(config)

    def of_rows(self, rows: list[int]) -> AttentionMask:
        """The masks of some rows."""
        part = copy.copy(self)
        part.left_padding = self.left_padding[rows]
        return part

    @property
    def reads_places(self) -> bool:
        """Whether a kind of layer limits the distance at which a token sees another."""
        return self.kinds != ["full_attention"]

    def __call__(self, visible, query_places, key_places) -> torch.Tensor | dict[str, torch.Tensor]:
        """
        Args:
            visible: `[B, Q, S]` bool.
            query_places: `[B, Q]`, the index in its sequence of each token.
            key_places: `[B, S]`, the index of the token in each slot; can be `None` unless `reads_places`.

        Returns:
            `[B, 1, groups * Q, S]`, additive for eager attention and folded groups, boolean otherwise; or a dict of
            such masks by layer type.
        """
        masks = {kind: self._finish(self._restrict(visible, query_places, key_places, kind)) for kind in self.kinds}
        return masks if self.layer_types else masks[self.kinds[0]]

    def _restrict(self, visible, query_places, key_places, kind: str) -> torch.Tensor:
        overlay = layer_overlay(kind, self.config, self.left_padding)
        if overlay is None:
            return visible
        return visible & overlay(ALL_ROWS, None, query_places.unsqueeze(2), key_places.unsqueeze(1))

    def _finish(self, visible: torch.Tensor) -> torch.Tensor:
        visible = visible.unsqueeze(1)
        if not self.additive:
            return visible
        mask = torch.where(visible, self.seen, self.unseen)
        return mask.repeat(1, 1, self.groups, 1) if self.groups > 1 else mask


class ChainMask:
    """
    Replaces the mask where every node sees all slots before it except the padding of its row: gives two numbers for
    each row, one past the slot of its last node, and the number of padding slots.

    Args:
        config: the text configuration of the model.
        left_padding: `[B]`, the number of padding slots that each row begins with.
    """

    reads_places = False

    def __init__(self, config: PreTrainedConfig, left_padding: torch.Tensor):
        self.left_padding = left_padding
        self.layer_types = named_kinds(config)
        if not hasattr(plain := registered_attention(CHAIN_ATTENTION), "attends_along_chains"):
            register_attention(CHAIN_ATTENTION, attend_along_chains(plain))

    def of_rows(self, rows: list[int]) -> ChainMask:
        """The same for some rows."""
        part = copy.copy(self)
        part.left_padding = self.left_padding[rows]
        return part

    def __call__(self, visible, query_places, key_places) -> torch.Tensor | dict[str, torch.Tensor]:
        """`[B, 1, 1, 2]` int32, or a dict as from `AttentionMask`; reads `query_places` `[B, Q]` alone."""
        ends = query_places[:, 0] + query_places.shape[1]
        mask = torch.stack([ends, self.left_padding], 1).to(torch.int32)[:, None, None]
        return dict.fromkeys(self.layer_types, mask) if self.layer_types else mask


def attend_along_chains(plain):
    """
    An attention function for steps without branches, around transformers' flash attention.

    It runs the kernel for caches, which takes the number of filled slots and of padding slots of each row. Forwards
    that are not ours have no integer mask (`ChainMask`); `plain` serves them.
    """

    @functools.wraps(plain)
    def attend(module, query, key, value, attention_mask, *arguments, **keywords):
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.int32:
            return plain(module, query, key, value, attention_mask, *arguments, **keywords)
        ends, padding = attention_mask.flatten(1).unbind(1)
        window = keywords.get("sliding_window")
        result = flash_kernel()(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=ends.contiguous(),
            cache_leftpad=padding.contiguous(),
            softmax_scale=keywords.get("scaling"),
            softcap=keywords.get("softcap") or 0.0,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            causal=True,
        )
        return result, None

    attend.attends_along_chains = True
    return attend


def groups_to_fold(model) -> int:
    """
    How many query heads share a head of keys and values, if the attention of a model can fold them; else 1.

    It can if it is the `sdpa` of transformers, which this function replaces by `fold_groups` in the registry. Another
    function that someone has registered under that name may compute something else, so nothing is folded then.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if attention_of(config) != "sdpa" or not looks_attention_up(model):
        return 1
    if not (isinstance(heads, int) and isinstance(shared, int) and shared and heads > shared):
        return 1
    if registered_attention("sdpa") is (plain := own_attention()):
        register_attention("sdpa", fold_groups(plain))
    found = registered_attention("sdpa")
    return heads // shared if getattr(found, "folds_groups", None) is found else 1  # wrappers copy attributes


def fold_groups(plain):
    """
    An attention function for grouped queries that copies no keys or values, around transformers' own.

    In every forward that has a mask, transformers repeats the keys and values of the whole cache in every layer, so
    that each query head has its own. Here the G query heads of a group become G times as many queries of the one head
    that they share. A mask made for this (`AttentionMask.groups`) has G * Q rows for Q queries, unlike any other;
    `plain` serves forwards without such a mask.
    """

    @functools.wraps(plain)
    def attend(module, query, key, value, attention_mask, *arguments, **keywords):
        length = query.shape[2]
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[2] <= length:
            return plain(module, query, key, value, attention_mask, *arguments, **keywords)
        groups = query.shape[1] // key.shape[1]
        unusual = arguments or any(keywords.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        if unusual or attention_mask.shape[2] != groups * length:  # a layer can have another number of heads
            return plain(module, query, key, value, attention_mask[:, :, :length], *arguments, **keywords)
        folded = query.reshape(query.shape[0], key.shape[1], groups * length, query.shape[3])
        result = torch.nn.functional.scaled_dot_product_attention(
            folded,
            key,
            value,
            attention_mask.to(query.dtype),
            keywords.get("dropout") or 0.0,
            scale=keywords.get("scaling"),
        )
        return result.reshape(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None

    attend.folds_groups = attend
    return attend
