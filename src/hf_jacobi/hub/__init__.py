"""How checkpoints are shared."""

from .publish import publish


__all__ = ["publish"]
