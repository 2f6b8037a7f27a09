"""Small files beside weights: reading raises errors that name the file, writing is all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import MissingFile, UsageError


POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(file: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        `UsageError`: the file does not hold a JSON object.
        `OSError`: the file cannot be read.
    """
    content = parse_json(file)
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def parse_json(file: Path) -> Any:
    """The content of a JSON file; raises the errors of `read_json`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid JSON or invalid UTF-8
        raise UsageError(f"{file} is not a JSON file ({error}): save it again.") from error


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """
    The names and values in a YAML file.

    Args:
        file: the file.
        what: what the file should hold, for error messages.

    Raises:
        `UsageError`: the file cannot be read, or does not hold names and values.
    """
    from yaml import YAMLError, safe_load

    try:
        content = safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFile(f"{file} cannot be read ({error.strerror}): name a YAML file with {what}.") from error
    except (YAMLError, ValueError) as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{file} must hold {what}, one `name: value` a line.")
    return content


def refuse_pointer(file: Path) -> None:
    """
    Refuses the pointer that a clone without `git lfs` holds in place of a large file.

    Raises:
        `UsageError`: the file is such a pointer.
    """
    with open(file, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise UsageError(
                f"{file} is not the file but a git-lfs pointer to it: run `git lfs pull` in {file.parent}."
            )


def write_whole(file: Path, content: str | bytes) -> None:
    """
    Writes a file in one operation: if the write fails, the old file stays.

    A link is replaced by a new file, so that the file it points to does not change. The Hub's cache consists of links
    to files that are named after their content.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if file.exists() and not file.is_file():  # a pipe or a device
        file.write_bytes(data)
        return
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        if file.exists():
            shutil.copymode(file, scratch)
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
