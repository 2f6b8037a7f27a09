"""Publishing checkpoints, and loading draft-only adapters."""

from .plain_lora import load_draft_adapter
from .publish import publish


__all__ = ["load_draft_adapter", "publish"]
