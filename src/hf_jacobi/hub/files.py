"""
Which files of a checkpoint are published: an allow-list of exact names, and the files that its index and configs name.

Files outside the folder are never published, and a checkpoint that could not be loaded again is refused before
anything is written.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..decoding.errors import MissingFile, UsageError
from ..decoding.files import parse_json, read_json, refuse_pointer
from ..decoding.ngram_table import TABLE
from .card import EVALUATION, NOTE
from .places import is_on_hub


# In the order in which transformers and PEFT look for them; they load the first one that exists.
MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    # the vocabularies of transformers' tokenizers
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "word_pronunciation.json",
    "word_shape.json",
    # and of models with their own code
    "tokenizer.model.v3",
    "ice_text.model",
    "qwen.tiktoken",
    "hy.tiktoken",
    "arcade100k.tiktoken",
    "cl100k_base.tiktoken",
)
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja files
PROCESSOR = (  # for multimodal models
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")
NAMING_CODE = ("config.json", "tokenizer_config.json", *PROCESSOR)
NAMING_PLACES = (*CONFIGS, "tokenizer_config.json", *PROCESSOR)  # can contain paths of this machine
BESIDE = {*CONFIGS, *PROCESSOR, NOTE, EVALUATION, TABLE}
LICENSES = tuple(name + end for name in ("LICENSE", "LICENCE", "NOTICE", "COPYING") for end in ("", ".txt", ".md")) + (
    "USE_POLICY.md",
)
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import\b|import\s+\.(\S+)\s*$)", re.MULTILINE)
TEXTS = {".json", ".py", ".jinja", ".txt", ".md"}
SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{40,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # the name of a file in the Hub's cache


@dataclass(frozen=True)
class Chosen:
    """
    Which files of a folder are published.

    Attributes:
        files: from the name in the repository to the file on disk.
        left: the names that are not published.
    """

    files: dict[str, Path]
    left: tuple[str, ...]


def choose(source: Path, with_tokenizer: bool = True) -> Chosen:
    """
    Chooses the files of a checkpoint to publish.

    Args:
        source: a folder that `save_pretrained` or the trainer wrote, or a snapshot in the Hub's cache.
        with_tokenizer: whether to include its tokenizer.

    Raises:
        `UsageError`: it is not a checkpoint, or a file to publish is damaged, a link, or outside the folder.
    """
    if not source.is_dir():
        raise MissingFile(f"there is no folder {source}: pass one that save_pretrained or the trainer wrote.")
    source = source.resolve()
    here = {path.name for path in source.iterdir()}
    weights = _weights(source, here)
    names = [*BESIDE, *LICENSES, *(TOKENIZER if with_tokenizer else ())]
    files = {name: _plain_file(source, name) for name in names if name in here} | weights
    if with_tokenizer and TEMPLATES in here:
        files |= _templates(source)
    for file in files.values():
        _check_content(file)
    naming = [name for name in NAMING_CODE if name in files]
    files |= _own_code(source, here, {name: read_json(files[name]) for name in naming})
    _refuse_same_but_for_case(files)
    if (source / TEMPLATES).is_dir():
        here |= {f"{TEMPLATES}/{path.name}" for path in (source / TEMPLATES).iterdir()}
    return Chosen(files, tuple(sorted(here - files.keys() - {TEMPLATES})))


def is_weights(name: str) -> bool:
    """Whether a name in a repository is that of a weights file."""
    return name in MODEL_WEIGHTS + ADAPTER_WEIGHTS or SHARD.fullmatch(name) is not None


def is_template(name: str) -> bool:
    """Whether a name in a repository is that of an additional chat template."""
    folder, _, name = name.partition("/")
    return folder == TEMPLATES and name.endswith(".jinja") and "/" not in name and not name.startswith(".")


def _refuse_hollow(file: Path) -> None:
    """Refuses a git-lfs pointer, and an empty file where that must be a mistake."""
    refuse_pointer(file)
    if not file.stat().st_size and file.suffix != ".py" and file.name not in LICENSES:
        raise UsageError(f"{file} is empty: copy or save it again.")


def _plain_file(source: Path, name: str) -> Path:
    """A regular file of the folder, or the file that a link in the Hub's cache points to."""
    path = source / name
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISLNK(mode):
        raise UsageError(f"{path} is not a regular file: move it away.")
    target = Path(os.path.realpath(path))
    cached = source.parent.name == "snapshots" and target.parent == source.parents[1] / "blobs"
    if not cached or not BLOB.fullmatch(target.name) or not target.is_file():
        raise UsageError(f"{path} is a link, which is not followed: replace it with the file it points to.")
    return target


def _weights(source: Path, here: set[str]) -> dict[str, Path]:
    """The weights files that transformers or PEFT would load from the folder."""
    kinds = ADAPTER_WEIGHTS if "adapter_config.json" in here else MODEL_WEIGHTS
    found = next((name for name in kinds if name in here), None)
    if found is None or not here & {"config.json", "adapter_config.json"}:
        beside = "adapter_config.json" in here and here & {*MODEL_WEIGHTS}
        raise UsageError(
            f"{source} contains adapter_config.json but no weights of an adapter: add them, or move that file away "
            "to publish the complete model."
            if beside
            else f"{source} contains no weights or no config: pass a folder that save_pretrained or the trainer wrote."
        )
    if "config.json" in here and read_json(_plain_file(source, "config.json")).get("transformers_weights"):
        raise UsageError(
            f"{source / 'config.json'} names other weights (`transformers_weights`), which is not supported: load "
            "the model and save it again with save_pretrained."
        )
    file = _plain_file(source, found)
    _refuse_hollow(file)
    if not found.endswith(".index.json"):
        check_weights(file, found.endswith(".safetensors"))
        return {found: file}
    return {found: file} | _shards(source, here, file, ".safetensors" if "safetensors" in found else ".bin")


def _shards(source: Path, here: set[str], index: Path, kind: str) -> dict[str, Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(shard, str) for shard in named.values()):
        raise UsageError(f"{index} has no `weight_map` from weights to files: save the model again.")
    shards = {}
    for shard in sorted(set(named.values())):
        if not _is_plain(shard.removesuffix(kind)) or not shard.endswith(kind):
            raise UsageError(
                f"{index} names {shard!r}, which is not a weights file (*{kind}) in the same folder: save the model "
                "again."
            )
        if shard not in here:
            raise UsageError(f"{index} names {shard}, which does not exist: add it, or save the model again.")
        shards[shard] = _plain_file(source, shard)
        _refuse_hollow(shards[shard])
        held = check_weights(shards[shard], kind == ".safetensors")
        if lacking := sorted({name for name, place in named.items() if place == shard} - held):
            raise UsageError(
                f"{shards[shard]} lacks {lacking[0]}, which {index.name} lists for it: save the model again."
            )
    return shards


def check_weights(file: Path, safe: bool) -> set[str]:
    """The names of the weights in a file; `UsageError` if it is truncated or contains something else."""
    try:
        if safe:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
        else:
            names = set(torch.load(file, map_location="meta", weights_only=True).keys())
    except PermissionError:
        raise
    except Exception as error:  # of any kind: only the file can be the cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{file} contains no readable weights ({reason}): copy or save it again.") from error
    if not names:
        raise UsageError(f"{file} contains no weights at all: save the model again.")
    return names


def _check_content(file: Path) -> None:
    _refuse_hollow(file)
    if file.suffix == ".json":
        (read_json if file.name in (*CONFIGS, *NAMING_CODE, NOTE, EVALUATION) else parse_json)(file)


def _templates(source: Path) -> dict[str, Path]:
    folder = source / TEMPLATES
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is not a folder of chat templates: move it away.")
    names = [f"{TEMPLATES}/{path.name}" for path in folder.iterdir()]
    return {name: _plain_file(source, name) for name in sorted(names) if is_template(name)}


def _is_plain(name: str) -> bool:
    """Whether a name without its suffix is that of a file in the folder: no path, no dot file."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None


def _own_code(source: Path, here: set[str], configs: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """The files of a model's own code: the modules that its configs name, and the modules that these import."""
    wanted = {
        module: f"{source / name} names"
        for name, config in configs.items()
        for module in _modules(source / name, config)
    }
    files: dict[str, Path] = {}
    while wanted:
        module, who = wanted.popitem()
        name = f"{module}.py"
        if not _is_plain(module) or name not in here:
            raise UsageError(f"{who} {name} as the model's own code, but there is no such file beside it: add it.")
        files[name] = _plain_file(source, name)
        _refuse_hollow(files[name])
        code = files[name].read_text(encoding="utf-8", errors="replace")
        found = {first or second for first, second in RELATIVE_IMPORT.findall(code)}
        wanted |= {one: f"{source / name} imports" for one in found if f"{one}.py" not in files}
    return files


def _modules(file: Path, config: dict[str, Any]) -> Iterator[str]:
    """The modules in a config's `auto_map`, except those of other repositories (`REPOSITORY--MODULE.CLASS`)."""
    named = config.get("auto_map") or {}
    for value in named.values() if isinstance(named, dict) else [named]:
        for reference in [value] if isinstance(value, str) else value if isinstance(value, list) else [0]:
            if reference is not None and not isinstance(reference, str):
                raise UsageError(f'{file}: `auto_map` must contain strings like "MODULE.CLASS", got {value!r}.')
            repository, elsewhere, _ = (reference or "").partition("--")
            if elsewhere and not is_on_hub(repository):
                raise UsageError(
                    f"{file}: `auto_map` names code in {repository!r}, which others cannot load: put the code beside "
                    'the config, and name it as "MODULE.CLASS".'
                )
            if reference and not elsewhere:
                module, dot, _ = reference.rpartition(".")
                if not dot:
                    raise UsageError(
                        f'{file}: `auto_map` must contain strings like "MODULE.CLASS", got {reference!r}.'
                    )
                yield module


def refuse_secrets(folder: Path) -> None:
    """Refuses a folder in which a text file contains an access token or a private key."""
    for file in sorted(folder.rglob("*")):
        if (file.suffix in TEXTS or file.name in LICENSES) and (found := SECRET.search(file.read_bytes())):
            raise UsageError(
                f"{file.relative_to(folder)} contains what looks like an access token or a private key "
                f"({found[0][:8].decode('ascii')}...): remove it."
            )


def _refuse_same_but_for_case(files: dict[str, Path]) -> None:
    lower: dict[str, str] = {}
    for name in files:
        if (other := lower.setdefault(name.lower(), name)) != name:
            raise UsageError(f"{other} and {name} are the same file on systems that ignore case: rename one of them.")
