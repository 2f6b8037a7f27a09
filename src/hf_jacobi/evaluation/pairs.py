"""The fastest forms of a model that has a PEFT adapter: what takes part in a comparison of speed."""

from __future__ import annotations

import copy
import itertools

from ..decoding.draft_adapter import is_activated, is_draft_only
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap


def fastest_pair(model, base=None):
    """
    What decodes by Jacobi decoding, and what writes the same text one token at a time, each in its fastest form.

    AR through PEFT's layers takes about twice as long as the same model without them, so that it is no yardstick.

    Args:
        model: a model, with an adapter (PEFT's own wrapper, or as transformers loads an adapter's folder) or without.
            It stays as it is.
        base: what is to decode by AR, if not `model`.

    Returns:
        `(model, writer)`. Of a model without an adapter, the model twice. Of one with a draft-only adapter, the model,
        and without PEFT's layers the model under it, which shares its weights. Of one with a LoRA for all tokens, a
        copy with the LoRA merged into its weights, twice.

    Raises:
        `ValueError`: there is no faster form of a model with such an adapter.
    """
    if base is not None:
        return model, fastest_pair(base)[1]
    layers = _adapter_layers(model)
    if not layers and not hasattr(model, "peft_config"):
        return model, model
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    configs = [unwrap(model).peft_config[name] for name in active] if layers else [*model.peft_config.values()]
    if any("forward" in vars(module) for module in unwrap(model).modules()):
        raise UsageError(
            "the forward of a model with an adapter was replaced (by torch.compile, a hook or a device map), so that "
            "it cannot be taken apart: pass `base`, the same model without PEFT's layers."
        )
    if layers and all(map(is_draft_only, configs)):
        tensors = itertools.chain(model.parameters(), model.buffers())
        bare = _without_layers(copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}), merge=False)
        return (model if configs else bare), bare
    if not all(map(is_for_all_tokens, configs)):
        raise UsageError(
            "AR through PEFT's layers is no yardstick, and an adapter that is neither a LoRA for all tokens nor one "
            "that only drafts cannot be merged: pass `base`, the same model without PEFT's layers."
        )
    merged = _without_layers(copy.deepcopy(model), merge=True)
    return merged, merged


def is_for_all_tokens(adapter_config) -> bool:
    """Whether an adapter is a LoRA that applies to every token, which can be merged into the weights."""
    kind = getattr(adapter_config, "peft_type", None)
    return getattr(kind, "value", kind) == "LORA" and not is_activated(adapter_config)


def _adapter_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "get_base_layer")]


def _without_layers(model, merge: bool):
    """The model with PEFT's layers replaced by those under them, `merge`d with what is active."""
    if hasattr(model, "merge_and_unload"):  # PEFT's own wrapper
        return (model.merge_and_unload() if merge else model.unload()).eval()
    for name, layer in [(name, module) for name, module in model.named_modules() if hasattr(module, "get_base_layer")]:
        if merge:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model.eval()
