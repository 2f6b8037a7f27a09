"""Batches: left padding, twins that move with it, and rows as drafts."""

import torch
from packed_rows import packed
from packing_example import PACKED

from hf_jacobi.training.collator import PackedCollator, cut_to_drafts


def test_padding_goes_on_the_left_and_twins_move_along():
    rows = packed(4)
    batch = PackedCollator(pad_token_id=7, multiple=16)(rows)
    length = batch["input_ids"].shape[1]
    assert length % 16 == 0
    for number, row in enumerate(rows):
        padding = length - len(row["input_ids"])
        assert batch["input_ids"][number, :padding].tolist() == [7] * padding
        assert batch["seq_ids"][number, :padding].tolist() == [-1] * padding
        for column, values in row.items():
            shift = padding if column == "twin_ids" else 0
            expected = [value + shift if column == "twin_ids" and value >= 0 else value for value in values]
            assert batch[column][number, padding:].tolist() == expected
    twins = batch["twin_ids"]
    for number, index in (twins >= 0).nonzero().tolist():
        twin = int(twins[number, index])
        assert batch["position_ids"][number, twin] == batch["position_ids"][number, index]
        assert batch["block_ids"][number, twin] == -1


def test_drafts_worked_by_hand():
    """In the worked example only block 1 has a wrong token, 91 at position 5; the last correct one before it is 13."""
    row = cut_to_drafts(PACKED)
    assert row["input_ids"] == [1, 2, 11, 12, 13, 14, 15, 13, 91]
    assert row["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert row["block_ids"] == [-1] * 7 + [1, 1]
    assert row["window_start"] == [0] * 7 + [4, 4]
    assert row["twin_ids"] == [-1] * 7 + [-1, 5]
    assert row["labels"] == [*PACKED["labels"][:7], -100, -100]


def test_drafts_keep_every_wrong_token_and_its_twin():
    for row in packed(3, max_length=100):
        drafts = cut_to_drafts(row)
        assert taught(row) == taught(drafts)
        clean = [index for index, block in enumerate(row["block_ids"]) if block < 0]
        assert drafts["input_ids"][: len(clean)] == [row["input_ids"][index] for index in clean]


def taught(row):
    """The tokens with a twin."""
    columns = zip(row["input_ids"], row["position_ids"], row["seq_ids"], row["twin_ids"])
    return {entry for entry in columns if entry[-1] >= 0}


def test_the_columns_are_integers():
    assert {values.dtype for values in PackedCollator(0)(packed(2)).values()} == {torch.long}
