"""Checks of arguments and models that several packages share; each raises an error of one sentence."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from ..decoding.errors import UsageError, check_range


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises `UsageError` for an argument that is not a whole number of at least `least`."""
    check_range(f"`{name}`", value, least, whole=True)


def check_real(name: str, value: Any) -> None:
    """Raises `UsageError` for an argument that is not a finite number; range checks can miss NaN."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"`{name}` must be a finite number, got {value!r}.")


def vocabulary_of(model) -> int:
    """The number of tokens a model has embeddings for, which can exceed the size in its configuration."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


@torch.no_grad()
def check_weights(model) -> None:
    """Raises `UsageError`, naming the tensor, if a weight holds NaN or infinity, or a buffer holds NaN."""
    for name, buffer in model.named_buffers():  # a mask among them can hold infinity
        if buffer.device.type != "meta" and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UsageError(f"the model is broken: {name} holds NaN; load the checkpoint again.")
    for name, weight in model.named_parameters():
        if weight.device.type == "meta" or not weight.numel() or not weight.is_floating_point():
            continue  # offloaded, spread over processes, or quantized
        if weight.element_size() == 1:  # eight-bit types have no arithmetic
            continue
        if not all(map(math.isfinite, torch.stack(torch.aminmax(weight.detach())).tolist())):  # NaN propagates
            raise UsageError(
                f"the model is broken: {name} holds NaN or infinite values; load a checkpoint without them."
            )
