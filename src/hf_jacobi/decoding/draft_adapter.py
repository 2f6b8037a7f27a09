"""Draft-only adapters: a LoRA that applies to drafts alone, while every committed token comes from the base model."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from .compat import INVOCATION, OFFSETS, VARIANT, has_weights_elsewhere
from .errors import UsageError
from .running import is_tracing


if TYPE_CHECKING:
    from collections.abc import Callable


# What marks such an adapter in its configuration (the invocation tokens of PEFT's activated LoRA): a token that no
# text holds, so that PEFT by itself never switches it on, and the model without this library is the base model.
DRAFT_ONLY = (-1,)
HARMLESS = ("gaussian", "orthogonal", "eva")  # ways to begin a LoRA that leave the base as it is
_BOTH_WEIGHTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()
# Whose forward it is that runs here, and for how many tokens at the end of each row that one's adapter is on. Every
# thread, and every task of an event loop, has its own.
_FORWARD: ContextVar[tuple[DraftAdapter | None, int]] = ContextVar("hf_jacobi_forward", default=(None, 0))
_LISTENING: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()  # calls, by layer
_LOCK = threading.Lock()


def _start_anew() -> None:
    """In a forked process: whatever the threads of its parent held or counted, they are not there."""
    global _LOCK
    _LOCK = threading.Lock()
    _LISTENING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def is_draft_only(adapter_config) -> bool:
    """Whether an adapter's configuration says that it is for drafts alone."""
    return tuple(getattr(adapter_config, INVOCATION, None) or ()) == DRAFT_ONLY


def is_activated(adapter_config) -> bool:
    """Whether an adapter applies from certain tokens of a text on (PEFT's activated LoRA), or to drafts alone."""
    return bool(getattr(adapter_config, INVOCATION, None))


def touching_base(adapter_config) -> list[str]:
    """What an adapter's configuration asks for that changes parts of the base model."""
    touching = {
        "modules_to_save": getattr(adapter_config, "modules_to_save", None),
        "trainable_token_indices": getattr(adapter_config, "trainable_token_indices", None),
        "bias": None if getattr(adapter_config, "bias", "none") == "none" else adapter_config.bias,
        "use_dora": getattr(adapter_config, "use_dora", None),
        "layer_replication": getattr(adapter_config, "layer_replication", None),
    }
    return [name for name, value in touching.items() if value]


def begun_on_other_weights(adapter_config) -> str | None:
    """The way in which an adapter begins, if that changes the base model: PEFT does it again when it loads one."""
    way = getattr(adapter_config, "init_lora_weights", True)
    return way if isinstance(way, str) and way.lower() not in HARMLESS else None


class DraftAdapter:
    """
    The draft-only adapter of a model in one call: on for the last tokens of each row of its forwards.

    Its layers ask, in each forward, whose it is. Any other, of another thread or of none of ours, gets the base
    model, and calls of several threads do not wait for each other.
    """

    def __init__(self, layers: list[torch.nn.Module]):
        self.layers = layers
        self._forwards: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}

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
        """While this is open, the layers ask whose forward it is, and answer to `on`."""
        handles = []
        try:
            for layer in self.layers:
                if _has_nothing_else(layer):
                    self._forwards[layer] = self._at_first(layer)
                    _listen(layer)
                else:
                    handles.append(layer.register_forward_pre_hook(self._tell, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._forwards:
                _stop_listening(layer)
            self._forwards.clear()

    def _tell(self, module, arguments, keywords=None):  # without them where another thread came while it was put on
        adapter, tokens = _FORWARD.get()
        if adapter is not self or not tokens:
            return None
        _check_rows(arguments[0])
        return arguments, keywords | {OFFSETS: [tokens] * arguments[0].shape[0]}

    def _at_first(self, layer: torch.nn.Module):
        """Prepares the layer when the adapter first takes part, as a call may do without it all along."""
        name = layer.active_adapters[0]

        def forward(tokens: int, x: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            if name not in layer.lora_A:  # it was deleted since the call began
                return layer.base_layer(x, *arguments, **keywords)
            quick = self._forwards[layer] = self._quick_forward(layer, name)
            return quick(tokens, x, *arguments, **keywords)

        return forward

    def _quick_forward(self, layer: torch.nn.Module, name: str):
        """
        What the layer's own forward does, in as few operations as that takes.

        On a CPU the adapter computes in float32: a bfloat16 product of this size takes 40 microseconds there whatever
        it holds, a float32 one 5, and a forward has hundreds of them. A large adapter is added to a copy of the
        weights it changes there: as long as a draft is as long as what is verified (it is without recycling), both
        are one product then, and a forward of a small model took 18% less time.
        """
        base = layer.get_base_layer().weight
        half = base.device.type != "cpu" and base.dtype in (torch.float16, torch.bfloat16)
        dtype = base.dtype if half else torch.float32
        down = layer.lora_A[name].weight.t().to(dtype).contiguous()
        up = (layer.lora_B[name].weight * layer.scaling[name]).t().to(dtype).contiguous()
        both = _both_weights(layer, down, up) if base.device.type == "cpu" and _is_large(layer, name) else None
        bias = getattr(layer.get_base_layer(), "bias", None)

        def forward(tokens: int, x: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            _check_rows(x)
            if both is not None and x.shape[1] == 2 * tokens:
                halves = x.unflatten(1, (2, tokens)).transpose(0, 1).flatten(1, 2)  # [2, B * tokens, in]
                result = torch.bmm(halves, both).unflatten(1, (-1, tokens)).transpose(0, 1).flatten(1, 2)
                return result if bias is None else result + bias
            result = layer.base_layer(x, *arguments, **keywords)
            result[:, -tokens:].add_(x[:, -tokens:].to(dtype) @ down @ up)
            return result

        return forward

    @property
    def is_plain(self) -> bool:
        """Whether, while it listens, every layer's forward is one of ours, which can be compiled."""
        return len(self._forwards) == len(self.layers)

    @contextmanager
    def on(self, tokens: int):
        """The adapter applies to the last `tokens` tokens of each row in the forwards that run in here."""
        before = _FORWARD.set((self, tokens))
        try:
            yield
        finally:
            _FORWARD.reset(before)


@functools.cache
def _listening_class(cls: type) -> type:
    """
    The class of a layer while calls draft with it: its forward asks whose forward it is.

    A class rather than a `forward` on the layer, which copies and pickles of the model would carry off; these are of
    `cls` itself.
    """

    class Listening(cls):
        below = cls
        over = staticmethod(_listening_class)

        def forward(self, *arguments, **keywords):
            if torch.compiler.is_compiling() and (tokens := _tokens_of_graph()) >= 0:
                return _with_adapter(self, tokens, *arguments)
            adapter, tokens = _FORWARD.get()
            own = adapter._forwards.get(self) if adapter else None
            told = keywords.get(OFFSETS)
            if told is not None and (own or not any(told)):
                del keywords[OFFSETS]  # what PEFT tells all layers on behalf of one call, maybe another than this
            if own is None:
                return cls.forward(self, *arguments, **keywords)
            return own(tokens, *arguments, **keywords) if tokens else self.base_layer(*arguments, **keywords)

        def __reduce_ex__(self, protocol):
            return object.__new__, (cls,), self.__dict__

    Listening.__name__, Listening.__qualname__, Listening.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Listening


@torch.compiler.assume_constant_result
def _tokens_of_graph() -> int:
    """While a graph of ours is made: for how many tokens the adapter is on in it. -1 in any other graph."""
    return _FORWARD.get()[1] if is_tracing() else -1


def _with_adapter(layer: torch.nn.Module, tokens: int, x: torch.Tensor) -> torch.Tensor:
    """What a layer of a compiled step computes, in plain operations, which the compiler puts together."""
    result = layer.base_layer(x)
    if not tokens:
        return result
    _check_rows(x)
    name, drafted = layer.active_adapters[0], x[:, -tokens:]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    share = (drafted.to(down.dtype) @ down.t() @ up.t()) * layer.scaling[name]
    return torch.cat([result[:, :-tokens], result[:, -tokens:] + share.to(result.dtype)], dim=1)


def _listen(layer: torch.nn.Module) -> None:
    with _LOCK:
        calls = _LISTENING.get(layer, 0)
        if not calls:
            layer.__class__ = _listening_class(_without_ours(type(layer)))
        _LISTENING[layer] = calls + 1


def _stop_listening(layer: torch.nn.Module) -> None:
    with _LOCK:
        calls = _LISTENING.pop(layer, 1) - 1
        if calls:
            _LISTENING[layer] = calls
        else:
            layer.__class__ = _without_ours(type(layer))


def _without_ours(cls: type) -> type:
    """
    A layer's class without what `_listening_class` put over it. Another copy of this module, that of a published
    checkpoint, may have put its own over that; under a class that is anyone else's, ours stays, and does nothing.
    """
    below = vars(cls).get("below")
    if below is None:
        return cls
    return below if cls is _listening_class(below) else cls.over(_without_ours(below))


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
    if has_weights_elsewhere(layer) or "forward" in vars(layer):
        return False
    if len(layer.active_adapters) != 1 or layer.training or torch.is_grad_enabled() or layer.merged:
        return False
    name, down, up = layer.active_adapters[0], getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
    if name not in down or name not in up:
        return False
    return all(type(part) is torch.nn.Linear and part.bias is None for part in (down[name], up[name]))
