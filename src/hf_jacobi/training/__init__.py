"""How a model learns to decode in parallel. Needs what the extra `train` brings."""

from .config import JacobiForcingConfig
from .refresh import Refresh
from .trainer import JacobiForcingTrainer


__all__ = ["JacobiForcingConfig", "JacobiForcingTrainer", "Refresh"]
