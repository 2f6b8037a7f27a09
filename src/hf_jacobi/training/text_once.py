"""
Draft-only training in two forwards: the text once, without a gradient, then the noise on its keys and values.

A draft-only adapter does not change the text. The text therefore needs no backward pass, and one forward over it
serves all noisy copies of its blocks. The noise is cut into groups of a few windows, which become the rows of the
second forward: tokens of different windows do not see each other, and a dense mask wastes little on short rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..decoding.compat import (
    attending_by,
    attention_layers,
    attention_of,
    cache_argument,
    caches_in_checkpoints,
    caching_in_checkpoints,
    looks_attention_up,
    not_compiled,
    own_attention,
    without_checkpointing,
)
from .adapters import NoisyTokens
from .forward import decoder_of, outside_training, run_decoder
from .mask import RowTensors, dense_mask, training_mask
from .windows import UNUSUAL, attending_by_windows, segments


AFTER_TEXT = {"sdpa": "jacobi_sdpa_after_text", "eager": "jacobi_eager_after_text"}
GROUPS = 64, 256  # fewest and most noisy tokens in a row of the second forward, approximately


class Split(NamedTuple):
    """
    The tokens of a batch that go into each forward, as indices into its rows; -1 for padding.

    Attributes:
        text: `[B, C]`.
        noise: `[R, N]`.
        rows: `[R]`, the row of the batch that each row of `noise` belongs to.
        from_text, to_text: the indices of the text's tokens in the flattened `text` and in the flattened batch.
        from_noise, to_noise: the same for `noise`.
        segments: what the windowed attention takes in place of a mask of the text; stays on the host.
    """

    text: torch.Tensor
    noise: torch.Tensor
    rows: torch.Tensor
    from_text: torch.Tensor
    to_text: torch.Tensor
    from_noise: torch.Tensor
    to_noise: torch.Tensor
    segments: torch.Tensor | None = None

    def to(self, device: torch.device | str, **others) -> Split:
        """The split with the tensors that the device reads on it."""
        return self._map(lambda values: values.to(device, **others))

    def pin_memory(self) -> Split:
        """The split with these tensors in pinned memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Split:
        return Split(
            function(self.text),
            function(self.noise),
            function(self.rows),
            function(self.from_text),
            function(self.to_text),
            function(self.from_noise),
            function(self.to_noise),
            self.segments,
        )


def split_tokens(rows: RowTensors, windowed: bool = False) -> Split:
    """
    Separates the text of a batch from its noise, and cuts the noise into rows that keep windows whole; on the host.

    A row of noise has about half as many tokens as the text that it sees, within `GROUPS`: longer ones waste more of
    the dense mask, shorter ones copy the text's keys and values more often. A longer window gets a row of its own.

    Args:
        rows: the tokens.
        windowed: whether the text runs with the windowed attention.
    """
    keys = torch.stack([rows.seq_ids, rows.noisy.long(), rows.window_start, rows.copy_ids]).cpu().numpy()
    texts, noises, owners = [], [], []
    for number in range(keys.shape[1]):
        sequence, noisy, *_ = of_row = keys[:, number]
        texts.append(np.flatnonzero((sequence >= 0) & (noisy == 0)))
        tokens = np.flatnonzero((sequence >= 0) & (noisy == 1))
        seams = 1 + np.flatnonzero((np.diff(of_row[:, tokens]) != 0).any(0))
        group = max(GROUPS[0], min(GROUPS[1], len(texts[-1]) // 2))
        size = len(tokens) / max(1, -(-len(tokens) // group))
        cuts = [seam for before, seam in zip([0, *seams], seams) if before // size < seam // size] if size else []
        for piece in np.split(tokens, cuts):
            noises.append(piece)
            owners.append(number)

    def padded(pieces: list[np.ndarray]) -> torch.Tensor:
        longest = max(1, *map(len, pieces))
        return torch.tensor(
            np.stack([np.pad(piece, (0, longest - len(piece)), constant_values=-1) for piece in pieces])
        )

    text, noise, owner = padded(texts), padded(noises), torch.tensor(owners)
    of_batch, length = torch.arange(len(text)).unsqueeze(1), keys.shape[2]
    places = [
        (found := (tokens >= 0).flatten().nonzero().squeeze(1), (number * length + tokens).flatten()[found])
        for tokens, number in ((text, of_batch), (noise, owner.unsqueeze(1)))
    ]
    here = RowTensors(**{name: values.cpu() for name, values in vars(rows).items()})
    windows = segments(here.take(of_batch, text)) if windowed else None
    return Split(text, noise, owner, *places[0], *places[1], windows)


class TextLayer(DynamicLayer):
    """
    The keys and values of the text in one layer. Noise sees them before its own, and does not change them.

    Args:
        layer: the layer of the cache that the text ran with.
        rows: `[R]`, the row whose text each row of noise sees.
    """

    def __init__(self, layer: Any, rows: torch.Tensor):
        super().__init__()
        self.text: tuple[torch.Tensor, torch.Tensor] = (layer.keys[rows], layer.values[rows])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.text
        return torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)

    def get_seq_length(self) -> int:
        return self.text[0].shape[2]


class TextCache(DynamicCache):
    """The layers of a text for rows of noise; see `TextLayer`."""

    def __init__(self, cache: DynamicCache, rows: torch.Tensor):
        super().__init__()
        self.layers = [TextLayer(layer, rows) for layer in cache.layers]


def sdpa_after_text(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, **kwargs
) -> tuple[torch.Tensor, None]:
    """
    SDPA in which noise sees the text before itself. The keys and values of the text are an attribute of the module: a
    compiled layer cannot take them from a cache without being compiled anew for each layer.
    """
    _refuse_unusual(kwargs)
    return own_attention()(module, query, *_with_text(module, key, value), attention_mask, **kwargs)


def eager_after_text(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The same in plain operations. Compiled, they take less time than SDPA for short rows on a CPU."""
    _refuse_unusual(kwargs)
    keys, values = (tensor.unsqueeze(2) for tensor in _with_text(module, key, value))
    groups = query.unflatten(1, (keys.shape[1], -1))  # [B, key heads, queries of a key head, L, D]
    scores = groups @ keys.transpose(3, 4) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    shares = torch.softmax(scores + attention_mask.unsqueeze(1), -1, dtype=torch.float32).to(query.dtype)
    shares = torch.nn.functional.dropout(shares, dropout, module.training)
    return (shares @ values).flatten(1, 2).transpose(1, 2).contiguous(), None


def _refuse_unusual(arguments: dict[str, Any]) -> None:
    """Raises an error, upon which `TextOnce.check` gives up, for what these functions would ignore."""
    if unknown := [name for name in UNUSUAL if arguments.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")


def _with_text(module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    text_keys, text_values = module.jacobi_text
    return torch.cat((text_keys, key), 2), torch.cat((text_values, value), 2)


class TextOnce:
    """
    Runs batches of a draft-only adapter in two forwards.

    Args:
        model: the causal language model, with the adapter's layers in it.
        noisy_tokens: switches the adapter on and off.
        windowed: whether the text runs with the windowed attention.
        compiled: whether the layers run compiled, for the noise; the text, without a gradient, gains little by it.
    """

    def __init__(self, model: PreTrainedModel, noisy_tokens: NoisyTokens, windowed: bool, compiled: bool = False):
        self.noisy_tokens = noisy_tokens
        self.windowed = windowed
        self.compiled = compiled
        cache = cache_argument(model)
        assert cache is not None  # see `can_split`
        self.cache = cache
        self.config = model.config.get_text_config(decoder=True)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        rows: RowTensors,
        split: Split,
        dtype: torch.dtype,
        adapted: bool = True,
    ) -> torch.Tensor:
        """
        The hidden states that the head reads, `[B, L, H]`, with a gradient at noisy tokens only; 0 at padding.

        Args:
            model: the causal language model.
            input_ids: `[B, L]`.
            rows: the tokens.
            split: the tokens of each forward.
            dtype: the dtype that the model computes in.
            adapted: whether the adapter applies to the noise.
        """
        of_batch = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1)
        with self.noisy_tokens.in_two_forwards():
            self.noisy_tokens.on = False
            cache, text = self._run_text(model, input_ids, rows.take(of_batch, split.text), of_batch, split, dtype)
            self.noisy_tokens.on = adapted
            noise = self._run_noise(model, input_ids, rows, split, cache, dtype)
        hidden = noise.new_zeros(input_ids.numel(), noise.shape[-1])
        hidden = hidden.index_copy(0, split.to_text, text.flatten(0, 1)[split.from_text])
        hidden = hidden.index_copy(0, split.to_noise, noise.flatten(0, 1)[split.from_noise])
        return hidden.view(*input_ids.shape, -1)

    @torch.no_grad()
    def _run_text(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        rows: RowTensors,
        of_batch: torch.Tensor,
        split: Split,
        dtype: torch.dtype,
    ) -> tuple[DynamicCache, torch.Tensor]:
        cache = DynamicCache()
        mask = split.segments if self.windowed else training_mask(rows, self.config, dtype)
        windows = attending_by_windows(model) if self.windowed else nullcontext()
        with without_checkpointing(model), windows, not_compiled(model):
            hidden = run_decoder(
                model,
                input_ids=input_ids[of_batch, split.text.clamp(min=0)],
                position_ids=rows.position_ids,
                attention_mask=mask,
                **{self.cache: cache},
            ).last_hidden_state
        return cache, hidden

    def _run_noise(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        rows: RowTensors,
        split: Split,
        cache: DynamicCache,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        owner, first = split.rows.unsqueeze(1), split.text.shape[1]
        seen = rows.take(owner, torch.cat([split.text[split.rows], split.noise], 1))
        inputs = {
            "input_ids": input_ids[owner, split.noise.clamp(min=0)],
            "position_ids": seen.position_ids[:, first:],
            "attention_mask": dense_mask(seen, self.config, dtype, first),
        }
        text = TextCache(cache, split.rows)
        if self.compiled:
            with after_text(model, text):
                return run_decoder(model, **inputs).last_hidden_state
        with caching_in_checkpoints(model):
            return run_decoder(model, **inputs, **{self.cache: text}).last_hidden_state

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> bool:
        """Whether a model computes the same hidden states for a few tokens in two forwards as in one."""
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % self.config.vocab_size
        places = torch.arange(8, device=model.device).unsqueeze(0)
        noisy = places >= 4
        rows = RowTensors(places * 0, noisy.long() - 1, 4 * noisy, places, places * 0)
        with outside_training(model), self.noisy_tokens.in_two_forwards():
            try:
                split = split_tokens(rows, windowed=self.windowed).to(model.device)
                ours = self(model, tokens, rows, split, model.dtype, adapted=False)
            except Exception:  # models fail in various ways with an unknown cache
                return False
            whole = run_decoder(model, input_ids=tokens).last_hidden_state
        return torch.allclose(ours.float(), whole.float(), atol=1e-2 * float(whole.abs().max()), rtol=1e-2)


@contextmanager
def after_text(model: PreTrainedModel, text: TextCache) -> Iterator[None]:
    """While this is open, the attention of each layer sees its part of a text; see `sdpa_after_text`."""
    layers = attention_layers(decoder_of(model))
    try:
        for module in layers:
            module.jacobi_text = text.layers[module.layer_idx].text
        with attending_by(model, AFTER_TEXT[attention_of(model.config.get_text_config(decoder=True))]):
            yield
    finally:
        for module in layers:
            vars(module).pop("jacobi_text", None)


def can_split(model: PreTrainedModel, checkpointing: bool, compiled: bool = False) -> bool:
    """
    Whether a model has the attention and the cache that two forwards need; `TextOnce.check` tests them.

    Args:
        model: the causal language model.
        checkpointing: whether the backward pass recomputes activations.
        compiled: whether the layers run compiled.
    """
    plain = attention_of(model.config.get_text_config(decoder=True)) in ("sdpa", "eager")
    if compiled and (checkpointing or not looks_attention_up(model)):
        return False
    cached = cache_argument(model) is not None and (not checkpointing or caches_in_checkpoints(model))
    return plain and cached


AttentionInterface.register(AFTER_TEXT["sdpa"], sdpa_after_text)
AttentionInterface.register(AFTER_TEXT["eager"], eager_after_text)
