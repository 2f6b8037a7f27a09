"""Model cards: what a checkpoint is, how to decode with it, how it was made, and what was measured of it."""

from __future__ import annotations

import json
import math
import numbers
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError
from .places import is_on_hub


TAGS = ("jacobi-forcing", "hf_jacobi")
NOTE = "jacobi_forcing.json"  # beside the weights: how they were made
EVALUATION = "evaluation.json"  # beside the weights: what was measured of them
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
KEYS = {"decoding", "jacobi"}  # of settings, in a generation config and in an evaluation
FIGURES = {
    "eval_consistency_loss": "consistency loss",
    "eval_ar_loss": "autoregressive loss",
    "eval_noisy_accuracy": "noisy positions predicted right at once",
    "eval_tokens_per_forward": "tokens per forward",
    "eval_agreement": "tokens as before training",
    "eval_score": "right answers",
    "eval_tokens_per_forward_right": "tokens per forward of right answers",
    "eval_repetition": "repeated 4-grams",
}
KINDS = {
    "model": "It is a whole model: without `hf_jacobi` it decodes as any other.",
    "adapter": "It is an adapter (PEFT) for every token, so the text is not the base model's.",
    "draft-only adapter": "It is an adapter (PEFT) that only drafts: every token of the text comes from the base "
    "model, and in float32 the text is the base model's, token for token.",
}
CITATION = """```bibtex
@article{hu2025jacobiforcing,
  title={Fast and Accurate Causal Parallel Decoding using Jacobi Forcing},
  author={Hu and others},
  journal={arXiv preprint arXiv:2512.14681},
  year={2025}
}
```"""


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
    What is noted of a training, JSON-serializable; `render_card` reads it.

    Args:
        base: the model it was trained from.
        dataset: what it was trained on, if that has a name.
        kind: one of `KINDS`.
        args: the training arguments.
        jacobi: how it decodes.
        history: the log of the training; the last evaluation is noted.
        step: the one whose evaluation is noted; the last if left out.
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
    """Those of `SETTINGS` that have a value and a meaning: epochs have none where steps are counted."""
    found = {key: _plain(getattr(args, key, None)) for key in SETTINGS}
    found["num_train_epochs" if (found["max_steps"] or 0) > 0 else "max_steps"] = None
    return {key: value for key, value in found.items() if value is not None}


def checked(evaluation: dict[str, Any] | None, file: Path | None = None) -> dict[str, Any] | None:
    """
    An evaluation as `render_card` takes it, its numbers those of Python.

    Args:
        evaluation: `measured_on`, `results`, and, where it is known how it was decoded, `settings`: `decoding` and
            `jacobi`.
        file: where it was read, for errors.

    Raises:
        `ValueError`: it is none.
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
            "this is what `hf-jacobi bench --output` wrote, not an evaluation: "
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
            "an evaluation has `measured_on`, a text, and `results`, a list of `dataset`, `decoding` and `metrics` "
            "(name to number)."
        ) from None
    if "settings" in found:
        found["settings"] = _settings_of(found["settings"])
    return found


def _settings_of(measured: Any) -> dict[str, Any]:
    """The settings that were measured, every one of them."""
    if not isinstance(measured, dict) or measured.get("decoding") not in DECODINGS or set(measured) - KEYS:
        raise UsageError(
            'the `settings` of an evaluation are `decoding` ("jacobi" or "ar") and `jacobi` (settings of '
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
    The model card of a checkpoint.

    Args:
        name: of the repository on the Hub.
        note: what `training_note` gave; with `remark`, what else is to be said at the top, and `example`, a prompt.
        evaluation: what was measured, `checked`: `measured_on`, a text, and `results`, each with `dataset` (a name),
            `decoding` (a name) and `metrics` (name to number). They make the table and the `model-index`.
        shared: whether `custom_generate/` goes with it.
        packaged: whether it comes with this package, in its folder `checkpoints`, under that name.
    """
    parts = [
        f"---\n{_metadata(name, note, evaluation, shared)}\n---",
        f"# {name}",
        f"{_opening(note)} {KINDS[note['kind']]}",
        *([note["remark"]] if note.get("remark") else []),
        "## Use",
        _usage_of_plain(name, note) if note.get("format") == "lora" else _usage(name, note, shared, packaged),
    ]
    if shared:
        parts += ["Without `hf_jacobi`, with the decoder that is in this repository:", _usage_of_shared(name, note)]
    if note.get("decoding") == "ar":
        parts.append(
            "Its generation config asks for one token at a time: Jacobi decoding has to be asked for, as above."
        )
    parts.append(f"It decodes with these settings, also in `generation_config.json`: `{json.dumps(note['jacobi'])}`.")
    if evaluation and evaluation["results"]:
        parts += ["## Measured", f"On {evaluation['measured_on']}.", _results_table(evaluation["results"])]
    if note["settings"]:
        software = ", ".join(f"{package} {version}" for package, version in note["software"].items())
        parts += ["## Training", _table(("setting", "value"), list(note["settings"].items())), f"{software}."]
    if note["figures"]:
        figures = [(label, f"{note['figures'][key]:.4g}") for key, label in FIGURES.items() if key in note["figures"]]
        parts += ["On the evaluation set of the training:", _table(("figure", "value"), figures)]
    parts += [
        "## Limits",
        "It gains where the next tokens can be guessed, most on text like that it was trained on. In half precision "
        "two tokens can tie, "
        "and the number of tokens in a forward decides which one wins, so text may differ from that of one token at a "
        "time; in float32 it does not. Large batches on a device that is busy with one token per row gain nothing.",
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _opening(note: dict[str, Any]) -> str:
    paper = "(Hu et al., [arXiv 2512.14681](https://arxiv.org/abs/2512.14681))"
    base = note["base_model"] and f"[{note['base_model']}](https://huggingface.co/{note['base_model']})"
    if note["settings"]:
        subject = base or "A causal language model"
        return f"{subject} trained with Jacobi Forcing {paper} to write several tokens per forward pass."
    # Nothing is known of its training: the weights of the base, or others that were made of them.
    adapter = note["kind"] != "model"
    subject = "An adapter" if adapter else "A causal language model"
    origin = f" {'for' if adapter else 'that comes from'} {base}" if base else ""
    gain = "that writes several tokens per forward pass where they can be guessed"
    return f"{subject}{origin}, with a decoder {gain} {paper}."


def _metadata(name: str, note: dict[str, Any], evaluation: dict[str, Any] | None, shared: bool) -> str:
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
                dataset_config=result["dataset"],  # else all would be put under the name of the first
                metric_type=metric,
                metric_name=f"{metric.replace('_', ' ')} ({result['decoding']})",
                metric_value=_rounded(value),
            )
            for result in evaluation["results"]
            for metric, value in result["metrics"].items()
        ]
    return ModelCardData(**data).to_yaml()


def _example(note: dict[str, Any]) -> str:
    return json.dumps(note.get("example", "Once upon a time"), ensure_ascii=False)


def _usage(name: str, note: dict[str, Any], shared: bool, packaged: bool) -> str:
    load = "AutoModelForCausalLM" if note["kind"] == "model" else "AutoPeftModelForCausalLM"
    imports = ["from transformers import AutoTokenizer", f"from peft import {load}"]
    if note["kind"] == "model":
        imports = [f"from transformers import {load}, AutoTokenizer"]
    config = ""
    if note["kind"] != "model":  # which takes the generation config of its base
        kept = {key: value for key, value in note["jacobi"].items() if value is not None}
        config = f"\n    jacobi_config={kept},\n    "
    place = "folder" if packaged else f'"{name}"'
    beside = shared or note["kind"] == "model" or not note["base_model"]
    tokenizer = place if beside else f'"{note["base_model"]}"'
    lines = [
        *(["from pathlib import Path", ""] if packaged else []),
        "import hf_jacobi",
        *sorted(imports),
        "",
        *([f'folder = Path(hf_jacobi.__file__).parent / "checkpoints" / "{name}"'] if packaged else []),
        f"model = hf_jacobi.enable({load}.from_pretrained({place}))",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        f'inputs = tokenizer({_example(note)}, return_tensors="pt")',
        f'output = model.generate({config}**inputs, decoding="jacobi", max_new_tokens=128)',
        "print(tokenizer.decode(output[0]))",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _usage_of_plain(name: str, note: dict[str, Any]) -> str:
    """Of a draft-only adapter as a plain LoRA."""
    base = note["base_model"] or "BASE"
    size = JacobiConfig.coerce(note["jacobi"]).size
    lines = [
        "import hf_jacobi",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = hf_jacobi.load_draft_adapter(base, "{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'inputs = tokenizer({_example(note)}, return_tensors="pt")',
        'output = model.generate(**inputs, decoding="jacobi", max_new_tokens=128)',
        "print(tokenizer.decode(output[0]))",
    ]
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\n"
        "It is a plain LoRA that is meant for drafts alone: loaded by PEFT's `from_pretrained` it would apply to "
        "every token and change the text. It has the form of UNO's adapters (arXiv 2609.04010), with which SGLang "
        "drafts; with this one, that was not tried. One of UNO is on for all tokens of a draft but its first, this "
        "one for that, too.\n\n"
        f"```bash\nhf download {name} --local-dir adapter\n"
        f"python -m sglang.launch_server --model-path {base} --dtype bfloat16 --attention-backend fa3 \\\n"
        f"    --speculative-algorithm UNO --uno-lora-path adapter --speculative-num-draft-tokens {size}\n```"
    )


def _usage_of_shared(name: str, note: dict[str, Any]) -> str:
    arguments = "**inputs, max_new_tokens=128"
    if note.get("decoding") == "ar":
        arguments += ', decoding="jacobi"'
    if note["kind"] != "model":  # transformers looks for `custom_generate` beside the base model
        arguments += f', custom_generate="{name}", trust_remote_code=True'
    load = "AutoModelForCausalLM" if note["kind"] == "model" else "AutoPeftModelForCausalLM"
    trust = ", trust_remote_code=True" if note["kind"] == "model" else ""
    lines = [
        f"from {'transformers' if note['kind'] == 'model' else 'peft'} import {load}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {load}.from_pretrained("{name}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'inputs = tokenizer({_example(note)}, return_tensors="pt")',
        f"output = model.generate({arguments})",
        "print(tokenizer.decode(output[0]))",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _results_table(results: list[dict[str, Any]]) -> str:
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
    return _table(head, rows)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rounded(value: float) -> float:
    if isinstance(value, int):
        return value
    return round(value, 1) if abs(value) >= 1000 else float(f"{value:.5g}")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in lines)
