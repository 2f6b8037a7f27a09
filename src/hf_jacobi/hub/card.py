"""Model cards: what a checkpoint is, how to decode with it, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ..decoding.config import JacobiConfig


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
    "consistency_loss",
    "temperature",
    "within_block",
    "adapter_scope",
)
FIGURES = {
    "eval_consistency_loss": "consistency loss",
    "eval_ar_loss": "autoregressive loss",
    "eval_noisy_accuracy": "noisy positions predicted right at once",
    "eval_tokens_per_forward": "tokens per forward",
    "eval_agreement": "tokens as before training",
}


def training_card(
    *,
    name: str,
    base: str | None,
    dataset: str | None,
    tags: list[str],
    args: Any,
    jacobi: JacobiConfig,
    history: list[dict[str, float]],
    adapter: bool,
    step: int | None = None,
) -> str:
    """
    The card of a checkpoint that `JacobiForcingTrainer` wrote.

    Args:
        name: of the model.
        base: the model it was trained from.
        dataset: what it was trained on, if that has a name.
        tags: for the Hub.
        args: the training arguments.
        jacobi: how it decodes.
        history: the log of the training; the last evaluation is reported.
        adapter: whether the checkpoint is a PEFT adapter.
        step: the one whose evaluation is reported; the last if left out.
    """
    on_hub = base and not base.startswith(("/", ".", "~")) and not Path(base).exists()
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": tags}
    if on_hub:
        head["base_model"] = base
    if dataset and not Path(dataset).exists():
        head["datasets"] = [dataset]
    load = [
        "import hf_jacobi",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained("{name}"))',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if adapter:
        load[1:] = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'model = hf_jacobi.enable(AutoPeftModelForCausalLM.from_pretrained("{name}"))',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    settings = json.dumps(jacobi.to_dict())
    config = ""
    if adapter:  # which takes the generation config of its base
        kept = {key: value for key, value in jacobi.to_dict().items() if value is not None}
        config = f"\n    jacobi_config={kept},\n    "
    load += [
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        f'output = model.generate({config}**inputs, decoding="jacobi", max_new_tokens=128)',
    ]
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"{f'[{base}](https://huggingface.co/{base})' if on_hub else 'A causal language model'} trained with Jacobi "
        "Forcing (Hu et al., [arXiv 2512.14681](https://arxiv.org/abs/2512.14681)) to write several tokens per "
        "forward pass. Without `hf_jacobi` it decodes as any other model.",
        "## Use",
        "```python\n" + "\n".join(load) + "\n```",
        f"Settings it was evaluated with, also in `generation_config.json`: `{settings}`.",
        "## Training",
        _table(("setting", "value"), [(key, _plain(getattr(args, key))) for key in SETTINGS if hasattr(args, key)]),
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
    ]
    figures = _evaluation(history, step)
    if figures:
        lines += [
            "## Evaluation",
            "On the evaluation set of the training.",
            _table(("figure", "value"), figures),
        ]
    return "\n\n".join(lines) + "\n"


def _evaluation(history: list[dict[str, float]], step: int | None) -> list[tuple[str, str]]:
    found: dict[str, float] = {}
    for entry in history:
        if step is None or entry.get("step") == step:
            found |= {key: value for key, value in entry.items() if key in FIGURES}
    return [(label, f"{found[key]:.4g}") for key, label in FIGURES.items() if key in found]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # of an enumeration


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines)
