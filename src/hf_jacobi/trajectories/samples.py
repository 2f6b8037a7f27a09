"""How one sequence is laid out for training, and how sequences become packed rows: one array per column, no loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow
from datasets import Features, List, Value

from .shards import in_shards


COLUMNS = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "seq_ids", "twin_ids")
PACKED_FEATURES = Features({column: List(Value("int32")) for column in COLUMNS})
HALF_ROWS = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "twin_ids")  # `seq_ids` come last
TWINS = HALF_ROWS.index("twin_ids")
BUFFER = 256  # samples that bin packing looks at together


@dataclass
class Sample:
    """
    One sequence.

    Attributes:
        clean, noisy: its halves, int32 `[len(HALF_ROWS), tokens]`, one row per column of `pack_trajectories`. A twin
            is an index in the clean half.
    """

    clean: np.ndarray
    noisy: np.ndarray

    def __len__(self) -> int:
        return self.clean.shape[1] + self.noisy.shape[1]


def lay_out_sample(
    prompt: Sequence[int], text: Sequence[int], copies: Sequence[Sequence[Sequence[int]]], window_size: int
) -> Sample:
    """
    Lays out one sequence.

    Args:
        prompt: its prompt.
        text: the clean tokens after the prompt.
        copies: for each noisy copy of the text, the state of each of its blocks; together they are as long as `text`.
        window_size: w, blocks of a window.
    """
    states = [state for copy in copies for state in copy]
    sizes = np.fromiter(map(len, states), np.int64, len(states))
    return lay_out_arrays(np.asarray(prompt), np.asarray(text), np.concatenate(states), sizes, window_size)


def lay_out_arrays(
    prompt: np.ndarray, text: np.ndarray, noise: np.ndarray, sizes: np.ndarray, window_size: int
) -> Sample:
    """
    Lays out one sequence whose noisy copies are flat; the arguments are those of `lay_out_sample`.

    Args:
        noise: the noisy tokens of all copies, `[copies * len(text)]`.
        sizes: the tokens of each block of all copies.
    """
    first, length = len(prompt), len(text)
    clean = np.empty((len(HALF_ROWS), first + length), np.int32)
    clean[0, :first], clean[0, first:] = prompt, text
    clean[1] = np.arange(first + length)
    clean[2], clean[3] = -1, 0
    clean[4, :first], clean[4, first:] = -100, text
    clean[TWINS] = -1

    begins = np.cumsum(sizes) - sizes
    starts = begins % length  # in the text: 0 where a copy begins
    order = np.arange(len(sizes))
    numbers = order - np.maximum.accumulate(np.where(starts == 0, order, 0))
    windows = starts[order - numbers % window_size]
    wrong = noise != np.tile(text, len(noise) // length)
    seen = np.cumsum(wrong)
    before = seen[begins] - wrong[begins]  # wrong tokens before each block
    noisy = np.empty((len(HALF_ROWS), len(noise)), np.int32)
    noisy[0] = noise
    noisy[1] = np.arange(len(noise)) % length + first
    noisy[2] = np.repeat(numbers, sizes)
    noisy[3] = np.repeat(windows + first, sizes)
    noisy[4] = -100
    noisy[TWINS] = np.where(seen > np.repeat(before, sizes), noisy[1], -1)
    return Sample(clean, noisy)


def join_samples(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """One row of several samples: all their clean halves, then all their noisy ones."""
    return table_of([samples]).to_pylist()[0]


def table_of(groups: Sequence[Sequence[Sample]]) -> pyarrow.Table:
    """The rows of `PACKED_FEATURES` that groups of samples make, one row per group; see `join_samples`."""
    halves: list[np.ndarray] = []
    firsts: list[int] = []  # index in the row of the clean half that a half's twins lie in
    numbers: list[int] = []
    for group in groups:
        ends = np.cumsum([0, *(sample.clean.shape[1] for sample in group)]).tolist()
        halves += [sample.clean for sample in group] + [sample.noisy for sample in group]
        firsts += 2 * ends[:-1]
        numbers += 2 * list(range(len(group)))
    sizes = [half.shape[1] for half in halves]
    values = np.concatenate(halves, axis=1)
    np.add(values[TWINS], np.repeat(firsts, sizes), out=values[TWINS], where=values[TWINS] >= 0, casting="unsafe")
    columns = dict(zip(HALF_ROWS, values)) | {"seq_ids": np.repeat(numbers, sizes).astype(np.int32)}
    offsets = pyarrow.array(np.cumsum([0, *(sum(map(len, group)) for group in groups)]), pyarrow.int32())
    lists = [pyarrow.ListArray.from_arrays(offsets, pyarrow.array(columns[column])) for column in COLUMNS]
    return pyarrow.Table.from_arrays(lists, schema=PACKED_FEATURES.arrow_schema)


def fill_rows(samples: Iterable[Sample], max_length: int) -> Iterator[list[Sample]]:
    """
    Bin packing, first fit by falling length within a buffer of `BUFFER` samples: rows of at most `max_length` tokens.

    TRL's `pack_dataset` does not serve here: it joins rows end to end, and ours hold all clean halves before the noisy
    ones; and a shard that is written anew must not depend on the others.

    Args:
        samples: the samples, none longer than `max_length`.
        max_length: tokens a row may have.
    """
    for _, buffer in in_shards(samples, BUFFER):
        rows: list[list[Sample]] = [[] for _ in buffer]
        room = np.full(len(buffer), max_length)
        for sample in sorted(buffer, key=len, reverse=True):
            place = int(np.argmax(room >= len(sample)))  # the first; a row that is still empty has room for any
            rows[place].append(sample)
            room[place] -= len(sample)
        yield from filter(None, rows)
