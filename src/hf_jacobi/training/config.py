"""`JacobiForcingConfig`: how a model is trained to decode in parallel."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from transformers import TrainingArguments

from ..decoding.compat import name_checkpointing, parsed_as_dict
from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError
from ..trajectories.checks import check_real, check_whole
from .losses import CONSISTENCY_LOSSES


ADAPTER_SCOPES = ("all", "draft")
# Of `TrainingArguments`, which leaves them to whatever stumbles over them: least and most.
RANGES = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "adam_beta1": (0, 0.999999999),
    "adam_beta2": (0, 0.999999999),
    "adam_epsilon": (0, math.inf),
}
COUNTS = (("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1))


@parsed_as_dict("model_init_kwargs", "jacobi_config")
@dataclass
class JacobiForcingConfig(TrainingArguments):
    """
    Arguments of [`JacobiForcingTrainer`]: those of `transformers.TrainingArguments`, and

    > Parameters that control the loss

    Args:
        ar_loss_weight (`float`, defaults to 1.0):
            Lambda, the weight of the autoregressive loss beside the consistency loss (paper, section 3.2). What a
            model unlearns, a larger one keeps.
        ar_loss_weight_start (`float`, *optional*):
            Lambda at the first step, from which it grows to `ar_loss_weight` at the last, slowly at first: its
            logarithm grows with the square of the steps done. A large weight keeps a model from learning to draft: so
            it learns that first, and its text is mended later.
        consistency_loss (`str`, defaults to `"soft"`):
            `"soft"`, `"kl"`, `"reverse_kl"`, `"jsd"`, `"hard"`, or what is accepted of a draft: `"tv"` (total
            variation) or `"lk"`; see `losses.consistency_loss`.
        temperature (`float`, defaults to 1.0):
            T of the consistency loss.
        accept_cut (`bool`, defaults to `False`):
            Of each noisy block only the positions up to the first one whose prediction is wrong, and that one, count
            in the consistency loss (Spec-AUF, arXiv 2607.01893). It is still divided by the number of all noisy
            positions, which is known before the forward pass. What is logged as `consistency_loss` is of all of them.
        block_position_weight (`float`, defaults to 1.0):
            What each position of a noisy block, from the first wrong token on, counts in the consistency loss of what
            the one before it does; above 0.
        within_block (`bool`, defaults to `False`):
            Leave out the last token of each noisy block, whose prediction belongs to the next block, as the authors'
            code does.
        loss_chunk_size (`int`, defaults to 512):
            Tokens whose logits are held in memory at a time.

    `label_smoothing_factor` applies to the autoregressive loss.

    > Parameters that control the model

    Args:
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained`, when the model is given by name.
        adapter_scope (`"all"` or `"draft"`, defaults to `"all"`):
            With a `peft_config`: whether the adapter applies to every token, or to noisy ones alone. With `"draft"`
            the text comes from the untouched base model, so it stays what it was, token for token; the adapter only
            drafts.
        compile_layers (`bool`, defaults to `False`):
            Compile each decoder layer with `torch.compile` while training; takes the place of `torch_compile`, which
            cannot follow the losses into the model. Worth it where steps are short and many.
        activation_checkpointing (`bool`, defaults to `False`):
            transformers' own, which it calls `gradient_checkpointing` before 5.23: this name works with every version.

    > Parameters that control decoding, while evaluating and in the saved checkpoint

    Args:
        block_size (`int`, *optional*):
            n that the data is expected to have; refused if it has another one. Left out, any.
        jacobi_config (`dict`, *optional*):
            Settings of `JacobiConfig` that the saved checkpoint decodes with. Left out: blocks as long as those of the
            data, a sliding window.
        eval_prompts (`int`, defaults to 8):
            How many prompts of the evaluation set are decoded at each evaluation, for tokens per forward and for the
            agreement with the text of the model as it was before training; 0 for none.
        eval_max_new_tokens (`int`, defaults to 128):
            How far.

    > Parameters that control the data

    Args:
        refresh_steps (`int`, *optional*):
            Every so many steps the model that is being trained writes fresh trajectories, which take the place of the
            rows; needs the trainer's `refresh`.

    Raises:
        `ValueError`: a value is out of range.
    """

    ar_loss_weight: float = field(default=1.0, metadata={"help": "weight of the autoregressive loss (lambda)"})
    ar_loss_weight_start: float | None = field(
        default=None, metadata={"help": "lambda at the first step, if it is to grow to ar_loss_weight"}
    )
    consistency_loss: str = field(default="soft", metadata={"help": "one of soft, kl, reverse_kl, jsd, tv, lk, hard"})
    temperature: float = field(default=1.0, metadata={"help": "temperature of the consistency loss"})
    accept_cut: bool = field(
        default=False, metadata={"help": "count the positions of a noisy block up to the first wrong prediction alone"}
    )
    block_position_weight: float = field(
        default=1.0, metadata={"help": "what a position of a noisy block counts of what the one before it does"}
    )
    within_block: bool = field(default=False, metadata={"help": "leave out the last token of each noisy block"})
    loss_chunk_size: int = field(default=512, metadata={"help": "tokens whose logits are held at a time"})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "arguments of from_pretrained, as JSON"}
    )
    adapter_scope: str = field(default="all", metadata={"help": "all, or draft: the adapter sees noisy tokens alone"})
    compile_layers: bool = field(default=False, metadata={"help": "compile each decoder layer with torch.compile"})
    block_size: int | None = field(default=None, metadata={"help": "block size that the data is expected to have"})
    jacobi_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "settings that the checkpoint decodes with, as JSON"}
    )
    eval_prompts: int = field(default=8, metadata={"help": "prompts decoded at each evaluation"})
    eval_max_new_tokens: int = field(default=128, metadata={"help": "how far they are decoded"})
    refresh_steps: int | None = field(
        default=None, metadata={"help": "steps between two refreshes of the trajectories (in Python, with `refresh`)"}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "compute activations again in the backward pass, to save memory",
            "nargs": "?",
            "const": True,
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "has no effect: every column is used"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two logs"})

    def __post_init__(self):
        name_checkpointing(self)
        self._check_numbers()
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise UsageError(f"an argument is no JSON: {error.doc!r:.80} ({error}).") from error
        except ValueError as error:  # of transformers' own checks of the arguments
            raise UsageError(str(error)) from error
        if not isinstance(self.model_init_kwargs, (dict, type(None))):
            raise UsageError(
                f"`model_init_kwargs` must be a dictionary, or JSON of one, got {self.model_init_kwargs!r:.80}."
            )
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0  # which `Trainer` takes for no clipping, and `None` for an error
        if self.consistency_loss not in CONSISTENCY_LOSSES:
            raise UsageError(f"`consistency_loss` must be one of {CONSISTENCY_LOSSES}, got {self.consistency_loss!r}.")
        if self.adapter_scope not in ADAPTER_SCOPES:
            raise UsageError(f"`adapter_scope` must be one of {ADAPTER_SCOPES}, got {self.adapter_scope!r}.")
        if self.temperature <= 0:
            raise UsageError(f"`temperature` must be positive, got {self.temperature}.")
        if self.block_position_weight <= 0:
            raise UsageError(f"`block_position_weight` must be above 0, got {self.block_position_weight}.")
        if self.ar_loss_weight < 0:
            raise UsageError(f"`ar_loss_weight` must not be negative, got {self.ar_loss_weight}.")
        if self.ar_loss_weight_start is not None and not 0 < self.ar_loss_weight_start <= self.ar_loss_weight:
            raise UsageError(
                "`ar_loss_weight_start` must be above 0 and at most `ar_loss_weight` "
                f"({self.ar_loss_weight}), got {self.ar_loss_weight_start}."
            )
        if self.jacobi_config is not None:
            self.jacobi_config = JacobiConfig.coerce(self.jacobi_config).to_dict()
        if self.torch_compile:
            raise UsageError(
                "`torch_compile` cannot follow the losses into the model: pass compile_layers=True instead."
            )
        self.remove_unused_columns = False
        if not torch.accelerator.is_available():  # torch warns of it once a training
            self.dataloader_pin_memory = False

    def _check_numbers(self) -> None:
        """Refuses numbers that are NaN or infinite, which pass comparisons; infinite clipping only measures norms."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, Real) or math.isfinite(value):
                continue
            if not (one.name == "max_grad_norm" and value == math.inf):
                raise UsageError(f"`{one.name}` must be a finite number, got {value}.")
        for name in ("ar_loss_weight", "temperature", "block_position_weight", *RANGES):
            check_real(name, getattr(self, name))
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"`{name}` must be from {least} to {most}, got {getattr(self, name)}.")
        if self.ar_loss_weight_start is not None:
            check_real("ar_loss_weight_start", self.ar_loss_weight_start)
        if self.block_size is not None:
            check_whole("block_size", self.block_size, 1)
        if self.refresh_steps is not None:
            check_whole("refresh_steps", self.refresh_steps, 1)
        for name, least in (("loss_chunk_size", 1), ("eval_prompts", 0), ("eval_max_new_tokens", 1), *COUNTS):
            check_whole(name, getattr(self, name), least)
