"""What Jacobi decoding cannot do, refused before the first forward, in one sentence that names the alternative."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.generation import GenerationMode

from .attention import CHAIN_ATTENTION, LAYER_KINDS, MASKED_ATTENTIONS, layer_kinds
from .compat import (
    CACHE,
    STEP_ARGUMENTS,
    attention_of,
    cache_argument,
    carries_state,
    flash_kernel,
    is_checkpointing,
    is_stateful,
    looks_attention_up,
    makes_dynamic_cache,
    samples_by_itself,
    warn_of_activations,
    warn_of_untested_version,
)
from .config import JacobiConfig
from .draft_adapter import is_activated, is_draft_only
from .errors import UsageError
from .slot_cache import can_roll_back, capacity_of, holds_more_than_text


INSTEAD = "use decoding='ar'"
WITHOUT_CACHE = ("xlm", "flaubert")  # they take a cache but return none


def refuse_other_caches(implementation: str | None) -> None:
    """Refuses a `cache_implementation` other than those that Jacobi decoding can keep."""
    if implementation not in (None, "dynamic", "static"):
        raise UsageError(
            f"Jacobi decoding keeps a dynamic or a static KV cache, but cache_implementation is {implementation!r}: "
            f"drop it, pass 'static', or {INSTEAD}."
        )


def refuse_unsupported(
    model, generation_config, prompt_length: int, model_kwargs: dict, settings: JacobiConfig | None = None
) -> None:
    """
    Checks that this call can be decoded exactly.

    Args:
        model, generation_config, model_kwargs: as `generate` prepared them.
        prompt_length: the number of prompt tokens that `max_length` counts (`inputs_embeds` count as none).
        settings: how drafts are made; `None` if branches are needed.

    Raises:
        `ValueError`: the call cannot be decoded; the message gives the cause and the alternative.
    """
    warn_of_untested_version()
    name = type(model).__name__
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UsageError(
            f"Jacobi decoding is greedy or sampled, but the arguments ask for {mode.value.replace('_', ' ')}: drop "
            f"num_beams and similar arguments, or {INSTEAD}."
        )
    if model.config.is_encoder_decoder:
        raise UsageError(f"Jacobi decoding needs a decoder-only model, but {name} is an encoder-decoder: {INSTEAD}.")
    if not generation_config.use_cache:
        raise UsageError(f"Jacobi decoding verifies drafts against the KV cache: drop use_cache=False, or {INSTEAD}.")
    if generation_config.output_attentions or generation_config.output_hidden_states:
        raise UsageError(
            "Jacobi decoding returns scores and logits, but no attentions or hidden states, since its forwards score "
            f"drafts as well as text: drop output_attentions and output_hidden_states, or {INSTEAD}."
        )
    refuse_other_caches(generation_config.cache_implementation)
    if model.training and is_checkpointing(model):
        raise UsageError(
            "Jacobi decoding verifies drafts against the KV cache, which gradient checkpointing switches off in "
            f"training mode: call model.eval() first, or {INSTEAD}."
        )
    _refuse_state(model, name, prompt_length, model_kwargs)
    _refuse_adapters(model, name)
    new_tokens = generation_config.max_length - prompt_length
    _refuse_model_without_cache(model, name, model_kwargs.get(CACHE))
    _refuse_cache(name, model_kwargs[CACHE], new_tokens + _whole_length(model_kwargs, prompt_length))
    _refuse_attention(model, name, model_kwargs, settings)
    _refuse_positions(model, name, model_kwargs)
    _refuse_rope(model, name, generation_config, prompt_length, model_kwargs)
    warn_of_activations(model)


def _refuse_state(model, name: str, prompt_length: int, model_kwargs: dict) -> None:
    """Refuses state that AR passes from one token to the next, and that a forward over a draft cannot."""
    if samples_by_itself(model):
        raise UsageError(f"Jacobi decoding has one loop for all models, but {name} has its own: {INSTEAD}.")
    if carries_state(model, model_kwargs):
        raise UsageError(
            f"Jacobi decoding scores many tokens in one forward, but {name} hands more than the KV cache from each "
            f"token to the next (_update_model_kwargs_for_generation): {INSTEAD}."
        )
    if (embeds := model_kwargs.get("inputs_embeds")) is not None:
        prompt_length = embeds.shape[1]
    for argument, value in model_kwargs.items():
        if argument in STEP_ARGUMENTS or not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        if prompt_length in (value.shape[min(1, value.dim() - 1)], value.shape[-1]):
            raise UsageError(
                f"Jacobi decoding cannot extend `{argument}`, which has an entry for each token of the prompt, to new "
                f"tokens of {name}: drop it, or {INSTEAD}."
            )


def _refuse_adapters(model, name: str) -> None:
    adapters = getattr(model, "peft_config", {}).values()
    if any(is_activated(adapter) and not is_draft_only(adapter) for adapter in adapters):
        raise UsageError(
            f"Jacobi decoding cannot tell an activated LoRA which tokens it applies to, but {name} has one: use a "
            f"plain LoRA or a draft-only adapter, or {INSTEAD}."
        )
    adapter: Any = getattr(getattr(model.prepare_inputs_for_generation, "__self__", None), "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UsageError(
            f"Jacobi decoding does not support virtual tokens, but {name} has a {adapter.peft_type.value} "
            f"adapter: use an adapter of another kind, such as LoRA, or {INSTEAD}."
        )


def _whole_length(model_kwargs: dict, prompt_length: int) -> int:
    """The length of the text before the first new token, including cached tokens and embeddings."""
    if (mask := model_kwargs.get("attention_mask")) is not None:
        return mask.shape[1] if mask.dim() == 2 else prompt_length
    positions = model_kwargs.get("position_ids")
    return prompt_length if positions is None else int(positions.max()) + 1


def _refuse_model_without_cache(model, name: str, cache) -> None:
    """Refuses models that do not cache the keys and values of every token, and of the text alone."""
    config = model.config.get_text_config(decoder=True)
    if (cache_argument(model) is None and not is_stateful(model)) or config.model_type in WITHOUT_CACHE:
        raise UsageError(f"Jacobi decoding verifies drafts against the KV cache, but {name} has none: {INSTEAD}.")
    if is_stateful(model) or not makes_dynamic_cache(model) or cache is None:
        raise UsageError(
            f"Jacobi decoding rolls the KV cache back, but {name} keeps a recurrent state (a linear-attention or "
            f"state-space model), which cannot be rolled back: {INSTEAD}."
        )
    if getattr(config, "is_decoder", None) is False and any(
        getattr(module, "is_decoder", None) is False for module in model.modules()
    ):
        raise UsageError(
            f"Jacobi decoding verifies drafts against the KV cache, but {name} is set up as an encoder, which has "
            f"none: load it with is_decoder=True, or {INSTEAD}."
        )
    if getattr(config, "add_cross_attention", False):
        raise UsageError(
            f"Jacobi decoding rolls the KV cache back, but {name} also caches what it attends to besides the text "
            f"(cross-attention): {INSTEAD}."
        )


def _refuse_cache(name: str, cache, longest: int) -> None:
    """Refuses a cache that cannot hold the text or cannot be rolled back; `longest` is the length of the text."""
    if type(cache).__name__ not in ("DynamicCache", "StaticCache") or getattr(cache, "offloading", False):
        raise UsageError(
            f"Jacobi decoding continues from a DynamicCache or a StaticCache, but the cache of this call is a "
            f"{type(cache).__name__}{' with offloading' if getattr(cache, 'offloading', False) else ''}: pass one of "
            f"those, or {INSTEAD}."
        )
    capacity = capacity_of(cache)
    if capacity is not None and capacity < longest - 1:
        raise UsageError(
            f"the StaticCache of this call holds {capacity} tokens, but its text can have {longest}, with Jacobi "
            "decoding as with decoding='ar': make it with a larger max_cache_len, or lower max_new_tokens."
        )
    if holds_more_than_text(cache):
        raise UsageError(
            "Jacobi decoding continues from a cache of text, but layers of the cache of this call hold something "
            f"else, such as the image that {name} attends to: pass a new cache, or {INSTEAD}."
        )
    if not can_roll_back(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise UsageError(
            f"Jacobi decoding rolls the KV cache back, but {name} has layers whose cache cannot be rolled back "
            f"({', '.join(kinds)}; linear attention, state-space or indexed): {INSTEAD}."
        )


def _refuse_attention(model, name: str, model_kwargs: dict, settings: JacobiConfig | None) -> None:
    config = model.config.get_text_config(decoder=True)
    attention = attention_of(config)
    if attention == CHAIN_ATTENTION:
        _refuse_branches(model, name, settings)
    elif attention not in MASKED_ATTENTIONS:
        raise UsageError(
            f"Jacobi decoding needs an attention that takes a custom mask, but {name} runs {attention!r}: load it "
            f"with attn_implementation='sdpa' (or 'eager'), or {INSTEAD}."
        )
    kinds = set(layer_kinds(config)) - set(LAYER_KINDS)
    if kinds:
        raise UsageError(
            f"Jacobi decoding does not support the mask of the {', '.join(sorted(kinds))} layers of {name}: {INSTEAD}."
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"Jacobi decoding tells each token its position, but {name} takes no position_ids (it derives them from "
            f"the mask, as models with ALiBi do): {INSTEAD}."
        )
    if (mask := model_kwargs.get("attention_mask")) is not None and (mask.dim() != 2 or config.model_type == "git"):
        raise UsageError(
            f"Jacobi decoding needs an attention_mask of two dimensions that covers all that {name} caches: drop the "
            f"mask (and the padding), or {INSTEAD}."
        )
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.dim() != 2:
        raise UsageError(
            f"Jacobi decoding needs position_ids of two dimensions, which {name} does not use: {INSTEAD}."
        )
    if getattr(config, "alibi", False) or has_own_mask(model):
        raise UsageError(
            f"Jacobi decoding needs an attention that takes a custom mask, but the attention of {name} adds its own "
            f"mask or bias by cache slot: {INSTEAD}."
        )


def _refuse_branches(model, name: str, settings: JacobiConfig | None) -> None:
    """Refuses what flash attention cannot do, since it takes no mask."""
    instead = f"load it with attn_implementation='sdpa', or {INSTEAD}"
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if flash_kernel() is None:
        raise UsageError(
            f"Jacobi decoding with flash attention runs the kernel of the flash-attn package, which is not installed: "
            f"pip install flash-attn, or {instead}."
        )
    if "chunked_attention" in kinds or not looks_attention_up(model):
        raise UsageError(f"Jacobi decoding does not support flash attention for {name}: {instead}.")
    if settings is None or settings.pool_size or any(map(is_draft_only, getattr(model, "peft_config", {}).values())):
        raise UsageError(
            f"{name} runs flash attention, which takes no mask, but recycled n-grams and draft-only adapters need "
            f"one, since they branch off the draft: pass JacobiConfig(pool_size=0) and no such adapter, or {instead}."
        )


def _refuse_positions(model, name: str, model_kwargs: dict) -> None:
    """Refuses models that count positions themselves in each step, by trying two that no text has in a row."""
    others = {name: value for name, value in model_kwargs.items() if name not in STEP_ARGUMENTS or name == CACHE}
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model_kwargs["position_ids"].device)
    asked = tokens + torch.tensor([[5, 9]], device=tokens.device)
    inputs = model.prepare_inputs_for_generation(tokens, position_ids=asked, **others)
    found = inputs.get("position_ids")
    if found is None or found.shape != asked.shape or (found[0, 1] - found[0, 0]).item() != 4:
        raise UsageError(
            f"Jacobi decoding tells each token its position, but {name} counts positions itself: {INSTEAD}."
        )


def _refuse_rope(model, name: str, generation_config, prompt_length: int, model_kwargs: dict) -> None:
    """Refuses to cross a length at which a rotary embedding changes, since a draft beyond it would change the text."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    first = int(model_kwargs["position_ids"].max()) + 1
    last = first + generation_config.max_length - prompt_length
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = part.get("rope_type")
        switch = (
            part.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        if last > switch and (kind == "dynamic" or (kind == "longrope" and first <= switch)):
            raise UsageError(
                f"Jacobi decoding cannot cross position {switch}, where the rotary embedding of {name} changes, but "
                f"this text can reach position {last}: lower max_new_tokens, or {INSTEAD}."
            )


def has_own_mask(model) -> bool:
    """Whether an attention module has a causal mask as a buffer (`[1, 1, length, length]`), as GPT-Neo's does."""
    return any(
        buffer.dim() == 4 and buffer.dtype in (torch.bool, torch.uint8) and buffer.shape[-1] == buffer.shape[-2]
        for _, buffer in model.named_buffers()
    )
