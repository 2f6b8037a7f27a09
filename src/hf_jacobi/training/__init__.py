"""Training a model to decode in parallel. Needs the extra `train`."""

from .config import JacobiForcingConfig
from .refresh import Refresh
from .trainer import JacobiForcingTrainer


__all__ = ["JacobiForcingConfig", "JacobiForcingTrainer", "Refresh"]
