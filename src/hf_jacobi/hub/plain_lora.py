"""
Draft-only adapters as plain LoRAs, the form in which other engines keep them (UNO, arXiv 2609.04010, in SGLang).

In this form nothing in the adapter's configuration says that it only drafts: whoever loads it has to know.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from ..decoding.compat import INVOCATION, make_own
from ..decoding.config import JacobiConfig
from ..decoding.draft_adapter import DRAFT_ONLY, is_draft_only, touching_base
from ..decoding.errors import MissingFile, MissingPackage, UsageError, of_usage
from ..decoding.files import read_json
from ..decoding.mixin import enable, unwrap
from .card import NOTE


CONFIG = "adapter_config.json"
DRAFTS = "draft-only adapter"


def is_plain_draft(folder: Path) -> bool:
    """Whether a folder holds a draft-only adapter in the plain form, as far as the note beside it says so."""
    note, config = ({} if not (folder / name).exists() else read_json(folder / name) for name in (NOTE, CONFIG))
    return note.get("kind") == DRAFTS and bool(config) and INVOCATION not in config


def as_plain(config: dict[str, Any], noted: bool) -> dict[str, Any]:
    """
    The configuration of a draft-only adapter without what makes it an activated LoRA.

    Args:
        config: as in `adapter_config.json`.
        noted: whether a note says that a plain LoRA only drafts.

    Raises:
        `ValueError`: it is not draft-only.
    """
    if not (is_draft_only(SimpleNamespace(**config)) or (noted and not config.get(INVOCATION))):
        raise UsageError(
            "format='lora' is for a draft-only adapter, which JacobiForcingTrainer makes with adapter_scope='draft': "
            "leave `format` out for any other."
        )
    plain = {name: value for name, value in config.items() if name != INVOCATION}
    if plain.get("use_rslora") and not (plain.get("rank_pattern") or plain.get("alpha_pattern")):
        # The same scale, alpha / sqrt(r), for engines that read none but alpha / r.
        plain |= {"use_rslora": False, "lora_alpha": plain["lora_alpha"] * math.sqrt(plain["r"])}
    return plain


def doubts_of(config: dict[str, Any]) -> list[str]:
    """What other engines may not make of the adapter what PEFT makes of it."""
    named = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(name)]
    return [f"Other engines may not read {', '.join(named)} of adapter_config.json."] if named else []


def load_draft_adapter(
    model, path: str | Path, adapter_name: str = "default", *, is_trainable: bool = False, **others
):
    """
    Puts a LoRA onto a model so that it only drafts: every token of the text stays the model's own.

    For adapters in the plain form that `publish(..., format="lora")` writes, and that UNO's are in. (PEFT's own
    `PeftModel.from_pretrained` would apply such a one to every token.) The adapter is on for the newest committed
    token of a draft, too, where UNO runs that with the base model; the text is the same in any case.

    Args:
        model (`PreTrainedModel`): the base model, which the adapter's layers are put into.
        path (`str` or `Path`): a folder or a Hub id.
        adapter_name (`str`): what PEFT calls it.
        is_trainable (`bool`): whether it is to be trained on.
        others: of `PeftModel.from_pretrained`, such as `subfolder="adapter"`, `revision` or `token`.

    Returns:
        The `PeftModel`, enabled; how it decodes is that of the generation config beside the adapter, if there is one.

    Raises:
        `ValueError`: it is no LoRA, changes the base model, or is for another model.
        `OSError`: there is none.
        `ImportError`: PEFT is not installed.

    Example:

    ```python
    >>> model = hf_jacobi.load_draft_adapter(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B"), "someone/adapter")
    >>> model.generate(**inputs, decoding="jacobi", jacobi_config={"block_size": 8, "draft_init": "vocabulary"})
    ```
    """
    try:
        from peft import LoraConfig, PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise MissingPackage(f"adapters need {error.name}: pip install peft") from error

    place = Path(path).expanduser()
    source = str(place) if place.is_dir() else str(path)
    if place.is_dir() and not (place / others.get("subfolder", "") / CONFIG).exists():
        raise MissingFile(f"{place} holds no {CONFIG}: name the folder of an adapter, or pass its `subfolder`.")
    hub = {name: others[name] for name in ("subfolder", "revision", "token", "cache_dir") if name in others}
    with of_usage(ValueError, TypeError, KeyError):
        config = PeftConfig.from_pretrained(source, **hub)
    as_draft(config, source, LoraConfig)
    with of_usage(RuntimeError, ValueError):
        adapted = PeftModel.from_pretrained(
            model, source, adapter_name, is_trainable=is_trainable, config=config, **others
        )
    _decode_as_beside(adapted, source, hub)
    return enable(adapted)


def as_draft(config, source: str, kind: type) -> None:
    """Marks the configuration of a LoRA as one that only drafts."""
    if not isinstance(config, kind):
        raise UsageError(f"{source} is a {type(config).__name__}, but a draft-only adapter is a LoRA.")
    if getattr(config, INVOCATION, None) and not is_draft_only(config):
        raise UsageError(
            f"{source} is an activated LoRA for tokens of the text ({INVOCATION}), not one that only drafts."
        )
    if found := touching_base(config):
        raise UsageError(f"{source} changes the base model ({', '.join(found)}), which a draft-only adapter must not.")
    setattr(config, INVOCATION, list(DRAFT_ONLY))


def _decode_as_beside(model, source: str, hub: dict[str, Any]) -> None:
    """Has a model decode as the generation config beside its adapter says, if that says so."""
    try:
        beside = GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return
    own = unwrap(model).generation_config
    settings = {name: getattr(beside, name, None) for name in ("decoding", "jacobi")}
    if settings["jacobi"] is not None:
        settings["jacobi"] = JacobiConfig.coerce(settings["jacobi"]).to_dict()
    for name, value in settings.items():
        if value is not None:
            make_own(own)
            setattr(own, name, value)
