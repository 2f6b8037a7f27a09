"""Runs the losses inside a model's own forward, so that every wrapper around it (DDP, FSDP, PEFT) takes part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.compat import (
    attending_by,
    attention_of,
    decoder_layers,
    not_compiled,
    router_loss_of,
    undo_compile,
)
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap


def forward_as(model: nn.Module, method: Callable[..., Any], **inputs) -> Any:
    """
    Calls `model(**inputs)`, with `method` in place of the forward of the causal language model inside it.

    Args:
        model: the model, wrapped or not.
        method: called with the causal language model and `inputs`.
        inputs: the arguments that the wrappers see; PEFT removes its own.

    Returns:
        what `method` returns.
    """
    inner = unwrap(model)
    with redirected(inner, partial(method, inner)):
        return model(**inputs)


@contextmanager
def redirected(module: nn.Module, method: Callable[..., Any]):
    """While this is open, the next call of `module` runs `method` in place of its forward."""
    original = module.__dict__.get("forward")

    def restore() -> None:
        if original is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = original

    def once(*args, **kwargs):
        restore()  # before `method`, which may call the module itself
        return method(*args, **kwargs)

    module.__dict__["forward"] = once
    try:
        yield
    finally:
        restore()


def run_decoder(model: PreTrainedModel, **inputs) -> Any:
    """The output of the decoder without the head, which reads its `last_hidden_state`, `[B, L, H]`."""
    return decoder_of(model)(**inputs, use_cache=False)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder of a causal language model."""
    decoder: Any = model.get_decoder()
    if decoder is model:  # Llama 4 returns itself
        decoder = model.model
    found: nn.Module = decoder
    return found


def check_compilable(model: PreTrainedModel) -> None:
    """
    Refuses, before any work, what `compiled_layers` cannot compile.

    Raises:
        `ValueError`: the model's layers were not found, or training runs on a CPU without a C++ compiler.
    """
    if not decoder_layers(model):
        raise UsageError(f"the layers of {type(model).__name__} were not found: drop `compile_layers`.")
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UsageError("`compile_layers` needs a C++ compiler on a CPU: install g++, or drop `compile_layers`.")


@contextmanager
def compiled_layers(model: PreTrainedModel):
    """
    While this is open, each decoder layer runs compiled, for rows of any length.

    Compiling layer by layer works although the losses replace the model's own forward, and is quick: all layers share
    the code of one.
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
    While this is open, the model is in evaluation mode, runs uncompiled, and uses SDPA in place of FlexAttention,
    which must be compiled and cannot decode.
    """
    training = model.training
    flex = attention_of(model.config.get_text_config(decoder=True)) == "flex_attention"
    model.eval()
    try:
        # Compiled layers would recompile for each kind of cache and mask.
        with not_compiled(model), attending_by(model, "sdpa") if flex else nullcontext():
            yield
    finally:
        model.train(training)


class Head:
    """
    Computes logits from hidden states as a model does, with its scalings and caps.

    Args:
        model: the causal language model.
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
        return self._scaled(self._embeddings()(hidden))

    def in_one_call(self, function: Callable[..., Any], hidden: torch.Tensor) -> Any:
        """
        Calls `function(head, hidden)` as the forward of the output embeddings. FSDP and DeepSpeed gather the weights
        of a module when it is called: so they gather them once, and once for the backward pass, however often
        `function` applies `head`.

        Args:
            function: its `head` maps hidden states `[N, H]` to logits `[N, V]`.
            hidden: `[B, L, H]`.
        """
        embeddings = self._embeddings()
        forward = embeddings.forward

        def head(hidden: torch.Tensor) -> torch.Tensor:
            return self._scaled(forward(hidden))

        with redirected(embeddings, partial(function, head)):
            return embeddings(hidden)

    @property
    def is_trained(self) -> bool:
        """Whether its weights can get a gradient. A wrapper such as FSDP 1 can hide them: then they may."""
        weights = list(self._embeddings().parameters())
        return not weights or any(weight.requires_grad for weight in weights)

    def _embeddings(self) -> nn.Module:
        embeddings = self.model.get_output_embeddings()
        assert embeddings is not None  # a causal language model has them
        return embeddings

    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    @torch.no_grad()
    def check(self) -> None:
        """
        Compares its logits of a few tokens with the model's own.

        Raises:
            `ValueError`: they differ, or are not finite.
        """
        if is_deepspeed_zero3_enabled():  # no process has the weights yet
            return
        model = self.model
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
        with outside_training(model):
            own = model(input_ids=tokens, use_cache=False).logits[0].float()
            ours = self(run_decoder(model, input_ids=tokens).last_hidden_state[0]).float()
        if not (own < float("inf")).all():  # NaN fails, too
            raise UsageError(
                f"the model is broken: the logits of {type(model).__name__} in {model.dtype} are NaN or infinite; "
                "load it in bfloat16 or float32, or load another checkpoint."
            )
        if not torch.allclose(own, ours, atol=1e-2 * float(own.abs().max() + 1e-6), rtol=1e-2):
            raise UsageError(
                f"the logits of {type(model).__name__} are not its output embeddings applied to its hidden states, so "
                "Jacobi Forcing cannot compute them in chunks: please report the model."
            )


class RouterLoss:
    """
    The loss that balances the experts of a mixture, computed by the model's own function. The model's configuration
    turns it on (`output_router_logits`, `router_aux_loss_coef`).

    Args:
        model: the causal language model.

    Attributes:
        weight: the factor of the loss; 0 if it is off.

    Raises:
        `ValueError`: it is on, but this library does not know how the model computes it.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        enabled = getattr(config, "output_router_logits", False)
        coefficient = getattr(model, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0.0))
        self.weight = float(coefficient or 0.0) if enabled else 0.0
        self.function = router_loss_of(model)
        experts = (
            getattr(part, name, None) for part in (model, config) for name in ("num_experts", "num_local_experts")
        )
        self.experts = next((number for number in experts if number), None)
        self.per_token = getattr(model, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
        if self.weight and (self.function is None or not self.experts or not self.per_token):
            self._refuse(model)
        if self.weight and not is_deepspeed_zero3_enabled():
            self._check(model)

    def __call__(self, logits: tuple[torch.Tensor, ...], mask: torch.Tensor, by_row: bool) -> torch.Tensor:
        """
        The loss times the number of tokens, a scalar in float32.

        Args:
            logits: `[B * L, experts]` for each layer that has experts.
            mask: `[B, L]`, the tokens that count.
            by_row: compute a mean for each row, so that the sum does not depend on which rows share a batch.
        """
        assert self.function is not None  # `__init__` refuses a model without it
        mask = mask.long()
        if not by_row:
            return self.function(logits, self.experts, self.per_token, mask).float() * mask.sum()
        layers = [layer.view(*mask.shape, -1) for layer in logits]
        total = torch.zeros((), device=mask.device)
        for row in range(len(mask)):
            if mask[row].any():
                of_row = tuple(layer[row] for layer in layers)
                loss = self.function(of_row, self.experts, self.per_token, mask[row : row + 1])
                total = total + loss.float() * mask[row].sum()
        return total

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """Compares its loss on a few tokens with the model's own."""
        tokens = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
        with outside_training(model):
            own = getattr(model(input_ids=tokens, use_cache=False), "aux_loss", None)
            logits = getattr(run_decoder(model, input_ids=tokens), "router_logits", None)
        if not isinstance(own, torch.Tensor) or not isinstance(logits, tuple):
            self._refuse(model)
        ours = self(logits, torch.ones_like(tokens), by_row=False) / tokens.numel()
        if not torch.allclose(own.float(), ours, rtol=1e-2):
            self._refuse(model)

    def _refuse(self, model: PreTrainedModel) -> NoReturn:
        raise UsageError(
            f"the configuration of {type(model).__name__} turns on a router loss that Jacobi Forcing does not "
            "support: set model.config.output_router_logits = False to train without it."
        )
