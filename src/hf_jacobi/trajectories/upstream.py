"""
Converts the data sets that the authors of Jacobi Forcing publish, and the files their code writes, into ours.

Two formats: raw trajectories, one row per block (`RawTrajectories`), and packed training rows, one per completion with
one noisy state per block (`PackedRows`). Both are read as a stream, from JSONL, a JSON array or Parquet.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features

from ..decoding.errors import MissingFile, UsageError
from .checks import check_whole
from .collect import TRAJECTORY_FEATURES
from .samples import PACKED_FEATURES, join_samples, lay_out_sample
from .shards import check_file


CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"
RAW_COLUMNS = ("data_id", "diffusion_itr_id", "prompt_ids", "answer_trajectory_ids")
PACKED_COLUMNS = ("data_id", "prompt_ids", "prompt_ids_len", "complete_training_sequence_ids", "traj_position_indices")


class MalformedRow(UsageError):
    """A row that does not follow its format."""


class UpstreamRows:
    """
    Rows of published files, converted one by one; can be iterated more than once.

    Args:
        paths: one file or several: `.jsonl`, `.json` (an array or lines) or `.parquet`.
        eos_token_id: the end-of-sequence tokens. Everything after the first of them in a completion is dropped: the
            published blocks are padded to their full length.
        strict: raise at the first malformed row instead of counting it.

    Attributes:
        skipped: how many rows were malformed in the last run, by reason.
    """

    features: Features

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        eos_token_id: int | Sequence[int] | None = None,
        strict: bool = False,
    ):
        self.paths = [Path(path).expanduser() for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        for path in self.paths:
            if not path.is_file():
                raise MissingFile(f"there is no file {path}.")
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.eos_tokens = set(ends)
        self.strict = strict
        self.skipped: Counter = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.skipped = Counter()
        for path in self.paths:
            yield from self._convert(path)

    def _convert(self, path: Path) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _skip(self, error: MalformedRow, path: Path, line: int) -> None:
        if self.strict:
            raise UsageError(f"{path}, row {line}: {error}") from error
        self.skipped[str(error)] += 1

    def _until_end(self, tokens: list[int]) -> list[int]:
        """The tokens up to and including the first end-of-sequence token."""
        end = next((index for index, token in enumerate(tokens) if token in self.eos_tokens), len(tokens))
        return tokens[: end + 1]

    def to_dataset(self) -> Dataset:
        """
        All rows as a `datasets.Dataset`, written to disk as they are read.

        Raises:
            `ValueError`: no row could be read.
        """
        if next(iter(self), None) is None:
            raise UsageError(f"no row could be read from {', '.join(map(str, self.paths))}: {dict(self.skipped)}.")
        # A unique fingerprint: by default `datasets` would return what files of the same names held before.
        return Dataset.from_generator(lambda: iter(self), features=self.features, fingerprint=uuid.uuid4().hex)


class RawTrajectories(UpstreamRows):
    """
    Raw trajectories: rows of `data_id`, `diffusion_itr_id` ("itr_0", "itr_1", ... in the order of the blocks),
    `prompt_ids` (the prompt; in later blocks the prompt or all the text before them) and
    `answer_trajectory_ids` (the states of the block; each may begin with the text before it).

    Rows of one completion must be adjacent. If a trajectory begins with its fixed point and then leaves it, the
    authors' code overwrote the first guess; that state is left out. `teacher_output_ids` is not needed.

    Yields:
        rows of `TRAJECTORY_FEATURES`, ready for `pack_trajectories`.

    Args:
        block_size: n, tokens of a block.
        others: see `UpstreamRows`.
    """

    features = TRAJECTORY_FEATURES

    def __init__(self, paths, block_size: int, eos_token_id=None, strict: bool = False):
        super().__init__(paths, eos_token_id, strict)
        check_whole("block_size", block_size, 2)
        self.block_size = block_size

    def _convert(self, path: Path) -> Iterator[dict[str, Any]]:
        pending: dict[str, Any] | None = None
        for line, row in self._rows(path, RAW_COLUMNS):
            try:
                number = _number_of(row["diffusion_itr_id"])
                prompt = _tokens(row["prompt_ids"], "prompt_ids")
                if pending is not None and pending["prompt_id"] == str(row["data_id"]) and number != 0:
                    self._append(pending, number, prompt, row["answer_trajectory_ids"])
                    continue
                if number != 0:
                    raise MalformedRow("a block without those before it")
                states = self._states(row["answer_trajectory_ids"], prompt)
            except MalformedRow as error:
                self._skip(error, path, line)
                continue
            if pending is not None:
                yield self._finish(pending)
            pending = {"prompt_id": str(row["data_id"]), "prompt_ids": prompt, "trajectories": [states]}
        if pending is not None:
            yield self._finish(pending)

    def _states(self, value: Any, before: list[int]) -> list[list[int]]:
        """The states of a block, without the text before them."""
        if not isinstance(value, list) or not value:
            raise MalformedRow("answer_trajectory_ids is not a list of states")
        states = [_tokens(state, "a state") for state in value]
        if all(len(state) > self.block_size for state in states):
            if any(state[: len(before)] != before for state in states):
                raise MalformedRow(f"states of over {self.block_size} tokens that do not begin with the text so far")
            states = [state[len(before) :] for state in states]
        lengths = {len(state) for state in states}
        if len(lengths) != 1 or not 0 < len(states[-1]) <= self.block_size:
            raise MalformedRow(f"states of {sorted(lengths)} tokens, in blocks of {self.block_size}")
        if len(states) > 2 and states[0] == states[-1] != states[1]:
            del states[0]
        return [state for index, state in enumerate(states) if state != states[-1] or index == len(states) - 1]

    def _append(self, pending: dict[str, Any], number: int, prompt: list[int], value: Any) -> None:
        blocks = pending["trajectories"]
        if number != len(blocks):
            raise MalformedRow("a block without those before it")
        if len(blocks[-1][-1]) < self.block_size:
            raise MalformedRow(f"a block after one of {len(blocks[-1][-1])} tokens, in blocks of {self.block_size}")
        before = pending["prompt_ids"] + [token for block in blocks for token in block[-1]]
        if prompt not in (pending["prompt_ids"], before):
            raise MalformedRow("prompt_ids is neither the prompt nor the text so far")
        blocks.append(self._states(value, before))

    def _finish(self, pending: dict[str, Any]) -> dict[str, Any]:
        text = [token for block in pending["trajectories"] for token in block[-1]]
        kept = self._until_end(text)
        blocks = []
        done = 0
        for states in pending["trajectories"]:
            length = min(len(states[-1]), len(kept) - done)
            if length <= 0:
                break
            cut = [state[:length] for state in states]
            blocks.append([state for state in cut[:-1] if state != cut[-1]] + [cut[-1]])
            done += length
        return {
            "prompt_id": pending["prompt_id"],
            "prompt_ids": pending["prompt_ids"],
            "completion_ids": kept,
            "block_size": self.block_size,
            "trajectories": blocks,
            "ended": kept[-1] in self.eos_tokens,
        }

    def _rows(self, path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for line, row in read_objects(path):
            try:
                yield line, _with_columns(row, columns)
            except MalformedRow as error:
                self._skip(error, path, line)


class PackedRows(UpstreamRows):
    """
    Packed training rows: `complete_training_sequence_ids` is the prompt, then for each block its noisy state and its
    clean tokens, n each; `traj_position_indices` has one entry per block.

    Yields:
        rows of `PACKED_FEATURES`, as `pack_trajectories` returns them: clean text first, then noise.

    Args:
        window_size: w, the number of blocks in a window when the rows were made ("n32w16": 16).
        block_size: n, checked if given; it follows from the lengths.
        others: see `UpstreamRows`.
    """

    features = PACKED_FEATURES

    def __init__(
        self, paths, window_size: int, block_size: int | None = None, eos_token_id=None, strict: bool = False
    ):
        super().__init__(paths, eos_token_id, strict)
        check_whole("window_size", window_size, 1)
        self.window_size = window_size
        self.block_size = block_size

    def _convert(self, path: Path) -> Iterator[dict[str, Any]]:
        for line, row in read_objects(path):
            try:
                yield self._packed(_with_columns(row, PACKED_COLUMNS))
            except MalformedRow as error:
                self._skip(error, path, line)

    def _packed(self, row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = _tokens(row["prompt_ids"], "prompt_ids")
        sequence = _tokens(row["complete_training_sequence_ids"], "complete_training_sequence_ids")
        indices = row["traj_position_indices"]
        if not isinstance(indices, list) or not indices:
            raise MalformedRow("traj_position_indices is not a list of one entry per block")
        length = row["prompt_ids_len"]
        length = length[0] if isinstance(length, list) and len(length) == 1 else length
        if len(prompt) != length:
            raise MalformedRow("prompt_ids_len is not the length of prompt_ids")
        if sequence[: len(prompt)] != prompt:
            raise MalformedRow("the sequence does not begin with the prompt")
        pairs = sequence[len(prompt) :]
        size, rest = divmod(len(pairs), 2 * len(indices))
        if rest or not size:
            raise MalformedRow(
                "the sequence is not the prompt and a pair of blocks per entry of traj_position_indices"
            )
        if self.block_size is not None and size != self.block_size:
            raise MalformedRow(f"blocks of {size} tokens, not {self.block_size}")
        text, states = [], []
        for start in range(0, len(pairs), 2 * size):
            noisy, clean = pairs[start : start + size], pairs[start + size : start + 2 * size]
            kept = self._until_end(clean)
            text += kept
            states.append(noisy[: len(kept)])
            if kept[-1] in self.eos_tokens:
                break
        return join_samples([lay_out_sample(prompt, text, [states], self.window_size)])


def read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """
    The objects of a file, numbered from 1 (by line, for JSONL); `None` for what is not JSON.

    Raises:
        `ValueError`: a JSON array or a Parquet file is broken, so that what follows cannot be read.
    """
    if path.suffix == ".parquet":
        check_file(path)
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        return
    with open(path, "rb") as file:
        start = file.read(len(BOM) + 64)
    if start.removeprefix(BOM).lstrip().startswith(b"["):
        with open(path, encoding="utf-8-sig") as file:
            try:
                while file.read(1) != "[":
                    pass
                yield from _array(file, path)
            except UnicodeDecodeError as error:
                raise UsageError(f"{path} is not text in UTF-8: {error}.") from error
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line.removeprefix(BOM))
                except ValueError:  # or UnicodeDecodeError, a subclass
                    yield number, None


def _array(file, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields a JSON array's elements after its opening bracket, with one chunk or element in memory at a time."""
    decoder = json.JSONDecoder()
    text, number = "", 0
    while True:
        text = text.lstrip().removeprefix(",").lstrip()
        if text.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            more = file.read(max(CHUNK, len(text)))
            if not more:
                raise UsageError(f"{path}, row {number + 1}: the array is cut off, or is not JSON.") from None
            text += more
            continue
        number += 1
        yield number, value
        text = text[end:]


def _with_columns(row: Any, columns: Iterable[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise MalformedRow("not a JSON object")
    if missing := [column for column in columns if row.get(column) is None]:
        raise MalformedRow(f"no {', '.join(missing)}")
    return row


def _tokens(value: Any, name: str) -> list[int]:
    """A list of tokens, possibly wrapped in a batch of one, as the authors' code does."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 2**31 for token in value):
        raise MalformedRow(f"{name} is not a list of tokens")
    return value


def _number_of(name: Any) -> int:
    found = re.fullmatch(r"(?:itr_)?(\d+)", str(name))
    if found is None:
        raise MalformedRow("diffusion_itr_id is not itr_ followed by a number")
    return int(found.group(1))
