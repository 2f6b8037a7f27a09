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
from .demo_model import DEMO_MODEL, demo_checkpoint


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..decoding import JacobiConfig


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"  # what comes with the package
DEMO_ADAPTER = CHECKPOINTS / "smollm2-135m-draft"  # trained by benchmarks/smollm2
MINIATURE = CHECKPOINTS / "miniature"  # trained by benchmarks/miniature
MODEL = f"a local folder or a Hub id, of a model or an adapter (default: {DEMO_MODEL})"  # how MODEL is described
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ENDS = ("_config.json", ".json", ".model")  # of `tokenizer`, in names of files
TOKENIZER = ("tokenizer*", "vocab.*", "*.model", "tekken.json", "*.tiktoken")  # one of which there must be
TOKENIZER_FILES = (*TOKENIZER, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Found:
    """
    What MODEL and `--adapter` mean, looked up before anything is loaded.

    Attributes:
        base: the folder or the Hub id of a whole model.
        adapter: the folder of the adapter that goes onto it, if one does.
        folder: the folder that was named, of the adapter or else of the model; `None` where it is on the Hub.
        name, adapter_name: as reports call them, without the way to a folder.
        is_demo: whether no model was named.
    """

    base: str
    adapter: Path | None
    folder: Path | None
    name: str
    adapter_name: str | None
    is_demo: bool

    @property
    def tokenizer_place(self) -> str:
        """Where the tokenizer is: beside the adapter, else beside the model."""
        beside = self.adapter is not None and any((self.adapter / f"tokenizer{end}").exists() for end in ENDS)
        return str(self.adapter) if beside else self.base

    def tokenizer(self):
        """
        The tokenizer.

        Raises:
            `UsageError`: there is none, or it cannot be read.
        """
        from transformers import AutoTokenizer

        place = Path(self.tokenizer_place)
        if place.is_dir() and not any(file for pattern in TOKENIZER for file in place.glob(pattern)):
            raise MissingFile(f"{place} holds no tokenizer: save one there with its `save_pretrained`.")
        with reading(self.tokenizer_place):
            return AutoTokenizer.from_pretrained(self.tokenizer_place)

    def load(self, dtype: str = "auto", device: torch.device | None = None, attention: str | None = None) -> Adapted:
        """
        The model in evaluation mode, with its adapter if it has one; `load` describes the arguments.

        Raises:
            `UsageError`: it cannot be read, or the adapter is of another kind or for another model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from ..evaluation.pairs import fastest_pair

        if self.is_demo and dtype == "auto":
            dtype = "float32"  # whichever way it came
        settings = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        settings |= {"attn_implementation": attention} if attention else {}
        with reading(self.base):
            model = AutoModelForCausalLM.from_pretrained(self.base, **settings)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        if self.adapter is not None and str(self.adapter) != self.base:
            return with_adapter(model, self.adapter)
        # A whole model, or one whose adapter lies in the same folder and came with it.
        return Adapted(*fastest_pair(model), **_settings_of(vars(model.generation_config)))


def find(model: str | os.PathLike | None, adapter: str | os.PathLike | None = None) -> Found:
    """
    What is meant by MODEL and `--adapter`. A MODEL that is an adapter's folder, here or on the Hub, is that adapter on
    the model it is for: the same as that model with `--adapter`.

    Args:
        model: a local folder or a Hub id; `None` for SmolLM2-135M-Instruct (`demo_checkpoint`).
        adapter: the same of an adapter.

    Raises:
        `UsageError`: there is nothing of that name, or not what is needed.
    """
    if model is None:
        base = demo_checkpoint()
        found = Found(str(base), None, base, DEMO_MODEL, None, True)
    else:
        place = place_of(model)
        config = _adapter_config(place)
        if config is not None and adapter is not None:
            raise UsageError(f"{model} is itself an adapter: drop --adapter, or name the model it is for instead.")
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
    """An adapter on the model that its config names, or that lies in the same folder."""
    name = config.get("base_model_name_or_path")
    weights = (file for pattern in MODEL_WEIGHTS for file in Path(place).glob(pattern))
    if (Path(place) / "config.json").exists() and any(weights):
        name = place  # transformers prefers it to the name
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{typed} does not say which model it is for: name the model, and {typed} with --adapter.")
    try:
        base = place_of(name)
        if base != place and _adapter_config(base) is not None:
            raise UsageError("that is an adapter, too")
    except UsageError as error:
        raise UsageError(
            f"{typed} is an adapter for {name} ({error}): name that model, and {typed} with --adapter."
        ) from error
    return _with(Found(base, None, None, _name_of(base), None, False), place)


def _with(found: Found, place: str) -> Found:
    """What was found, with an adapter on it."""
    local = Path(place).is_dir()
    if not local:
        from huggingface_hub import snapshot_download

        with reading(place):
            files = ("adapter_*", "generation_config.json", *TOKENIZER_FILES)
            folder = Path(snapshot_download(place, allow_patterns=files))
    else:
        folder = Path(place)
    return Found(found.base, folder, folder if local else None, found.name, _name_of(place), found.is_demo)


def _name_of(place: str) -> str:
    """A model's name: that on the Hub, or of its folder, without the way there."""
    return Path(place).resolve().name if Path(place).is_dir() else place


def place_of(name: str | os.PathLike) -> str:
    """
    The folder of that name, `~` spelt out, or the name itself, where it can be one on the Hub.

    Raises:
        `UsageError`: it is neither.
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
    """The configuration of the adapter at a place, if it is one."""
    if Path(place).is_dir():
        file = Path(place) / ADAPTER_CONFIG
        return read_json(file) if file.exists() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with reading(place):
        try:
            return read_json(Path(hf_hub_download(place, ADAPTER_CONFIG)))
        except LocalEntryNotFoundError:  # no way to the Hub, which was tried for long enough
            if isinstance(try_to_load_from_cache(place, "config.json"), str):
                return None
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def reading(name: str):
    """
    Errors of reading a checkpoint go on as `UsageError`, which names it: only the checkpoint, the way to it and what
    was asked of it can be wrong here.
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
            f"the weights of {name} cannot be read ({reason}): they are damaged, copied in part, or pickled with more "
            "than weights; get them again, as .safetensors."
        ) from error
    except OSError as error:
        here = "" if Path(name).is_dir() else "there is no such folder here, and on the Hub: "
        raise MissingFile(f"{name}: {here}{_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise UsageError(f"{name}: {_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # which is what `tokenizers` raises for a file that it cannot read
            raise
        raise UsageError(f"{name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """What an error says, in one line that is no page."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300].rpartition(" ")[0] + " ..."


def load(name: str | None, dtype: str = "auto", device: torch.device | None = None, attention: str | None = None):
    """
    A model in evaluation mode, and its tokenizer.

    Args:
        name: a local folder or a Hub id, of a model or of an adapter; `None` for SmolLM2-135M-Instruct.
        dtype: `"auto"` (as saved; float32 for the demo model), `"float32"`, `"bfloat16"` or `"float16"`.
        device: where it goes; left out, the GPU if there is one.
        attention: transformers' `attn_implementation`; its own choice if left out.

    Raises:
        `ImportError`: what reads the weights is not installed.
        `OSError`: no model of that name, or no way to the demo model.
        `ValueError`: the checkpoint is damaged.
    """
    found = find(name)
    tokenizer = found.tokenizer()
    return found.load(dtype, device, attention).model, tokenizer


def encode(tokenizer, prompt: str, device) -> dict[str, torch.Tensor]:
    """The prompt as the model expects it: through its chat template if it has one, else as plain text."""
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
    """Errors of a chat template that cannot be rendered go on as `UsageError`."""
    try:
        from jinja2 import TemplateError
    except ModuleNotFoundError:
        TemplateError = UsageError
    try:
        yield
    except UsageError:
        raise
    except TemplateError as error:
        raise UsageError(f"the tokenizer's chat template cannot be used ({type(error).__name__}: {error}).") from error


class Adapted(NamedTuple):
    """
    A model as it takes part in a comparison.

    Attributes:
        model: what decodes by Jacobi decoding.
        writer: what writes the same text one token at a time, in its fastest form: for a draft-only adapter the base
            model, else `model`.
        config: how it decodes by default.
        decoding: `"jacobi"`, or `"ar"` where the checkpoint is to decode one token at a time.
        tuned: whether the checkpoint itself says how it decodes.
    """

    model: PreTrainedModel | PeftModel
    writer: PreTrainedModel
    config: JacobiConfig
    decoding: str = "jacobi"
    tuned: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """How the checkpoint decodes, as its generation config says it."""
        return {"decoding": self.decoding, "jacobi": self.config.to_dict()}


def _settings_of(content: dict[str, Any]) -> dict[str, Any]:
    """How a generation config says that a checkpoint decodes, as arguments of `Adapted`."""
    from ..decoding import JacobiConfig

    settings = content.get("jacobi")
    config = JacobiConfig.coerce(settings)
    decoding = content.get("decoding") or "jacobi"
    if decoding not in ("jacobi", "ar"):
        raise UsageError(f"`decoding` must be 'jacobi' or 'ar', got {decoding!r}.")
    return {"config": config, "decoding": decoding, "tuned": settings is not None}


def settings_beside(adapter: Path) -> dict[str, Any]:
    """How the generation config in the folder of an adapter says that it decodes, as arguments of `Adapted`."""
    file = adapter / "generation_config.json"
    content = read_json(file) if file.exists() else {}
    try:
        return _settings_of(content)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


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
    from ..decoding.draft_adapter import is_draft_only
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
        raise UsageError(f"{folder / ADAPTER_CONFIG}: `peft_type` is {kind!r}, which this PEFT does not know.")
    if not any((folder / name).exists() for name in ADAPTER_WEIGHTS):
        raise MissingFile(f"{folder} holds neither {' nor '.join(ADAPTER_WEIGHTS)}: add the adapter's weights.")
    with reading(str(folder)):
        adapter = PeftConfig.from_pretrained(folder)
    if is_plain_draft(folder):
        as_draft(adapter, str(folder), LoraConfig)
    drafts = is_draft_only(adapter)
    if not (drafts or is_for_all_tokens(adapter)):
        raise UsageError(f"{folder} is neither a LoRA for all tokens nor one that only drafts: give one of these.")
    tensors = itertools.chain(model.parameters(), model.buffers())
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        with reading(str(folder)):
            adapted = PeftModel.from_pretrained(shared, folder, config=adapter)
    except UsageError as error:
        if not isinstance(error.__cause__, (RuntimeError, ValueError)):
            raise
        raise UsageError(f"{folder} is not for this model: its weights have other names or shapes.") from error
    return Adapted(*fastest_pair(adapted.eval(), model if drafts else None), **settings)
