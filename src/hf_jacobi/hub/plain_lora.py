"""
Draft-only adapters as plain LoRAs, the form in which other engines keep them (UNO, arXiv 2609.04010, in SGLang).

In this form nothing in the adapter's configuration says that it only drafts: whoever loads it has to know.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..decoding.compat import INVOCATION, make_own
from ..decoding.config import JacobiConfig
from ..decoding.draft_adapter import DRAFT_ONLY, begun_on_other_weights, is_draft_only, touching_base
from ..decoding.errors import MissingFile, MissingPackage, UsageError, of_usage
from ..decoding.files import read_json
from ..decoding.mixin import enable, unwrap
from .card import NOTE
from .files import ADAPTER_WEIGHTS, check_weights
from .places import is_on_hub


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
        `ValueError`: it is not draft-only, or could not be.
    """
    if not (is_draft_only(SimpleNamespace(**config)) or (noted and not config.get(INVOCATION))):
        raise UsageError(
            "format='lora' is for a draft-only adapter, which JacobiForcingTrainer makes with adapter_scope='draft': "
            "leave `format` out for any other."
        )
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"the adapter is of the kind {config.get('peft_type')!r}, but a draft-only adapter is a LoRA."
        )
    refuse_changing(SimpleNamespace(**config), "the adapter")
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
        from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
    except ModuleNotFoundError as error:
        raise MissingPackage(f"adapters need {error.name}: pip install peft") from error

    if not isinstance(model, PreTrainedModel) or getattr(model, "peft_config", None):
        what = "one with an adapter" if getattr(model, "peft_config", None) else type(model).__name__
        raise UsageError(f"`model` must be a base model of transformers, got {what}: load it anew.")
    source = _source_of(path, others.get("subfolder") or "")
    hub = {name: others[name] for name in ("subfolder", "revision", "token", "cache_dir") if name in others}
    with _reading(source):
        config = PeftConfig.from_pretrained(source, **hub)
    as_draft(config, source, LoraConfig)
    with _reading(source):
        adapted = PeftModel.from_pretrained(
            model, source, adapter_name, is_trainable=is_trainable, config=config, **others
        )
        held = load_peft_weights(source, device="cpu", **hub)
    if held.keys().isdisjoint(get_peft_model_state_dict(adapted, adapter_name=adapter_name)):
        raise UsageError(
            f"{source} is not for this {type(model).__name__}: it has no layer by the name of {next(iter(held))}."
        )
    _decode_as_beside(adapted, source, hub)
    return enable(adapted)


def _source_of(path: str | Path, subfolder: str) -> str:
    """The folder or the Hub id of an adapter; of a folder, the files are looked at."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"`path` must be the folder or the Hub id of an adapter, got {path!r:.60}.")
    place = Path(path).expanduser()
    if not place.is_dir():
        if place.exists() or not is_on_hub(str(path)):
            raise MissingFile(f"there is no folder {path}: name that of an adapter, or one on the Hub.")
        return str(path)
    folder = place / subfolder
    if not (folder / CONFIG).exists():
        raise MissingFile(f"{folder} holds no {CONFIG}: name the folder of an adapter, or pass its `subfolder`.")
    for name in (CONFIG, "generation_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise MissingFile(f"{folder} holds neither {' nor '.join(ADAPTER_WEIGHTS)}: add the adapter's weights.")
    check_weights(weights, weights.suffix == ".safetensors")
    return str(place)


@contextmanager
def _reading(source: str):
    """Errors of reading an adapter go on as `UsageError`, in one line that names it."""
    try:
        with of_usage(ValueError, TypeError, KeyError, RuntimeError):
            yield
    except UsageError as error:
        line = " ".join(str(error).split())
        raise UsageError(f"{source} cannot be read for this model: {line[:240]}.") from error


def as_draft(config, source: str, kind: type) -> None:
    """Marks the configuration of a LoRA as one that only drafts."""
    if not isinstance(config, kind):
        raise UsageError(f"{source} is a {type(config).__name__}, but a draft-only adapter is a LoRA.")
    if getattr(config, INVOCATION, None) and not is_draft_only(config):
        raise UsageError(
            f"{source} is an activated LoRA for tokens of the text ({INVOCATION}), not one that only drafts."
        )
    refuse_changing(config, source)
    setattr(config, INVOCATION, list(DRAFT_ONLY))


def refuse_changing(config, source: str) -> None:
    """Raises `UsageError` for the configuration of a LoRA that changes the base model, and so cannot only draft."""
    if found := touching_base(config):
        raise UsageError(f"{source} changes the base model ({', '.join(found)}), which a draft-only adapter must not.")
    if way := begun_on_other_weights(config):
        raise UsageError(
            f"{source} began with init_lora_weights={way!r}, which changes the weights of the base model: a "
            "draft-only adapter must leave them as they are."
        )


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
