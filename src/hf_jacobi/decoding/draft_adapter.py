"""Draft-only adapters: a LoRA that applies to drafts alone, while every committed token is the base model's."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from .compat import INVOCATION, OFFSETS, VARIANT, has_hooks, has_weights_elsewhere
from .errors import UsageError
from .running import is_tracing


if TYPE_CHECKING:

    class LoraLayer(torch.nn.Module):
        """The members of PEFT's LoRA layers that are used here; this package does not import PEFT."""

        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        scaling: dict[str, float]
        lora_A: dict[str, torch.nn.Linear]
        lora_B: dict[str, torch.nn.Linear]
        base_layer: torch.nn.Linear

        def get_base_layer(self) -> torch.nn.Linear: ...


# The invocation tokens (of PEFT's activated LoRA) that mark such an adapter in its configuration: a token that no text
# contains. PEFT itself therefore never switches the adapter on, and without this library the model is the base model.
DRAFT_ONLY = (-1,)
HARMLESS = ("gaussian", "orthogonal", "eva")  # initialisations of a LoRA that leave the base model unchanged
_BOTH_WEIGHTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()
# The adapter whose call runs the current forward, and for how many tokens at the end of each row it is on. Every
# thread, and every task of an event loop, has its own value.
_FORWARD: ContextVar[tuple[DraftAdapter | None, int]] = ContextVar("hf_jacobi_forward", default=(None, 0))
_LISTENING: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()  # number of calls by layer
_LOCK = threading.Lock()


def _start_anew() -> None:
    """Resets the state in a forked process, in which the threads of the parent do not exist."""
    global _LOCK
    _LOCK = threading.Lock()
    _LISTENING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def is_draft_only(adapter_config) -> bool:
    """Whether an adapter's configuration marks it as draft-only."""
    return tuple(getattr(adapter_config, INVOCATION, None) or ()) == DRAFT_ONLY


def is_activated(adapter_config) -> bool:
    """Whether an adapter is an activated LoRA of PEFT, which applies from certain tokens on, or is draft-only."""
    return bool(getattr(adapter_config, INVOCATION, None))


def touching_base(adapter_config) -> list[str]:
    """The settings of an adapter's configuration that change parts of the base model."""
    touching = {
        "modules_to_save": getattr(adapter_config, "modules_to_save", None),
        "trainable_token_indices": getattr(adapter_config, "trainable_token_indices", None),
        "bias": None if getattr(adapter_config, "bias", "none") == "none" else adapter_config.bias,
        "use_dora": getattr(adapter_config, "use_dora", None),
        "layer_replication": getattr(adapter_config, "layer_replication", None),
    }
    return [name for name, value in touching.items() if value]


def begun_on_other_weights(adapter_config) -> str | None:
    """The initialisation of an adapter if it changes the base model, which PEFT repeats when it loads the adapter."""
    way = getattr(adapter_config, "init_lora_weights", True)
    return way if isinstance(way, str) and way.lower() not in HARMLESS else None


class DraftAdapter:
    """
    The draft-only adapter of a model in one call: it is on for the last tokens of each row of the call's forwards.

    In each forward, the adapter's layers look up which call it belongs to. Any other forward, of another thread or
    outside of Jacobi decoding, gets the base model, and calls of several threads do not wait for each other.
    """

    def __init__(self, layers: list[LoraLayer]):
        self.layers = layers
        self._forwards: dict[LoraLayer, Callable[..., torch.Tensor]] = {}
        self._bare: dict[LoraLayer, Callable[..., torch.Tensor]] = {}  # what is below layers without hooks

    @classmethod
    def of(cls, model) -> DraftAdapter | None:
        """The active draft-only adapter of a model, or `None`."""
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
    def listening(self) -> Iterator[None]:
        """While this is open, the layers look up the call of each forward, and `on` takes effect."""
        handles = []
        try:
            for layer in self.layers:
                if _has_nothing_else(layer):
                    self._forwards[layer] = self._at_first(layer)
                    if not has_hooks(layer):
                        self._bare[layer] = _base_of(layer)
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
            self._bare.clear()

    def _tell(self, module, arguments, keywords=None):  # another thread can call without keywords during registration
        adapter, tokens = _FORWARD.get()
        if adapter is not self or not tokens:
            return None
        _check_rows(arguments[0])
        return arguments, keywords | {OFFSETS: [tokens] * arguments[0].shape[0]}

    def _at_first(self, layer: LoraLayer) -> Callable[..., torch.Tensor]:
        """A forward that prepares the layer when the adapter first takes part, since some calls never use it."""
        name, base = layer.active_adapters[0], _base_of(layer)

        def forward(tokens: int, x: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            if not tokens or name not in layer.lora_A:  # it can be deleted during the call
                return base(x, *arguments, **keywords)
            quick = self._forwards[layer] = self._quick_forward(layer, name)
            return quick(tokens, x, *arguments, **keywords)

        return forward

    def _quick_forward(self, layer: LoraLayer, name: str) -> Callable[..., torch.Tensor]:
        """
        The layer's own forward in as few operations as possible.

        On a CPU the adapter computes in float32: a bfloat16 product of this size takes 40 microseconds there, a
        float32 one 5, and a forward has hundreds of them. Its weights are used as they are, since a copy of all of
        them in each call takes as long as a forward of a small model. A large adapter is also merged into a copy of
        the weights there. As long as the draft is as long as what is verified (which holds without recycling), the
        base and the adapter then need only one product, which reduced the time of a forward of a small model by 18%.
        """
        base = layer.get_base_layer().weight
        half = base.device.type != "cpu" and base.dtype in (torch.float16, torch.bfloat16)
        dtype = base.dtype if half else torch.float32
        down, up = layer.lora_A[name].weight.to(dtype).t(), layer.lora_B[name].weight.to(dtype).t()
        scaling = layer.scaling[name]
        is_merged = base.device.type == "cpu" and _is_large(layer, name)
        both = _both_weights(layer, down, up * scaling) if is_merged else None
        bias = getattr(layer.get_base_layer(), "bias", None)
        alone = _base_of(layer)

        def forward(tokens: int, x: torch.Tensor, *arguments, **keywords) -> torch.Tensor:
            if not tokens:
                return alone(x, *arguments, **keywords)
            _check_rows(x)
            if both is not None and x.shape[1] == 2 * tokens:
                halves = x.unflatten(1, (2, tokens)).transpose(0, 1).flatten(1, 2)  # [2, B * tokens, in]
                result = torch.bmm(halves, both).unflatten(1, (-1, tokens)).transpose(0, 1).flatten(1, 2)
                return result if bias is None else result + bias
            result = alone(x, *arguments, **keywords)
            if len(x) == 1 and result.dtype == dtype:
                result[0, -tokens:].addmm_(torch.mm(x[0, -tokens:].to(dtype), down), up, alpha=scaling)
                return result
            drafted = x[:, -tokens:].flatten(0, 1).to(dtype)
            share = torch.mm(torch.mm(drafted, down), up).unflatten(0, (-1, tokens))
            result[:, -tokens:].add_(share, alpha=scaling)
            return result

        return forward

    @property
    def is_plain(self) -> bool:
        """Whether, inside `listening`, every layer runs a forward of ours, which can be compiled."""
        return len(self._forwards) == len(self.layers)

    @contextmanager
    def on(self, tokens: int) -> Iterator[None]:
        """While this is open, the adapter applies to the last `tokens` tokens of each row of a forward."""
        before = _FORWARD.set((self, tokens))
        try:
            yield
        finally:
            _FORWARD.reset(before)


@functools.cache
def _listening_class(cls: Any) -> type[LoraLayer]:
    """
    The class of a layer while calls draft with it: its forward looks up the call that runs it.

    A class is used rather than a `forward` on the layer because copies and pickles of the model would include the
    latter; with the class they are instances of `cls` itself.
    """

    class Listening(cls):
        below = cls
        over = staticmethod(_listening_class)

        def __call__(self, *arguments, **keywords):
            # Without the adapter, a layer takes no longer than the layer below it: forwards have hundreds of them.
            if not keywords and not torch.compiler.is_compiling():
                adapter, tokens = _FORWARD.get()
                if adapter and not tokens and (bare := adapter._bare.get(self)):
                    return bare(*arguments)
            return super().__call__(*arguments, **keywords)

        def forward(self, *arguments, **keywords):
            if torch.compiler.is_compiling() and (tokens := _tokens_of_graph()) >= 0:
                return _with_adapter(self, tokens, *arguments)
            adapter, tokens = _FORWARD.get()
            own = adapter._forwards.get(self) if adapter else None
            if own and not keywords:
                return own(tokens, *arguments)
            told = keywords.get(OFFSETS)
            if told is not None and (own or not any(told)):
                del keywords[OFFSETS]  # PEFT tells all layers on behalf of one call, possibly another one
            if own is None:
                return cls.forward(self, *arguments, **keywords)
            return own(tokens, *arguments, **keywords)

        def __reduce_ex__(self, protocol):
            return object.__new__, (cls,), self.__dict__

    Listening.__name__, Listening.__qualname__, Listening.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Listening


@torch.compiler.assume_constant_result
def _tokens_of_graph() -> int:
    """For how many tokens the adapter is on in the graph of ours that is being compiled; -1 in any other graph."""
    return _FORWARD.get()[1] if is_tracing() else -1


def _with_adapter(layer: LoraLayer, tokens: int, x: torch.Tensor) -> torch.Tensor:
    """The forward of a layer in a compiled step, in plain operations that the compiler fuses."""
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


def _without_ours(cls: Any) -> type:
    """
    A layer's class without the subclass made by `_listening_class`. Another copy of this module, that of a published
    checkpoint, may have subclassed it again. Below a subclass made by anyone else, ours stays and does nothing.
    """
    below = vars(cls).get("below")
    if below is None:
        return cls
    return below if cls is _listening_class(below) else cls.over(_without_ours(below))


def _base_of(layer: LoraLayer) -> Callable[..., torch.Tensor]:
    """The layer below an adapter; its bare forward where nothing else happens, which saves 4% of a small forward."""
    base = layer.base_layer
    return base.forward if type(base) is torch.nn.Linear and not has_hooks(base) else base


def _is_large(layer: LoraLayer, name: str) -> bool:
    """Whether an adapter of a plain `Linear` takes at least half the memory of the weights it changes."""
    if type(layer.base_layer) is not torch.nn.Linear:
        return False
    adapter = layer.lora_A[name].weight.numel() + layer.lora_B[name].weight.numel()
    return 2 * adapter >= layer.base_layer.weight.numel()


def _both_weights(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """
    `[2, in, out]`, the weights of a layer without its adapter and with it.

    They are kept for the next call, which compares all weights to detect changes. Nothing else would reveal them: not
    even a parameter's version changes when PEFT merges another adapter into it.
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
            "a draft-only adapter cannot serve a layer whose input does not separate the rows of the batch: train it "
            "with other target_modules, such as those of the attention."
        )


def _has_nothing_else(layer: LoraLayer) -> bool:
    """Whether a layer's only adapter is a plain draft-only LoRA, and no gradient is needed."""
    if has_weights_elsewhere(layer) or "forward" in vars(layer):
        return False
    if len(layer.active_adapters) != 1 or layer.training or torch.is_grad_enabled() or layer.merged:
        return False
    name, down, up = layer.active_adapters[0], getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})
    if name not in down or name not in up:
        return False
    return all(type(part) is torch.nn.Linear and part.bias is None for part in (down[name], up[name]))
