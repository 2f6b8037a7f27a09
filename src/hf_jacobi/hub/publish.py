"""`publish`: a checkpoint on the Hub that decodes many tokens per forward for whoever loads it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer

from ..decoding.compat import causal_lm_of, imported_beside, is_stateful, name_of, requirement
from ..decoding.config import write_settings
from ..decoding.draft_adapter import is_draft_only
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from .card import EVALUATION, NOTE, checked, is_on_hub, render_card


ENTRY = "generate"
CARRIED = "custom_generate"
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.bin")
TEMPLATES = "additional_chat_templates"
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    TEMPLATES,
)
PUBLISHED = (
    *WEIGHTS,
    *TOKENIZER,
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    NOTE,
    EVALUATION,
)
LICENSE = "LICENSE*"


def publish(
    model_or_dir,
    repo_id: str,
    tokenizer=None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    *,
    evaluation: str | Path | dict[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """
    Pushes a model or an adapter to the Hub with everything it needs to decode fast.

    What is pushed: the weights; the tokenizer; the generation config with `decoding` and `jacobi`; a model card out
    of what was noted of the training and of what was measured; and `custom_generate/`, the decoder itself, so that
    `AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True).generate(...)` decodes fast where
    `hf_jacobi` is not installed. (For an adapter, `generate(..., custom_generate=repo_id, trust_remote_code=True)`.)

    Args:
        model_or_dir (`PreTrainedModel`, `PeftModel`, `str` or `Path`):
            A model, or the folder of one that `save_pretrained` or `JacobiForcingTrainer` wrote. A LoRA is published
            as an adapter; `merge_and_unload()` before makes a whole model of it.
        repo_id (`str`): `"user/name"` on the Hub; made if it is not there.
        tokenizer (*optional*): the tokenizer; that of the folder, or of the base model, if left out.
        output_dir (*optional*): where the folder that is pushed is written, empty or new. Needed for a dry run.
        dry_run (`bool`): write `output_dir` and push nothing.
        evaluation (*optional*): what was measured, for the card: a dict or a JSON file, as `render_card` takes it;
            `evaluation.json` of the folder if left out.
        private (`bool`, *optional*): whether a new repository is private; as the organization has it if left out.
        token (*optional*): for the Hub; the one that is logged in if left out.

    Returns:
        The address of the commit, or for a dry run the folder.

    Raises:
        `ValueError`: no checkpoint, no tokenizer, a bad `repo_id` or evaluation, `output_dir` holds files, the model
            keeps what Jacobi decoding cannot take back, or an adapter goes onto a model that is not on the Hub.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UsageError(f"{repo_id!r} names no user or organization: pass 'user/name'.")
    if dry_run and output_dir is None:
        raise UsageError("a dry run writes the folder that would be pushed: pass `output_dir` too.")
    target = None if output_dir is None else Path(output_dir).expanduser()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{output_dir} holds files: name an empty folder or a new one.")
    if isinstance(evaluation, (str, Path)):
        evaluation = json.loads(Path(evaluation).expanduser().read_text(encoding="utf-8"))
    evaluation = checked(evaluation)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target and target.parent) as place:
        folder = Path(place) / "pushed"
        folder.mkdir()
        write_folder(model_or_dir, repo_id, folder, tokenizer, evaluation)
        adapter = _adapter_config(folder)
        if not dry_run and adapter is not None and not is_on_hub(base := adapter.get("base_model_name_or_path")):
            raise UsageError(
                f"others cannot load {base or 'a model without a name'}, which the adapter goes onto: publish that "
                "first, and name its repository in adapter_config.json (`base_model_name_or_path`)."
            )
        if target is not None:  # at once: what failed leaves nothing
            if target.exists():
                target.rmdir()
            folder = folder.rename(target)
        if dry_run:
            return str(folder)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload with hf_jacobi",
                delete_patterns=_left_behind(api.list_repo_files(repo_id), folder),
            )
        )


def _left_behind(files: list[str], folder: Path) -> list[str]:
    """
    What an earlier upload left in the repository, of what such a folder holds: old weights in another layout would be
    loaded before the new ones. What else there is stays.
    """
    return [
        name
        for name in files
        if not (folder / name).exists()
        and (
            name.startswith((f"{CARRIED}/", f"{TEMPLATES}/"))
            or ("/" not in name and any(fnmatch(name, pattern) for pattern in PUBLISHED))
        )
    ]


def write_folder(model_or_dir, repo_id: str, folder: Path, tokenizer, evaluation: dict[str, Any] | None) -> None:
    """Writes everything that is pushed into an empty folder."""
    if isinstance(model_or_dir, (str, Path)):
        source = Path(model_or_dir).expanduser()
        _copy_checkpoint(source, folder, {*PUBLISHED, LICENSE} - set(() if tokenizer is None else TOKENIZER))
    else:
        source = None
        model_or_dir.save_pretrained(folder)
        settings = unwrap(model_or_dir).generation_config.to_json_string(use_diff=True)
        (folder / "generation_config.json").write_text(settings, encoding="utf-8")
        if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            raise UsageError("an adapter is published if its name is 'default': make it with that name.")
    _check_decodable(folder)
    base = _base_of(folder, None if source else name_of(unwrap(model_or_dir)))
    _write_tokenizer(folder, tokenizer, [source, base])
    settings = write_settings(folder)
    _write_decoder(folder / CARRIED, settings, adapter=_adapter_config(folder) is not None)
    note = _note(folder, base, settings)
    _write_json(folder / NOTE, note)
    if evaluation is not None:
        _write_json(folder / EVALUATION, evaluation)
    elif (folder / EVALUATION).exists():
        evaluation = checked(json.loads((folder / EVALUATION).read_text(encoding="utf-8")))
    (folder / "README.md").write_text(render_card(repo_id, note, evaluation, shared=True), encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_checkpoint(source: Path, folder: Path, patterns) -> None:
    weights = any(path for pattern in WEIGHTS for path in source.glob(pattern))
    if not weights or not any((source / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"{source} holds no weights or no config: name a folder that save_pretrained or the trainer wrote."
        )
    for path in {path for pattern in patterns for path in source.glob(pattern)} | _own_code(source):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _own_code(source: Path) -> set[Path]:
    """The files of a model's own code: those that its configs name, and what these import beside them."""
    files = set()
    for config in filter(Path.exists, (source / "config.json", source / "tokenizer_config.json")):
        for named in json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}).values():
            references = [named] if isinstance(named, str) else filter(None, named)
            files |= {source / f"{name.partition('.')[0]}.py" for name in references if "--" not in name}
    files = set(filter(Path.exists, files))
    return files | {found for file in files for found in imported_beside(file)}


def _check_decodable(folder: Path) -> None:
    """Refuses what would decode in parallel for nobody."""
    adapter = _adapter_config(folder)
    if adapter is not None:
        if adapter.get("num_virtual_tokens"):
            raise UsageError(f"Jacobi decoding knows no virtual tokens ({adapter['peft_type']}): publish a LoRA.")
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("model_type")
    model = None if "auto_map" in config else causal_lm_of(name)
    if is_stateful(model) or config.get("is_encoder_decoder"):
        raise UsageError(
            f"Jacobi decoding needs a decoder whose KV cache can be rolled back, which {name} is not: push it with "
            "its own `push_to_hub`."
        )


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    file = folder / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _base_of(folder: Path, trained_from: str | None) -> str | None:
    """What an adapter goes onto, or what a model was trained from."""
    if (adapter := _adapter_config(folder)) is not None:
        return adapter.get("base_model_name_or_path")
    if (folder / NOTE).exists():
        return json.loads((folder / NOTE).read_text(encoding="utf-8")).get("base_model")
    return trained_from


def _write_tokenizer(folder: Path, tokenizer, places: list) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if (folder / "tokenizer_config.json").exists():
        return
    for place in filter(None, places):
        try:
            AutoTokenizer.from_pretrained(place).save_pretrained(folder)
            return
        except (OSError, ValueError):  # there is none
            continue
    raise UsageError("there is no tokenizer beside the model: pass `tokenizer`.")


def _write_decoder(folder: Path, settings: dict[str, Any], adapter: bool) -> None:
    """The decoder out of this package's own source: the entry, and the modules it needs, directly or not."""
    package = resources.files("hf_jacobi")
    sources = {ENTRY: (package / "hub" / "custom_generate.py").read_text(encoding="utf-8")}
    sources["settings"] = (
        '"""How this checkpoint decodes, where neither the call nor the generation config says so."""\n\n'
        f"ADAPTER = {adapter}\nDECODING = {settings['decoding']!r}\nJACOBI = {settings['jacobi']!r}\n"
    )
    missing = set(RELATIVE_IMPORT.findall(sources[ENTRY])) - sources.keys()
    while missing:
        name = missing.pop()
        sources[name] = (package / "decoding" / f"{name}.py").read_text(encoding="utf-8")
        missing |= set(RELATIVE_IMPORT.findall(sources[name])) - sources.keys()
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "requirements.txt").write_text(requirement() + "\n", encoding="utf-8")


def _note(folder: Path, base: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the trainer noted, or what can be told of a checkpoint without that; what it is, its files say."""
    adapter = _adapter_config(folder)
    draft = adapter is not None and is_draft_only(SimpleNamespace(**adapter))
    note: dict[str, Any] = {
        "dataset": None,
        "settings": {},
        "figures": {},
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if (folder / NOTE).exists():
        note |= json.loads((folder / NOTE).read_text(encoding="utf-8"))
    return note | {
        "base_model": base if is_on_hub(base) else None,
        "kind": "model" if adapter is None else "draft-only adapter" if draft else "adapter",
        **settings,
    }
