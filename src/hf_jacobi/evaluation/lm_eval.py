"""Registers the lm-evaluation-harness model `hf-jacobi`, which decodes by Jacobi decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from ..decoding import JacobiConfig, JacobiStats, enable
from ..decoding.errors import UsageError
from ..decoding.mixin import DECODINGS, setting_of, unwrap
from .measuring import up_to_end
from .pairs import fastest_pair


TASKS = Path(__file__).parent / "tasks"  # the paper's tasks, with its authors' prompts and decoding settings
SETTINGS = tuple(field.name for field in dataclasses.fields(JacobiConfig) if field.name != "seed")


def check_gen_kwargs(given: Mapping[str, Any]) -> None:
    """
    Raises `UsageError` for an invalid name or value in `gen_kwargs`.

    Besides the settings of a generation config, lm-eval accepts `until` and further names for the maximum length.
    """
    decoding = given.get("decoding", "jacobi")
    if decoding not in DECODINGS:
        raise UsageError(f"decoding must be one of {DECODINGS}, got {decoding!r}.")
    settings = {name: value for name, value in given.items() if name in SETTINGS}
    if settings and decoding == "ar":
        raise UsageError(f"{', '.join(settings)}: settings of Jacobi decoding need decoding=jacobi, not decoding=ar.")
    JacobiConfig(**settings)
    known = {*vars(GenerationConfig()), *SETTINGS, "decoding", "until"}
    unknown = [name for name in given if name not in known and not name.startswith("max_")]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)}: neither a setting of JacobiConfig nor of transformers' GenerationConfig."
        )


def evaluation_of(
    results: Mapping[str, Any], stats: JacobiStats, model: str, settings: Mapping[str, Any], setup: str
) -> dict[str, Any]:
    """
    The evaluation for `publish(evaluation=...)`: the scores of each task, and the tokens per forward over all tasks.

    Args:
        results: the result of lm-eval's `simple_evaluate`.
        stats: the statistics of the model that generated the texts.
        model: the checkpoint's name.
        settings: the decoding settings, `decoding` and `jacobi` as in a generation config.
        setup: the hardware and software that it ran on.
    """
    decoding = {"ar": "AR", "jacobi": "Jacobi"}[settings["decoding"]]
    rows = [
        {"dataset": task, "decoding": decoding, "metrics": scores}
        for task, figures in results["results"].items()
        if (scores := _scores(figures))
    ]
    if stats.forwards:
        yielded = {"tokens_per_forward": stats.tokens_per_forward}
        if len(rows) == 1:
            rows[0]["metrics"] |= yielded
        else:
            rows.append({"dataset": "all tasks", "decoding": decoding, "metrics": yielded})
    return {"measured_on": setup, "model": model, "settings": dict(settings), "results": rows}


def _scores(figures: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a task without their standard errors; the name of a score includes its filter, if any."""
    scores = {}
    for name, value in figures.items():
        metric, _, kind = name.partition(",")
        counts = kind and not metric.endswith("stderr") and isinstance(value, (int, float))
        if counts and not isinstance(value, bool) and math.isfinite(value):
            scores[metric if kind == "none" else f"{metric} ({kind})"] = float(value)
    return scores


@register_model("hf-jacobi")
class JacobiLM(HFLM):
    """
    lm-eval's `hf` model with a choice of decoding method.

    `gen_kwargs` accepts `decoding=jacobi` (the default) or `decoding=ar`, and every setting of `JacobiConfig` except
    the seed, such as `block_size=32`. Other settings come from the model's generation config.

    Args:
        pretrained, others: as for lm-eval's `hf` model. An adapter is merged unless it is draft-only.

    Attributes:
        stats: the tokens and forwards of all rows since the model was created.
    """

    def __init__(self, pretrained, **others):
        others.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, **others)
        self._model = fastest_pair(self._model)[0]
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
