"""
Draft-only adapters as plain LoRAs, the format of other engines (UNO, arXiv 2609.04010, in SGLang).

In this format the adapter's configuration does not say that it only drafts: whoever loads it has to know.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import GenerationConfig, PreTrainedModel

from ..decoding.compat import INVOCATION, make_own
from ..decoding.config import JacobiConfig
from ..decoding.draft_adapter import DRAFT_ONLY, begun_on_other_weights, is_draft_only, touching_base
from ..decoding.errors import MissingFile, MissingPackage, UsageError, of_usage
from ..decoding.files import read_json
from ..decoding.mixin import enable, unwrap
from ..decoding.ngram_table import loaded_from
from .card import NOTE
from .files import ADAPTER_WEIGHTS, check_weights
from .places import is_on_hub


CONFIG = "adapter_config.json"
DRAFTS = "draft-only adapter"
HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
# Arguments that PEFT reads from `**kwargs`, so that no signature lists them.
UNLISTED = {
    "device_map",
    "max_memory",
    "offload_dir",
    "offload_folder",
    "offload_index",
    "ignore_mismatched_sizes",
    "use_safetensors",
}
OURS = {"model", "model_id", "adapter_name", "is_trainable", "config", "repo_id", "filename", "self", "kwargs"}


def is_plain_draft(folder: Path) -> bool:
    """Whether a folder contains a draft-only adapter as a plain LoRA, according to the note beside it."""
    note, config = ({} if not (folder / name).exists() else read_json(folder / name) for name in (NOTE, CONFIG))
    return note.get("kind") == DRAFTS and bool(config) and INVOCATION not in config


def as_plain(config: dict[str, Any], noted: bool) -> dict[str, Any]:
    """
    The configuration of a draft-only adapter without the keys that make it an activated LoRA.

    Args:
        config: the content of `adapter_config.json`.
        noted: whether a note says that the plain LoRA only drafts.

    Raises:
        `UsageError`: the adapter is not draft-only, or cannot be.
    """
    if not (is_draft_only(SimpleNamespace(**config)) or (noted and not config.get(INVOCATION))):
        raise UsageError(
            "format='lora' is for a draft-only adapter, which JacobiForcingTrainer trains with adapter_scope='draft': "
            "leave `format` out for anything else."
        )
    if config.get("peft_type") != "LORA":
        raise UsageError(f"the adapter has the type {config.get('peft_type')!r}, but a draft-only adapter is a LoRA.")
    refuse_changing(SimpleNamespace(**config), "the adapter")
    plain = {name: value for name, value in config.items() if name != INVOCATION}
    if plain.get("use_rslora") and not (plain.get("rank_pattern") or plain.get("alpha_pattern")):
        # The same scale, alpha / sqrt(r), for engines that only support alpha / r.
        plain |= {"use_rslora": False, "lora_alpha": plain["lora_alpha"] * math.sqrt(plain["r"])}
    return plain


def doubts_of(config: dict[str, Any]) -> list[str]:
    """Warnings about settings that other engines may interpret differently from PEFT."""
    named = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(name)]
    return [f"Other engines may ignore {', '.join(named)} in adapter_config.json."] if named else []


def load_draft_adapter(
    model, path: str | Path, adapter_name: str = "default", *, is_trainable: bool = False, **others: Any
):
    """
    Adds a LoRA to a model so that it only drafts: the base model still decides every token of the text.

    For adapters saved as plain LoRAs, as `publish(..., format="lora")` writes them and as UNO's are. (PEFT's own
    `PeftModel.from_pretrained` would apply such an adapter to every token.) Here the adapter is also on for the newest
    committed token of a draft, which UNO runs with the base model; the text is the same in both cases.

    Args:
        model (`PreTrainedModel`): the base model; it receives the adapter's layers.
        path (`str` or `Path`): a folder or a Hub id.
        adapter_name (`str`): the name of the adapter in PEFT.
        is_trainable (`bool`): whether to continue training it.
        others: further arguments of `PeftModel.from_pretrained`, such as `subfolder="adapter"`, `revision` or `token`.

    Returns:
        The `PeftModel`, enabled. If a generation config lies beside the adapter, it decodes with the settings there.

    Raises:
        `ValueError`: the adapter is not a LoRA, changes the base model, or belongs to another model; or PEFT does not
            support an argument.
        `OSError`: there is no adapter at `path`.
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
        raise UsageError(f"`model` must be a base model of transformers, got {what}: load it again.")
    _refuse_unknown(others, PeftModel.from_pretrained, PeftModel.load_adapter, hf_hub_download)
    subfolder = others.get("subfolder") or ""
    source = _source_of(path, subfolder)
    hub: dict[str, Any] = {name: others[name] for name in HUB if name in others}
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
            f"{source} is not for this {type(model).__name__}, which has no layer for {next(iter(held))}: load the "
            "base model that the adapter was trained on."
        )
    loaded_from(unwrap(adapted), Path(source) / subfolder if Path(source).is_dir() else source)
    _decode_as_beside(adapted, source, hub)
    return enable(adapted)


def _refuse_unknown(given: dict[str, Any], *functions: Callable[..., Any]) -> None:
    """Refuses arguments that no function has: PEFT would silently ignore them, even if a name is misspelt."""
    known = {name for function in functions for name in inspect.signature(function).parameters} | UNLISTED
    if unknown := sorted(given.keys() - (known - OURS)):
        raise UsageError(
            f"load_draft_adapter does not support {', '.join(unknown)}: pass arguments of PeftModel.from_pretrained, "
            "such as subfolder, revision or token."
        )


def _source_of(path: str | Path, subfolder: str) -> str:
    """The folder or the Hub id of an adapter; checks the files of a folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"`path` must be the folder or the Hub id of an adapter, got {path!r:.60}.")
    place = Path(path).expanduser()
    if not place.is_dir():
        if place.exists() or not is_on_hub(str(path)):
            raise MissingFile(f"there is no folder {path}: pass the folder or the Hub id of an adapter.")
        return str(path)
    folder = place / subfolder
    if not (folder / CONFIG).exists():
        raise MissingFile(f"{folder} contains no {CONFIG}: pass the folder of an adapter, or its `subfolder`.")
    for name in (CONFIG, "generation_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    weights = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise MissingFile(f"{folder} contains neither {' nor '.join(ADAPTER_WEIGHTS)}: add the adapter's weights.")
    check_weights(weights, weights.suffix == ".safetensors")
    return str(place)


@contextmanager
def _reading(source: str):
    """Converts errors in reading an adapter to `UsageError`, in one line that names the adapter."""
    try:
        with of_usage(ValueError, TypeError, KeyError, RuntimeError):
            yield
    except UsageError as error:
        line = " ".join(str(error).split())
        raise UsageError(f"{source} cannot be read for this model: {line[:240]}.") from error


def as_draft(config, source: str, kind: type) -> None:
    """Marks the configuration of a LoRA as draft-only."""
    if not isinstance(config, kind):
        raise UsageError(f"{source} is a {type(config).__name__}, but a draft-only adapter is a LoRA.")
    if getattr(config, INVOCATION, None) and not is_draft_only(config):
        raise UsageError(
            f"{source} is an activated LoRA for tokens of the text ({INVOCATION}), not a draft-only adapter."
        )
    refuse_changing(config, source)
    setattr(config, INVOCATION, list(DRAFT_ONLY))


def refuse_changing(config, source: str) -> None:
    """Refuses a LoRA that changes the base model and therefore cannot be draft-only."""
    if found := touching_base(config):
        raise UsageError(f"{source} changes the base model ({', '.join(found)}), which a draft-only adapter must not.")
    if way := begun_on_other_weights(config):
        raise UsageError(
            f"{source} was initialized with init_lora_weights={way!r}, which changes the weights of the base model: a "
            "draft-only adapter must leave them unchanged."
        )


def _decode_as_beside(model, source: str, hub: dict[str, Any]) -> None:
    """Copies the settings of Jacobi decoding from the generation config beside an adapter, if there are any."""
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
