"""Packing compared with an example worked by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from packing_example import PACKED, ROW

import hf_jacobi
from hf_jacobi.trajectories import pack_trajectories


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


def test_a_folder_holds_the_same_rows_and_is_gone_on_with(tmp_path):
    rows = [ROW | {"prompt_ids": [number]} for number in range(5)]
    expected = pack_trajectories(rows, 2, "random", seed=3)[:]
    packed = pack_trajectories(rows, 2, "random", seed=3, output_dir=tmp_path / "out", shard_size=2)
    assert packed[:] == expected
    (tmp_path / "out" / "packed-00001.parquet").unlink()  # as if the work had been interrupted
    kept = (tmp_path / "out" / "packed-00000.parquet").stat().st_mtime_ns
    assert pack_trajectories(rows, 2, "random", seed=3, output_dir=tmp_path / "out", shard_size=2)[:] == expected
    assert (tmp_path / "out" / "packed-00000.parquet").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="window_size 2, now 3"):
        pack_trajectories(rows, 3, "random", seed=3, output_dir=tmp_path / "out", shard_size=2)
    with pytest.raises(ValueError, match="other data"):
        pack_trajectories(rows[1:], 2, "random", seed=3, output_dir=tmp_path / "out", shard_size=2)


def test_data_that_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="through only once"):
        pack_trajectories(iter([ROW]))
    with pytest.raises(ValueError, match="there are no trajectories"):
        pack_trajectories([])
    short = ROW | {"trajectories": [[[11]], [[12, 13]], [[14, 15]]]}
    with pytest.raises(ValueError, match=r"trajectory 1 has blocks of \[1, 2, 2\] tokens"):
        pack_trajectories([ROW, short])
    with pytest.raises(ValueError, match="other text in completion_ids"):
        pack_trajectories([ROW | {"completion_ids": [1, 2]}])
    with pytest.raises(ValueError, match="block of no states"):
        pack_trajectories([ROW | {"trajectories": [[]]}])
    pack_trajectories([ROW] * 3, output_dir=tmp_path / "out", shard_size=1)
    with pytest.raises(ValueError, match="more data than is given now"):
        pack_trajectories([ROW], output_dir=tmp_path / "out", shard_size=1)


def test_what_is_packed_is_what_there_is_now():
    class Source:
        rows: list = []  # noqa: RUF012

        def __iter__(self):
            return iter(self.rows)

    Source.rows = [ROW]
    assert len(pack_trajectories(Source())) == 1
    Source.rows = [ROW, ROW]
    assert len(pack_trajectories(Source())) == 2


def test_a_schedule_of_ones_own_is_part_of_the_settings(tmp_path):
    pack_trajectories([ROW], 2, lambda index, size, generator: 0.5, output_dir=tmp_path / "out")
    pack_trajectories([ROW], 2, lambda index, size, generator: 0.5, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="noise_schedule"):
        pack_trajectories([ROW], 2, lambda index, size, generator: 0.6, output_dir=tmp_path / "out")


MEMORY = """
import resource, sys
sys.path.insert(0, {path!r})
import datasets
datasets.config.HF_DATASETS_CACHE = {cache!r}
from hf_jacobi.trajectories import pack_trajectories
from hf_jacobi.trajectories.shards import ShardFolder
from hf_jacobi.trajectories.upstream import RawTrajectories
class Rows:
    def __init__(self, count): self.count = count
    def __iter__(self):
        states = [[[block + right] * 16 for right in range(8)] for block in range(16)]
        for number in range(self.count):
            yield {{"prompt_ids": [number % 500] * 64, "completion_ids": [s[-1][0] for s in states for _ in range(16)],
                   "block_size": 16, "trajectories": states}}
def peak(count, **settings):
    pack_trajectories(Rows(count), 4, max_length=2048, **settings)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
first = peak(600), peak(600, output_dir={out!r} + "/few")
last = peak(6000), peak(6000, output_dir={out!r} + "/many")
print(max(last) - max(first))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """Ten times the data, 150 MB of packed rows, takes less than 60 MB more."""
    path = str(Path(hf_jacobi.__file__).parents[1])
    code = MEMORY.format(path=path, cache=str(tmp_path / "cache"), out=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 60
