"""Ways of running a step: the forward eager or compiled, and the whole step launched or replayed as a CUDA graph."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType
from typing import Any, TypeVar

import torch

from .attention import AttentionMask, ChainMask
from .compat import adapters_in_force, attention_of, compile_settings, explains_failed_compile
from .layout import Layout
from .slot_cache import SlotCache


# The graphs of each model, by what they were made for. They hold no reference to the model.
_COMPILED: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, Callable[..., torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)
_LOCK = threading.Lock()
# Whether a graph of ours is being compiled.
_TRACING: ContextVar[bool] = ContextVar("hf_jacobi_tracing", default=False)


def _forward(model, arguments: dict) -> torch.Tensor:
    return model(**arguments, return_dict=True).logits


class Eager:
    """The model's own forward. Every way of running a step is a class with these members."""

    name = "as written"

    def __call__(self, model, arguments: dict, shape: tuple[int, ...]) -> torch.Tensor:
        """
        Logits `[B, Q, V]`.

        Args:
            model: the model.
            arguments: the arguments of its forward.
            shape: of the step: B, Q, the number of the Q nodes that a draft-only adapter serves, and S.
        """
        return _forward(model, arguments)


class Compiled:
    """
    The forward by `torch.compile`, which is called with few shapes (`FixedShapes`) and keeps a graph for each.

    Each shape, and each state of the model, gets its own function: torch counts recompilations and checks guards per
    function, and would stop compiling after eight.

    Args:
        settings: a `transformers.CompileConfig`; `None` for the defaults.
        purpose: what else distinguishes graphs, such as the size of the cache and the active adapters.
    """

    def __init__(self, settings=None, purpose: tuple = ()):
        self.settings, self.purpose = compile_settings(settings), purpose
        self.name = repr(sorted(self.settings.items(), key=str))

    def __call__(self, model, arguments: dict, shape: tuple[int, ...]) -> torch.Tensor:
        """As `Eager`."""
        with _LOCK:
            graphs = _COMPILED.setdefault(model, {})
            kind = shape, self.purpose, self.name
            if kind not in graphs:
                code = _forward.__code__.replace(co_name="step_" + "_".join(map(str, shape)))
                own = FunctionType(code, _forward.__globals__)
                graphs[kind] = torch.compile(own, **self.settings)
            graph = graphs[kind]
        before = _TRACING.set(True)
        try:
            with explains_failed_compile():
                return graph(model, arguments)
        finally:
            _TRACING.reset(before)


def is_tracing() -> bool:
    """Whether `Compiled` is running, so that values that are constant for a shape can be constants of the graph."""
    return _TRACING.get()


WARM_UPS = 2  # runs of a shape before it is recorded, which allocate memory and select kernels

Result = TypeVar("Result")


def record_on_cuda(function: Callable[[], Result], pool) -> tuple[Callable[[], None], Result]:
    """Records the kernels that a function launches: returns what replays them, and the result that they then fill."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def recorder_of(device: torch.device) -> Callable[..., tuple[Callable[[], None], Any]] | None:
    """The function that records on a device, or `None`."""
    return record_on_cuda if device.type == "cuda" else None


class Graphs:
    """
    CUDA graphs of functions that run repeatedly over the same tensors.

    Args:
        device: where they run.
        record: records a function, as `record_on_cuda`.
    """

    def __init__(self, device: torch.device, record: Callable[..., tuple[Callable[[], None], Any]]):
        self._record = record
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._seen: Counter = Counter()
        self._recorded: dict[tuple, tuple[Callable[[], None], Any]] = {}

    def run(self, shape: tuple, function: Callable[[], Result]) -> Result:
        """The result of a function, which `shape` identifies. Once recorded, it is replayed."""
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] <= WARM_UPS:
                return function()
            self._recorded[shape] = self._record(function, self._pool)
        replay, result = self._recorded[shape]
        replay()
        return result


class Resident:
    """
    The tensors that stay on the device from one call to the next because graphs have recorded their addresses.

    Attributes:
        cache, mask, key_valid, layouts, slots: as in a `Step`.
        graphs: the graphs recorded over them.
    """

    def __init__(self, cache: SlotCache, mask: AttentionMask | ChainMask, key_valid: torch.Tensor, graphs: Graphs):
        self.cache, self.mask, self.key_valid, self.graphs = cache, mask, key_valid, graphs
        self.layouts: dict[tuple[int, int], Layout] = {}
        self.slots = torch.arange(key_valid.shape[1], device=key_valid.device)


# For each model, the newest one that no call is using, and its purpose.
_RESIDENTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple, Resident]] = weakref.WeakKeyDictionary()


def take_resident(model, purpose: tuple) -> Resident | None:
    """The one left for a model, if it has the same purpose. It is the caller's until `leave_resident`."""
    with _LOCK:
        kept, resident = _RESIDENTS.pop(model, (None, None))
    return resident if kept == purpose else None


def leave_resident(model, purpose: tuple, resident: Resident) -> None:
    """Leaves one for the next call."""
    with _LOCK:
        _RESIDENTS[model] = (purpose, resident)


def weights_of(model) -> tuple:
    """Changes when a recording of a model is no longer its forward: other weights have other addresses."""
    tensors = [(tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers())]
    return hash(tuple(tensors)), *state_of(model)


def state_of(model) -> tuple:
    """What a model's forward depends on besides its weights."""
    text = model.config.get_text_config(decoder=True)
    return model.dtype, model.training, attention_of(text), adapters_in_force(model)
