"""How text is made: Jacobi decoding behind `model.generate`. Needs torch and transformers alone."""

from .config import JacobiConfig
from .mixin import JacobiGenerationMixin, disable, enable
from .stats import JacobiOutput, JacobiStats, Trajectory, TrajectoryStep


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
