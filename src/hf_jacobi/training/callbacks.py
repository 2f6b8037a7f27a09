"""What training looks like from outside: tokens per forward by now, and whether the text is still the same."""

from __future__ import annotations

from itertools import islice

import torch
from transformers import TrainerCallback

from ..decoding.blocks import agreement
from ..decoding.mixin import enable, unwrap


class DecodingCallback(TrainerCallback):
    """
    At each evaluation, decodes some prompts of the evaluation set with the settings that the checkpoint will have.

    Adds `eval_tokens_per_forward`, and `eval_agreement`: the share of tokens that are those of the model's greedy text
    before training, up to the first that is not.

    Args:
        trainer: the trainer; its arguments say how many prompts, and how far.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.prompts = [prompt_of(row) for row in islice(trainer.eval_dataset, trainer.args.eval_prompts)]
        self.before: list[list[int]] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._remember()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self._can_decode():
            return
        self._remember()
        tokens = forwards = same = total = 0
        for prompt, text in zip(self.prompts, self.before):
            output = self._generate(prompt, decoding="jacobi", return_dict_in_generate=True)
            tokens += output.jacobi_stats.new_tokens
            forwards += output.jacobi_stats.forwards
            same += agreement(output.sequences[0, len(prompt) :].tolist(), text)
            total += len(text)
        figures = {"eval_tokens_per_forward": tokens / forwards, "eval_agreement": same / total}
        metrics.update(figures)
        self.trainer.log(figures)

    def _remember(self) -> None:
        """Writes the texts of the model as it is, once: before training."""
        if self.before is None and self._can_decode():
            self.before = [self._generate(prompt, decoding="ar")[0, len(prompt) :].tolist() for prompt in self.prompts]

    def _can_decode(self) -> bool:
        """A model whose weights are spread over processes cannot be decoded by one of them."""
        return not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def _generate(self, prompt: list[int], **settings):
        """Greedy text, in evaluation mode."""
        model = enable(unwrap(self.trainer.model))
        training = model.training
        model.eval()
        inputs = torch.tensor([prompt], device=model.device)
        if settings["decoding"] == "jacobi":
            settings["jacobi_config"] = self.trainer.jacobi_config
        with self.trainer.accelerator.autocast():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.trainer.args.eval_max_new_tokens,
                do_sample=False,
                use_cache=True,
                **settings,
            )
        model.train(training)
        return output


def prompt_of(row: dict[str, list[int]]) -> list[int]:
    """The prompt of the first sample of a packed row."""
    columns = zip(row["input_ids"], row["labels"], row["seq_ids"], row["block_ids"])
    return [token for token, label, seq, block in columns if seq == 0 and block < 0 and label == -100]
