"""Jacobi decoding through `model.generate`. Needs only torch, numpy and transformers."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import JacobiConfig
    from .errors import UsageError
    from .mixin import JacobiGenerationMixin, disable, enable
    from .stats import JacobiOutput, JacobiStats, Trajectory, TrajectoryStep


# Names are imported on first use, so that `errors` and `config` do not wait for torch and transformers.
_STATS = ("JacobiOutput", "JacobiStats", "Trajectory", "TrajectoryStep")
_MODULES = {"JacobiConfig": "config", "UsageError": "errors"} | dict.fromkeys(_STATS, "stats")

__all__ = [
    "JacobiConfig",
    "JacobiGenerationMixin",
    "JacobiOutput",
    "JacobiStats",
    "Trajectory",
    "TrajectoryStep",
    "UsageError",
    "disable",
    "enable",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_MODULES.get(name, 'mixin')}", __name__), name)
    return value
