"""Packing, which works on whole arrays, compared with the slow and obvious way: token by token, in lists."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import groupby

import pyarrow.parquet
import pytest
from datasets import Dataset, Features, LargeList, List, Value
from packed_rows import trajectories

from hf_jacobi.trajectories import (
    PackingStatistics,
    nearest_state,
    noise_targets,
    pack_completions,
    pack_trajectories,
    packing_statistics,
)
from hf_jacobi.trajectories.packing import COLUMNS, PackSettings, packed_rows
from hf_jacobi.trajectories.pieces import digest_of_piece
from hf_jacobi.trajectories.shards import read_note


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def laid_out(prompt, text, copies, window_size):
    """The clean and the noisy half: rows of token, position, block, window start, label and twin."""
    clean = [
        (token, position, -1, 0, token if position >= len(prompt) else -100, -1)
        for position, token in enumerate([*prompt, *text])
    ]
    noisy = []
    for states in copies:
        start = window_start = len(prompt)
        for index, state in enumerate(states):
            window_start = start if index % window_size == 0 else window_start
            wrong = False
            for position, token in enumerate(state, start):
                wrong = wrong or token != text[position - len(prompt)]
                noisy.append((token, position, index, window_start, -100, position if wrong else -1))
            start += len(state)
    return clean, noisy


def joined(samples):
    row = {column: [] for column in COLUMNS}
    firsts = []
    for half in (0, 1):
        for number, sample in enumerate(samples):
            if half == 0:
                firsts.append(len(row["input_ids"]))
            for token, position, block, start, label, twin in sample[half]:
                twin = twin if twin < 0 else twin + firsts[number]
                for column, value in zip(COLUMNS, (token, position, block, start, label, number, twin)):
                    row[column].append(value)
    return row


def first_fit(samples, max_length):
    """First fit by falling length, 256 samples at a time."""
    filled = []
    for first in range(0, len(samples), 256):
        rows = []
        for sample in sorted(samples[first : first + 256], key=lambda sample: -sum(map(len, sample))):
            lengths = (sum(len(half) for one in [*row, sample] for half in one) for row in rows)
            place = next((place for place, length in enumerate(lengths) if length <= max_length), None)
            if place is None:
                rows.append([])
                place = -1
            rows[place].append(sample)
        filled += rows
    return filled


def slow(rows, window_size, schedule, low=0.0, high=1.0, max_length=None, pack=False, copies=1, seed=0):
    samples = []
    for number, row in enumerate(rows):
        room = None if max_length is None else max_length - len(row["prompt_ids"])
        blocks = []
        for states in row["trajectories"]:
            if room is not None:
                room -= (1 + copies) * len(states[-1])
                if room < 0:
                    break
            blocks.append(states)
        noisy = []
        for copy in range(copies):
            generator = random.Random(f"{seed}/{number}" + (f"/{copy}" if copy else ""))
            noisy.append([])
            for index, states in enumerate(blocks):
                if index % window_size == 0:
                    targets = noise_targets(schedule, window_size, low, high, generator)
                target = targets[(index + copy * window_size // copies) % window_size]
                noisy[-1].append(states[nearest_state(states, target)])
        if blocks:
            text = [token for states in blocks for token in states[-1]]
            samples.append(laid_out(row["prompt_ids"], text, noisy, window_size))
    groups = first_fit(samples, max_length) if pack else [[sample] for sample in samples]
    return [joined(group) for group in groups]


def slow_completions(rows, tokens, size, noise, share, copies=1, max_length=None, seed=0):
    samples = []
    for number, row in enumerate(rows):
        text = row["completion_ids"]
        if max_length is not None:
            room = max(0, max_length - len(row["prompt_ids"])) // (1 + copies)
            text = text if len(text) <= room else text[: room - room % size]
        noisy = []
        for copy in range(copies):
            generator = random.Random(f"{seed}/{number}/{copy}")
            first = generator.randint(1, size) if copy else size
            starts = [0, *range(first, len(text), size)]
            noisy.append([])
            for start, end in zip(starts, [*starts[1:], len(text)]):
                block = []
                for place in range(start, end):
                    kept = place == start or (noise == "corrupt" and share < 1.0 and generator.random() >= share)
                    block.append(text[place] if kept else tokens[generator.randrange(len(tokens))])
                noisy[-1].append(block)
        if text:
            samples.append(laid_out(row["prompt_ids"], text, noisy, 1))
    return [joined([sample]) for sample in samples]


ROWS = [*trajectories(300, length=22), *trajectories(3, length=4, block_size=1), *trajectories(5, block_size=40)]
CASES = [
    {"window_size": window_size, "schedule": schedule}
    for window_size in (1, 2, 3, 16)
    for schedule in ("linear", "reverse", "random", "constant")
] + [
    {"window_size": 4, "schedule": lambda index, size, generator: generator.random() * index / size},
    {"window_size": 3, "schedule": "linear", "low": 0.2, "high": 0.7},
    {"window_size": 4, "schedule": "linear", "copies": 3},
    {"window_size": 3, "schedule": "random", "copies": 4, "seed": 5},
    {"window_size": 3, "schedule": "random", "max_length": 40},
    {"window_size": 3, "schedule": "random", "max_length": 120, "pack": True},
    {"window_size": 3, "schedule": "random", "max_length": 300, "pack": True, "copies": 3},
]  # fmt: skip


def fast(rows, window_size, schedule, low=0.0, high=1.0, max_length=None, pack=False, copies=1, seed=0, **others):
    return pack_trajectories(
        rows, window_size, schedule, min_noise=low, max_noise=high, max_length=max_length, pack_samples=pack,
        noisy_copies=copies, seed=seed, **others,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trajectories_are_packed_as_token_by_token(case):
    expected = slow(ROWS, **case)
    assert fast(ROWS, **case).to_list() == expected
    assert fast(Dataset.from_list(ROWS), **case).to_list() == expected


def test_what_data_sets_hold_is_read_whatever_its_types_and_order():
    expected = slow(ROWS[:40], 3, "random")
    data = Dataset.from_list(ROWS[:40])
    wide = Features(
        {
            "prompt_ids": LargeList(Value("int64")),
            "completion_ids": LargeList(Value("uint32")),
            "block_size": Value("int16"),
            "trajectories": List(LargeList(List(Value("int64")))),
        }
    )
    backwards = Dataset.from_list(ROWS[39::-1]).select(range(39, -1, -1))
    for source in (data.cast(wide), backwards, data.with_format("torch"), data.with_format("numpy"), ROWS[:40]):
        assert fast(source, 3, "random").to_list() == expected
    settings = PackSettings(3, "random", 0.0, 1.0, None, False, 0)
    assert list(packed_rows(ROWS[:40], settings)) == expected
    assert list(packed_rows(ROWS[20:40], settings, first=20)) == slow([ROWS[0]] * 20 + ROWS[20:40], 3, "random")[20:]


@pytest.mark.parametrize("source", [list, Dataset.from_list])
def test_files_and_their_digests_are_those_of_rows_written_one_by_one(tmp_path, source):
    """So that folders begun by an earlier version can be continued."""
    fast(source(ROWS), 3, "random", copies=2, output_dir=tmp_path, shard_size=100)
    for shard in range(4):
        piece = ROWS[shard * 100 : (shard + 1) * 100]
        path = tmp_path / f"packed-{shard:05d}.parquet"
        rows = slow([ROWS[0]] * 100 * shard + piece, 3, "random", copies=2)[100 * shard :]
        assert pyarrow.parquet.read_table(path).to_pylist() == rows
        columns = ("prompt_ids", "completion_ids", "block_size", "trajectories")
        text = json.dumps([[row[column] for column in columns] for row in piece])
        note = read_note(path)
        assert note["digest"] == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        assert note["counts"] == slow_statistics(rows).counts() | {"trajectories": len(piece)}


def test_a_digest_does_not_depend_on_where_the_rows_come_from():
    """Those that Arrow writes as text, and those that it cannot write."""
    columns = ("prompt_ids", "completion_ids", "block_size", "trajectories")
    empty = {"prompt_ids": [], "completion_ids": [], "block_size": 2, "trajectories": []}
    for rows in (ROWS, [empty, *ROWS], [{**empty, "block_size": None}, *ROWS[:3]]):
        table = Dataset.from_list(rows).with_format("arrow")[:]
        assert digest_of_piece(table, columns) == digest_of_piece(rows, columns)
        assert digest_of_piece(table[2:], columns) == digest_of_piece(rows[2:], columns)


@pytest.mark.parametrize(
    ("size", "noise", "share", "others"),
    [
        (8, "uniform", 0.5, {}),
        (3, "uniform", 0.5, {"copies": 4, "seed": 3}),
        (8, "corrupt", 0.3, {"copies": 2}),
        (8, "corrupt", 1.0, {"copies": 2}),
        (4, "uniform", 0.5, {"copies": 2, "max_length": 40}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 90, 1024, 50_257])
def test_completions_are_packed_as_token_by_token(size, noise, share, others, tokens):
    expected = slow_completions(ROWS, range(tokens), size, noise, share, **others)
    given = {"noisy_copies": others.get("copies", 1)} | {key: others[key] for key in others if key != "copies"}
    given |= {} if noise == "uniform" else {"corrupt_share": share}
    for rows in (ROWS, Dataset.from_list(ROWS)):
        assert pack_completions(rows, tokens, size, noise, **given).to_list() == expected


def slow_statistics(rows) -> PackingStatistics:
    found = PackingStatistics()
    for row in rows:
        found.rows += 1
        found.samples += max(row["seq_ids"]) + 1
        found.label_tokens += sum(label != -100 for label in row["labels"])
        noisy = [index for index, block in enumerate(row["block_ids"]) if block >= 0]
        found.noisy_tokens += len(noisy)
        found.clean_tokens += sum(
            block < 0 and sequence >= 0 for block, sequence in zip(row["block_ids"], row["seq_ids"])
        )
        places: Counter = Counter()
        sequences, blocks, positions = row["seq_ids"], row["block_ids"], row["position_ids"]
        keys = {index: (sequences[index], blocks[index], positions[index] - index) for index in noisy}
        for (sequence, *_), block in groupby(noisy, keys.__getitem__):
            indices = list(block)
            if indices[0] and row["position_ids"][indices[0]] <= row["position_ids"][indices[0] - 1]:
                places.clear()
            wrong = sum(row["twin_ids"][index] >= 0 for index in indices)
            found.twin_tokens += wrong
            found.blocks += 1
            found.converged_blocks += not wrong
            noise = wrong / len(indices)
            if wrong:
                found.histogram[min(9, int(noise * 10 - 1e-9))] += 1
            window = (sequence, row["window_start"][indices[0]])
            count, total = found.by_place.get(places[window], (0, 0.0))
            found.by_place[places[window]] = (count + 1, total + noise)
            places[window] += 1
    return found


@pytest.mark.parametrize("case", CASES[:4] + CASES[-6:])
def test_statistics_are_those_counted_token_by_token(case):
    packed = fast(ROWS, **case)
    expected = slow_statistics(packed.to_list())
    assert packing_statistics(packed) == expected
    assert packing_statistics(packed.to_list()) == expected
