"""Ways of running the forward of a step: as the model is written, or compiled, one graph for each shape."""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from types import FunctionType

import torch

from .compat import compile_settings, explains_failed_compile


# For each model, by what a graph is made for. Of the models themselves the graphs hold nothing.
_COMPILED: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, object]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_TRACING: ContextVar[bool] = ContextVar("hf_jacobi_tracing", default=False)  # whether a graph of ours is being made


def _forward(model, arguments: dict) -> torch.Tensor:
    return model(**arguments, return_dict=True).logits


class Eager:
    """The model's own forward. Any way of running a step is a class with this method."""

    def __call__(self, model, arguments: dict, shape: tuple[int, ...]) -> torch.Tensor:
        """
        Logits `[B, Q, V]`.

        Args:
            model: the model.
            arguments: those of its forward.
            shape: of the step: B, Q, how many of the Q nodes a draft-only adapter serves, and S.
        """
        return _forward(model, arguments)


class Compiled:
    """
    The forward by `torch.compile`, which is called with few shapes (`FixedShapes`) and keeps a graph for each.

    Each shape gets a function of its own, as torch counts recompilations, and tries guards, by function.

    Args:
        settings: a `transformers.CompileConfig`; `None` for the defaults.
    """

    def __init__(self, settings=None):
        self.settings = compile_settings(settings)
        self.name = repr(sorted(self.settings.items(), key=str))

    def __call__(self, model, arguments: dict, shape: tuple[int, ...]) -> torch.Tensor:
        """As `Eager`."""
        with _LOCK:
            graphs = _COMPILED.setdefault(model, {})
            if (shape, self.name) not in graphs:
                code = _forward.__code__.replace(co_name="step_" + "_".join(map(str, shape)))
                own = FunctionType(code, _forward.__globals__)
                graphs[shape, self.name] = torch.compile(own, **self.settings)
            graph = graphs[shape, self.name]
        before = _TRACING.set(True)
        try:
            with explains_failed_compile():
                return graph(model, arguments)
        finally:
            _TRACING.reset(before)


def is_tracing() -> bool:
    """Whether `Compiled` runs here, so that what is constant for a shape may be a constant of the graph."""
    return _TRACING.get()
