"""`JacobiForcingConfig`: the arguments of training a model to decode in parallel."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments

from ..decoding.compat import has_only_cpu, name_checkpointing, parsed_as_dict
from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError, check_range
from ..trajectories.checks import check_real, check_whole
from .losses import CONSISTENCY_LOSSES


ADAPTER_SCOPES = ("all", "draft")
# Smallest and largest values of arguments that `TrainingArguments` does not check.
RANGES: dict[str, tuple[float, float | None]] = {
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "label_smoothing_factor": (0, 1),
    "adam_beta1": (0, 0.999999999),
    "adam_beta2": (0, 0.999999999),
    "adam_epsilon": (0, None),
}
POSITIVE = ("temperature", "block_position_weight")
COUNTS = {  # whole numbers, and the smallest value of each
    "loss_chunk_size": 1,
    "eval_prompts": 0,
    "eval_max_new_tokens": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


@parsed_as_dict("model_init_kwargs", "jacobi_config")
@dataclass
class JacobiForcingConfig(TrainingArguments):
    """
    The arguments of [`JacobiForcingTrainer`]: those of `transformers.TrainingArguments`, and these.

    > Parameters that control the loss

    Args:
        ar_loss_weight (`float`, defaults to 1.0):
            Lambda, the weight of the autoregressive loss relative to the consistency loss (paper, section 3.2). The
            larger it is, the better the model keeps its text.
        ar_loss_weight_start (`float`, *optional*):
            Lambda at the first step. It grows to `ar_loss_weight` at the last step, slowly at first: its logarithm
            grows with the square of the step. A large weight hinders learning to draft, so the model first learns to
            draft, and later restores its text.
        consistency_loss (`str`, defaults to `"soft"`):
            `"soft"`, `"kl"`, `"reverse_kl"`, `"jsd"` or `"hard"`, or, to optimise the acceptance of drafts, `"tv"`
            (total variation) or `"lk"`; see `losses.consistency_loss`.
        temperature (`float`, defaults to 1.0):
            T of the consistency loss.
        accept_cut (`bool`, defaults to `False`):
            Restrict the consistency loss to the positions of each noisy block up to and including the first one whose
            prediction is wrong (Spec-AUF, arXiv 2607.01893). The loss is still divided by the number of all noisy
            positions, which is known before the forward pass. The logged `consistency_loss` covers all positions.
        block_position_weight (`float`, defaults to 1.0):
            The weight in the consistency loss of each position of a noisy block, from the first wrong token on,
            relative to the position before it; above 0.
        within_block (`bool`, defaults to `False`):
            Omit the last token of each noisy block, whose prediction belongs to the next block, as the authors' code
            does.
        loss_chunk_size (`int`, defaults to 512):
            The number of tokens whose logits are in memory at a time.

    `label_smoothing_factor` applies to the autoregressive loss. `bf16` needs no `use_cpu` where there is only a CPU.

    > Parameters that control the model

    Args:
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, for a model given by name.
        adapter_scope (`"all"` or `"draft"`, defaults to `"all"`):
            Whether the adapter applies to every token, or only to noisy ones. With `"draft"`, the text comes from the
            unchanged base model, token for token, and the adapter only drafts.
        compile_layers (`bool`, defaults to `False`):
            Compile each decoder layer with `torch.compile` during training. It replaces `torch_compile`, which does
            not support losses computed inside the model. It pays if steps are short and many.
        activation_checkpointing (`bool`, defaults to `False`):
            As in transformers, where it is `gradient_checkpointing` before 5.23; this name works with every version.

    > Parameters that control decoding, during evaluation and in the saved checkpoint

    Args:
        block_size (`int`, *optional*):
            The block size n that the data must have. Any by default.
        jacobi_config (`dict`, *optional*):
            Settings of `JacobiConfig` that the saved checkpoint decodes with. By default, blocks as long as those of
            the data, and a sliding window.
        eval_prompts (`int`, defaults to 8):
            The number of prompts of the evaluation set to decode at each evaluation, which gives the tokens per
            forward and the agreement with the text of the model before training; 0 for none.
        eval_max_new_tokens (`int`, defaults to 128):
            The number of tokens to decode after each prompt.

    > Parameters that control the data

    Args:
        refresh_steps (`int`, *optional*):
            The number of steps after which new trajectories of the model in training replace the rows, again and
            again; needs the trainer's `refresh`.

    Raises:
        `ValueError`: a value is out of range.
    """

    ar_loss_weight: float = field(default=1.0, metadata={"help": "weight of the autoregressive loss (lambda)"})
    ar_loss_weight_start: float | None = field(
        default=None, metadata={"help": "lambda at the first step, from which it grows to ar_loss_weight"}
    )
    consistency_loss: str = field(default="soft", metadata={"help": "one of soft, kl, reverse_kl, jsd, tv, lk, hard"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the consistency loss"})
    accept_cut: bool = field(
        default=False, metadata={"help": "count only positions of a noisy block up to the first wrong prediction"}
    )
    block_position_weight: float = field(
        default=1.0, metadata={"help": "weight of a position of a noisy block relative to the one before it"}
    )
    within_block: bool = field(default=False, metadata={"help": "omit the last token of each noisy block"})
    loss_chunk_size: int = field(default=512, metadata={"help": "tokens whose logits are in memory at a time"})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "arguments of from_pretrained, as JSON"}
    )
    adapter_scope: str = field(default="all", metadata={"help": "all, or draft: the adapter sees noisy tokens only"})
    compile_layers: bool = field(default=False, metadata={"help": "compile each decoder layer with torch.compile"})
    block_size: int | None = field(default=None, metadata={"help": "block size that the data must have"})
    jacobi_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "settings that the checkpoint decodes with, as JSON"}
    )
    eval_prompts: int = field(default=8, metadata={"help": "prompts decoded at each evaluation"})
    eval_max_new_tokens: int = field(default=128, metadata={"help": "tokens decoded after each of them"})
    refresh_steps: int | None = field(
        default=None, metadata={"help": "steps between two refreshes of the trajectories (in Python, with `refresh`)"}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "recompute activations in the backward pass, to save memory",
            "nargs": "?",
            "const": True,
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "has no effect: every column is used"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two logs"})

    def __post_init__(self) -> None:
        name_checkpointing(self)
        self._check_numbers()
        self._check_choices()
        if self.bf16 and has_only_cpu() and not self.deepspeed and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            self.use_cpu = True  # without it, transformers refuses bfloat16 there
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise UsageError(f"an argument must be JSON, got {error.doc!r:.80} ({error}).") from error
        except ValueError as error:  # transformers checks its own arguments
            raise UsageError(str(error)) from error
        if not isinstance(self.model_init_kwargs, (dict, type(None))):
            raise UsageError(
                f"`model_init_kwargs` must be a dictionary, or JSON of one, got {self.model_init_kwargs!r:.80}."
            )
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # `Trainer` does not clip with 0, and fails with `None`
        if isinstance(self.jacobi_config, str):
            raise UsageError(f"`jacobi_config` must be a dictionary, or JSON of one, got {self.jacobi_config!r:.80}.")
        if self.jacobi_config is not None:
            self.jacobi_config = JacobiConfig.coerce(self.jacobi_config).to_dict()
        if self.torch_compile:
            raise UsageError(
                "`torch_compile` does not support losses computed inside the model: set compile_layers=True instead."
            )
        self.remove_unused_columns = False
        if not torch.accelerator.is_available():  # torch would warn once per training
            self.dataloader_pin_memory = False

    def _check_choices(self) -> None:
        if self.consistency_loss not in CONSISTENCY_LOSSES:
            raise UsageError(f"`consistency_loss` must be one of {CONSISTENCY_LOSSES}, got {self.consistency_loss!r}.")
        if self.adapter_scope not in ADAPTER_SCOPES:
            raise UsageError(f"`adapter_scope` must be one of {ADAPTER_SCOPES}, got {self.adapter_scope!r}.")

    def _check_numbers(self) -> None:
        """Refuses numbers out of range. NaN passes comparisons; an infinite `max_grad_norm` only measures norms."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, Real) or math.isfinite(value):
                continue
            if not (one.name == "max_grad_norm" and value == math.inf):
                raise UsageError(f"`{one.name}` must be a finite number, got {value}.")
        for name in ("ar_loss_weight", *POSITIVE, *RANGES):
            check_real(name, getattr(self, name))
        for name in POSITIVE:
            check_range(f"`{name}`", getattr(self, name), above=0)
        for name, (least, most) in RANGES.items():
            check_range(f"`{name}`", getattr(self, name), least, most)
        for name, smallest in COUNTS.items():
            check_whole(name, getattr(self, name), smallest)
        for name in ("block_size", "refresh_steps"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        self._check_weights()

    def _check_weights(self) -> None:
        if self.ar_loss_weight < 0:
            raise UsageError(f"`ar_loss_weight` must not be negative, got {self.ar_loss_weight}.")
        if self.ar_loss_weight_start is None:
            return
        check_real("ar_loss_weight_start", self.ar_loss_weight_start)
        if not 0 < self.ar_loss_weight_start <= self.ar_loss_weight:
            raise UsageError(
                "`ar_loss_weight_start` must be above 0 and at most `ar_loss_weight` "
                f"({self.ar_loss_weight}), got {self.ar_loss_weight_start}."
            )
