"""Models of lm-evaluation-harness that decode by Jacobi decoding: `hf-jacobi`, registered when this is imported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..decoding import JacobiConfig, JacobiStats, enable
from ..decoding.mixin import setting_of, unwrap
from .measuring import up_to_end


TASKS = Path(__file__).parent / "tasks"  # the paper's, asked and decoded as its authors do
SETTINGS = tuple(field.name for field in dataclasses.fields(JacobiConfig) if field.name != "seed")


@register_model("hf-jacobi")
class JacobiLM(HFLM):
    """
    lm-eval's `hf` model with a choice of how it decodes, by `gen_kwargs`: `decoding=jacobi` (the default) or
    `decoding=ar`, and any setting of `JacobiConfig` but the seed, such as `block_size=32`. Settings that
    are left out are those of the model's generation config.

    Args:
        pretrained, others: as for lm-eval's `hf` model.

    Attributes:
        stats: what decoding took since the model was made: tokens and forwards of all rows.
    """

    def __init__(self, pretrained, **others):
        others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, **others)
        enable(self.model)
        self.stats = JacobiStats()

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        settings = {name: generation_kwargs.pop(name) for name in SETTINGS if name in generation_kwargs}
        decoding = generation_kwargs.pop("decoding", "jacobi")
        if settings and decoding == "jacobi":
            of_checkpoint = JacobiConfig.coerce(setting_of("jacobi", None, unwrap(self.model)))
            generation_kwargs["jacobi_config"] = dataclasses.replace(of_checkpoint, **settings)
        output = super()._model_generate(
            context, max_length, stop, **generation_kwargs, decoding=decoding, return_dict_in_generate=True
        )
        if decoding == "jacobi":
            rows = [(row.new_tokens, row.forwards) for row in output.jacobi_stats.per_sequence]
        else:
            counts = [up_to_end(row, self.eot_token_id) for row in output.sequences[:, context.shape[1] :].tolist()]
            rows = [(count, count) for count in counts]
        self.stats.new_tokens += sum(tokens for tokens, _ in rows)
        self.stats.forwards += sum(forwards for _, forwards in rows)
        return output.sequences
