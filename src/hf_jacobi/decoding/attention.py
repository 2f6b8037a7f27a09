"""The mask of a step, one for each kind of layer, and the attention function that uses it."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import PreTrainedConfig

from .compat import (
    attention_of,
    flash_kernel,
    looks_attention_up,
    own_attention,
    register_attention,
    registered_attention,
)


MASKED_ATTENTIONS = ("sdpa", "eager")
CHAIN_ATTENTION = "flash_attention_2"  # takes no mask, but the ends of rows, which is enough without branches
LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class AttentionMask:
    """
    Builds the 4D masks of a model.

    A 4D mask switches off whatever mask the model would have made itself, so windows are applied here, measured in
    places in the sequence: branches of a row share them, and slots would count them twice.

    Args:
        config: the text configuration of the model.
        dtype: the dtype that the model computes in.
        left_padding: `[B]`, how much padding a row begins with; chunks are counted from its end.
        groups: how many times the queries stand in a mask, one below the other (`fold_groups`).
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, left_padding: torch.Tensor, groups: int = 1):
        self.left_padding = left_padding
        self.groups = groups
        # Eager attention adds the mask: a boolean one would do nothing. Others turn it into such a one in every layer.
        self.additive = attention_of(config) == "eager" or groups > 1
        # What is added where a token sees another, and where it does not.
        self.added = torch.tensor([0.0, torch.finfo(dtype).min], dtype=dtype, device=left_padding.device).unbind()
        self.sliding_window = getattr(config, "sliding_window", None)
        self.chunk_size = getattr(config, "attention_chunk_size", None)
        self.layer_types = sorted(set(config.layer_types)) if getattr(config, "layer_types", None) else None

    def single_kind(self) -> str:
        """The kind of all layers of a model that names no layer types; as transformers infers it."""
        if self.sliding_window is not None:
            return "sliding_attention"
        return "chunked_attention" if self.chunk_size is not None else "full_attention"

    def of_rows(self, rows: list[int]) -> AttentionMask:
        """Those of some rows."""
        part = copy.copy(self)
        part.left_padding = self.left_padding[rows]
        return part

    @property
    def reads_places(self) -> bool:
        """Whether a kind of layer restricts what is seen by distance."""
        return any(kind != "full_attention" for kind in self.layer_types or [self.single_kind()])

    def __call__(self, visible, query_places, key_places) -> torch.Tensor | dict[str, torch.Tensor]:
        """
        Args:
            visible: `[B, Q, S]` bool.
            query_places: `[B, Q]`, the index in its sequence of each token.
            key_places: `[B, S]`, the index of the token in each slot; may be `None` where nothing `reads_places`.

        Returns:
            `[B, 1, groups * Q, S]`, additive for eager attention and folded groups, boolean otherwise, or a dict of
            them by layer type.
        """
        kinds = self.layer_types or [self.single_kind()]
        masks = {kind: self._finish(self._restrict(visible, query_places, key_places, kind)) for kind in kinds}
        return masks if self.layer_types else masks[kinds[0]]

    def _restrict(self, visible, query_places, key_places, kind: str) -> torch.Tensor:
        if kind == "full_attention":
            return visible
        query, key = query_places.unsqueeze(2), key_places.unsqueeze(1)
        if kind == "sliding_attention":
            return visible & (query - key < self.sliding_window)
        start = self.left_padding.view(-1, 1, 1)
        return visible & ((query - start) // self.chunk_size == (key - start) // self.chunk_size)

    def _finish(self, visible: torch.Tensor) -> torch.Tensor:
        visible = visible.unsqueeze(1)
        if not self.additive:
            return visible
        mask = torch.where(visible, *self.added)
        return mask.repeat(1, 1, self.groups, 1) if self.groups > 1 else mask


class ChainMask:
    """
    What stands in the place of a mask where every node sees all slots before it, from the end of its row's padding on:
    for each row one past the slot of its last node, and its padding.

    Args:
        config: the text configuration of the model.
        left_padding: `[B]`, how many slots a row begins with that nobody sees.
    """

    reads_places = False

    def __init__(self, config: PreTrainedConfig, left_padding: torch.Tensor):
        self.left_padding = left_padding
        self.layer_types = sorted(set(config.layer_types)) if getattr(config, "layer_types", None) else None
        if not hasattr(plain := registered_attention(CHAIN_ATTENTION), "attends_along_chains"):
            register_attention(CHAIN_ATTENTION, attend_along_chains(plain))

    def of_rows(self, rows: list[int]) -> ChainMask:
        """Those of some rows."""
        part = copy.copy(self)
        part.left_padding = self.left_padding[rows]
        return part

    def __call__(self, visible, query_places, key_places) -> torch.Tensor | dict[str, torch.Tensor]:
        """As `AttentionMask`, of which the places `[B, Q]` are read alone: `[B, 1, 1, 2]` int32."""
        ends = query_places[:, 0] + query_places.shape[1]
        mask = torch.stack([ends, self.left_padding], 1).to(torch.int32)[:, None, None]
        return dict.fromkeys(self.layer_types, mask) if self.layer_types else mask


def attend_along_chains(plain):
    """
    An attention function for steps without branches, around transformers' flash attention.

    The kernel that serves caches is told how many slots of each row are filled, and where its padding ends; a forward
    that is not ours, which has no mask of integers (`ChainMask`), is left to `plain`.
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
    How many query heads share a head of keys and values, where the attention of a model can fold them; else 1.

    It can where it is the `sdpa` of transformers, which this function puts `fold_groups` before in the registry; not
    where someone else has registered another function by that name, which may compute something else.
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
    return heads // shared if getattr(found, "folds_groups", None) is found else 1  # what wraps it copies attributes


def fold_groups(plain):
    """
    An attention function for grouped queries that copies no keys or values, around the one of transformers.

    transformers repeats the keys and values of the whole cache for every layer of every forward that has a mask, until
    each query head has its own. Here the G query heads of a group become G times as many queries of the one head that
    they share. A mask made for that (`AttentionMask.groups`) has G * Q rows for Q queries, which tells it from any
    other, so that forwards that are not ours are left to `plain`.
    """

    @functools.wraps(plain)
    def attend(module, query, key, value, attention_mask, *arguments, **keywords):
        length = query.shape[2]
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[2] <= length:
            return plain(module, query, key, value, attention_mask, *arguments, **keywords)
        groups = query.shape[1] // key.shape[1]
        unusual = arguments or any(keywords.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        if unusual or attention_mask.shape[2] != groups * length:  # a layer may have another number of heads
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
