"""Makes a Hugging Face causal language model decode many tokens per forward."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from . import decoding as decoding
    from .decoding import (
        JacobiConfig,
        JacobiGenerationMixin,
        JacobiOutput,
        JacobiStats,
        Trajectory,
        TrajectoryStep,
        UsageError,
        disable,
        enable,
    )
    from .evaluation import plots
    from .hub import load_draft_adapter, publish
    from .recipes import run_recipe
    from .training import JacobiForcingConfig, JacobiForcingTrainer, Refresh
    from .trajectories import build_ngram_table, collect_trajectories, pack_completions, pack_trajectories


__version__ = "0.2.0"

__all__ = [
    "JacobiConfig",
    "JacobiForcingConfig",
    "JacobiForcingTrainer",
    "JacobiGenerationMixin",
    "JacobiOutput",
    "JacobiStats",
    "Refresh",
    "Trajectory",
    "TrajectoryStep",
    "UsageError",
    "build_ngram_table",
    "collect_trajectories",
    "disable",
    "enable",
    "load_draft_adapter",
    "pack_completions",
    "pack_trajectories",
    "plots",
    "publish",
    "run_recipe",
]

# Names are imported on first use: torch and transformers take seconds, and some names need an extra.
_MODULES = {
    "JacobiForcingConfig": "training",
    "JacobiForcingTrainer": "training",
    "Refresh": "training",
    "build_ngram_table": "trajectories",
    "collect_trajectories": "trajectories",
    "pack_completions": "trajectories",
    "pack_trajectories": "trajectories",
    "load_draft_adapter": "hub",
    "publish": "hub",
    "run_recipe": "recipes",
    "plots": "evaluation.plots",
    "decoding": "decoding",
}


def __getattr__(name: str):
    if name not in __all__ and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _MODULES.get(name, "decoding")
    try:
        module = importlib.import_module(f".{place}", __name__)
    except ModuleNotFoundError as error:
        if place == "decoding":
            raise
        from .decoding.errors import missing_extra

        raise missing_extra(f"hf_jacobi.{name}", error.name, "eval" if name == "plots" else "train") from error
    value = module if place.split(".")[-1] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
