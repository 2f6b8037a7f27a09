"""Names that mean something on this machine alone: they stay here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..decoding.compat import LOADED_FROM


# Two parts at least, so that "/think", a token, is none; nothing before it, so that an address is none.
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


def is_on_hub(name: Any, *folders: Path) -> bool:
    """
    Whether a name can be one on the Hub, rather than a path.

    Args:
        name: what it may be, if it is a text at all.
        folders: from where a path may have been meant: there, in the folders above and in the current one nothing of
            that name may lie.
    """
    try:
        validate_repo_id(name if isinstance(name, str) else "")
    except HFValidationError:
        return False
    starts = [Path.cwd(), *(place for folder in folders for place in [folder.resolve(), *folder.resolve().parents])]
    return not any((place / name).exists() for place in starts)


def without_local_paths(value: Any, *folders: Path) -> Any:
    """
    A JSON value as others may read it: where a model or a vocabulary came from is left out unless it is on the Hub,
    and of other paths of this machine the last part is kept. Tokens and templates are left as they are.
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
