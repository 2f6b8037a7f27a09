"""Runs the losses inside a model's own forward, so that every wrapper around it (DDP, FSDP, PEFT) does its part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.compat import attention_of, decoder_layers, not_compiled, undo_compile
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap


def forward_as(model: nn.Module, method: Callable[..., Any], **inputs) -> Any:
    """
    Calls `model(**inputs)` with the forward of the causal language model inside it replaced by `method`, once.

    Args:
        model: the model, wrapped or not.
        method: called with the causal language model and `inputs`.
        inputs: what the wrappers see; PEFT takes its own out.

    Returns:
        what `method` returns.
    """
    inner = unwrap(model)
    original = inner.__dict__.get("forward")

    def restore() -> None:
        if original is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.__dict__["forward"] = original

    def redirected(*args, **kwargs):
        restore()  # before `method`, which may call the model itself
        return method(inner, *args, **kwargs)

    inner.__dict__["forward"] = redirected
    try:
        return model(**inputs)
    finally:
        restore()


def hidden_states(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """`[B, L, H]`, what the model's head reads: the output of the decoder without the head."""
    decoder = model.get_decoder()
    if decoder is model:  # Llama 4 does not know its own
        decoder = model.model
    return decoder(**inputs, use_cache=False).last_hidden_state


def check_compilable(model: PreTrainedModel) -> None:
    """
    Refuses what `compiled_layers` cannot compile, before any work is done.

    Raises:
        `ValueError`: the model has no layers that are known as such, or a CPU has no C++ compiler.
    """
    if not decoder_layers(model):
        raise UsageError(f"the layers of {type(model).__name__} were not found: drop `compile_layers`.")
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UsageError("`compile_layers` needs a C++ compiler on a CPU: install g++, or drop `compile_layers`.")


@contextmanager
def compiled_layers(model: PreTrainedModel):
    """
    While this is open, each decoder layer runs compiled, for rows of any length.

    Layer by layer rather than whole: the losses take the place of the model's own forward, and one layer is quickly
    compiled and serves for all.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            undo_compile(layer)


@contextmanager
def outside_training(model: PreTrainedModel):
    """
    The model in evaluation mode, nothing of it compiled, and with SDPA in place of FlexAttention, which must be
    compiled and cannot decode.
    """
    training = model.training
    attention = attention_of(model.config.get_text_config(decoder=True))
    model.eval()
    if attention == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        with not_compiled(model):  # decoding would compile anew for each kind of cache and mask
            yield
    finally:
        if attention == "flex_attention":
            model.set_attn_implementation(attention)
        model.train(training)


class Head:
    """
    From hidden states to logits as a model computes them, its scalings and caps included.

    Args:
        model: the causal language model.

    Raises:
        `ValueError`: its logits come about in a way that is not known here.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = model.config.get_text_config(decoder=True)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.factor = 1.0
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            self.factor *= scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            self.factor /= scale

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, H]` to `[N, V]`."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    @torch.no_grad()
    def check(self) -> None:
        """
        Compares with the model's own logits on a few tokens.

        Raises:
            `ValueError`: they differ.
        """
        if is_deepspeed_zero3_enabled():  # no process has the weights yet
            return
        model = self.model
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
        with outside_training(model):
            own = model(input_ids=tokens, use_cache=False).logits[0].float()
            ours = self(hidden_states(model, input_ids=tokens)[0]).float()
        if not torch.allclose(own, ours, atol=1e-2 * float(own.abs().max() + 1e-6), rtol=1e-2):
            raise UsageError(
                f"the logits of {type(model).__name__} are not those of its output embeddings applied to its hidden "
                "states, so that Jacobi Forcing cannot compute them in chunks: please report the model."
            )
