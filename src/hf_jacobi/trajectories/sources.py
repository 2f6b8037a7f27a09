"""Names of data. It imports nothing heavy, so that the command line can refuse a wrong name at once."""

from __future__ import annotations

from pathlib import Path

from ..decoding.errors import MissingFile, UsageError


# From the ending of a file to the builder of `datasets` that reads it.
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}


def path_of(source: str) -> Path:
    """
    The path that a name of data stands for, `~` expanded. If nothing is there, the name can only be one on the Hub.

    Raises:
        `UsageError`: the name is empty, or is a path, and nothing is there.
    """
    if not source.strip():
        raise UsageError("the name of the data is empty: name a file, a folder or a data set on the Hub.")
    path = Path(source).expanduser()
    if not path.exists() and (source.startswith(("/", ".", "~")) or path.suffix.lower() in BUILDERS):
        raise MissingFile(f"there is no file or folder {source}.")
    return path
