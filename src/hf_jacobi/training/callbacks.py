"""What training looks like from outside: tokens per forward by now, and whether the text is still the same."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch
from transformers import TrainerCallback

from ..decoding.drafting import agreement
from ..decoding.mixin import enable, unwrap
from .forward import outside_training


BEFORE = "_texts_before_training.json"  # what begins so is not pushed to the Hub


class DecodingCallback(TrainerCallback):
    """
    Decodes some prompts of the evaluation set with the settings that the checkpoint will have.

    Args:
        trainer: the trainer; its arguments say how many prompts, and how far.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        data = trainer.eval_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        self.prompts = [prompt_of(row) for row in islice(data, trainer.args.eval_prompts)]
        self.before: list[list[int]] | None = None

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
        `tokens_per_forward`, and `agreement`: the share of tokens that are those of the model's greedy text before
        training, up to the first that is not. Both texts are written one token at a time: in half precision Jacobi
        decoding settles ties otherwise, which no training did. Nothing where no process has the whole model.
        """
        if not self._can_decode():
            return {}
        self._remember()
        tokens = forwards = same = total = 0
        for prompt, text in zip(self.prompts, self.before):
            output = self._generate(prompt, decoding="jacobi", return_dict_in_generate=True)
            tokens += output.jacobi_stats.new_tokens
            forwards += output.jacobi_stats.forwards
            same += agreement(self._text(prompt), text)
            total += len(text)
        return {"tokens_per_forward": tokens / forwards, "agreement": same / total}

    def _remember(self) -> None:
        if self.before is None and self._can_decode():
            self.before = [self._text(prompt) for prompt in self.prompts]

    def _can_decode(self) -> bool:
        """A model whose weights are spread over processes cannot be decoded by one of them."""
        return bool(self.prompts) and not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def _text(self, prompt: list[int]) -> list[int]:
        return self._generate(prompt, decoding="ar")[0, len(prompt) :].tolist()

    def _generate(self, prompt: list[int], **settings):
        """Greedy text."""
        model = enable(unwrap(self.trainer.model))
        inputs = torch.tensor([prompt], device=model.device)
        if settings["decoding"] == "jacobi":
            settings["jacobi_config"] = self.trainer.jacobi_config
        table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = self.trainer.args.eval_max_new_tokens if table is None else table - len(prompt)
        with outside_training(model), self.trainer.accelerator.autocast():
            return model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max(1, min(room, self.trainer.args.eval_max_new_tokens)),
                do_sample=False,
                use_cache=True,
                **settings,
            )


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """The prompt of the first sample of a packed row."""
    columns = zip(row["input_ids"], row["labels"], row["seq_ids"], row["block_ids"])
    return [token for token, label, seq, block in columns if seq == 0 and block < 0 and label == -100]
