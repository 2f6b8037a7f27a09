"""Callbacks of a training: decoding at each evaluation, and skipping steps with broken gradients."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..decoding.compat import without_router_logits
from ..decoding.errors import UsageError
from ..decoding.mixin import enable, unwrap
from .figures import Score, Tally
from .forward import outside_training
from .rows import iter_rows


if TYPE_CHECKING:
    from .config import JacobiForcingConfig
    from .trainer import JacobiForcingTrainer


logger = logging.get_logger(__name__)
IN_A_ROW = 10  # skipped steps that end the training
BEFORE = "_texts_before_training.json"  # the underscore keeps it off the Hub


class DecodingCallback(TrainerCallback):
    """
    Decodes some prompts of the evaluation set with the settings that the checkpoint will have.

    Args:
        trainer: the trainer.
        prompts: the prompts, as token ids.
        before: the original model's texts, if an adapter has changed it since.
        score: tells from the text of a prompt and that of its completion whether the answer is correct.
    """

    def __init__(
        self,
        trainer: JacobiForcingTrainer,
        prompts: list[list[int]],
        before: list[list[int]] | None = None,
        score: Score | None = None,
    ):
        self.trainer = trainer
        self.prompts = prompts
        self.before = before
        self.score = score

    def on_train_begin(self, args, state, control, **kwargs):
        """Stores the texts of the model before training; a resumed run reads those of the run that it resumes."""
        file = Path(args.output_dir) / BEFORE
        if state.global_step and file.exists():
            known = json.loads(file.read_text())
            texts = [known.get(json.dumps(prompt)) for prompt in self.prompts]
            self.before = None if None in texts else texts
        self._remember()
        if args.should_save and self.before is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({json.dumps(prompt): text for prompt, text in zip(self.prompts, self.before)}))

    def figures(self) -> dict[str, float]:
        """
        The figures of `Tally.figures`, decoded with the settings that the checkpoint will have. Empty if no process
        has the whole model.
        """
        self._remember()
        if self.before is None or not self._can_decode():
            return {}
        tally = Tally(self.score is not None)
        for prompt, before in zip(self.prompts, self.before):
            output = self._generate(prompt, decoding="jacobi", return_dict_in_generate=True)
            text = output.sequences[0, len(prompt) :].tolist()
            tally.add(text, output.jacobi_stats.forwards, self._text(prompt), before, self._is_right(prompt, text))
        return tally.figures()

    def _is_right(self, prompt: list[int], text: list[int]) -> bool:
        if self.score is None:
            return False
        tokenizer: Any = self.trainer.processing_class  # `check_score` requires one
        decode = tokenizer.decode
        return bool(self.score(*(decode(tokens, skip_special_tokens=True) for tokens in (prompt, text))))

    def _remember(self) -> None:
        if self.before is None and self._can_decode():
            self.before = [self._text(prompt) for prompt in self.prompts]

    def _can_decode(self) -> bool:
        return not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def _text(self, prompt: list[int]) -> list[int]:
        return self._generate(prompt, decoding="ar")[0, len(prompt) :].tolist()

    def _generate(self, prompt: list[int], **settings) -> Any:
        if settings["decoding"] == "jacobi":
            settings["jacobi_config"] = self.trainer.jacobi_config
        with self.trainer.accelerator.autocast():
            return greedy(unwrap(self.trainer.model), prompt, self.trainer.args, **settings)


def greedy(model, prompt: list[int], args: JacobiForcingConfig, **settings) -> Any:
    """
    What `generate` returns for a prompt with greedy decoding. It generates up to `args.eval_max_new_tokens` tokens, or
    as many as the model has positions for.
    """
    model = enable(model)
    inputs = torch.tensor([prompt], device=model.device)
    table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = args.eval_max_new_tokens if table is None else table - len(prompt)
    with outside_training(model), without_router_logits(model):
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max(1, min(room, args.eval_max_new_tokens)),
            do_sample=False,
            use_cache=True,
            **settings,
        )


def texts_of_base(model, prompts: list[list[int]], args: JacobiForcingConfig) -> list[list[int]] | None:
    """
    The texts of a model that an adapter is about to change, in the precision of the training. `None` if the adapter
    leaves texts unchanged, or if no process will have the whole model and be able to decode.
    """
    if args.adapter_scope == "draft" or args.fsdp or args.deepspeed:
        return None
    if not getattr(model, "hf_device_map", None):
        model.to(args.device)
    with torch.autocast(model.device.type, torch.bfloat16 if args.bf16 else torch.float16, args.bf16 or args.fp16):
        return [greedy(model, prompt, args, decoding="ar")[0, len(prompt) :].tolist() for prompt in prompts]


def prompts_of(dataset, count: int) -> list[list[int]]:
    """The first `count` prompts of packed rows, or fewer: texts without a prompt are passed over."""
    if dataset is None or not count:
        return []
    found = list(islice(filter(None, map(prompt_of, iter_rows(dataset))), count))
    if not found:
        logger.warning("no row of the evaluation set has a prompt: evaluation decodes nothing.")
    return found


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """The prompt of the first sample of a packed row."""
    columns = zip(row["input_ids"], row["labels"], row["seq_ids"], row["block_ids"])
    return [int(token) for token, label, seq, block in columns if seq == 0 and block < 0 and label == -100]


class SkippingBrokenSteps(TrainerCallback):
    """
    Leaves weights and optimizer unchanged in a step whose gradients are NaN or infinite, on all processes together.

    It does not interfere with a gradient scaler (float16), which does the same, nor with DeepSpeed, which takes its
    own steps.

    Args:
        trainer: the trainer.

    Attributes:
        skipped: the number of skipped steps.
    """

    def __init__(self, trainer: JacobiForcingTrainer):
        self.trainer = trainer
        self.skipped = self._in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts counting at 0, or where the run that this one resumes stopped."""
        logged = [line["skipped_steps"] for line in state.log_history if "skipped_steps" in line]
        self.skipped = logged[-1] if state.global_step and logged else 0
        self._in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Removes broken gradients: an optimizer skips parameters that have none."""
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None or self.trainer.is_deepspeed_enabled:
            return
        parameters = [one for one in self.trainer.model.parameters() if one.grad is not None]
        broken = torch.zeros((), device=accelerator.device)
        for one in parameters:
            gradient = one.grad.to_local() if hasattr(one.grad, "to_local") else one.grad
            broken += (~gradient.isfinite().all()).to(broken)
        if not accelerator.reduce(broken, "sum").item():  # with sharded weights, perhaps one process sees it
            self._in_a_row = 0
            return
        for one in parameters:
            one.grad = None
        self.skipped += 1
        self._in_a_row += 1
        logger.warning(f"step {state.global_step + 1} was skipped: its gradients are not finite.")
        if self._in_a_row == IN_A_ROW:
            raise UsageError(
                f"the gradients of {IN_A_ROW} steps in a row are NaN or infinite: lower the learning rate, or train "
                "in float32; the weights are as they were before these steps."
            )
