"""Statistics of packed rows, compared with counts by hand."""

import pytest
from packing_example import PACKED, ROW

from hf_jacobi.trajectories import PackingStatistics, pack_trajectories, packing_statistics


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_the_worked_example():
    statistics = packing_statistics([PACKED])
    assert (statistics.rows, statistics.samples, statistics.clean_tokens, statistics.noisy_tokens) == (1, 1, 7, 5)
    assert (statistics.label_tokens, statistics.twin_tokens) == (5, 1)
    assert (statistics.blocks, statistics.converged_blocks) == (3, 2)
    assert statistics.histogram == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]  # 0.5 belongs to (0.4, 0.5]
    assert statistics.mean_noise_by_place == [0.0, 0.5]
    assert "66.7%" in statistics.table() and f"0.4 to 0.5{1:10}  {20 * '#'}\n" in statistics.table()


def test_samples_of_a_row_are_told_apart_and_padding_is_left_out():
    packed = pack_trajectories([ROW, ROW], window_size=2, max_length=24, pack_samples=True)
    one, two = packing_statistics([PACKED]), packing_statistics(packed)
    assert two.samples == 2 and two.rows == 1
    assert two.mean_noise_by_place == one.mean_noise_by_place
    assert [two.clean_tokens, two.noisy_tokens, two.blocks] == [14, 10, 6]
    fill = {"seq_ids": -1, "block_ids": -1, "labels": -100, "twin_ids": -1}
    padded = {name: [fill.get(name, 0), *values] for name, values in PACKED.items()}
    assert packing_statistics([padded]) == one


def test_counts_add_up():
    one = packing_statistics([PACKED])
    assert PackingStatistics.from_counts(one.counts()) == one
    doubled = {name: 2 * value for name, value in one.counts().items()}
    assert PackingStatistics.from_counts(doubled) == packing_statistics([PACKED, PACKED])
