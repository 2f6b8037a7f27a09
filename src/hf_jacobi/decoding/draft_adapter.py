"""Draft-only adapters: a LoRA that applies to drafts alone, while every committed token comes from the base model."""

from __future__ import annotations

from contextlib import contextmanager

import torch


# What marks such an adapter in its configuration (`alora_invocation_tokens` of PEFT's activated LoRA): a token that no
# text holds, so that PEFT by itself never switches it on, and the model without this library is the base model.
DRAFT_ONLY = (-1,)


def is_draft_only(adapter_config) -> bool:
    """Whether an adapter's configuration says that it is for drafts alone."""
    return tuple(getattr(adapter_config, "alora_invocation_tokens", None) or ()) == DRAFT_ONLY


class DraftAdapter:
    """
    Switches the draft-only adapter of a model on for the last tokens of each row of a forward, and off otherwise.

    Attributes:
        tokens: for how many tokens it is on.
    """

    def __init__(self, layers: list[torch.nn.Module]):
        self.layers = layers
        self.tokens = 0

    @classmethod
    def of(cls, model) -> DraftAdapter | None:
        """That of a model, or `None` if it has none that is active."""
        configs = getattr(model, "peft_config", {})
        names = {name for name, config in configs.items() if is_draft_only(config)}
        layers = [
            module
            for module in model.modules()
            if names & set(getattr(module, "lora_variant", ()))
            and names & set(module.active_adapters)
            and not module.disable_adapters
        ]
        return cls(layers) if layers else None

    @contextmanager
    def listening(self):
        """While this is open, the layers ask how many tokens the adapter is on for."""

        def tell(module, arguments, keywords):
            return arguments, keywords | {"alora_offsets": [self.tokens] * arguments[0].shape[0]}

        handles = [layer.register_forward_pre_hook(tell, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def on(self, tokens: int):
        """The adapter applies to the last `tokens` tokens of each row."""
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = 0
