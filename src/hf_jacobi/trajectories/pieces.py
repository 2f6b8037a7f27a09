"""Reads the rows that are packed as arrays: those of a data set from Arrow, without a Python list in between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from ..decoding.errors import UsageError
from .checks import check_whole
from .shards import in_shards


TRAJECTORY_COLUMNS = ("prompt_ids", "completion_ids", "block_size", "trajectories")
MOST_TOKENS = 2**31  # what an int32 column holds
COUNTED = 1000  # rows whose blocks are counted at once
MOST_NUMBERS = 2**27  # whose text is under the 2 GiB that an Arrow array of strings holds
LISTS = {"prompt_ids": 1, "completion_ids": 1, "trajectories": 3}  # how deep the lists of a column are
Piece: TypeAlias = "list[Any] | pyarrow.Table"  # consecutive rows


@dataclass
class States:
    """
    The states of all blocks of a sequence, one after the other.

    Attributes:
        tokens: their tokens.
        lengths: the tokens of each state.
        counts: the states of each block; the last is the fixed point.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, blocks: Sequence[Sequence[Sequence[int]]]) -> States:
        """Those of nested lists; `TypeError` where they are not."""
        states = list(chain.from_iterable(blocks))
        lengths = np.fromiter(map(len, states), np.int64, len(states))
        counts = np.fromiter(map(len, blocks), np.int64, len(blocks))
        return cls(_array(list(chain.from_iterable(states))), lengths, counts)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where in `tokens` each state begins."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def finals(self) -> np.ndarray:
        """For each block, which state is its last."""
        return np.cumsum(self.counts) - 1

    def first_blocks(self, count: int) -> States:
        """Those of the first `count` blocks."""
        states = int(self.counts[:count].sum())
        return States(self.tokens[: self.lengths[:states].sum()], self.lengths[:states], self.counts[:count])

    def joined(self, chosen: np.ndarray) -> np.ndarray:
        """The tokens of some states, given by number, one after the other."""
        lengths = self.lengths[chosen]
        shifts = self.starts[chosen] - (np.cumsum(lengths) - lengths)
        return self.tokens[np.arange(lengths.sum()) + np.repeat(shifts, lengths)]

    def noise_levels(self) -> np.ndarray:
        """The noise level of each state; see `noise_level`."""
        shifts = np.repeat(self.starts[self.finals], self.counts) - self.starts
        places = np.arange(len(self.tokens))
        wrong = self.tokens != self.tokens[places + np.repeat(shifts, self.lengths)]
        ends = np.repeat(self.starts + self.lengths, self.lengths)
        first_wrong = np.minimum.reduceat(np.where(wrong, places, ends), self.starts)
        return (self.lengths - (first_wrong - self.starts)) / self.lengths


@dataclass
class TrajectoryArrays:
    """A row of trajectories, checked."""

    prompt: np.ndarray
    states: States


def read_trajectory(row: Any, number: int) -> TrajectoryArrays:
    """The arrays of a row; raises `UsageError` where its blocks do not make up its text."""
    what = f"trajectory {number}"
    if not isinstance(row, Mapping):
        raise UsageError(f"{what} is not a row with columns: {row!r:.80}.")
    if missing := [column for column in TRAJECTORY_COLUMNS if row.get(column) is None]:
        raise UsageError(f"{what} lacks {missing}: rows need {list(TRAJECTORY_COLUMNS)}.")
    check_whole(f"block_size of {what}", row["block_size"], 1)
    states = row["trajectories"]
    if not isinstance(states, States):
        try:
            states = States.of(states)
        except TypeError:
            raise UsageError(f"{what} must be a list of blocks of states of tokens, three lists deep.") from None
    lengths, counts = states.lengths, states.counts
    if not counts.all() or (lengths != np.repeat(lengths[states.finals], counts)).any():
        raise UsageError(f"{what} has a block of no states, or of states of different lengths.")
    prompt, text = (token_array(row[column], what) for column in ("prompt_ids", "completion_ids"))
    states.tokens = token_array(states.tokens, what)
    sizes, size = lengths[states.finals], row["block_size"]
    if (sizes[:-1] != size).any() or (len(sizes) and not 0 < sizes[-1] <= size):
        raise UsageError(f"{what} has blocks of {sizes.tolist()} tokens, but its block_size is {size}.")
    if not np.array_equal(states.joined(states.finals), text):
        raise UsageError(f"{what} has other text in completion_ids than its blocks end in.")
    return TrajectoryArrays(prompt, states)


def token_array(tokens: Any, what: str) -> np.ndarray:
    """Tokens as an array `[n]` of int64; raises `UsageError` for a list that holds anything else."""
    array = _array(tokens)
    if not array.size:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= MOST_TOKENS:
        odd = next((token for token in array.tolist() if not _is_token(token)), None)
        raise UsageError(f"{what} holds {odd!r}, which is not a token: tokens are whole numbers from 0 on.")
    return array.astype(np.int64, copy=False)  # noise can be a number that a narrower type does not hold


def _array(values: Any) -> np.ndarray:
    """An array of whole numbers, or one of objects where something else is among the values."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.zeros(())
    whole = array.ndim == 1 and (not array.size or array.dtype.kind in "iu")
    return array if whole else np.fromiter(values, object, len(values))


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < MOST_TOKENS


def pieces_of(rows: Iterable[Any], size: int, columns: Sequence[str]) -> Iterator[tuple[int, Piece]]:
    """Consecutive pieces of `size` rows, numbered: those of a data set as Arrow tables of the given columns."""
    if isinstance(rows, Dataset):
        yield from enumerate(rows.select_columns(list(columns)).with_format("arrow").iter(size))
    else:
        yield from in_shards(rows, size)


def most_blocks(rows: Iterable[Any]) -> int | None:
    """The blocks of the longest text of a data set, without reading any token; `None` for data of another form."""
    column = "trajectories"
    if not isinstance(rows, Dataset) or column not in rows.column_names:
        return None
    if not _is_list(rows.features.arrow_schema.field(column).type):
        return None
    most = 0
    for piece in rows.select_columns([column]).with_format("arrow").iter(COUNTED):
        blocks = pyarrow.compute.list_value_length(piece.column(0))
        most = max(most, pyarrow.compute.max(blocks).as_py() or 0)
    return most


def rows_in(piece: Piece) -> Iterator[Any]:
    """The rows of a piece; those of an Arrow table hold arrays and `States`."""
    if isinstance(piece, list):
        yield from piece
        return
    nested = {name: _flat(piece.column(name), LISTS[name]) for name in piece.column_names if name in LISTS}
    if any(flat is None for flat in nested.values()):  # not lists of whole numbers: checked row by row
        yield from piece.to_pylist()
        return
    columns: dict[str, Iterable[Any]] = {name: _split(*flat) for name, flat in nested.items() if flat is not None} | {
        name: piece.column(name).to_pylist() for name in piece.column_names if name not in nested
    }
    for values in zip(*columns.values()):
        yield dict(zip(columns, values))


def _flat(column: pyarrow.ChunkedArray, depth: int) -> tuple[list[np.ndarray], np.ndarray] | None:
    """The lengths of the lists of each level, and the values; `None` if they are not lists of whole numbers."""
    array = pyarrow.concat_arrays(column.chunks) if column.num_chunks else None
    lengths = []
    for _ in range(depth):
        if array is None or array.null_count or not _is_list(array.type):
            return None
        lengths.append(pyarrow.compute.list_value_length(array).to_numpy())
        array = array.flatten()
    if array is None or array.null_count or not pyarrow.types.is_integer(array.type):
        return None
    return lengths, array.to_numpy()


def _is_list(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _split(levels: list[np.ndarray], values: np.ndarray) -> Iterator[Any]:
    """What `_flat` gave, row by row: arrays of tokens, or `States`."""
    if len(levels) == 1:
        yield from np.split(values, np.cumsum(levels[0])[:-1])
        return
    blocks, counts, lengths = levels
    block, state, token = 0, 0, 0
    for number in blocks.tolist():
        of_row = counts[block : block + number]
        block += number
        sizes = lengths[state : state + of_row.sum()]
        state += len(sizes)
        count = int(sizes.sum())
        yield States(values[token : token + count], sizes, of_row)
        token += count


def digest_of_piece(piece: Piece, columns: Sequence[str]) -> str:
    """A digest of the columns of some rows, by which a resumed run checks that they have not changed."""
    if isinstance(piece, list) or (text := _json_of_table(piece.select(columns))) is None:
        rows = piece if isinstance(piece, list) else piece.to_pylist()
        known = [[row[column] for column in columns] for row in rows]
        text = json.dumps(known, default=lambda array: array.tolist())  # of numpy, say
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _json_of_table(table: pyarrow.Table) -> str | None:
    """What `json.dumps` makes of the rows of a table, each a list of its values; `None` where it holds other types."""
    columns = [_json_of(pyarrow.concat_arrays(column.chunks)) for column in table.columns if column.num_chunks]
    if not columns or any(column is None for column in columns):
        return None
    rows = pyarrow.compute.binary_join_element_wise(*columns, ", ")
    return "[" + ", ".join(f"[{row}]" for row in rows.to_pylist()) + "]"


def _json_of(array: pyarrow.Array) -> pyarrow.Array | None:
    """The JSON of each value, whole numbers or lists of them; `None` for other types, or too many numbers."""
    if array.null_count or len(array) > MOST_NUMBERS:
        return None
    if pyarrow.types.is_integer(array.type):
        return array.cast(pyarrow.string())
    if not _is_list(array.type) or (inner := _json_of(array.flatten())) is None:
        return None
    lengths = pyarrow.compute.list_value_length(array).to_numpy()
    offsets = pyarrow.array(np.append(0, np.cumsum(lengths)), pyarrow.int32())
    joined = pyarrow.compute.binary_join(pyarrow.ListArray.from_arrays(offsets, inner), ", ")
    return pyarrow.compute.binary_join_element_wise("[", joined, "]", "")
