"""The authors' formats, on rows made by hand: the pairs, windows and positions stay the same."""

import json
import re

import pytest
from datasets import Dataset

from hf_jacobi.trajectories import pack_trajectories
from hf_jacobi.trajectories.upstream import PackedRows, RawTrajectories


EOS = 2
# Two blocks of three tokens; the text ends inside the second.
PAIRS = [([11, 90, 91], [11, 12, 13]), ([92, 93, 94], [14, EOS, 0])]
PACKED = {
    "data_id": "data_7",
    "prompt_ids": [5, 6],
    "prompt_ids_len": 2,
    "complete_training_sequence_ids": [5, 6, 11, 90, 91, 11, 12, 13, 92, 93, 94, 14, EOS, 0],
    "traj_position_indices": [1, 0],
}
RAW = [
    {
        "data_id": "data_7",
        "diffusion_itr_id": "itr_0",
        "prompt_ids": [[5, 6]],
        "answer_trajectory_ids": [[[11, 12, 13]], [[11, 90, 91]], [[11, 12, 95]], [[11, 12, 13]], [[11, 12, 13]]],
        "teacher_output_ids": [[5, 6, 11, 12, 13]],
    },
    {
        "data_id": "data_7",
        "diffusion_itr_id": "itr_1",
        "prompt_ids": [5, 6, 11, 12, 13],
        "answer_trajectory_ids": [[5, 6, 11, 12, 13, 92, 93, 94], [5, 6, 11, 12, 13, 14, EOS, 0]],
        "teacher_output_ids": [5, 6, 11, 12, 13, 14, EOS, 0],
    },
]
OTHER = {"data_id": "data_8", "diffusion_itr_id": "itr_0", "prompt_ids": [7], "answer_trajectory_ids": [[1, 3, 4]]}


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(tmp_path, rows, kind=".jsonl"):
    path = tmp_path / f"rows{kind}"
    if kind == ".jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def pairs_of(row):
    """`(noisy block, clean block, position of the first token, window's first position)` of each block."""
    clean = [(p, t) for p, t, b in zip(row["position_ids"], row["input_ids"], row["block_ids"]) if b < 0]
    text = dict(clean)
    result = []
    for block in range(max(row["block_ids"]) + 1):
        indices = [index for index, number in enumerate(row["block_ids"]) if number == block]
        positions = [row["position_ids"][index] for index in indices]
        starts = {row["window_start"][index] for index in indices}
        noisy = [row["input_ids"][index] for index in indices]
        result.append((noisy, [text[position] for position in positions], positions[0], *starts))
    return result


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_packed_rows_keep_their_pairs_windows_and_positions(tmp_path, kind):
    path = write(tmp_path, [PACKED, PACKED], kind)
    for window, starts in ((1, (2, 5)), (2, (2, 2))):
        rows = list(PackedRows(path, window_size=window))
        assert len(rows) == 2 and rows[0] == rows[1]
        assert pairs_of(rows[0]) == [
            (noisy, clean, 2 + 3 * number, starts[number]) for number, (noisy, clean) in enumerate(PAIRS)
        ]
        assert rows[0]["labels"] == [-100, -100, 11, 12, 13, 14, EOS, 0] + [-100] * 6
        assert rows[0]["twin_ids"] == [-1] * 9 + [3, 4, 5, 6, 7]
    cut = next(iter(PackedRows(path, window_size=2, eos_token_id=[EOS, 9])))
    assert pairs_of(cut) == [(*PAIRS[0], 2, 2), ([92, 93], [14, EOS], 5, 2)]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_raw_trajectories_become_ours(tmp_path, kind):
    reader = RawTrajectories(write(tmp_path, [*RAW, OTHER], kind), block_size=3, eos_token_id=EOS)
    assert list(reader) == [
        {
            "prompt_id": "data_7",
            "prompt_ids": [5, 6],
            "completion_ids": [11, 12, 13, 14, EOS],
            "block_size": 3,
            "trajectories": [[[11, 90, 91], [11, 12, 95], [11, 12, 13]], [[92, 93], [14, EOS]]],
            "ended": True,
        },
        {
            "prompt_id": "data_8",
            "prompt_ids": [7],
            "completion_ids": [1, 3, 4],
            "block_size": 3,
            "trajectories": [[[1, 3, 4]]],
            "ended": False,
        },
    ]
    assert not reader.skipped


def test_raw_and_packed_agree(tmp_path):
    """Packing raw rows gives the same result as converting the authors' packed rows."""
    raw = RawTrajectories(write(tmp_path, RAW), block_size=3)
    ours = pack_trajectories(raw, window_size=2, noise_schedule="constant")
    theirs = PackedRows(write(tmp_path, [PACKED], ".json"), window_size=2).to_dataset()
    assert ours[:] == theirs[:]


def without(row, column):
    return {name: value for name, value in row.items() if name != column}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not a JSON object"),
        ([1], "not a JSON object"),
        (without(PACKED, "prompt_ids"), "no prompt_ids"),
        (PACKED | {"prompt_ids_len": 3}, "not the length of prompt_ids"),
        (PACKED | {"prompt_ids": [5, 7]}, "does not begin with the prompt"),
        (PACKED | {"traj_position_indices": [1, 0, 1, 0, 0]}, "a pair of blocks per entry"),
        (PACKED | {"traj_position_indices": []}, "one entry per block"),
        (PACKED | {"complete_training_sequence_ids": [5, "x"]}, "not a list of tokens"),
        (PACKED | {"traj_position_indices": [1]}, "blocks of 6 tokens, not 3"),
    ],
)
def test_malformed_packed_rows_are_counted_or_named(tmp_path, row, reason):
    path = write(tmp_path, [PACKED, row, PACKED])
    reader = PackedRows(path, window_size=2, block_size=3)
    assert len(list(reader)) == len(list(reader)) == 2
    assert sum(reader.skipped.values()) == 1 and reason in next(iter(reader.skipped))
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 2: .*{reason}"):
        list(PackedRows(path, window_size=2, block_size=3, strict=True))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (RAW[1], "without those before it"),
        (OTHER | {"diffusion_itr_id": "one"}, "itr_ followed by a number"),
        (OTHER | {"answer_trajectory_ids": [[1, 3, 4], [1, 3]]}, r"states of \[2, 3\] tokens"),
        (OTHER | {"answer_trajectory_ids": []}, "not a list of states"),
        (RAW[1] | {"data_id": "data_8", "prompt_ids": [8]}, "neither the prompt nor the text"),
        (OTHER | {"answer_trajectory_ids": [[77, 1, 3, 4]]}, "do not begin with the text so far"),
        (OTHER | {"answer_trajectory_ids": [[1, 3, 2**31]]}, "not a list of tokens"),
    ],
)
def test_malformed_raw_rows_are_counted_or_named(tmp_path, row, reason):
    path = write(tmp_path, [*RAW, OTHER, row])
    reader = RawTrajectories(path, block_size=3)
    assert [row["prompt_id"] for row in reader] == ["data_7", "data_8"]
    assert sum(reader.skipped.values()) == 1 and re.search(reason, next(iter(reader.skipped)))
    with pytest.raises(ValueError, match=rf"row 4: .*{reason}"):
        list(RawTrajectories(path, block_size=3, strict=True))


def test_a_broken_array_and_a_missing_file_are_errors(tmp_path):
    path = write(tmp_path, [PACKED], ".json")
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="row 1: the array is cut off"):
        list(PackedRows(path, window_size=2))
    with pytest.raises(OSError, match="no file"):
        PackedRows(tmp_path / "nothing.jsonl", window_size=2)
    with pytest.raises(ValueError, match="no row could be read"):
        PackedRows(write(tmp_path, [{}]), window_size=2).to_dataset()


@pytest.mark.parametrize("size", [2, 4])
def test_another_block_size_than_that_of_the_data_makes_no_rows(tmp_path, size):
    reader = RawTrajectories(write(tmp_path, [*RAW, OTHER]), block_size=size)
    rows = list(reader)
    assert sum(reader.skipped.values()) >= 1
    for row in rows:
        assert row["prompt_id"] != "data_7" or size == 4  # blocks of three are short blocks of four: none can follow
        assert len(row["trajectories"]) == 1


def test_what_is_read_is_what_the_file_holds_now(tmp_path):
    path = write(tmp_path, [PACKED])
    assert len(PackedRows(path, window_size=2).to_dataset()) == 1
    write(tmp_path, [PACKED, PACKED])
    assert len(PackedRows(path, window_size=2).to_dataset()) == 2


def test_bytes_that_are_no_text_and_marks_at_the_beginning(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(PACKED).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\n\xff\xfe\n" + line)
    reader = PackedRows(path, window_size=2)
    assert len(list(reader)) == 2 and sum(reader.skipped.values()) == 1
