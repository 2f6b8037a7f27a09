"""Checks of arguments and of models that several rooms share, each an error in one sentence."""

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
    """Raises `UsageError` for an argument that is no finite number: NaN passes every comparison by failing it."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"`{name}` must be a finite number, got {value!r}.")


def vocabulary_of(model) -> int:
    """How many tokens a model has embeddings for, which may be more than its configuration says."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


@torch.no_grad()
def check_weights(model) -> None:
    """Raises `UsageError` for a model with a weight that is NaN or infinite, or a buffer of NaN, and names it."""
    for name, buffer in model.named_buffers():  # of which masks may hold infinity
        if buffer.device.type != "meta" and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UsageError(f"the model is broken: {name} holds NaN; load the checkpoint anew.")
    for name, weight in model.named_parameters():
        if weight.device.type == "meta" or not weight.numel() or not weight.is_floating_point():
            continue  # offloaded, spread over processes, or quantised
        if weight.element_size() == 1:  # of eight bits, which have no arithmetic
            continue
        if not all(map(math.isfinite, torch.stack(torch.aminmax(weight.detach())).tolist())):  # NaN among them shows
            raise UsageError(
                f"the model is broken: {name} holds numbers that are NaN or infinite; load a checkpoint without them."
            )
