"""PEFT adapters: for every token, or for drafts only (an activated LoRA on the noisy tokens, which end each row)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..decoding.compat import INVOCATION, OFFSETS, VARIANT, decoder_layers, forget_offsets
from ..decoding.draft_adapter import DRAFT_ONLY, begun_on_other_weights, is_draft_only, touching_base
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from .config import JacobiForcingConfig
from .forward import outside_training
from .mask import RowTensors


if TYPE_CHECKING:
    from peft import PeftConfig


PREFIX = "lora_"  # of the modules that hold a LoRA's weights in PEFT
CHUNK = 1 << 20  # eight-byte numbers summed at a time


def add_adapter(model, peft_config: PeftConfig | None, args: JacobiForcingConfig) -> torch.nn.Module:
    """
    Adds an adapter to a model.

    Args:
        model: the model.
        peft_config: the adapter's configuration; `None` returns the model unchanged.
        args: the training arguments.

    Raises:
        `ValueError`: the model, `peft_config` and `args.adapter_scope` do not fit together, or a draft-only adapter
            would change the base model.
    """
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise UsageError(
            "the model's adapter is merged into the weights and would not learn: call unmerge_adapter() first."
        )
    if peft_config is None:
        _check_present(model, args)
        return model
    _check_config(peft_config, getattr(model, "peft_config", {}), args)
    drafting = args.adapter_scope == "draft"
    if drafting:
        peft_config = _draft_only(peft_config)
    model = _prepare(model, args)
    before = _checksums(unwrap(model)) if drafting else {}
    adapted = _make(model, peft_config)
    if drafting:
        _check_base(adapted, before, peft_config)
        _check_layers(adapted)
    return adapted


def _check_present(model, args: JacobiForcingConfig) -> None:
    """Raises `ValueError` if the adapters that a model already has do not fit `adapter_scope`."""
    drafting = [is_draft_only(config) for config in getattr(model, "peft_config", {}).values()]
    if args.adapter_scope != "draft":
        if any(drafting):
            raise UsageError("the model has a draft-only adapter, which learns with adapter_scope='draft' only.")
        return
    if not (drafting and all(drafting)):
        raise UsageError(
            "adapter_scope='draft' trains a draft-only adapter: pass a `peft_config`, or a model with such an adapter."
        )
    _check_made(model)


def _check_config(peft_config: PeftConfig, present: dict[str, PeftConfig], args: JacobiForcingConfig) -> None:
    """Raises `ValueError` for an adapter that cannot be trained, or not with this `adapter_scope`."""
    from peft import LoraConfig, PeftConfig, PeftType

    if not isinstance(peft_config, PeftConfig):
        raise UsageError(f"`peft_config` must be a PEFT configuration, got {type(peft_config).__name__}.")
    if present:
        raise UsageError("the model already has an adapter: omit `peft_config`, or pass the base model.")
    if peft_config.is_prompt_learning:
        raise UsageError(
            f"Jacobi Forcing does not support virtual tokens, as {PeftType(peft_config.peft_type).value} adds: use a "
            "LoraConfig."
        )
    if args.adapter_scope != "draft":
        if getattr(peft_config, INVOCATION, None):
            raise UsageError(
                f"`{INVOCATION}` make an activated LoRA, which learns with adapter_scope='draft' only: drop them, or "
                "set it."
            )
        return
    if not isinstance(peft_config, LoraConfig):
        raise UsageError(f"adapter_scope='draft' needs a LoraConfig, got {type(peft_config).__name__}.")
    _refuse_touching(peft_config)
    if getattr(peft_config, "target_parameters", None):
        raise UsageError(
            "a draft-only adapter does not support `target_parameters`, such as the experts of a mixture, which get "
            "tokens without their rows: use target_modules, such as those of the attention."
        )


def _draft_only(peft_config: PeftConfig) -> PeftConfig:
    """A copy of a LoRA's configuration for drafts only."""
    made = copy.copy(peft_config)
    # With invocation tokens, PEFT applies the adapter to the last tokens of a row. It never looks for these.
    setattr(made, INVOCATION, list(DRAFT_ONLY))
    made.task_type = "CAUSAL_LM"
    return made


def _prepare(model, args: JacobiForcingConfig):
    """The model, ready for an adapter: quantised weights and activation checkpointing need some settings."""
    from peft import prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.activation_checkpointing)
    if args.activation_checkpointing:
        model.enable_input_require_grads()
    return model


def _make(model, peft_config: PeftConfig) -> torch.nn.Module:
    from peft import get_peft_model

    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:  # PEFT checks the configuration
        if INVOCATION not in str(error):
            raise UsageError(str(error)) from error
        raise UsageError(
            f"PEFT cannot make a draft-only adapter from this configuration ({error}): use a plain LoraConfig whose "
            "target_modules are linear layers, such as those of the attention."
        ) from error


def _refuse_touching(config: PeftConfig) -> None:
    """Raises `ValueError` for the configuration of an adapter that changes parts of the base model."""
    if touching := touching_base(config):
        raise UsageError(f"a draft-only adapter must leave the base model as it is: drop {', '.join(touching)}.")


def _check_made(model) -> None:
    """
    Raises `ValueError` for a draft-only adapter, made elsewhere, that is known to have changed its base model. The
    earlier state of the base is unknown: only the configuration, the layers and the trainable weights can be checked.
    """
    for config in model.peft_config.values():
        _refuse_touching(config)
        if way := begun_on_other_weights(config):
            raise UsageError(
                f"a draft-only adapter must leave the base model as it is, but init_lora_weights={way!r} changes it: "
                "reload the base model and make the adapter again without it."
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
            f"configuration says {named}: reload the base model."
        )


def _of_adapter(name: str) -> bool:
    return any(part.startswith(PREFIX) for part in name.split("."))


@torch.no_grad()
def _checksums(model: PreTrainedModel) -> dict[str, tuple]:
    """
    The shape and dtype of each weight and buffer of a model, without its adapter, and two sums over its bits. A copy
    would take as much memory as the model; the sums take almost none.
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
    except (RuntimeError, NotImplementedError):  # a quantised tensor subclass
        return ()
    whole = len(content) // 8 * 8
    aligned = content if content.storage_offset() % 8 == 0 else content.clone()  # a part of a larger buffer
    flat = aligned[:whole].view(torch.long)
    place = torch.arange(1, min(CHUNK, len(flat)) + 1, device=flat.device)  # a plain sum would miss a swap
    sums = torch.zeros(2, dtype=torch.long, device=flat.device)
    for piece in flat.split(CHUNK):
        sums = 31 * sums + torch.stack([piece.sum(), (piece * place[: len(piece)]).sum()])
    return (*sums.tolist(), *content[whole:].tolist())


def _check_base(model, before: dict[str, tuple], config: PeftConfig) -> None:
    """Raises `ValueError` if making an adapter changed the base model."""
    after = _checksums(unwrap(model))
    if after == before:
        return
    changed = next(name for name in [*after, *before] if after.get(name) != before.get(name))
    raise UsageError(
        f"a draft-only adapter must leave the base model as it is, but PEFT changed {changed} with this adapter "
        f"(init_lora_weights={getattr(config, 'init_lora_weights', None)!r}): reload the model, and drop the setting "
        "that changes it."
    )


@torch.no_grad()
def _check_layers(model) -> None:
    """Raises `ValueError` if a layer cannot tell which of its tokens come last in their row."""
    flat: list[str] = []
    inner = unwrap(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if any(hasattr(end, "lora_A") for end in ends):
        raise UsageError("a draft-only adapter cannot be on the embeddings or the head: use other target_modules.")
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
            f"a draft-only adapter does not support {flat[0]}, which gets its tokens without their rows (as the "
            "experts of a mixture do): use other target_modules, such as those of the attention."
        )


class NoisyTokens:
    """
    Tells the layers of a draft-only adapter which tokens of a batch it applies to: the noisy ones, which end each row.

    PEFT tells its layers through hooks, and picks the tokens by boolean indices: each layer then waits for the device
    and breaks into pieces when compiled. While `in_one_piece` is open, layers compute the adapter's share for the last
    tokens of all rows and mask it instead. While `in_two_forwards` is open, the adapter applies to whole forwards.

    Args:
        model: the model with the adapter.

    Attributes:
        on: whether the adapter applies to the current forward, while `in_two_forwards` is open; `None` between
            batches, where layers run as they do otherwise.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.mask: torch.Tensor | None = None  # [B, T, 1], true for noisy tokens; the longest row has T of them
        self.on: bool | None = None
        self._in_one_piece = self._in_two_forwards = self._in_batch = False

    def inputs(self, rows: RowTensors, counts: list[int]) -> dict[str, Any]:
        """
        The arguments that a batch's forward needs for the adapter.

        Args:
            rows: the tokens.
            counts: the number of noisy tokens in each row.
        """
        if self._in_two_forwards:
            return {OFFSETS: []}  # without it, PEFT searches the text for invocation tokens
        noisy = rows.noisy
        if not (self._in_one_piece and self._in_batch):
            return {OFFSETS: counts}
        self.mask = noisy[:, noisy.shape[1] - max(1, *counts) :, None]
        return {OFFSETS: []}

    @contextmanager
    def one_batch(self):
        """While this is open, the layers keep what `inputs` told them; afterwards they forget it."""
        self._in_batch = True
        try:
            yield
        except BaseException:
            forget_offsets(self.model)
            raise
        finally:
            self._in_batch, self.mask, self.on = False, None, None

    @contextmanager
    def in_one_piece(self):
        """While this is open, the adapter's layers neither wait for the device nor break a compiled graph."""
        if self._in_one_piece:
            yield
            return
        self._in_one_piece = True
        try:
            with self._with_forwards(self._forward_of_some):
                yield
        finally:
            self._in_one_piece = False

    @contextmanager
    def in_two_forwards(self):
        """While this is open, the adapter applies to whole forwards, according to `on`."""
        if self._in_two_forwards:
            try:
                yield
            finally:
                self.on = self.on if self._in_batch else None
            return
        self._in_two_forwards = True
        try:
            with self._with_forwards(self._forward_of_all):
                yield
        finally:
            self._in_two_forwards, self.on = False, None

    @contextmanager
    def _with_forwards(self, make: Callable[[Any, Callable | None], MethodType]):
        """While this is open, each layer of the adapter runs the forward that `make(layer, forward)` returns."""
        layers = [module for module in self.model.modules() if getattr(module, VARIANT, None)]
        before: dict[Any, Callable | None] = {layer: vars(layer).get("forward") for layer in layers}
        for layer, forward in before.items():
            layer.forward = make(layer, forward)
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _forward_of_all(self, layer, before: Callable | None) -> MethodType:
        def forward(layer, x, *args, **kwargs):
            if self.on is None:
                return before(x, *args, **kwargs) if before else type(layer).forward(layer, x, *args, **kwargs)
            kwargs.pop(OFFSETS, None)
            result = layer.base_layer(x, *args, **kwargs)
            if not self.on or layer.disable_adapters:
                return result
            for share in _shares(layer, x):
                result = (result + share).to(result.dtype)
            return result

        return MethodType(forward, layer)

    def _forward_of_some(self, layer, before: Callable | None) -> MethodType:
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
    """What each adapter of a layer adds to its output."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
            yield up(down(dropout(x.to(down.weight.dtype)))) * layer.scaling[name]
