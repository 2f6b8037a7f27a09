"""A data set on disk that grows by whole Parquet files, so that work killed at any moment goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features


SETTINGS = ".hf_jacobi.json"  # hidden, so that `load_dataset(folder)` sees Parquet files alone
METADATA = b"hf_jacobi"
Row = TypeVar("Row")


class ShardFolder:
    """
    A folder of numbered Parquet files, each written at once, and the settings they were made with.

    Args:
        folder: where the files are; made if it is not there.
        name: what the files are called, `name-00000.parquet` and so on.
        features: the columns.
        settings: what the content depends on, JSON-serializable; a folder begun with others is refused.

    Raises:
        `ValueError`: the folder was begun with other settings, or holds something else.
    """

    def __init__(self, folder: str | Path, name: str, features: Features, settings: dict[str, Any]):
        self.folder = Path(folder).expanduser()
        self.name = name
        self.features = features
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(json.loads(json.dumps({"kind": name, **settings})))

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / SETTINGS
        if not file.exists():
            if any(self.folder.glob("*.parquet")):
                raise ValueError(
                    f"{self.folder} holds Parquet files of other work: name an empty folder or a new one."
                )
            self._write_at_once(file, lambda path: path.write_text(json.dumps(settings, indent=2)))
            return
        before = json.loads(file.read_text())
        keys = sorted(before.keys() | settings.keys())
        other = [
            f"{key} {before.get(key)!r}, now {settings.get(key)!r}"
            for key in keys
            if before.get(key) != settings.get(key)
        ]
        if other:
            raise ValueError(
                f"{self.folder} was begun with other settings ({'; '.join(other)}): go on with those, or name another "
                "folder."
            )

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.name}-{number:05d}.parquet"

    def finished(self) -> set[int]:
        """The numbers of the shards that are there; what an interrupted run left half-written is removed."""
        for scratch in self.folder.glob(".*.tmp"):
            scratch.unlink(missing_ok=True)
        return {int(file.stem.rsplit("-", 1)[1]) for file in self.folder.glob(f"{self.name}-*.parquet")}

    def write(self, number: int, rows: list[dict], counts: dict[str, float], digest: str) -> None:
        """
        Writes a shard: either all of it is there afterwards, or nothing.

        Args:
            number: its number.
            rows: its rows, possibly none.
            counts: what `counts_in` adds up over all shards.
            digest: of what it was made from; `check` compares it.
        """
        schema = self.features.arrow_schema
        note = json.dumps({"digest": digest, "counts": counts}).encode()
        schema = schema.with_metadata({**(schema.metadata or {}), METADATA: note})

        def write(path: Path) -> None:
            with pyarrow.parquet.ParquetWriter(path, schema) as writer:
                if rows:  # a file of no row groups is what `datasets` reads as empty
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))

        self._write_at_once(self.path(number), write)

    def _write_at_once(self, path: Path, write: Callable[[Path], Any]) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)

    def check(self, number: int, digest: str) -> dict[str, float]:
        """
        The counts of a shard that is there, made from what `digest` stands for.

        Raises:
            `ValueError`: it was made from something else.
        """
        note = _note(self.path(number))
        if note["digest"] != digest:
            raise ValueError(
                f"{self.path(number)} was made from other data than is at its place now: go on with the data that "
                f"{self.folder} was begun with, or name another folder."
            )
        return note["counts"]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.parquet"))

    def dataset(self, in_memory: bool = False) -> Dataset:
        """All rows, in order; mapped from disk unless `in_memory`."""
        files = [str(path) for path in self._files() if pyarrow.parquet.read_metadata(path).num_rows]
        if not files:  # which `datasets` takes for an error
            return Dataset.from_dict({column: [] for column in self.features}, features=self.features)
        return Dataset.from_parquet(files, features=self.features, keep_in_memory=in_memory)


def _note(path: Path) -> dict[str, Any]:
    return json.loads(pyarrow.parquet.read_schema(path).metadata[METADATA])


def counts_in(folder: str | Path, name: str) -> Counter:
    """
    The counts of all shards of a folder, added up.

    Raises:
        `OSError`: there are none.
    """
    total: Counter = Counter()
    files = list(Path(folder).expanduser().glob(f"{name}-*.parquet"))
    if not files:
        raise OSError(f"{folder} holds no {name}.")
    for path in files:
        total.update(_note(path)["counts"])
    return total


def in_shards(rows: Iterable[Row], size: int) -> Iterator[tuple[int, list[Row]]]:
    """Consecutive pieces of `size` rows, numbered; the last may be short."""
    piece: list[Row] = []
    number = 0
    for row in rows:
        piece.append(row)
        if len(piece) == size:
            yield number, piece
            number, piece = number + 1, []
    if piece:
        yield number, piece
