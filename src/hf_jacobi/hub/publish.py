"""`publish`: a checkpoint on the Hub that decodes many tokens per forward for whoever loads it."""

from __future__ import annotations

import glob
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoTokenizer

from ..decoding.compat import causal_lm_of, is_stateful, name_of
from ..decoding.config import write_settings
from ..decoding.draft_adapter import is_draft_only
from ..decoding.errors import MissingFile, UsageError, of_usage
from ..decoding.files import read_json
from ..decoding.mixin import unwrap
from .card import DECODINGS, EVALUATION, NOTE, checked, render_card
from .carried import CARRIED, is_carried, write_decoder
from .files import (
    ADAPTER_WEIGHTS,
    BESIDE,
    NAMING_PLACES,
    TOKENIZER,
    Chosen,
    choose,
    is_template,
    is_weights,
    refuse_secrets,
)
from .network import talking_to_the_hub
from .places import is_on_hub, without_local_paths
from .plain_lora import DRAFTS, as_plain, doubts_of, is_plain_draft


logger = logging.getLogger(__name__)
CARD = "README.md"
FORMATS = (None, "lora")


def publish(
    model_or_dir,
    repo_id: str,
    tokenizer=None,
    output_dir: str | Path | None = None,
    dry_run: bool = False,
    *,
    evaluation: str | Path | dict[str, Any] | None = None,
    format: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    tell: Callable[[str], Any] | None = None,
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
        tokenizer (*optional*): the tokenizer, or the name of one (a folder or a Hub id); that of the folder, or of the
            base model, if left out.
        output_dir (*optional*): where the folder that is pushed is written, empty or new. Needed for a dry run.
        dry_run (`bool`): write `output_dir` and push nothing.
        evaluation (*optional*): what was measured, for the card: a dict or a JSON file, as `render_card` takes it;
            `evaluation.json` of the folder if left out.
        format (`"lora"`, *optional*): writes a draft-only adapter as a plain LoRA, without the keys of an activated
            one and without `custom_generate/`: for `hf_jacobi.load_draft_adapter`, and for SGLang's UNO decoding
            (`--speculative-algorithm UNO --uno-lora-path`), in which it was not run.
        private (`bool`, *optional*): whether a new repository is private; as the organization has it if left out.
        token (*optional*): for the Hub; the one that is logged in if left out.
        tell (*optional*): called with each line of what is to be said before the push: names and sizes of what goes,
            what stays behind, what is doubtful. Logged if left out, the last as a warning.

    Returns:
        The address of the commit, or for a dry run the folder.

    Raises:
        `ValueError`: no checkpoint, no tokenizer, a bad `repo_id` or evaluation, `output_dir` holds files, a file is
            damaged or a link, the model keeps what Jacobi decoding cannot take back, an adapter goes onto a model that
            is not on the Hub, or there is no way to the Hub.
    """
    _check_names(model_or_dir=model_or_dir, tokenizer=tokenizer, output_dir=output_dir, evaluation=evaluation)
    in_memory = not isinstance(model_or_dir, (str, Path))
    _check_kinds(model_or_dir, tokenizer)
    if format not in FORMATS:
        raise UsageError(f"`format` must be 'lora', or left out, got {format!r}.")
    check_repo(repo_id)
    target = target_of(output_dir, dry_run)
    evaluation = _read_evaluation(evaluation)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(dir=target and target.parent) as place:
        source = _save(model_or_dir, Path(place) / "saved") if in_memory else Path(model_or_dir).expanduser()
        chosen = choose(source, with_tokenizer=tokenizer is None)
        base = _base_of(chosen, name_of(unwrap(model_or_dir)) if in_memory else None)
        _check_decodable(chosen)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        doubts = _doubts_of_base(chosen, base, source) if dry_run else _check_base(api, chosen, base, source)
        folder = Path(place) / "pushed"
        doubts += _write_folder(chosen, folder, repo_id, base, source, tokenizer, evaluation, format == "lora")
        refuse_secrets(folder)
        for doubt in doubts:
            (tell or logger.warning)(doubt)
        left = () if in_memory else [name for name in chosen.left if name != Path(place).name]
        for line in _listing(folder, repo_id, source, left):
            (tell or logger.info)(line)
        if target is not None:  # at once: what failed leaves nothing
            if target.exists():
                target.rmdir()
            folder = folder.rename(target)
        return str(folder) if dry_run else _push(api, repo_id, folder, private)


def _check_names(**given) -> None:
    """Refuses an empty text, which names the current folder: most likely a variable that is not set."""
    for name, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"`{name}` is empty: give it a name (is a variable not set?).")


def _check_kinds(model, tokenizer) -> None:
    for what, given in {"model_or_dir": model, "tokenizer": tokenizer}.items():
        left_out = given is None and what == "tokenizer"
        if not (left_out or isinstance(given, (str, Path)) or hasattr(given, "save_pretrained")):
            raise UsageError(
                f"`{what}` must be the name of a folder or what has `save_pretrained`, got {given!r:.80}."
            )


def check_repo(repo_id: str) -> None:
    """Refuses a name that no repository can have, or that names no owner."""
    with of_usage(HFValidationError):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UsageError(f"{repo_id!r} names no user or organization: pass 'user/name'.")


def target_of(output_dir: str | Path | None, dry_run: bool) -> Path | None:
    """Where the folder is kept; what lies above it is made."""
    if output_dir is None:
        if dry_run:
            raise UsageError("a dry run writes the folder that would be pushed: pass `output_dir` too (--output-dir).")
        return None
    target = Path(output_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{output_dir} holds files: name an empty folder or a new one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _read_evaluation(evaluation: str | Path | dict[str, Any] | None) -> dict[str, Any] | None:
    if not isinstance(evaluation, (str, Path)):
        return checked(evaluation)
    file = Path(evaluation).expanduser()
    if not file.is_file():
        raise MissingFile(f"there is no file {file}: `hf-jacobi bench MODEL --evaluation FILE` writes one.")
    return checked(read_json(file), file)


def _save(model, folder: Path) -> Path:
    """A model from memory as a folder."""
    model.save_pretrained(folder)
    settings = unwrap(model).generation_config.to_json_string(use_diff=True)
    (folder / "generation_config.json").write_text(settings, encoding="utf-8")
    if not any(is_weights(file.name) for file in folder.iterdir()):
        raise UsageError("an adapter is published if its name is 'default': make it with that name.")
    return folder


def _check_decodable(chosen: Chosen) -> None:
    """Refuses what would decode in parallel for nobody."""
    adapter = _adapter_config(chosen)
    if adapter is not None:
        if adapter.get("num_virtual_tokens"):
            kind = adapter.get("peft_type")
            raise UsageError(f"Jacobi decoding does not support virtual tokens ({kind}): publish a LoRA.")
        return
    config = read_json(chosen.files["config.json"])
    name = config.get("model_type")
    if "auto_map" not in config and not (isinstance(name, str) and name):
        raise UsageError(f"{chosen.files['config.json']} names no `model_type`, so that nobody can load the model.")
    model = None if "auto_map" in config or not isinstance(name, str) else causal_lm_of(name)
    if is_stateful(model) or config.get("is_encoder_decoder"):
        raise UsageError(
            f"Jacobi decoding needs a decoder whose KV cache can be rolled back, which {name} is not: push it with "
            "its own `push_to_hub`."
        )


def _adapter_config(chosen: Chosen) -> dict[str, Any] | None:
    file = chosen.files.get("adapter_config.json")
    return None if file is None else read_json(file)


def _base_of(chosen: Chosen, trained_from: str | None) -> str | None:
    """What an adapter goes onto, or what a model was trained from."""
    if (adapter := _adapter_config(chosen)) is not None:
        base = adapter.get("base_model_name_or_path")
    else:
        base = read_json(chosen.files[NOTE]).get("base_model") if NOTE in chosen.files else trained_from
    return base if isinstance(base, str) and base else None


def _unloadable(base: str | None) -> str:
    return (
        f"others cannot load {base or 'a model without a name'}, which the adapter goes onto and which is not on the "
        "Hub: publish that first, and name its repository in adapter_config.json (`base_model_name_or_path`)."
    )


def _doubts_of_base(chosen: Chosen, base: str | None, source: Path) -> list[str]:
    """What a push would refuse or look up, said by a dry run."""
    if _adapter_config(chosen) is None:
        return []
    if not is_on_hub(base, source):
        return [f"A push would be refused: {_unloadable(base)}"]
    return [f"A push would look {base}, which the adapter goes onto, up on the Hub."]


def _check_base(api: HfApi, chosen: Chosen, base: str | None, source: Path) -> list[str]:
    """Refuses, before anything is written, an adapter on what others cannot load, and a push nobody would take."""
    adapter = _adapter_config(chosen) is not None
    if adapter and not is_on_hub(base, source):
        raise UsageError(_unloadable(base))
    with talking_to_the_hub():
        try:
            api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # another Hub may not tell
                raise
        try:
            if adapter:
                api.model_info(base)
        except GatedRepoError:
            pass  # it is there, and whoever may use it knows
        except RepositoryNotFoundError:
            raise UsageError(_unloadable(base)) from None
    return []


def _push(api: HfApi, repo_id: str, folder: Path, private: bool | None) -> str:
    with talking_to_the_hub():
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
    What is in the repository of the parts that are replaced: old weights in another layout, an old adapter or an old
    chat template would be loaded before the new ones. Of a repository that no earlier push wrote the rest stays.
    """
    ours = NOTE in files
    adapter = (folder / "adapter_config.json").exists()

    def replaced(name: str) -> bool:
        if is_weights(name):
            return ours or not adapter or name in ADAPTER_WEIGHTS
        if name in TOKENIZER or is_template(name) or name == "adapter_config.json":
            return True
        return ours and (name in BESIDE or is_carried(name))

    return [
        glob.escape(name) for name in files if replaced(name) and not (folder / name).exists()
    ]  # these are patterns


def _write_folder(
    chosen: Chosen,
    folder: Path,
    repo_id: str,
    base: str | None,
    source: Path,
    tokenizer,
    evaluation: dict[str, Any] | None,
    plain: bool,
) -> list[str]:
    """Writes everything that is pushed into a new folder; returns what is doubtful of it."""
    adapter = _adapter_config(chosen)
    written = as_plain(adapter or {}, is_plain_draft(source)) if plain else adapter
    folder.mkdir()
    for name, file in chosen.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    _write_tokenizer(folder, tokenizer, base)
    settings = write_settings(folder)
    if settings["decoding"] not in DECODINGS:
        raise UsageError(
            f"generation_config.json: `decoding` must be one of {DECODINGS}, got {settings['decoding']!r}."
        )
    if plain:
        _write_json(folder / "adapter_config.json", written)
    else:
        write_decoder(folder / CARRIED, settings, adapter=adapter is not None)
    for file in filter(Path.exists, (folder / name for name in NAMING_PLACES)):
        content = read_json(file)
        if (cleaned := without_local_paths(content, source)) != content:
            _write_json(file, cleaned)
    note = without_local_paths(_note(folder, adapter, base, settings, source), source)
    if plain:
        note |= {"kind": DRAFTS, "format": "lora"}
    _write_json(folder / NOTE, note)
    doubts = doubts_of(written) if plain else []
    if evaluation is None and (folder / EVALUATION).exists():
        evaluation = checked(read_json(folder / EVALUATION), source / EVALUATION)
    if evaluation is not None:
        doubts += _check_measured(evaluation, settings)
        evaluation = without_local_paths(evaluation, source)
        _write_json(folder / EVALUATION, evaluation)
    (folder / CARD).write_text(render_card(repo_id, note, evaluation, shared=not plain), encoding="utf-8")
    return doubts


def _check_measured(evaluation: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Refuses figures of other settings than those that are published; says so where that cannot be told."""
    again = "measure again with `hf-jacobi bench MODEL --evaluation MODEL/evaluation.json`"
    measured = evaluation.get("settings")
    if measured is None:
        return [f"The evaluation does not say with which settings it was made: if they changed since, {again}."]
    if measured != settings:
        raise UsageError(
            f"the evaluation was measured with other settings than those published: {again}, or delete it."
        )
    return []


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer, base: str | None) -> None:
    """The tokenizer that was given, or that of the folder, if need be of the base model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if (folder / "tokenizer_config.json").exists():
        _check_tokenizer(folder)
        return
    said = ""
    for place in filter(None, [folder, base]):
        try:
            load_tokenizer(place).save_pretrained(folder)
            return
        except UsageError as error:  # there is none
            said = f" ({error})" if place is base else ""
    raise UsageError(f"there is no tokenizer beside the model: pass `tokenizer`{said}.")


def load_tokenizer(place: str | Path):
    """The tokenizer of a folder or a Hub id."""
    path = Path(place).expanduser()
    if path.is_file():
        raise UsageError(f"{place} is a file: name the folder that holds the tokenizer.")
    if not path.is_dir() and not is_on_hub(str(place)):
        raise MissingFile(f"there is no folder {place}, to read a tokenizer from, nor can it be a name on the Hub.")
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else place, trust_remote_code=False)
    except Exception as error:  # tokenizers raises `Exception` itself; nothing but the place can be at fault
        raise UsageError(f"{place} gives no tokenizer: {' '.join(str(error).split())}") from error


def _check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer that does not load from what goes, unless that takes code or packages of its own."""
    if "auto_map" in read_json(folder / "tokenizer_config.json") or list(folder.glob("*.py")):
        return
    try:
        load_tokenizer(folder)
    except UsageError as error:
        if not isinstance(error.__cause__, ImportError):
            said = str(error).partition(": ")[2]
            raise UsageError(f"the tokenizer does not load from the files that would go: {said}") from error


def _listing(folder: Path, repo_id: str, source: Path, left: Iterable[str]) -> list[str]:
    """What goes, with its size, and what stays."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{_size(file.stat().st_size):>9}  {file.relative_to(folder).as_posix()}" for file in files]
    stays = [_printable(name) for name in left if name not in (CARD, CARRIED)]
    return [f"what goes to {repo_id}:", *lines, *([f"what stays in {source}: {', '.join(stays)}"] if stays else [])]


def _printable(name: str) -> str:
    """A name as it is, unless it would do something to the terminal or look like other lines."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} GB"


def _note(folder: Path, adapter: dict | None, base: str | None, settings: dict[str, Any], source: Path) -> dict:
    """What the trainer noted, or what can be told of a checkpoint without that; what it is, its files say."""
    draft = adapter is not None and is_draft_only(SimpleNamespace(**adapter))
    draft = draft or is_plain_draft(source)
    note: dict[str, Any] = {
        "dataset": None,
        "settings": {},
        "figures": {},
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if (folder / NOTE).exists():
        note |= read_json(folder / NOTE)
    for key, kind in {"settings": dict, "figures": dict, "software": dict, "remark": str}.items():
        if not isinstance(note.get(key, kind()), kind):
            raise UsageError(f"{NOTE}: `{key}` is {note[key]!r}, which no training wrote: delete the file.")
    if not all(isinstance(figure, (int, float)) for figure in note["figures"].values()):
        raise UsageError(f"{NOTE}: `figures` should hold numbers, got {note['figures']!r}: delete the file.")
    return note | {
        "base_model": base if is_on_hub(base, source) else None,
        "dataset": note["dataset"] if is_on_hub(note["dataset"], source) else None,
        "kind": "model" if adapter is None else "draft-only adapter" if draft else "adapter",
        **settings,
    }
