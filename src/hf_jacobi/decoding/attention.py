"""Turns what each token may see into the mask a model's attention takes, one per kind of layer."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig

from .compat import attention_of


MASKED_ATTENTIONS = ("sdpa", "eager")
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
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, left_padding: torch.Tensor):
        self.left_padding = left_padding
        self.additive = attention_of(config) == "eager"  # eager adds the mask: a boolean one would do nothing
        self.dtype = dtype
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
            `[B, 1, Q, S]`, boolean for sdpa and additive for eager attention, or a dict of them by layer type.
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
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)
