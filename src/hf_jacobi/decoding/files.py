"""Small files beside weights: read with an error that names them, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UsageError


POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(file: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        `UsageError`: the file holds something else.
        `OSError`: it cannot be read.
    """
    content = parse_json(file)
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a JSON object, not a {type(content).__name__}.")
    return content


def parse_json(file: Path) -> Any:
    """What a JSON file holds; the errors are those of `read_json`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise UsageError(f"{file} is not a JSON file ({error}): save it again.") from error


def refuse_pointer(file: Path) -> None:
    """
    Refuses what a clone holds in the place of a file that `git lfs` keeps elsewhere.

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
    Writes a file at once: a write that fails leaves what was there.

    A new file takes the place of a link, so that what the link points to stays as it is. The Hub's cache is made of
    links to files that are named after what they hold.
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
