"""A data set on disk that grows by whole Parquet files, so that a run killed at any moment can be resumed."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features, concatenate_datasets, disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from filelock import FileLock, Timeout

from ..decoding.errors import MissingFile, UsageError


LOCK = ".hf_jacobi.lock"
SETTINGS = ".hf_jacobi.json"  # hidden, so that `load_dataset(folder)` sees only the Parquet files
METADATA = b"hf_jacobi"
AGAIN = "delete it and make it again"
Row = TypeVar("Row")


class ShardFolder:
    """
    A folder of numbered Parquet files, each written atomically, and the settings they were made with.

    Args:
        folder: where the files are; created if it does not exist.
        name: prefix of the file names, `name-00000.parquet` and so on.
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
        self.settings = json.loads(json.dumps({"kind": name, **settings}))
        self._check_settings(self.settings)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / SETTINGS
        if not self.files():  # settings without files do not matter
            if any(path.suffix == ".parquet" for path in self.folder.iterdir()):
                raise UsageError(
                    f"{self.folder} holds Parquet files from other work: name an empty folder or a new one."
                )
            return
        before = read_settings(file)
        keys = sorted(before.keys() | settings.keys())
        other = [
            f"{key} {before.get(key)!r}, now {settings.get(key)!r}"
            for key in keys
            if before.get(key) != settings.get(key)
        ]
        if other:
            raise UsageError(
                f"{self.folder} was begun with other settings ({'; '.join(other)}): continue with those, or name "
                "another folder."
            )

    @contextmanager
    def locked(self):
        """
        Locks the folder, removes partial files of an interrupted run, and writes the settings.

        Raises:
            `ValueError`: another run is at work in the folder.
        """
        with alone_in(self.folder):
            self._check_settings(self.settings)  # another run may have begun since
            for scratch in self.folder.iterdir():
                if scratch.name.startswith(".") and scratch.suffix == ".tmp":
                    scratch.unlink(missing_ok=True)
            text = json.dumps(self.settings, indent=2)
            self._write_at_once(self.folder / SETTINGS, lambda path: path.write_text(text))
            yield

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.name}-{number:05d}.parquet"

    def files(self) -> list[Path]:
        """The existing files, in order."""
        return shard_files(self.folder, self.name)

    def clear(self) -> None:
        """Removes all files."""
        for path in self.files():
            seconds_of(path).unlink(missing_ok=True)
            path.unlink()

    def is_done(self, number: int, piece: Any, digest: Callable[[Any], str]) -> bool:
        """
        Whether a shard exists and was made from all of `piece`; one made from a part of it must be made again.

        Args:
            number: its number.
            piece: the data it should be made from.
            digest: the function that identifies data.

        Raises:
            `ValueError`: it was made from something else, or is damaged.
        """
        path = self.path(number)
        if not path.exists():
            return False
        check_file(path)
        note = read_note(path)
        if note["made_from"] > len(piece) or note["digest"] != digest(piece[: note["made_from"]]):
            raise UsageError(
                f"{path} was made from other data than that now in its place: continue with what {self.folder} "
                "was begun with, or name another folder."
            )
        return note["made_from"] == len(piece)

    def check_end(self, count: int) -> None:
        """Raises `ValueError` if shards exist beyond the first `count`, which the given data did not make."""
        if more := [path.name for path in self.files() if _number(path) >= count]:
            raise UsageError(
                f"{self.folder} was begun with more data than is given now ({', '.join(more)} left over): continue "
                "with all of it, or name another folder."
            )

    def write(
        self,
        number: int,
        rows: list[dict] | pyarrow.Table,
        counts: dict[str, float],
        digest: str,
        made_from: int,
        skipped: Sequence[str] = (),
    ) -> None:
        """
        Writes a shard atomically.

        Args:
            number: its number.
            rows: its rows, possibly none.
            counts: numbers that `counts_in` sums over all shards.
            digest: digest of the data it was made from; `is_done` compares it.
            made_from: how many rows that digest covers.
            skipped: why some of these rows were left out, one sentence each.
        """
        schema = self.features.arrow_schema
        counts = dict(counts)
        seconds = counts.pop("seconds", None)  # kept outside the shard, whose bytes must not depend on time
        note = {"digest": digest, "made_from": made_from, "counts": counts, "skipped": list(skipped)}
        schema = schema.with_metadata({**(schema.metadata or {}), METADATA: json.dumps(note).encode()})

        def write(path: Path) -> None:
            with pyarrow.parquet.ParquetWriter(path, schema, write_page_checksum=True) as writer:
                if len(rows):  # `datasets` reads a file without row groups as empty
                    table = pyarrow.Table.from_pylist(rows, schema) if isinstance(rows, list) else rows
                    writer.write_table(table.replace_schema_metadata(schema.metadata))

        if seconds is not None:
            self._write_at_once(seconds_of(self.path(number)), lambda path: path.write_text(f"{seconds}\n"))
        self._write_at_once(self.path(number), write)

    def _write_at_once(self, path: Path, write: Callable[[Path], Any]) -> None:
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)

    def dataset(self, in_memory: bool = False) -> Dataset:
        """All rows, in order; mapped from disk unless `in_memory`."""
        files = [path for path in self.files() if _rows_of(path)]
        if not files:  # `datasets` raises an error for no files
            return Dataset.from_dict({column: [] for column in self.features}, features=self.features)
        if in_memory:
            tables = [pyarrow.parquet.read_table(path) for path in files]
            return Dataset(pyarrow.concat_tables(tables).replace_schema_metadata(self.features.arrow_schema.metadata))
        with _without_progress_bars():  # file by file, so that cached ones are not converted again
            return concatenate_datasets([self._open(path) for path in files])

    def _open(self, path: Path) -> Dataset:
        try:
            return Dataset.from_parquet(glob.escape(os.path.abspath(path)), features=self.features)
        except Exception as error:
            check_file(path)  # says what is wrong with it
            if isinstance(error.__cause__ or error, (OSError, MemoryError)):  # not the file's fault
                raise
            raise UsageError(f"{path} is broken ({_first_line(error.__cause__ or error)}): {AGAIN}.") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; raises `UsageError` if one is already at work in it."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"another run is at work in {folder}: wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _without_progress_bars():
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _rows_of(path: Path) -> int:
    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (ValueError, OSError):
        return check_file(path)  # says what is wrong with it


def _number(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def shard_files(folder: str | Path, name: str) -> list[Path]:
    """The shards of a folder, in order."""
    pattern = re.compile(rf"{re.escape(name)}-\d+\.parquet")
    files = [path for path in Path(folder).expanduser().iterdir() if pattern.fullmatch(path.name)]
    return sorted(files, key=_number)


def read_settings(path: Path) -> dict[str, Any]:
    """
    Reads the settings that the shards beside a file were made with.

    Raises:
        `ValueError`: the file is lost or damaged.
    """
    way_out = f"restore the hidden file {path.name} that was beside them, or name another folder"
    if not path.exists():
        raise UsageError(f"{path.parent} holds files from an earlier run without its settings: {way_out}.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        settings = None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is damaged, so the files beside it cannot be identified: {way_out}.")
    return settings


def check_file(path: Path) -> int:
    """
    Reads a Parquet file from end to end; files written here have checksums that reveal a single flipped bit.

    Returns:
        how many rows it has.

    Raises:
        `ValueError`: it is damaged; the message names the file, and the rows if the file as a whole can be read.
    """
    first = 0
    where = ""
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        for number in range(file.num_row_groups):
            count = file.metadata.row_group(number).num_rows
            where = f" in rows {first} to {first + count - 1}"
            file.read_row_group(number)
            first += count
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # pyarrow raises many types
        raise UsageError(f"{path} is broken{where} ({_first_line(error)}): {AGAIN}.") from error
    return first


def check_own_file(path: Path) -> None:
    """`check_file` for files written here: other readers ignore their checksums."""
    try:
        own = METADATA in (pyarrow.parquet.read_schema(path).metadata or {})
    except (ValueError, OSError):  # opening the file reports it
        return
    if own:
        check_file(path)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_note(path: Path) -> dict[str, Any]:
    """
    The metadata written with a shard.

    Raises:
        `ValueError`: the file is broken, or was not written here.
    """
    try:
        note = json.loads(pyarrow.parquet.read_schema(path).metadata[METADATA])
        return {"skipped": [], **note, "counts": dict(note["counts"]), "made_from": int(note["made_from"])}
    except (ValueError, OSError, KeyError, TypeError) as error:  # pyarrow's errors are among these
        raise UsageError(f"{path} is broken or not one of ours: delete it and run again.") from error


def seconds_of(path: Path) -> Path:
    """The file that says how long a shard took."""
    return path.with_name(f".{path.stem}.seconds")


def notes_in(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """
    The metadata of each shard of a folder.

    Raises:
        `OSError`: there are none.
        `ValueError`: one is damaged.
    """
    folder = Path(folder).expanduser()
    files = shard_files(folder, name) if folder.is_dir() else []
    if not files:
        raise MissingFile(f"{folder} holds no {name}.")
    for path in files:
        check_file(path)
    notes = [read_note(path) for path in files]
    for path, note in zip(files, notes):
        with suppress(OSError, ValueError):  # a copy may lack it
            note["counts"]["seconds"] = float(seconds_of(path).read_text())
    return notes


def counts_in(folder: str | Path, name: str) -> Counter:
    """The summed counts of all shards of a folder; errors as in `notes_in`."""
    total: Counter = Counter()
    for note in notes_in(folder, name):
        total.update(note["counts"])
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
