"""PEFT adapters: for every token, or for drafts alone (activated LoRA on the noisy tokens, which stand last)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.compat import INVOCATION, OFFSETS, VARIANT, decoder_layers, forget_offsets
from ..decoding.draft_adapter import DRAFT_ONLY, begun_on_other_weights, is_draft_only, touching_base
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from .config import JacobiForcingConfig
from .forward import outside_training
from .mask import RowTensors


PREFIX = "lora_"  # of the modules that PEFT puts a LoRA's weights into
CHUNK = 1 << 20  # numbers of eight bytes that are summed at a time


def add_adapter(model, peft_config, args: JacobiForcingConfig):
    """
    The model with an adapter, if there is to be one.

    Args:
        model: the model.
        peft_config: the adapter's configuration; `None` leaves the model as it is.
        args: the training arguments.

    Raises:
        `ValueError`: a draft-only adapter is asked for that is no LoRA, or none at all.
    """
    present = getattr(model, "peft_config", {})
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise UsageError(
            "the model's adapter is merged into the weights, and would not learn: unmerge_adapter() first."
        )
    if peft_config is None:
        drafting = [is_draft_only(config) for config in present.values()]
        if args.adapter_scope == "draft" and not (drafting and all(drafting)):
            raise UsageError(
                "adapter_scope='draft' trains a draft-only adapter: pass a `peft_config`, or a model with such an "
                "adapter."
            )
        if args.adapter_scope != "draft" and any(drafting):
            raise UsageError("the model carries a draft-only adapter, which learns with adapter_scope='draft' alone.")
        if args.adapter_scope == "draft":
            _check_made(model)
        return model
    from peft import LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        raise UsageError(f"`peft_config` must be a configuration of PEFT, got {type(peft_config).__name__}.")
    if present:
        raise UsageError("the model carries an adapter already: leave `peft_config` out, or pass the base model.")
    if peft_config.is_prompt_learning:
        raise UsageError(
            f"Jacobi Forcing does not support virtual tokens, as of {peft_config.peft_type.value}: use a LoraConfig."
        )
    if args.adapter_scope != "draft" and getattr(peft_config, INVOCATION, None):
        raise UsageError(
            f"`{INVOCATION}` are of an activated LoRA, which learns with adapter_scope='draft' alone: drop them, or "
            "pass that."
        )
    if args.adapter_scope == "draft":
        if not isinstance(peft_config, LoraConfig):
            raise UsageError(f"adapter_scope='draft' needs a LoraConfig, got {type(peft_config).__name__}.")
        _refuse_touching(peft_config)
        if getattr(peft_config, "target_parameters", None):
            raise UsageError(
                "a draft-only adapter cannot be on `target_parameters`, such as the experts of a mixture, which get "
                "tokens without their rows: name target_modules, such as those of the attention."
            )
        peft_config = copy.copy(peft_config)
        # What makes PEFT apply it to the last tokens of a row. The tokens themselves are never looked for.
        setattr(peft_config, INVOCATION, list(DRAFT_ONLY))
        peft_config.task_type = "CAUSAL_LM"
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.activation_checkpointing)
    elif args.activation_checkpointing:
        model.enable_input_require_grads()
    before = _checksums(unwrap(model)) if args.adapter_scope == "draft" else {}
    try:
        adapted = get_peft_model(model, peft_config)
    except ValueError as error:  # of PEFT's own checks of the configuration
        if INVOCATION not in str(error):
            raise UsageError(str(error)) from error
        raise UsageError(
            f"PEFT cannot make a draft-only adapter of this configuration ({error}): use a plain LoraConfig with "
            "target_modules that are linear layers, such as those of the attention."
        ) from error
    if args.adapter_scope == "draft":
        _check_base(adapted, before, peft_config)
        _check_layers(adapted)
    return adapted


def _refuse_touching(config) -> None:
    """Raises `ValueError` for the configuration of an adapter that changes parts of the base model."""
    if asked := touching_base(config):
        raise UsageError(f"a draft-only adapter must leave the base model as it is: drop {', '.join(asked)}.")


def _check_made(model) -> None:
    """
    Raises `ValueError` for a draft-only adapter that was made elsewhere and is known to have changed its base. What
    the base was before cannot be seen: only its configuration, its layers, and what is going to be trained.
    """
    for config in model.peft_config.values():
        _refuse_touching(config)
        if way := begun_on_other_weights(config):
            raise UsageError(
                f"a draft-only adapter must leave the base model as it is, but init_lora_weights={way!r} changes it: "
                "make the adapter anew without it, on a base model that is loaded anew."
            )
    inner = unwrap(model)
    trained = [name for name, weight in inner.named_parameters() if weight.requires_grad and not _of_adapter(name)]
    if trained:
        raise UsageError(
            f"a draft-only adapter must leave the base model as it is, but {trained[0]} would be trained: call "
            "requires_grad_(False) on the weights of the base."
        )
    layers, named = len(decoder_layers(inner)), inner.config.get_text_config(decoder=True).num_hidden_layers
    if layers > named:
        raise UsageError(
            f"a draft-only adapter must leave the base model as it is, but the model has {layers} layers where its "
            f"configuration says {named}: load the base model anew."
        )


def _of_adapter(name: str) -> bool:
    return any(part.startswith(PREFIX) for part in name.split("."))


@torch.no_grad()
def _checksums(model) -> dict[str, tuple]:
    """
    For each weight and buffer of a model, but not of its adapter, its shape, its dtype and two sums over its bits.
    They take hardly any memory, where a copy would take as much as the model.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {
        name.replace(".base_layer.", "."): (tuple(tensor.shape), tensor.dtype, *_sums(tensor.detach()))
        for name, tensor in tensors
        if not _of_adapter(name)
    }


def _sums(tensor: torch.Tensor) -> tuple[int, ...]:
    if tensor.device.type == "meta" or not tensor.numel():
        return ()
    try:
        content = tensor.contiguous().flatten().view(torch.uint8)
    except (RuntimeError, NotImplementedError):  # quantised in a class of its own
        return ()
    whole = len(content) // 8 * 8
    aligned = content if content.storage_offset() % 8 == 0 else content.clone()  # a part of a larger buffer
    flat = aligned[:whole].view(torch.long)
    place = torch.arange(1, min(CHUNK, len(flat)) + 1, device=flat.device)  # a sum alone would not see an exchange
    sums = torch.zeros(2, dtype=torch.long, device=flat.device)
    for piece in flat.split(CHUNK):
        sums = 31 * sums + torch.stack([piece.sum(), (piece * place[: len(piece)]).sum()])
    return (*sums.tolist(), *content[whole:].tolist())


def _check_base(model, before: dict[str, tuple], config) -> None:
    """Raises `ValueError` where the base model of an adapter is not what it was before the adapter was made."""
    after = _checksums(unwrap(model))
    if after == before:
        return
    changed = next(name for name in [*after, *before] if after.get(name) != before.get(name))
    raise UsageError(
        f"a draft-only adapter must leave the base model as it is, but PEFT changed {changed} with this adapter "
        f"(init_lora_weights={config.init_lora_weights!r}): load the model anew, and leave out what changes it."
    )


@torch.no_grad()
def _check_layers(model) -> None:
    """Raises `ValueError` where a layer cannot tell which of its tokens are last in their row."""
    flat: list[str] = []
    inner = unwrap(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if any(hasattr(end, "lora_A") for end in ends):
        raise UsageError("a draft-only adapter cannot be on the embeddings or the head: name other target_modules.")
    if is_deepspeed_zero3_enabled():  # no process has the weights
        return
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: flat.append(name) if inputs[0].dim() != 3 else None
        )
        for name, module in inner.named_modules()
        if getattr(module, VARIANT, None)
    ]
    try:
        with outside_training(inner):
            inner(input_ids=torch.zeros(2, 3, dtype=torch.long, device=inner.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if flat:
        raise UsageError(
            f"a draft-only adapter cannot serve {flat[0]}, which gets its tokens without their rows (as the experts "
            "of a mixture do): name other target_modules, such as those of the attention."
        )


class NoisyTokens:
    """
    Tells the layers of a draft-only adapter which tokens of a batch it applies to: the noisy ones, which stand last.

    PEFT's layers are told by hooks, and pick the tokens out of the rows, which falls into many pieces when it is
    compiled. While `in_one_piece` is open they add to the last tokens of all rows what a mask lets through; while
    `in_two_forwards` is open, to all tokens of a forward or to none.

    Args:
        model: with the adapter.

    Attributes:
        on: whether the adapter applies to the forward that runs, while `in_two_forwards` is open.
    """

    def __init__(self, model):
        self.model = model
        self.mask: torch.Tensor | None = None  # [B, T, 1], true for noisy tokens, T of them in the longest row
        self.on = False
        self._in_one_piece = self._in_two_forwards = self._in_batch = False

    def inputs(self, rows: RowTensors, counts: list[int]) -> dict[str, Any]:
        """
        What the forward of a batch is given for its adapter.

        Args:
            rows: the tokens.
            counts: how many of them are noisy in each row.
        """
        if self._in_two_forwards:
            return {OFFSETS: []}  # else PEFT looks for them in the text
        noisy = rows.noisy
        if not (self._in_one_piece and self._in_batch):
            return {OFFSETS: counts}
        self.mask = noisy[:, noisy.shape[1] - max(1, *counts) :, None]
        return {OFFSETS: []}

    @contextmanager
    def one_batch(self):
        """While this is open, what the layers were told holds; afterwards they know nothing of it."""
        self._in_batch = True
        try:
            yield
        except BaseException:
            forget_offsets(self.model)
            raise
        finally:
            self._in_batch, self.mask = False, None

    @contextmanager
    def in_one_piece(self):
        """While this is open, the layers of the adapter compute in operations that compile into one graph."""
        self._in_one_piece = True
        try:
            with self._with_forwards(self._forward_of_some):
                yield
        finally:
            self._in_one_piece = False

    @contextmanager
    def in_two_forwards(self):
        """While this is open, the layers of the adapter apply it to whole forwards, as `on` says."""
        if self._in_two_forwards:
            yield
            return
        self._in_two_forwards = True
        try:
            with self._with_forwards(self._forward_of_all):
                yield
        finally:
            self._in_two_forwards = False

    @contextmanager
    def _with_forwards(self, make):
        """While this is open, the layers of the adapter have the forwards that `make(layer, forward)` returns."""
        layers = [module for module in self.model.modules() if getattr(module, VARIANT, None)]
        before = {layer: vars(layer).get("forward") for layer in layers}
        for layer, forward in before.items():
            layer.forward = make(layer, forward)
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _forward_of_all(self, layer, before):
        def forward(layer, x, *args, **kwargs):
            kwargs.pop(OFFSETS, None)
            result = layer.base_layer(x, *args, **kwargs)
            if not self.on or layer.disable_adapters:
                return result
            for share in _shares(layer, x):
                result = (result + share).to(result.dtype)
            return result

        return MethodType(forward, layer)

    def _forward_of_some(self, layer, before):
        def forward(layer, x, *args, **kwargs):
            if self.mask is None or layer.disable_adapters:
                return before(x, *args, **kwargs) if before else type(layer).forward(layer, x, *args, **kwargs)
            kwargs.pop(OFFSETS, None)
            result = layer.base_layer(x, *args, **kwargs)
            length = x.shape[1] - self.mask.shape[1]
            noisy = result[:, length:]
            for share in _shares(layer, x[:, length:]):
                noisy = (noisy + torch.where(self.mask, share, 0)).to(noisy.dtype)
            return torch.cat([result[:, :length], noisy], 1)

        return MethodType(forward, layer)  # bound, so that a copy of the layer computes with its own weights


def _shares(layer, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each adapter of a layer adds."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
            yield up(down(dropout(x.to(down.weight.dtype)))) * layer.scaling[name]
