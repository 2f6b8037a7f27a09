"""Packing against an example worked by hand."""

from __future__ import annotations

import pytest
from datasets import Dataset

import hf_jacobi
from hf_jacobi.trajectories import pack_trajectories


# Two prompt tokens, blocks of two tokens, the last one short.
ROW = {
    "prompt_ids": [1, 2],
    "completion_ids": [11, 12, 13, 14, 15],
    "block_size": 2,
    "trajectories": [[[11, 90], [11, 12]], [[13, 91], [13, 14]], [[92], [15]]],
}
# window_size=2, linear: levels 0 and 1 over each window, so block 0 is clean, block 1 noisy, block 2 clean.
PACKED = {
    "input_ids": [1, 2, 11, 12, 13, 14, 15, 11, 12, 13, 91, 15],
    "position_ids": [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6],
    "block_ids": [-1, -1, -1, -1, -1, -1, -1, 0, 0, 1, 1, 2],
    "window_start": [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 6],
    "labels": [-100, -100, 11, 12, 13, 14, 15, -100, -100, -100, -100, -100],
    "seq_ids": [0] * 12,
    "twin_ids": [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 5, -1],
}


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_worked_example():
    for trajectories in ([ROW], Dataset.from_list([ROW])):
        assert pack_trajectories(trajectories, window_size=2)[:] == {name: [value] for name, value in PACKED.items()}


def test_it_stands_at_the_top_level():
    assert hf_jacobi.pack_trajectories is pack_trajectories


def test_several_samples_share_a_row_clean_halves_first():
    other = ROW | {"prompt_ids": [3], "completion_ids": [21], "trajectories": [[[93], [21]]]}
    packed = pack_trajectories([other, ROW], window_size=1, max_length=15, pack_samples=True)
    assert len(packed) == 1
    row = packed[0]
    assert row["input_ids"] == [1, 2, 11, 12, 13, 14, 15, 3, 21, 11, 90, 13, 91, 92, 93]
    assert row["seq_ids"] == [0] * 7 + [1] * 2 + [0] * 5 + [1]
    assert row["position_ids"] == [*range(7), 0, 1, 2, 3, 4, 5, 6, 1]
    assert row["twin_ids"] == [-1] * 9 + [-1, 3, -1, 5, 6, 8]
    for index, twin in enumerate(row["twin_ids"]):
        if twin >= 0:
            assert row["seq_ids"][twin] == row["seq_ids"][index] and row["block_ids"][twin] == -1
            assert row["position_ids"][twin] == row["position_ids"][index]
            assert row["input_ids"][twin] != row["input_ids"][index] or row["twin_ids"][index - 1] >= 0


def test_rows_are_filled_but_never_overfilled():
    packed = pack_trajectories([ROW] * 10, max_length=30, pack_samples=True)
    assert [len(row) for row in packed["input_ids"]] == [24] * 5
    assert sum(max(row) + 1 for row in packed["seq_ids"]) == 10


@pytest.mark.parametrize(("length", "tokens"), [(12, 12), (11, 10), (10, 10), (9, 6), (6, 6)])
def test_a_sample_too_long_is_cut_at_a_block_boundary(length, tokens):
    packed = pack_trajectories([ROW], window_size=2, max_length=length)
    assert [len(row) for row in packed["input_ids"]] == [tokens]
    clean = packed[0]["block_ids"].count(-1)
    assert packed[0]["input_ids"][:clean] == PACKED["input_ids"][:clean]
    assert tokens - clean == clean - 2, "every clean block has its noisy one"


def test_the_seed_governs_and_samples_draw_by_themselves():
    long = ROW | {"completion_ids": list(range(40)), "block_size": 8}
    long["trajectories"] = [
        [[*range(first, first + right), *[99] * (8 - right)] for right in range(1, 9)] for first in range(0, 40, 8)
    ]
    packs = [pack_trajectories([long, long], 4, "random", seed=seed)[:] for seed in (0, 0, 1)]
    assert packs[0] == packs[1] != packs[2]
    assert packs[0]["input_ids"][0] != packs[0]["input_ids"][1]
    assert pack_trajectories([long], 4, "random", seed=0)[0]["input_ids"] == packs[0]["input_ids"][0]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="max_length"):
        pack_trajectories([ROW], pack_samples=True)
    with pytest.raises(ValueError, match="noise_schedule"):
        pack_trajectories([ROW], noise_schedule="cosine")
    with pytest.raises(ValueError, match="completion_ids"):
        pack_trajectories([{"prompt_ids": [1], "trajectories": [], "block_size": 2}])
    with pytest.raises(ValueError, match="max_length=5"):
        pack_trajectories([ROW], max_length=5)
