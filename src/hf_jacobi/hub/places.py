"""Paths of this machine, which must not be published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..decoding.compat import LOADED_FROM


# At least two parts, so that the token "/think" does not match; nothing before it, so that a URL does not match.
LOCAL_PATH = re.compile(
    r"file:/+[^\s\"'`)]+"
    r"|(?<![\w./:~)\]}>*-])~?(?:/[\w.@+~=,-]+){2,}/?"
    r"|(?<![\w./:])~/[\w.@+~=,-]+/?"
    r"|(?<!\w)[A-Za-z]:[\\/]{1,2}[\w.@+~-]+(?:[\\/]{1,2}[\w.@+~-]+)*"
    r"|(?<!\\)\\\\\w[\w.-]*(?:\\[\w.@$+~-]+)+"
)
NAMES = {LOADED_FROM, "name_or_path", "base_model_name_or_path", "tokenizer_name_or_path"}
FILES = {"tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"}
AS_THEY_ARE = {
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "auto_map",
}


def is_on_hub(name: Any, *folders: Path) -> TypeGuard[str]:
    """
    Whether a name can be a Hub id rather than a path.

    Args:
        name: any value; only a string can be a Hub id.
        folders: what a relative path could refer to. If the name exists there, in a parent folder or in the current
            folder, it is a path.
    """
    try:
        validate_repo_id(name if isinstance(name, str) else "")
    except HFValidationError:
        return False
    starts = [Path.cwd(), *(place for folder in folders for place in [folder.resolve(), *folder.resolve().parents])]
    return not any((place / name).exists() for place in starts)


def without_local_paths(value: Any, *folders: Path) -> Any:
    """
    A JSON value without the paths of this machine: the source of a model or a vocabulary is dropped unless it is on
    the Hub, and any other path is shortened to its last part. Tokens and templates stay unchanged.
    """
    if isinstance(value, str):
        return LOCAL_PATH.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], value)
    if isinstance(value, list):
        return [without_local_paths(one, *folders) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: one if key in AS_THEY_ARE or key.endswith("token") else without_local_paths(one, *folders)
        for key, one in value.items()
        if not (key in NAMES and not is_on_hub(one, *folders)) and not (key in FILES and re.search(r"[\\/]", str(one)))
    }
