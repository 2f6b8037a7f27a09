"""What training looks like from outside: tokens per forward by now, and whether the text is still the same."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..decoding.compat import without_router_logits
from ..decoding.errors import UsageError
from ..decoding.mixin import enable, unwrap
from .figures import Score, Tally
from .forward import outside_training
from .rows import iter_rows


logger = logging.get_logger(__name__)
IN_A_ROW = 10  # steps that may be skipped, less one
BEFORE = "_texts_before_training.json"  # what begins so is not pushed to the Hub


class DecodingCallback(TrainerCallback):
    """
    Decodes some prompts of the evaluation set with the settings that the checkpoint will have.

    Args:
        trainer: the trainer.
        prompts: what is decoded.
        before: their texts by the model as it was, where it is that no more.
        score: says of the text of a prompt and that of its completion whether it is right.
    """

    def __init__(
        self,
        trainer,
        prompts: list[list[int]],
        before: list[list[int]] | None = None,
        score: Score | None = None,
    ):
        self.trainer = trainer
        self.prompts = prompts
        self.before = before
        self.score = score

    def on_train_begin(self, args, state, control, **kwargs):
        """Remembers the texts of the model as it is, or as it was before the run that this one resumes."""
        file = Path(args.output_dir) / BEFORE
        if state.global_step and file.exists():
            known = json.loads(file.read_text())
            self.before = [known.get(json.dumps(prompt)) for prompt in self.prompts]
            self.before = None if None in self.before else self.before
        self._remember()
        if args.should_save and self.before is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({json.dumps(prompt): text for prompt, text in zip(self.prompts, self.before)}))

    def figures(self) -> dict[str, float]:
        """
        What `Tally.figures` says, with the settings that the checkpoint will have. Nothing where no process has the
        whole model.
        """
        if not self._can_decode():
            return {}
        self._remember()
        tally = Tally(self.score is not None)
        for prompt, before in zip(self.prompts, self.before):
            output = self._generate(prompt, decoding="jacobi", return_dict_in_generate=True)
            text = output.sequences[0, len(prompt) :].tolist()
            tally.add(text, output.jacobi_stats.forwards, self._text(prompt), before, self._is_right(prompt, text))
        return tally.figures()

    def _is_right(self, prompt: list[int], text: list[int]) -> bool:
        if self.score is None:
            return False
        decode = self.trainer.processing_class.decode
        return bool(self.score(*(decode(tokens, skip_special_tokens=True) for tokens in (prompt, text))))

    def _remember(self) -> None:
        if self.before is None and self._can_decode():
            self.before = [self._text(prompt) for prompt in self.prompts]

    def _can_decode(self) -> bool:
        return not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def _text(self, prompt: list[int]) -> list[int]:
        return self._generate(prompt, decoding="ar")[0, len(prompt) :].tolist()

    def _generate(self, prompt: list[int], **settings):
        """Greedy text."""
        if settings["decoding"] == "jacobi":
            settings["jacobi_config"] = self.trainer.jacobi_config
        with self.trainer.accelerator.autocast():
            return greedy(unwrap(self.trainer.model), prompt, self.trainer.args, **settings)


def greedy(model, prompt: list[int], args, **settings):
    """What `generate` returns for a prompt, as far as the arguments of the training say, and there are positions."""
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


def texts_of_base(model, prompts: list[list[int]], args) -> list[list[int]] | None:
    """
    The texts of a model that an adapter is about to change, in the precision of the training. `None` where one process
    is not going to have the whole model, and so never decodes.
    """
    if args.adapter_scope == "draft" or args.fsdp or args.deepspeed:
        return None
    if not getattr(model, "hf_device_map", None):
        model.to(args.device)
    with torch.autocast(model.device.type, torch.bfloat16 if args.bf16 else torch.float16, args.bf16 or args.fp16):
        return [greedy(model, prompt, args, decoding="ar")[0, len(prompt) :].tolist() for prompt in prompts]


def prompts_of(dataset, count: int) -> list[list[int]]:
    """The first `count` prompts of packed rows, if there are any; a text may do without a prompt."""
    if dataset is None or not count:
        return []
    found = list(islice(filter(None, map(prompt_of, iter_rows(dataset))), count))
    if not found:
        logger.warning("no row of the evaluation set has a prompt: there is no text to decode during evaluation.")
    return found


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """The prompt of the first sample of a packed row."""
    columns = zip(row["input_ids"], row["labels"], row["seq_ids"], row["block_ids"])
    return [int(token) for token, label, seq, block in columns if seq == 0 and block < 0 and label == -100]


class SkippingBrokenSteps(TrainerCallback):
    """
    Leaves weights and optimizer as they are in a step whose gradients are NaN or infinite, on all processes together.

    A gradient scaler (float16) does so by itself, and DeepSpeed takes steps of its own: neither is touched.

    Args:
        trainer: the trainer.

    Attributes:
        skipped: how many steps were left out.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.skipped = self._in_a_row = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Counts anew, or on from what the run logged that this one resumes."""
        logged = [line["skipped_steps"] for line in state.log_history if "skipped_steps" in line]
        self.skipped = logged[-1] if state.global_step and logged else 0
        self._in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Takes the gradients away, if they are broken: an optimizer passes over parameters that have none."""
        accelerator = self.trainer.accelerator
        if accelerator.scaler is not None or self.trainer.is_deepspeed_enabled:
            return
        parameters = [one for one in self.trainer.model.parameters() if one.grad is not None]
        broken = torch.zeros((), device=accelerator.device)
        for one in parameters:
            gradient = one.grad.to_local() if hasattr(one.grad, "to_local") else one.grad
            broken += (~gradient.isfinite().all()).to(broken)
        if not accelerator.reduce(broken, "sum").item():  # with weights spread over processes one alone may see it
            self._in_a_row = 0
            return
        for one in parameters:
            one.grad = None
        self.skipped += 1
        self._in_a_row += 1
        logger.warning(f"step {state.global_step + 1} is skipped: its gradients are not finite.")
        if self._in_a_row == IN_A_ROW:
            raise UsageError(
                f"the gradients of {IN_A_ROW} steps in a row are NaN or infinite: lower the learning rate, or train "
                "in float32; the weights are those before these steps."
            )
