"""Makes a Hugging Face causal language model decode many tokens per forward."""

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
    "JacobiGenerationMixin",
    "JacobiOutput",
    "JacobiStats",
    "Trajectory",
    "TrajectoryStep",
    "disable",
    "enable",
]
