"""Makes a Hugging Face causal language model decode many tokens per forward."""

import importlib

from .decoding import (
    JacobiConfig,
    JacobiGenerationMixin,
    JacobiOutput,
    JacobiStats,
    Trajectory,
    TrajectoryStep,
    disable,
    enable,
)


__version__ = "0.1.0"

__all__ = [
    "JacobiConfig",
    "JacobiForcingConfig",
    "JacobiForcingTrainer",
    "JacobiGenerationMixin",
    "JacobiOutput",
    "JacobiStats",
    "Trajectory",
    "TrajectoryStep",
    "collect_trajectories",
    "disable",
    "enable",
    "pack_trajectories",
    "plots",
    "publish",
]

# What needs more than torch and transformers is imported when it is first asked for.
_LATER = {
    "JacobiForcingConfig": "training",
    "JacobiForcingTrainer": "training",
    "collect_trajectories": "trajectories",
    "pack_trajectories": "trajectories",
    "publish": "hub",
    "plots": "evaluation.plots",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LATER[name]}", __name__)
    except ModuleNotFoundError as error:
        extra = "eval" if name == "plots" else "train"
        raise ImportError(f"hf_jacobi.{name} needs {error.name}: pip install 'hf_jacobi[{extra}]'") from error
    return module if _LATER[name].endswith(f".{name}") else getattr(module, name)
