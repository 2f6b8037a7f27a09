"""The fastest forms of a model with a PEFT adapter, for fair comparisons of speed."""

from __future__ import annotations

import copy
import itertools

from ..decoding.draft_adapter import is_activated, is_draft_only
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap


def fastest_pair(model, base=None):
    """
    The model that decodes by Jacobi decoding and the model that decodes the same text by AR, each in its fastest form.

    AR through PEFT's layers takes about twice as long as AR without them, so it is not a fair baseline.

    Args:
        model: a model without an adapter or with one (PEFT's wrapper, or the model that transformers loads from an
            adapter's folder). It is not changed.
        base: the model that decodes by AR, if not `model`.

    Returns:
        `(model, writer)`. Without an adapter: the model twice. With a draft-only adapter: the model, and its base
        model without PEFT's layers, which shares the weights. With a LoRA for all tokens: a copy with the LoRA merged
        into the weights, twice.

    Raises:
        `ValueError`: a model with this adapter has no faster form.
    """
    if base is not None:
        return model, fastest_pair(base)[1]
    layers = _adapter_layers(model)
    if not layers and not hasattr(model, "peft_config"):
        return model, model
    _refuse_replaced_forwards(model)
    configs = _active_configs(model, layers)
    if layers and all(map(is_draft_only, configs)):
        tensors = itertools.chain(model.parameters(), model.buffers())
        bare = _without_layers(copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}), merge=False)
        return (model if configs else bare), bare
    if not all(map(is_for_all_tokens, configs)):
        raise UsageError(
            "an adapter that is neither a LoRA for all tokens nor draft-only cannot be merged, and AR through PEFT's "
            "layers is not a fair baseline: pass `base`, the same model without PEFT's layers."
        )
    merged = _without_layers(copy.deepcopy(model), merge=True)
    return merged, merged


def _refuse_replaced_forwards(model) -> None:
    if any("forward" in vars(module) for module in unwrap(model).modules()):
        raise UsageError(
            "the forward of a model with an adapter was replaced (by torch.compile, a hook or a device map), so the "
            "adapter cannot be separated from it: pass `base`, the same model without PEFT's layers."
        )


def _active_configs(model, layers: list) -> list:
    """The configurations of the adapters that are switched on; of all adapters where no layer belongs to one."""
    if not layers:
        return [*model.peft_config.values()]
    active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return [unwrap(model).peft_config[name] for name in active]


def is_for_all_tokens(adapter_config) -> bool:
    """Whether an adapter is a LoRA that applies to every token, so that it can be merged into the weights."""
    kind = getattr(adapter_config, "peft_type", None)
    return getattr(kind, "value", kind) == "LORA" and not is_activated(adapter_config)


def _adapter_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "get_base_layer")]


def _without_layers(model, merge: bool):
    """The model with its base layers in place of PEFT's, after merging the active adapters if `merge` is true."""
    if hasattr(model, "merge_and_unload"):  # PEFT's own wrapper
        return (model.merge_and_unload() if merge else model.unload()).eval()
    for name, layer in [(name, module) for name, module in model.named_modules() if hasattr(module, "get_base_layer")]:
        if merge:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model.eval()
