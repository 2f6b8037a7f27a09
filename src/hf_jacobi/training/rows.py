"""Checks that rows have the layout of `pack_trajectories`: many rows at once, in flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from ..decoding.errors import UsageError
from ..trajectories.packing import COLUMNS


AT_ONCE = 256  # rows
LARGEST = np.iinfo(np.int64).max


class Fault(NamedTuple):
    """The number of a wrong row, and what is wrong: the rest of a sentence that begins "row 3 of the data"."""

    row: int
    what: str


class Flat(NamedTuple):
    """
    Some rows, flattened.

    Attributes:
        columns: for each of `COLUMNS`, the entries of all rows, one after the other, `[T]`.
        lengths: `[R]`, the number of entries of each row.
    """

    columns: dict[str, np.ndarray]
    lengths: np.ndarray


class BlockSizes(NamedTuple):
    """The length of the longest noisy block of some rows, and whether a text has several blocks."""

    longest: int
    several: bool


def flat_batches(dataset: Iterable, name: str) -> Iterator[tuple[int, Flat]]:
    """
    A data set in pieces, each with the number of its first row.

    Args:
        dataset: a `datasets.Dataset`, whose columns are read without copying them to lists, or any rows.
        name: the name of the data in errors.

    Raises:
        `ValueError`: the columns of a row are not lists of whole numbers of one length.
    """
    first = 0
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # a custom format changes rows
        for table in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(AT_ONCE):
            yield first, _joined({key: _of_arrow(table.column(key)) for key in COLUMNS}, name, first)
            first += table.num_rows
        return
    rows = iter_rows(dataset)
    while some := list(islice(rows, AT_ONCE)):
        yield first, flat_rows(some, name, first)
        first += len(some)


def iter_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of any data set; torch's data sets can lack `__iter__`."""
    if hasattr(dataset, "__iter__") or not hasattr(dataset, "__len__"):
        return iter(dataset)
    return (dataset[number] for number in range(len(dataset)))


def flat_rows(rows: list[dict[str, Any]], name: str, first: int = 0) -> Flat:
    """Some rows as `Flat`, with the errors of `flat_batches`."""
    for number, row in enumerate(rows, start=first):
        if not hasattr(row, "keys"):
            raise UsageError(f"row {number} of {name} has no columns: it must map columns to lists, got {row!r:.60}.")
        if missing := [column for column in COLUMNS if column not in row]:
            raise UsageError(f"row {number} of {name} lacks {missing}: pass what pack_trajectories returns.")
    return _joined({key: _of_lists([row[key] for row in rows]) for key in COLUMNS}, name, first)


def _of_arrow(column: pyarrow.ChunkedArray) -> list[np.ndarray] | tuple[np.ndarray, np.ndarray]:
    """Entries and lengths; or, if the entries are not plain, an array for each row, so that the row can be found."""
    array = column.combine_chunks()
    nested = pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)
    plain = nested and not array.null_count and pyarrow.types.is_integer(array.type.value_type)
    if not plain or pyarrow.types.is_uint64(array.type.value_type):  # NumPy does not mix it with signed numbers
        return _of_lists(array.to_pylist())
    values = pyarrow.compute.list_flatten(array)
    if values.null_count:
        return _of_lists(array.to_pylist())
    lengths = pyarrow.compute.list_value_length(array).to_numpy(zero_copy_only=False)
    return values.to_numpy(zero_copy_only=False), lengths


def _of_lists(lists: list[Any]) -> list[np.ndarray] | tuple[np.ndarray, np.ndarray]:
    arrays = [_array(one) for one in lists]
    if all(_is_plain(array) for array in arrays):
        filled = [array.astype(np.int64) for array in arrays if array.size]
        values = np.concatenate(filled) if filled else np.empty(0, dtype=np.int64)
        return values, np.array([len(array) for array in arrays])
    return arrays


def _array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # lists among the entries
        return np.array(None)


def _is_plain(array: np.ndarray) -> bool:
    if array.ndim != 1 or not array.size:
        return array.ndim == 1
    return array.dtype.kind == "i" or (array.dtype.kind == "u" and array.max() <= LARGEST)


def _joined(columns: dict[str, Any], name: str, first: int) -> Flat:
    for key, column in columns.items():
        if isinstance(column, list):
            row = next(number for number, array in enumerate(column) if not _is_plain(array))
            raise UsageError(f"row {first + row} of {name} has {key} that are not a list of whole numbers.")
    lengths = columns["input_ids"][1]
    for key, (_, others) in columns.items():
        if len(odd := np.flatnonzero(others != lengths)):
            row = odd[0]
            raise UsageError(
                f"row {first + row} of {name} has {others[row]} {key}, but {lengths[row]} input_ids: each token needs "
                "one entry in each column."
            )
    if len(odd := np.flatnonzero(lengths == 0)):
        raise UsageError(f"row {first + odd[0]} of {name} is empty: drop it.")
    return Flat({key: values for key, (values, _) in columns.items()}, lengths)


def find_fault(rows: Flat, vocabulary: int, positions: int | None) -> Fault | None:
    """
    The first row whose layout is not what the masks and losses expect, or `None`.

    Args:
        rows: the rows.
        vocabulary: the number of tokens of the model.
        positions: the number of its positions, if it is limited.
    """
    tokens, places, blocks, windows, labels, samples, twins = (rows.columns[key] for key in COLUMNS)
    row = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
    begins = np.cumsum(rows.lengths) - rows.lengths
    first = np.zeros(len(tokens), dtype=bool)
    first[begins] = True
    noisy = blocks >= 0

    def fault(bad: np.ndarray, what: str, *named: np.ndarray) -> Fault | None:
        where = int(bad.argmax())
        return Fault(int(row[where]), what.format(*(array[where] for array in named))) if bad[where] else None

    def step(array: np.ndarray) -> np.ndarray:
        return np.diff(array.astype(np.int64), prepend=0)

    after_noise = np.roll(noisy, 1) & ~first
    new_sample = first | (step(samples) != 0)
    found = (
        fault(
            (tokens < 0) | (tokens >= vocabulary), f"holds token {{}}, but the model has {vocabulary} tokens", tokens
        )
        or fault(places < 0, "has position {}", places)
        or (
            positions
            and fault(places >= positions, f"has position {{}}, but the model has {positions} positions", places)
        )
        or fault((blocks < -1) | (samples < 0), "has block_ids below -1 or seq_ids below 0")
        or fault(first & noisy, "begins with noise")
        or fault(~noisy & after_noise, "has text after noise")
        or fault(
            ~noisy & np.where(new_sample, places != 0, step(places) != 1),
            "has text whose positions do not count up from 0",
        )
        or fault(~noisy & new_sample & np.where(first, samples != 0, step(samples) != 1), "has samples out of order")
        or fault(~noisy & (windows != 0), "has text with a window_start")
        or fault(
            (labels != -100) & (noisy | (labels != tokens)),
            "has label {} at token {}, where it should be -100 or, in the text, that token",
            labels,
            tokens,
        )
    )
    if found is not None:
        return found

    # From here on, the text is known to be correct: sample by sample, with positions from 0.
    starts = np.flatnonzero(new_sample & ~noisy)
    sizes = np.bincount(np.cumsum(new_sample & ~noisy)[~noisy] - 1)
    counts = np.bincount(row[starts], minlength=len(rows.lengths))
    group = (np.cumsum(counts) - counts)[row] + np.minimum(samples, counts[row] - 1)
    inside = noisy & after_noise & ~new_sample  # a noisy token that follows one of its own sample
    start = np.maximum.accumulate(
        np.where(noisy & ~inside, np.arange(len(tokens)), 0)
    )  # where the sample's noise starts
    new_copy = inside & (step(places) < 1) & (places == places[start]) & (blocks == blocks[start])
    new_copy &= windows == windows[start]
    inside &= ~new_copy
    new_block = step(blocks) != 0
    twin = np.minimum(begins[row] + np.clip(twins, 0, None), len(tokens) - 1)
    return (
        fault(noisy & (samples >= counts[row]), "has noise of sample {}, which has no text", samples)
        or fault(noisy & after_noise & (step(samples) < 0), "has noise of samples out of order")
        or fault(noisy & (places >= sizes[group]), "has noise at position {}, after the end of its text", places)
        or fault(
            inside & ((step(blocks) < 0) | (step(places) < 1) | (~new_block & (step(places) != 1))),
            "has noisy blocks out of order",
        )
        or fault(noisy & ((windows < 0) | (windows > places)), "has window_start {} at position {}", windows, places)
        or fault(
            inside & ((step(windows) < 0) | (~new_block & (step(windows) != 0))), "has windows out of order"
        )
        or fault(
            np.where(
                noisy,
                (twins != -1) & ((twins < 0) | noisy[twin] | (row[twin] != row) | (samples[twin] != samples)
                | (places[twin] != places)),
                twins != -1,
            ),
            "has twin {} at position {}, which is another token",
            twins,
            places,
        )
    )  # fmt: skip


def block_sizes(rows: Flat) -> BlockSizes:
    """The block sizes of rows without faults."""
    blocks, samples = rows.columns["block_ids"], rows.columns["seq_ids"]
    starts = np.ones(len(blocks), dtype=bool)
    starts[1:] = (np.diff(blocks) != 0) | (np.diff(samples) != 0) | (np.diff(rows.columns["position_ids"]) < 1)
    starts[np.cumsum(rows.lengths)[:-1]] = True
    begins = np.flatnonzero(starts)
    lengths = np.diff(np.append(begins, len(blocks)))[blocks[begins] >= 0]
    return BlockSizes(int(lengths.max(initial=0)), bool((blocks > 0).any()))
