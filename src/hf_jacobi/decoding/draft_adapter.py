"""Draft-only adapters: a LoRA that applies to drafts alone, while every committed token comes from the base model."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager

import torch

from .compat import INVOCATION, OFFSETS, VARIANT, has_weights_elsewhere
from .errors import UsageError


# What marks such an adapter in its configuration (the invocation tokens of PEFT's activated LoRA): a token that no
# text holds, so that PEFT by itself never switches it on, and the model without this library is the base model.
DRAFT_ONLY = (-1,)
_BOTH_WEIGHTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()
_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def is_draft_only(adapter_config) -> bool:
    """Whether an adapter's configuration says that it is for drafts alone."""
    return tuple(getattr(adapter_config, INVOCATION, None) or ()) == DRAFT_ONLY


def is_activated(adapter_config) -> bool:
    """Whether an adapter applies from certain tokens of a text on (PEFT's activated LoRA), or to drafts alone."""
    return bool(getattr(adapter_config, INVOCATION, None))


class DraftAdapter:
    """
    Switches the draft-only adapter of a model on for the last tokens of each row of a forward, and off otherwise.

    Attributes:
        tokens: for how many tokens it is on.
    """

    def __init__(self, layers: list[torch.nn.Module]):
        self.layers = layers
        self.tokens = 0

    @classmethod
    def of(cls, model) -> DraftAdapter | None:
        """That of a model, or `None` if it has none that is active."""
        configs = getattr(model, "peft_config", {})
        names = {name for name, config in configs.items() if is_draft_only(config)}
        layers = [
            module
            for module in model.modules()
            if names & set(getattr(module, VARIANT, ()))
            and names & set(module.active_adapters)
            and not module.disable_adapters
        ]
        return cls(layers) if layers else None

    @contextmanager
    def listening(self):
        """
        While this is open, the layers ask how many tokens the adapter is on for.

        Threads that decode with the same adapter take turns.
        """
        with _LOCKS.setdefault(self.layers[0], threading.RLock()):
            handles, before = [], {}
            try:
                for layer in self.layers:
                    if _has_nothing_else(layer):
                        before[layer] = vars(layer).get("forward")
                        layer.forward = self._quick_forward(layer)
                    else:
                        handles.append(layer.register_forward_pre_hook(self._tell, with_kwargs=True))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                for layer, forward in before.items():
                    del layer.forward
                    if forward is not None:
                        layer.forward = forward

    def _tell(self, module, arguments, keywords):
        _check_rows(arguments[0])
        return arguments, keywords | {OFFSETS: [self.tokens] * arguments[0].shape[0]}

    def _quick_forward(self, layer: torch.nn.Module):
        """
        What the layer's own forward does, in as few operations as that takes.

        On a CPU the adapter computes in float32: a bfloat16 product of this size takes 40 microseconds there whatever
        it holds, a float32 one 5, and a forward has hundreds of them. A large adapter is added to a copy of the
        weights it changes there: as long as a draft is as long as what is verified (it is without recycling), both
        are one product then, and a forward of a small model took 18% less time.
        """
        name, base = layer.active_adapters[0], layer.get_base_layer().weight
        half = base.device.type != "cpu" and base.dtype in (torch.float16, torch.bfloat16)
        dtype = base.dtype if half else torch.float32
        down = layer.lora_A[name].weight.t().to(dtype).contiguous()
        up = (layer.lora_B[name].weight * layer.scaling[name]).t().to(dtype).contiguous()
        both = _both_weights(layer, down, up) if base.device.type == "cpu" and _is_large(layer, name) else None
        bias = getattr(layer.get_base_layer(), "bias", None)

        def forward(x: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            keywords.pop(OFFSETS, None)
            if both is not None and self.tokens and x.dim() == 3 and x.shape[1] == 2 * self.tokens:
                halves = x.unflatten(1, (2, self.tokens)).transpose(0, 1).flatten(1, 2)  # [2, B * tokens, in]
                result = torch.bmm(halves, both).unflatten(1, (-1, self.tokens)).transpose(0, 1).flatten(1, 2)
                return result if bias is None else result + bias
            result = layer.base_layer(x, *arguments, **keywords)
            if self.tokens:
                _check_rows(x)
                result[:, -self.tokens :].add_(x[:, -self.tokens :].to(dtype) @ down @ up)
            return result

        return forward

    @contextmanager
    def on(self, tokens: int):
        """The adapter applies to the last `tokens` tokens of each row."""
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = 0


def _is_large(layer: torch.nn.Module, name: str) -> bool:
    """Whether an adapter takes at least half the memory of the weights it changes, those of a plain `Linear`."""
    if type(layer.base_layer) is not torch.nn.Linear:
        return False
    adapter = layer.lora_A[name].weight.numel() + layer.lora_B[name].weight.numel()
    return 2 * adapter >= layer.base_layer.weight.numel()


def _both_weights(layer: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """
    `[2, in, out]`, the weights of a layer without its adapter and with it.

    They are kept for the next call. That reads all weights to see whether one has changed, as nothing else tells: not
    even a parameter's version does when PEFT merges another adapter into it.
    """
    base = layer.base_layer.weight.t()
    kept = _BOTH_WEIGHTS.get(layer)
    if kept is None or not all(map(_same, (base, down, up), (kept[0][0], *kept[1:]))):
        merged = (base.float() + down @ up).to(base.dtype)
        kept = _BOTH_WEIGHTS[layer] = (torch.stack([base, merged]), down, up)
    return kept[0]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)


def _check_rows(x: torch.Tensor) -> None:
    if x.dim() != 3:
        raise UsageError(
            "a draft-only adapter cannot serve a layer that gets its tokens without their rows: train it with other "
            "target_modules, such as those of the attention."
        )


def _has_nothing_else(layer: torch.nn.Module) -> bool:
    """Whether a layer's one adapter is a plain LoRA for drafts, of which no gradient is wanted."""
    if has_weights_elsewhere(layer):
        return False
    if len(layer.active_adapters) != 1 or layer.training or torch.is_grad_enabled() or layer.merged:
        return False
    name, down, up = layer.active_adapters[0], getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
    if name not in down or name not in up:
        return False
    return all(type(part) is torch.nn.Linear and part.bias is None for part in (down[name], up[name]))
