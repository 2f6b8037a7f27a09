"""Model cards: what a checkpoint is, how to decode with it, how it was trained, and what was measured."""

from __future__ import annotations

import json
import math
import numbers
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError
from ..decoding.ngram_table import TABLE
from .places import is_on_hub


TAGS = ("jacobi-forcing", "hf_jacobi")
NOTE = "jacobi_forcing.json"  # beside the weights: how they were trained
EVALUATION = "evaluation.json"  # beside the weights: what was measured
TEMPLATE = Path(__file__).with_name("card.md.jinja")
SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
    "ar_loss_weight",
    "ar_loss_weight_start",
    "consistency_loss",
    "temperature",
    "within_block",
    "adapter_scope",
)
DECODINGS = ("jacobi", "ar")
KEYS = {"decoding", "jacobi"}  # the settings in a generation config and in an evaluation
FIGURES = {
    "eval_consistency_loss": "consistency loss",
    "eval_ar_loss": "autoregressive loss",
    "eval_noisy_accuracy": "noisy positions predicted correctly",
    "eval_tokens_per_forward": "tokens per forward",
    "eval_agreement": "agreement with the text before training",
    "eval_score": "correct answers",
    "eval_tokens_per_forward_right": "tokens per forward of correct answers",
    "eval_repetition": "repeated 4-grams",
}
KINDS = {
    "model": "It is a complete model: without `hf_jacobi` it decodes like any other.",
    "adapter": "It is a PEFT adapter that applies to every token, so the text is not the base model's.",
    "draft-only adapter": "It is a PEFT adapter that only drafts: the base model decides every token, and in float32 "
    "the text equals the base model's, token for token.",
}


def training_note(
    *,
    base: str | None,
    dataset: str | None,
    kind: str,
    args: Any,
    jacobi: JacobiConfig,
    history: list[dict[str, float]],
    step: int | None = None,
) -> dict[str, Any]:
    """
    The record of a training run, JSON-serializable; `render_card` reads it.

    Args:
        base: the model that training started from.
        dataset: the name of the training data, if it has one.
        kind: one of `KINDS`.
        args: the training arguments.
        jacobi: the settings of Jacobi decoding.
        history: the training log.
        step: the step whose evaluation is recorded; by default the last.
    """
    figures: dict[str, float] = {}
    for entry in history:
        if step is None or entry.get("step") == step:
            figures |= {key: value for key, value in entry.items() if key in FIGURES}
    return {
        "base_model": base if is_on_hub(base) else None,
        "dataset": dataset if dataset and not Path(dataset).exists() else None,
        "kind": kind,
        "settings": _settings(args),
        "figures": figures,
        "jacobi": jacobi.to_dict(),
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _settings(args: Any) -> dict[str, Any]:
    """Those of `SETTINGS` that are set and have an effect: `max_steps` overrides the number of epochs."""
    found = {key: _plain(getattr(args, key, None)) for key in SETTINGS}
    found["num_train_epochs" if (found["max_steps"] or 0) > 0 else "max_steps"] = None
    return {key: value for key, value in found.items() if value is not None}


def checked(evaluation: dict[str, Any] | None, file: Path | None = None) -> dict[str, Any] | None:
    """
    Checks an evaluation and converts its numbers to Python's own, as `render_card` expects.

    Args:
        evaluation: `measured_on`, `results` and, if the decoding settings are known, `settings` with `decoding` and
            `jacobi`.
        file: where it was read from, for errors.

    Raises:
        `UsageError`: it does not have this form.
    """
    if evaluation is None:
        return None
    try:
        return _checked(evaluation)
    except UsageError as error:
        raise (UsageError(f"{file}: {error}") if file else error) from None


def _checked(evaluation: Any) -> dict[str, Any]:
    if isinstance(evaluation, dict) and "setup" in evaluation and "measured_on" not in evaluation:
        raise UsageError(
            "this is the report of `hf-jacobi bench --output`, not an evaluation: "
            "`hf-jacobi bench MODEL --evaluation FILE` writes one."
        )
    try:
        results = [
            row
            | {"dataset": _text(row["dataset"]), "decoding": _text(row["decoding"])}
            | {"metrics": {_text(name): _number(value) for name, value in row["metrics"].items()}}
            for row in evaluation["results"]
        ]
        found = evaluation | {"measured_on": _text(evaluation["measured_on"]), "results": results}
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise UsageError(
            "an evaluation has `measured_on`, a string, and `results`, a list of `dataset`, `decoding` and `metrics` "
            "(name to number)."
        ) from None
    if "settings" in found:
        found["settings"] = _settings_of(found["settings"])
    return found


def _settings_of(measured: Any) -> dict[str, Any]:
    """The decoding settings of an evaluation, with the defaults filled in."""
    if not isinstance(measured, dict) or measured.get("decoding") not in DECODINGS or set(measured) - KEYS:
        raise UsageError(
            'the `settings` of an evaluation must be `decoding` ("jacobi" or "ar") and `jacobi` (settings of '
            f"JacobiConfig), got {measured!r}."
        )
    return {"decoding": measured["decoding"], "jacobi": JacobiConfig.coerce(measured.get("jacobi")).to_dict()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return " ".join(value.split())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def render_card(
    name: str,
    note: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    shared: bool = False,
    packaged: bool = False,
) -> str:
    """
    The model card of a checkpoint, from the template `card.md.jinja`.

    Args:
        name: the repository on the Hub.
        note: what `training_note` returned, optionally with `remark`, a paragraph for the top of the card, and
            `example`, a prompt.
        evaluation: what was measured, as `checked` returns it: `measured_on`, a string, and `results`, each with
            `dataset` and `decoding` (names) and `metrics` (name to number). They make the table and the `model-index`.
        shared: whether the repository contains `custom_generate/`.
        packaged: whether the checkpoint is part of this package, in its folder `checkpoints`, under that name.
    """
    place = "folder" if packaged else f'"{name}"'
    beside = shared or note["kind"] == "model" or not note["base_model"]
    card = ModelCard.from_template(
        ModelCardData(**_metadata(name, note, evaluation, shared)),
        template_path=str(TEMPLATE),
        name=name,
        note=note,
        shared=shared,
        packaged=packaged,
        kind=KINDS[note["kind"]],
        place=place,
        tokenizer=place if beside else f'"{note["base_model"]}"',
        example=json.dumps(note.get("example", "Once upon a time"), ensure_ascii=False),
        settings=json.dumps(note["jacobi"]),
        set_values=_as_source(note["jacobi"], place),
        size=JacobiConfig.coerce(note["jacobi"]).size,
        figures=[(label, f"{note['figures'][key]:.4g}") for key, label in FIGURES.items() if key in note["figures"]],
        measured_on=evaluation and evaluation["measured_on"],
        results=_results_table(evaluation["results"]) if evaluation else [],
    )
    return f"{card.content}\n"


def _as_source(settings: dict[str, Any], place: str) -> str:
    """
    The settings that are not the default ones, as the source of a dict.

    Args:
        settings: the settings of Jacobi decoding.
        place: the expression for the checkpoint, whose table of n-grams they may name.
    """
    default = JacobiConfig().to_dict()
    changed = {key: value for key, value in settings.items() if value != default.get(key)}
    shown = {key: json.dumps(value) if isinstance(value, str) else repr(value) for key, value in changed.items()}
    if settings.get("ngram_table") == TABLE:
        shown["ngram_table"] = place
    return "{" + ", ".join(f'"{key}": {value}' for key, value in shown.items()) + "}"


def _metadata(name: str, note: dict[str, Any], evaluation: dict[str, Any] | None, shared: bool) -> dict[str, Any]:
    adapter = note["kind"] != "model"
    data: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(TAGS if note["settings"] else TAGS[1:]), *(["custom_generate"] if shared else [])],
    }
    if note["base_model"]:
        data["base_model"] = note["base_model"]
        if adapter or note["settings"]:
            data["base_model_relation"] = "adapter" if adapter else "finetune"
    if note["dataset"]:
        data["datasets"] = [note["dataset"]]
    if evaluation and evaluation["results"]:
        data["model_name"] = name.split("/")[-1]
        data["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type="local",
                dataset_name=result["dataset"],
                dataset_config=result["dataset"],  # otherwise the Hub lists every result under the first name
                metric_type=metric,
                metric_name=f"{metric.replace('_', ' ')} ({result['decoding']})",
                metric_value=_rounded(value),
            )
            for result in evaluation["results"]
            for metric, value in result["metrics"].items()
        ]
    return data


def _results_table(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table of an evaluation, header first; empty without results."""
    metrics = list(dict.fromkeys(metric for result in results for metric in result["metrics"]))
    head = ["data", "decoding", *(metric.replace("_", " ") for metric in metrics)]
    rows = [
        [
            result["dataset"],
            result["decoding"],
            *(_figure(result["metrics"][metric]) if metric in result["metrics"] else "" for metric in metrics),
        ]
        for result in results
    ]
    return [head, *rows] if rows else []


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rounded(value: float) -> float:
    if isinstance(value, int):
        return value
    return round(value, 1) if abs(value) >= 1000 else float(f"{value:.5g}")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # an enumeration's value
