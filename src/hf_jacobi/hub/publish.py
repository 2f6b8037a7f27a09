"""`publish`: pushes a checkpoint to the Hub that decodes many tokens per forward without further setup."""

from __future__ import annotations

import glob
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from ..decoding.config import JacobiConfig, write_settings
from ..decoding.draft_adapter import is_draft_only
from ..decoding.errors import MissingFile, UsageError, of_usage
from ..decoding.files import read_json
from ..decoding.mixin import unwrap
from ..decoding.ngram_table import TABLE, checkpoint_of, find_table
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
from .plain_lora import CONFIG, DRAFTS, as_plain, doubts_of, is_plain_draft


logger = logging.getLogger(__name__)
CARD = "README.md"
FORMATS = (None, "lora")


@dataclass(frozen=True)
class Checkpoint:
    """
    What is published.

    Attributes:
        source: the folder.
        chosen: the files of it that are published.
        adapter: the content of its `adapter_config.json`; `None` for a complete model.
        base: the model that the adapter is for, or that the complete model was trained from, if known.
    """

    source: Path
    chosen: Chosen
    adapter: dict[str, Any] | None
    base: str | None


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
    Pushes a model or an adapter to the Hub with everything it needs for Jacobi decoding.

    The repository receives the weights, the tokenizer, the generation config with `decoding` and `jacobi`, a model
    card with the record of the training and the evaluation, and the decoder itself in `custom_generate/`. With it,
    `AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True).generate(...)` uses Jacobi decoding where
    `hf_jacobi` is not installed. (For an adapter, `generate(..., custom_generate=repo_id, trust_remote_code=True)`.)

    Args:
        model_or_dir (`PreTrainedModel`, `PeftModel`, `str` or `Path`):
            A model, or a folder that `save_pretrained` or `JacobiForcingTrainer` wrote. A LoRA is published as an
            adapter; call `merge_and_unload()` first to publish a complete model.
        repo_id (`str`): `"user/name"` on the Hub; created if it does not exist.
        tokenizer (*optional*): the tokenizer, or its folder or Hub id. By default that of the folder, or else that of
            the base model.
        output_dir (*optional*): where to keep the folder that is pushed; a new or empty folder.
        dry_run (`bool`): write the folder and report its files without pushing it.
        evaluation (*optional*): the measurements for the card: a dict, as `render_card` takes it, or a JSON file. By
            default `evaluation.json` in the folder.
        format (`"lora"`, *optional*): writes a draft-only adapter as a plain LoRA, without the keys of an activated
            LoRA and without `custom_generate/`: for `hf_jacobi.load_draft_adapter`, and for UNO decoding in SGLang
            (`--speculative-algorithm UNO --uno-lora-path`), where it was not tested.
        private (`bool`, *optional*): whether a new repository is private; by default as the organization sets it.
        token (*optional*): the Hub token; by default that of the login.
        tell (*optional*): called with each line of the report before the push: the files that go, with their sizes,
            the files that stay, and warnings. By default they are logged.

    Returns:
        The URL of the commit; for a dry run `output_dir`, or `""` without one.

    Raises:
        `ValueError`: there is no checkpoint or no tokenizer, `repo_id` or the evaluation is invalid, `output_dir` is
            not empty, a file is damaged or a link, Jacobi decoding does not support the model, the base model of an
            adapter is not on the Hub, or the Hub cannot be reached.
    """
    _check_names(model_or_dir=model_or_dir, tokenizer=tokenizer, output_dir=output_dir, evaluation=evaluation)
    _check_kinds(model_or_dir, tokenizer)
    if format not in FORMATS:
        raise UsageError(f"`format` must be 'lora', or left out, got {format!r}.")
    check_repo(repo_id)
    target = target_of(output_dir)
    evaluation = _read_evaluation(evaluation)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(dir=target and target.parent) as scratch:
        checkpoint = _checkpoint_of(model_or_dir, Path(scratch), with_tokenizer=tokenizer is None)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        doubts = _doubts_of_base(checkpoint) if dry_run else []
        if not dry_run:
            _check_push(api, checkpoint)
        folder = Path(scratch) / "pushed"
        doubts += _write_folder(checkpoint, folder, repo_id, tokenizer, evaluation, plain=format == "lora")
        refuse_secrets(folder)
        for doubt in doubts:
            (tell or logger.warning)(doubt)
        for line in _listing(folder, repo_id, checkpoint, Path(scratch)):
            (tell or logger.info)(line)
        if target is not None:
            folder = moved(folder, target)
        return str(target or "") if dry_run else _push(api, repo_id, folder, private)


def _check_names(**given) -> None:
    """Refuses an empty string, which would mean the current folder: most likely an unset variable."""
    for name, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise UsageError(f"`{name}` is empty: pass a name (is a variable unset?).")


def _check_kinds(model, tokenizer) -> None:
    for what, given in {"model_or_dir": model, "tokenizer": tokenizer}.items():
        left_out = given is None and what == "tokenizer"
        if not (left_out or isinstance(given, (str, Path)) or hasattr(given, "save_pretrained")):
            raise UsageError(f"`{what}` must be a name or an object with `save_pretrained`, got {given!r:.80}.")


def check_repo(repo_id: str) -> None:
    """Refuses an invalid repository id, or one without an owner."""
    with of_usage(HFValidationError):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise UsageError(f"{repo_id!r} does not name a user or organization: pass 'user/name'.")


def target_of(output_dir: str | Path | None) -> Path | None:
    """Checks where the pushed folder is kept, and creates its parent folders; `None` if it is not kept."""
    if output_dir is None:
        return None
    target = Path(output_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{output_dir} is not an empty folder: pass a new or empty one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def moved(folder: Path, target: Path) -> Path:
    """Moves a finished folder to where it is kept, so that a failure before leaves nothing there."""
    if target.exists():
        target.rmdir()
    return folder.rename(target)


def _read_evaluation(evaluation: str | Path | dict[str, Any] | None) -> dict[str, Any] | None:
    if not isinstance(evaluation, (str, Path)):
        return checked(evaluation)
    file = Path(evaluation).expanduser()
    if not file.is_file():
        raise MissingFile(f"there is no file {file}: `hf-jacobi bench MODEL --evaluation FILE` writes one.")
    return checked(read_json(file), file)


def _checkpoint_of(model_or_dir, scratch: Path, with_tokenizer: bool) -> Checkpoint:
    """The checkpoint to publish; a model in memory is saved to `scratch` first."""
    in_memory = not isinstance(model_or_dir, (str, Path))
    source = _save(model_or_dir, scratch / "saved") if in_memory else Path(model_or_dir).expanduser()
    chosen = choose(source, with_tokenizer=with_tokenizer)
    adapter = read_json(chosen.files[CONFIG]) if CONFIG in chosen.files else None
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
    elif NOTE in chosen.files:
        base = read_json(chosen.files[NOTE]).get("base_model")
    else:
        base = name_of(unwrap(model_or_dir)) if in_memory else None
    checkpoint = Checkpoint(source, chosen, adapter, base if isinstance(base, str) and base else None)
    _check_decodable(checkpoint)
    return checkpoint


def _save(model, folder: Path) -> Path:
    """Saves a model from memory to a folder."""
    model.save_pretrained(folder)
    inner = unwrap(model)
    (folder / "generation_config.json").write_text(
        inner.generation_config.to_json_string(use_diff=True), encoding="utf-8"
    )
    name = JacobiConfig.coerce(getattr(inner.generation_config, "jacobi", None)).ngram_table
    if name == TABLE and (table := find_table(name, checkpoint_of(inner))):
        shutil.copyfile(table, folder / TABLE)
    if not any(is_weights(file.name) for file in folder.iterdir()):
        raise UsageError("only an adapter named 'default' can be published: create it under that name.")
    return folder


def _check_decodable(checkpoint: Checkpoint) -> None:
    """Refuses a model that Jacobi decoding does not support."""
    adapter = checkpoint.adapter
    if adapter is not None:
        if adapter.get("num_virtual_tokens"):
            kind = adapter.get("peft_type")
            raise UsageError(f"Jacobi decoding does not support virtual tokens ({kind}): publish a LoRA.")
        return
    file = checkpoint.chosen.files["config.json"]
    config = read_json(file)
    name = config.get("model_type")
    if "auto_map" not in config and not (isinstance(name, str) and name):
        raise UsageError(f"{file} names no `model_type`, so the model cannot be loaded: save it again.")
    model = None if "auto_map" in config or not isinstance(name, str) else causal_lm_of(name)
    if is_stateful(model) or config.get("is_encoder_decoder"):
        raise UsageError(
            f"Jacobi decoding needs a decoder whose KV cache can be rolled back, which {name} is not: push it with "
            "its own `push_to_hub`."
        )


def _hub_base(checkpoint: Checkpoint) -> str | None:
    """The Hub id of the model that an adapter is for; `None` for a complete model."""
    if checkpoint.adapter is None:
        return None
    if not is_on_hub(checkpoint.base, checkpoint.source):
        raise UsageError(_unloadable(checkpoint.base))
    return checkpoint.base


def _unloadable(base: str | None) -> str:
    return (
        f"others cannot load {base or 'a model without a name'}, the adapter's base model, which is not on the Hub: "
        f"publish that first, and name its repository in {CONFIG} (`base_model_name_or_path`)."
    )


def _doubts_of_base(checkpoint: Checkpoint) -> list[str]:
    """What a dry run says about the base model of an adapter in place of the checks of a push."""
    try:
        base = _hub_base(checkpoint)
    except UsageError as error:
        return [f"A push would be refused: {error}"]
    return [] if base is None else [f"A push would check that {base}, the adapter's base model, is on the Hub."]


def _check_push(api: HfApi, checkpoint: Checkpoint) -> None:
    """Refuses, before anything is written, an invalid login and an adapter whose base model others cannot load."""
    base = _hub_base(checkpoint)
    with talking_to_the_hub():
        try:
            api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # other Hub servers may lack this endpoint
                raise
        try:
            if base is not None:
                api.model_info(base)
        except GatedRepoError:
            pass  # it exists, and its users have to request access in any case
        except RepositoryNotFoundError:
            raise UsageError(_unloadable(base)) from None


def _push(api: HfApi, repo_id: str, folder: Path, private: bool | None) -> str:
    with talking_to_the_hub():
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload with hf_jacobi",
                delete_patterns=_outdated(api.list_repo_files(repo_id), folder),
            )
        )


def _outdated(files: list[str], folder: Path) -> list[str]:
    """
    The outdated files of a repository, as patterns to delete: old weights in another layout, an old adapter or an old
    chat template would be loaded before the new ones. Other files go only if an earlier push wrote them.
    """
    ours = NOTE in files
    adapter = (folder / "adapter_config.json").exists()

    def replaced(name: str) -> bool:
        if is_weights(name):
            return ours or not adapter or name in ADAPTER_WEIGHTS
        if name in TOKENIZER or is_template(name) or name == "adapter_config.json":
            return True
        return ours and (name in BESIDE or is_carried(name))

    return [glob.escape(name) for name in files if replaced(name) and not (folder / name).exists()]


def _write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    repo_id: str,
    tokenizer,
    evaluation: dict[str, Any] | None,
    plain: bool,
) -> list[str]:
    """Writes everything that is pushed into a new folder; returns warnings."""
    source, adapter = checkpoint.source, checkpoint.adapter
    written = as_plain(adapter or {}, is_plain_draft(source)) if plain else None
    folder.mkdir()
    for name, file in checkpoint.chosen.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    _write_tokenizer(folder, tokenizer, checkpoint.base)
    settings = write_settings(folder, jacobi=_with_own_table(folder, source))
    if settings["decoding"] not in DECODINGS:
        raise UsageError(
            f"generation_config.json: `decoding` must be one of {DECODINGS}, got {settings['decoding']!r}."
        )
    if written is not None:
        _write_json(folder / CONFIG, written)
    else:
        write_decoder(folder / CARRIED, settings, repo_id if adapter is not None else None)
    _remove_local_paths(folder, source)
    note = without_local_paths(_note(folder, checkpoint, settings), source)
    if plain:
        note |= {"kind": DRAFTS, "format": "lora"}
    _write_json(folder / NOTE, note)
    evaluation, doubts = _write_evaluation(folder, evaluation, settings, source)
    (folder / CARD).write_text(render_card(repo_id, note, evaluation, shared=not plain), encoding="utf-8")
    if settings["jacobi"]["ngram_table"] == TABLE and not (folder / TABLE).exists():
        doubts = [*doubts, f"generation_config.json names {TABLE}, which the folder lacks: drafts do without."]
    return [*doubts_of(written or {}), *doubts]


def _with_own_table(folder: Path, source: Path) -> dict[str, Any]:
    """
    The settings of Jacobi decoding to publish, whose table of n-grams, if they name a file of this machine, becomes
    part of the folder.
    """
    file = folder / "generation_config.json"
    settings = JacobiConfig.coerce(read_json(file).get("jacobi") if file.exists() else None).to_dict()
    name = settings["ngram_table"]
    if name not in (None, TABLE) and not is_on_hub(name, source):
        table = find_table(name, str(source))
        if table is None:  # find_table has warned
            return settings | {"ngram_table": None}
        shutil.copyfile(table, folder / TABLE)
        settings["ngram_table"] = TABLE
    return settings


def _remove_local_paths(folder: Path, source: Path) -> None:
    for file in filter(Path.exists, (folder / name for name in NAMING_PLACES)):
        content = read_json(file)
        if (cleaned := without_local_paths(content, source)) != content:
            _write_json(file, cleaned)


def _write_evaluation(
    folder: Path, evaluation: dict[str, Any] | None, settings: dict[str, Any], source: Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Writes the evaluation that was passed; returns it, or else the one in the folder, and warnings."""
    if evaluation is None and (folder / EVALUATION).exists():
        evaluation = checked(read_json(folder / EVALUATION), source / EVALUATION)
    if evaluation is None:
        return None, []
    doubts = _check_measured(evaluation, settings)
    evaluation = without_local_paths(evaluation, source)
    _write_json(folder / EVALUATION, evaluation)
    return evaluation, doubts


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a table of n-grams has the name that publishing gives it, wherever it was measured."""
    jacobi = settings["jacobi"]
    return settings | {"jacobi": jacobi | {"ngram_table": jacobi.get("ngram_table") and TABLE}}


def _check_measured(evaluation: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Refuses figures measured with settings other than the published ones; warns if the settings are unknown."""
    again = "measure again with `hf-jacobi bench MODEL --evaluation MODEL/evaluation.json`"
    measured = evaluation.get("settings")
    if measured is None:
        return [f"The evaluation does not say with which settings it was measured: if they have changed, {again}."]
    if _comparable(measured) != _comparable(settings):
        raise UsageError(
            f"the evaluation was measured with other settings than those published: {again}, or delete it."
        )
    return []


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, tokenizer, base: str | None) -> None:
    """Writes the tokenizer that was passed, or else that of the folder, or else that of the base model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if (folder / "tokenizer_config.json").exists():
        _check_tokenizer(folder)
        return
    places: list[str | Path] = [folder] if base is None else [folder, base]
    said = ""
    for place in places:
        try:
            load_tokenizer(place).save_pretrained(folder)
            return
        except UsageError as error:  # it has no tokenizer
            said = f" ({error})" if place is base else ""
    raise UsageError(f"there is no tokenizer beside the model: pass `tokenizer`{said}.")


def load_tokenizer(place: str | Path):
    """The tokenizer of a folder or a Hub id."""
    path = Path(place).expanduser()
    if path.is_file():
        raise UsageError(f"{place} is a file: name the folder that holds the tokenizer.")
    if not path.is_dir() and not is_on_hub(str(place)):
        raise MissingFile(f"there is no folder {place}, and it is not a Hub id: pass the folder or id of a tokenizer.")
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else place, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`s; only the place can be the cause
        raise UsageError(f"no tokenizer can be loaded from {place}: {' '.join(str(error).split())}") from error


def _check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer that cannot be loaded from the folder, unless it needs its own code or a missing package."""
    if "auto_map" in read_json(folder / "tokenizer_config.json") or list(folder.glob("*.py")):
        return
    try:
        load_tokenizer(folder)
    except UsageError as error:
        if not isinstance(error.__cause__, ImportError):
            said = str(error).partition(": ")[2]
            raise UsageError(f"the tokenizer cannot be loaded from its files: {said}") from error


def _listing(folder: Path, repo_id: str, checkpoint: Checkpoint, scratch: Path) -> list[str]:
    """The files that go to the Hub, with their sizes, and the files that stay."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    lines = [f"{_size(file.stat().st_size):>9}  {file.relative_to(folder).as_posix()}" for file in files]
    lines = [f"what goes to {repo_id}:", *lines]
    if scratch in checkpoint.source.parents:  # a model from memory, where everything of interest goes
        return lines
    ours = {CARD, CARRIED, scratch.name}
    if stays := [_printable(name) for name in checkpoint.chosen.left if name not in ours]:
        lines.append(f"what stays in {checkpoint.source}: {', '.join(stays)}")
    return lines


def _printable(name: str) -> str:
    """A file name, quoted if it could control the terminal or be mistaken for another line."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} GB"


def _note(folder: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """The trainer's note, if there is one; what kind of checkpoint it is and how it decodes comes from its files."""
    source, adapter = checkpoint.source, checkpoint.adapter
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
            raise UsageError(f"{NOTE}: `{key}` is {note[key]!r}, which the trainer does not write: delete the file.")
    if not all(isinstance(figure, (int, float)) for figure in note["figures"].values()):
        raise UsageError(f"{NOTE}: `figures` must contain numbers, got {note['figures']!r}: delete the file.")
    return note | {
        "base_model": checkpoint.base if is_on_hub(checkpoint.base, source) else None,
        "dataset": note["dataset"] if is_on_hub(note["dataset"], source) else None,
        "kind": "model" if adapter is None else "draft-only adapter" if draft else "adapter",
        **settings,
    }
