"""Loads models and adapters for the commands."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..decoding.errors import MissingFile, MissingPackage, UsageError
from .demo_model import demo_checkpoint


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..decoding import JacobiConfig


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"  # what comes with the package
DEMO_ADAPTER = CHECKPOINTS / "smollm2-135m-draft"  # trained by benchmarks/smollm2
MINIATURE = CHECKPOINTS / "miniature"  # trained by benchmarks/miniature


def load(name: str | None, dtype: str = "auto", device: torch.device | None = None, attention: str | None = None):
    """
    A model in evaluation mode, and its tokenizer.

    Args:
        name: a local folder or a Hub id; `None` for SmolLM2-135M-Instruct (`demo_checkpoint`).
        dtype: `"auto"` (as saved; float32 for the demo model), `"float32"`, `"bfloat16"` or `"float16"`.
        device: where it goes; left out, the GPU if there is one.
        attention: transformers' `attn_implementation`; its own choice if left out.

    Raises:
        `ImportError`: what reads the demo model's weights is not installed.
        `OSError`: no model of that name, or no way to the demo model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name and name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise MissingFile(
            f"there is no folder {name}: name a folder that save_pretrained wrote, or a model on the Hub"
        )
    path = str(Path(name).expanduser()) if name and name.startswith("~") else name or str(demo_checkpoint())
    if name is None and dtype == "auto":
        dtype = "float32"  # whichever way it came
    settings = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    settings |= {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_pretrained(path, **settings)
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), AutoTokenizer.from_pretrained(path)


def encode(tokenizer, prompt: str, device) -> dict[str, torch.Tensor]:
    """The prompt as the model expects it: through its chat template if it has one, else as plain text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty: give --prompt some text")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


class Adapted(NamedTuple):
    """
    A model with an adapter.

    Attributes:
        model: what decodes by Jacobi decoding.
        writer: what writes the same text one token at a time: for a draft-only adapter the base model, else `model`.
        config: how it decodes by default.
    """

    model: PreTrainedModel | PeftModel
    writer: PreTrainedModel
    config: JacobiConfig


def with_adapter(model, folder: Path) -> Adapted:
    """
    The model with a PEFT adapter, merged into its weights unless it only drafts. `model` itself stays as it is.

    Args:
        model: the base model, which shares its weights with a draft-only adapter's.
        folder: what `JacobiForcingTrainer` wrote.

    Raises:
        `OSError`: there is no adapter.
        `ValueError`: it is of another kind, or for another model.
        `ImportError`: PEFT is not installed.
    """
    from ..decoding import JacobiConfig
    from ..decoding.draft_adapter import is_activated, is_draft_only

    folder = folder.expanduser()
    if not (folder / "adapter_config.json").exists():
        raise MissingFile(f"{folder} holds no adapter: name a folder that `hf-jacobi train` wrote")
    try:
        from peft import LoraConfig, PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise MissingPackage(f"adapters need {error.name}: pip install peft") from error

    file = folder / "generation_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    config = JacobiConfig.coerce(content.get("jacobi"))
    adapter = PeftConfig.from_pretrained(folder)
    draft_only = is_draft_only(adapter)
    if not draft_only and (not isinstance(adapter, LoraConfig) or is_activated(adapter)):
        raise UsageError(f"{folder} is neither a LoRA for all tokens nor one that only drafts: give one of these.")
    kept = itertools.chain(model.parameters(), model.buffers()) if draft_only else ()
    try:
        adapted = PeftModel.from_pretrained(copy.deepcopy(model, {id(tensor): tensor for tensor in kept}), folder)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{folder} is not for this model: its weights have other names or shapes.") from error
    if draft_only:
        return Adapted(adapted.eval(), model, config)
    merged = adapted.merge_and_unload().eval()
    return Adapted(merged, merged, config)
