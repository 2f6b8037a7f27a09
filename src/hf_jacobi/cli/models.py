"""Finds and loads models and adapters for the commands."""

from __future__ import annotations

import copy
import itertools
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..decoding.errors import MissingFile, MissingPackage, UsageError
from ..decoding.files import read_json, refuse_pointer
from ..decoding.ngram_table import TABLE
from .demo_model import DEMO_MODEL, demo_checkpoint


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..decoding import JacobiConfig


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"  # part of the package
DEMO_ADAPTER = CHECKPOINTS / "smollm2-135m-draft"  # trained by benchmarks/smollm2
MINIATURE = CHECKPOINTS / "miniature"  # trained by benchmarks/miniature
MODEL = f"a local folder or a Hub id, of a model or an adapter (default: {DEMO_MODEL})"  # help text
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ENDS = ("_config.json", ".json", ".model")  # of the names of files that begin with `tokenizer`
TOKENIZER = ("tokenizer*", "vocab.*", "*.model", "tekken.json", "*.tiktoken")  # every tokenizer has one of these
TOKENIZER_FILES = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Found:
    """
    The model and adapter that MODEL and `--adapter` mean, resolved before anything is loaded.

    Attributes:
        base: the folder or the Hub id of a complete model.
        adapter: the folder of its adapter, if any.
        folder: the local folder that the user named, of the adapter or else of the model; `None` for the Hub.
        name, adapter_name: their names in reports, without the path of a folder.
        is_demo: whether the user named no model.
    """

    base: str
    adapter: Path | None
    folder: Path | None
    name: str
    adapter_name: str | None
    is_demo: bool

    @property
    def tokenizer_place(self) -> str:
        """The folder or Hub id of the tokenizer: the adapter's if it has one, else the model's."""
        beside = self.adapter is not None and any((self.adapter / f"tokenizer{end}").exists() for end in ENDS)
        return str(self.adapter) if beside else self.base

    def tokenizer(self):
        """
        The tokenizer.

        Raises:
            `UsageError`: the tokenizer is missing or cannot be read.
        """
        from transformers import AutoTokenizer

        place = Path(self.tokenizer_place)
        if place.is_dir() and not any(file for pattern in TOKENIZER for file in place.glob(pattern)):
            raise MissingFile(f"{place} holds no tokenizer: save one there with its `save_pretrained` method.")
        with reading(self.tokenizer_place):
            return AutoTokenizer.from_pretrained(self.tokenizer_place)

    def load(self, dtype: str = "auto", device: torch.device | None = None, attention: str | None = None) -> Adapted:
        """
        Loads the model in evaluation mode, with its adapter if it has one; see `load` for the arguments.

        Raises:
            `UsageError`: the model cannot be read, or the adapter is of an unsupported kind or for another model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from ..evaluation.pairs import fastest_pair

        if self.is_demo and dtype == "auto":
            dtype = "float32"  # from whichever source it comes
        settings = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        settings |= {"attn_implementation": attention} if attention else {}
        with reading(self.base):
            model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(self.base, **settings)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if self.adapter is not None and str(self.adapter) != self.base:
            return with_adapter(model, self.adapter)
        # A complete model; transformers has already loaded an adapter in the same folder.
        return Adapted(*fastest_pair(model), **_settings_of(vars(model.generation_config)))


def find(model: str | os.PathLike | None, adapter: str | os.PathLike | None = None) -> Found:
    """
    Resolves MODEL and `--adapter`. If MODEL is an adapter, local or on the Hub, it means the adapter on its base
    model, as if the user had named the base model and `--adapter`.

    Args:
        model: a local folder or a Hub id; `None` for SmolLM2-135M-Instruct (`demo_checkpoint`).
        adapter: a local folder or a Hub id of an adapter.

    Raises:
        `UsageError`: a name does not exist or means something else.
    """
    if model is None:
        base = demo_checkpoint()
        found = Found(str(base), None, base, DEMO_MODEL, None, True)
    else:
        place = place_of(model)
        config = _adapter_config(place)
        if config is not None and adapter is not None:
            raise UsageError(f"{model} is itself an adapter: drop --adapter, or name its base model instead.")
        if config is not None:
            return _on_its_base(str(model), place, config)
        local = Path(place).is_dir()
        if local and not (Path(place) / "config.json").exists():
            raise MissingFile(f"{model} holds no config.json: name a folder that save_pretrained wrote.")
        found = Found(place, None, Path(place) if local else None, _name_of(place), None, False)
    if adapter is None:
        return found
    place = place_of(adapter)
    if _adapter_config(place) is None:
        raise MissingFile(f"{adapter} holds no adapter: name a folder that `hf-jacobi train` wrote.")
    return _with(found, place)


def _on_its_base(typed: str, place: str, config: dict[str, Any]) -> Found:
    """An adapter on the base model that its config names, or that is in the same folder."""
    name = config.get("base_model_name_or_path")
    weights = (file for pattern in MODEL_WEIGHTS for file in Path(place).glob(pattern))
    if (Path(place) / "config.json").exists() and any(weights):
        name = place  # transformers also prefers the model in the folder
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{typed} does not name its base model: name that model, and {typed} with --adapter.")
    try:
        base = place_of(name)
        if base != place and _adapter_config(base) is not None:
            raise UsageError("which is an adapter too")
    except UsageError as error:
        raise UsageError(
            f"{typed} is an adapter for {name} ({error}): name its base model, and {typed} with --adapter."
        ) from error
    return _with(Found(base, None, None, _name_of(base), None, False), place)


def _with(found: Found, place: str) -> Found:
    """A model with the adapter at a place."""
    local = Path(place).is_dir()
    if not local:
        from huggingface_hub import snapshot_download

        with reading(place):
            files = ["adapter_*", "generation_config.json", TABLE, *TOKENIZER_FILES]
            folder = Path(snapshot_download(place, allow_patterns=files))
    else:
        folder = Path(place)
    return Found(found.base, folder, folder if local else None, found.name, _name_of(place), found.is_demo)


def _name_of(place: str) -> str:
    """The name of a model: its Hub id, or the name of its folder without the path."""
    return Path(place).resolve().name if Path(place).is_dir() else place


def place_of(name: str | os.PathLike) -> str:
    """
    The folder with this name, `~` expanded, or the name itself if it can be a Hub id.

    Raises:
        `UsageError`: the name is neither.
    """
    typed = str(name)
    if not typed.strip():
        raise UsageError("the name of the model is empty: name a folder or a model on the Hub.")
    path = Path(typed).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise UsageError(f"{typed} is a file: name the folder that holds the model.")
    if typed.startswith((".", "~", "/")) or "\\" in typed or typed.rstrip("/").count("/") > 1 or typed.endswith("/"):
        raise MissingFile(
            f"there is no folder {typed}: name a folder that save_pretrained wrote, or a model on the Hub."
        )
    return typed


def _adapter_config(place: str) -> dict[str, Any] | None:
    """The configuration of the adapter at a place; `None` if that is not an adapter."""
    if Path(place).is_dir():
        file = Path(place) / ADAPTER_CONFIG
        return read_json(file) if file.exists() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with reading(place):
        try:
            return read_json(Path(hf_hub_download(place, ADAPTER_CONFIG)))
        except LocalEntryNotFoundError:  # the Hub cannot be reached
            if isinstance(try_to_load_from_cache(place, "config.json"), str):
                return None
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def reading(name: str):
    """
    Turns errors of reading a checkpoint into a `UsageError` that names it. Use it only where the checkpoint, its
    location and the user's options are the only possible causes.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    for file in Path(name).glob("*"):
        if file.is_file():
            refuse_pointer(file)
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        raise MissingPackage(f"{name}: {_line(error)}") from error
    except (SafetensorError, UnpicklingError, EOFError) as error:
        reason = _line(error) if isinstance(error, SafetensorError) else type(error).__name__
        raise UsageError(
            f"the weights of {name} cannot be read ({reason}): they are damaged, copied in part, or a pickle with "
            "other objects; get them again as .safetensors."
        ) from error
    except OSError as error:
        here = "" if Path(name).is_dir() else "there is no such folder here, and on the Hub: "
        raise MissingFile(f"{name}: {here}{_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UsageError(f"{name}: {_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises a bare Exception for a file that it cannot read
            raise
        raise UsageError(f"{name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The message of an error in one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300].rpartition(" ")[0] + " ..."


def load(
    name: str | None,
    dtype: str = "auto",
    device: torch.device | None = None,
    attention: str | None = None,
    adapter: str | None = None,
):
    """
    Loads a model in evaluation mode, with an adapter if one is named, and its tokenizer.

    Args:
        name: a local folder or a Hub id, of a model or of an adapter; `None` for SmolLM2-135M-Instruct.
        dtype: `"auto"` (as saved; float32 for the demo model), `"float32"`, `"bfloat16"` or `"float16"`.
        device: the device of the model, by default the GPU if there is one.
        attention: transformers' `attn_implementation`, by default the choice of transformers.
        adapter: a local folder or a Hub id of an adapter for the model.

    Raises:
        `ImportError`: a package for reading the weights is missing.
        `OSError`: there is no model of this name, or the demo model cannot be downloaded.
        `ValueError`: the checkpoint is damaged.
    """
    found = find(name, adapter)
    tokenizer = found.tokenizer()
    return found.load(dtype, device, attention).model, tokenizer


def encode(tokenizer, prompt: str, device) -> dict[str, torch.Tensor]:
    """The tokens of a prompt, formatted with the tokenizer's chat template if it has one, else as plain text."""
    import torch

    from ..trajectories.encoding import encode_messages, encode_text

    with refusing_bad_templates():
        if tokenizer.chat_template:
            ids = encode_messages(tokenizer, [{"role": "user", "content": prompt}])
        else:
            ids = encode_text(tokenizer, prompt)
    if not ids:
        raise UsageError("the prompt is empty: give --prompt some text")
    input_ids = torch.tensor([ids], device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@contextmanager
def refusing_bad_templates():
    """Turns errors of a chat template that cannot be rendered into a `UsageError`."""
    try:
        from jinja2 import TemplateError
    except ModuleNotFoundError:
        TemplateError = UsageError
    try:
        yield
    except UsageError:
        raise
    except TemplateError as error:
        raise UsageError(
            f"the tokenizer's chat template cannot be used ({type(error).__name__}: {error}): correct the template."
        ) from error


class Adapted(NamedTuple):
    """
    A loaded model and its decoding settings.

    Attributes:
        model: the model that decodes by Jacobi decoding.
        writer: the fastest model that decodes the same text by AR: with a draft-only adapter the base model, else
            `model`.
        config: the default settings of Jacobi decoding.
        decoding: `"jacobi"`, or `"ar"` if the checkpoint asks for AR.
        tuned: whether the checkpoint has settings for Jacobi decoding.
    """

    model: PreTrainedModel | PeftModel
    writer: PreTrainedModel
    config: JacobiConfig
    decoding: str = "jacobi"
    tuned: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The decoding settings, in the form of a generation config."""
        return {"decoding": self.decoding, "jacobi": self.config.to_dict()}


def _settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """The decoding settings in a generation config, as arguments of `Adapted`."""
    from ..decoding import JacobiConfig

    settings = content.get("jacobi")
    config = JacobiConfig.coerce(settings)
    decoding = content.get("decoding") or "jacobi"
    if decoding not in ("jacobi", "ar"):
        raise UsageError(f"`decoding` must be 'jacobi' or 'ar', got {decoding!r}.")
    return {"config": config, "decoding": decoding, "tuned": settings is not None}


def settings_beside(adapter: Path) -> dict[str, Any]:
    """The decoding settings in the generation config of an adapter's folder, as arguments of `Adapted`."""
    file = adapter / "generation_config.json"
    content = read_json(file) if file.exists() else {}
    try:
        return _settings_of(content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def sharing_weights(model):
    """A copy of a model that has the same weights in memory."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def with_adapter(model, folder: Path) -> Adapted:
    """
    The model with a PEFT adapter, which is merged into the weights unless it is draft-only. `model` is not changed.

    Args:
        model: the base model; a draft-only adapter shares its weights.
        folder: a folder that `JacobiForcingTrainer` wrote.

    Raises:
        `OSError`: the folder holds no adapter.
        `ValueError`: the adapter is of an unsupported kind, or for another model.
        `ImportError`: PEFT is not installed.
    """
    from ..decoding.draft_adapter import is_draft_only
    from ..decoding.mixin import unwrap
    from ..decoding.ngram_table import loaded_from
    from ..evaluation.pairs import fastest_pair, is_for_all_tokens
    from ..hub.plain_lora import as_draft, is_plain_draft

    folder = Path(folder).expanduser()
    if not (folder / ADAPTER_CONFIG).exists():
        raise MissingFile(f"{folder} holds no adapter: name a folder that `hf-jacobi train` wrote.")
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise MissingPackage(f"adapters need {error.name}: pip install peft") from error

    settings = settings_beside(folder)
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UsageError(
            f"{folder / ADAPTER_CONFIG}: `peft_type` is {kind!r}, which the installed PEFT does not support: give "
            "the folder of a LoRA."
        )
    if not any((folder / name).exists() for name in ADAPTER_WEIGHTS):
        raise MissingFile(f"{folder} holds neither {' nor '.join(ADAPTER_WEIGHTS)}: add the adapter's weights.")
    with reading(str(folder)):
        adapter = PeftConfig.from_pretrained(str(folder))
    if is_plain_draft(folder):
        as_draft(adapter, str(folder), LoraConfig)
    drafts = is_draft_only(adapter)
    if not (drafts or is_for_all_tokens(adapter)):
        raise UsageError(f"{folder} is neither a LoRA for all tokens nor a draft-only one: give one of these.")
    try:
        with reading(str(folder)):
            adapted = PeftModel.from_pretrained(sharing_weights(model), str(folder), config=adapter)
    except UsageError as error:
        if not isinstance(error.__cause__, (RuntimeError, ValueError)):
            raise
        raise UsageError(
            f"{folder} is not for this model, whose weights have other names or shapes: name the adapter's base model."
        ) from error
    served, writer = fastest_pair(adapted.eval(), model if drafts else None)
    loaded_from(unwrap(served), folder)
    return Adapted(served, writer, **settings)
