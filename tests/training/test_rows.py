"""Edited or cut rows are refused and named, wherever they are."""

from __future__ import annotations

import copy

import numpy as np
import pyarrow
import pytest
import torch
from datasets import Dataset, IterableDataset
from models import tiny_model
from packed_rows import packed
from test_trainer import rows, trainer_of

from hf_jacobi import UsageError
from hf_jacobi.trajectories.packing import COLUMNS, PACKED_FEATURES


WRONG = 66  # beyond the first ones


def order(row, key):
    """The tokens of a row, sorted by `key` of their block."""
    indices = sorted(range(len(row["block_ids"])), key=lambda index: key(row["block_ids"][index]))
    for column in COLUMNS:
        row[column] = [row[column][index] for index in indices]


def put(column, index, value):
    def edit(row):
        row[column][index] = value

    return edit


def cut_left(row):
    for column in COLUMNS:
        row[column] = row[column][2:]


def cut_left_and_counted_anew(row):
    cut_left(row)
    row["position_ids"] = [position - 2 for position in row["position_ids"]]
    row["window_start"] = [
        start - 2 if block >= 0 else 0 for start, block in zip(row["window_start"], row["block_ids"])
    ]


def labels_moved(row):
    row["labels"] = row["labels"][1:] + [-100]


def empty(row):
    for column in COLUMNS:
        row[column] = []


EDITS = {
    "labels one shorter": (lambda row: row["labels"].pop(), "46 labels, but 47 input_ids"),
    "labels moved": (labels_moved, "has label"),
    "cut on the left": (cut_left, "positions do not count up from 0"),
    "cut, twins left": (cut_left_and_counted_anew, "has twin 8 at position 6"),
    "blocks in another order": (lambda row: order(row, lambda block: {0: 1, 1: 0}.get(block, block)), "out of order"),
    "noise before text": (lambda row: order(row, lambda block: block < 0), "begins with noise"),
    "empty": (empty, "is empty"),
    "a column of nothing": (lambda row: row.update(labels=None), "labels that are not a list"),
    "a token of nothing": (put("input_ids", 3, None), "input_ids that are not a list"),
    "a list for a token": (put("input_ids", 3, [3]), "input_ids that are not a list"),
    "a tensor for a twin": (put("twin_ids", -1, torch.tensor([3])), "twin_ids that are not a list"),
    "a twin beyond all numbers": (
        lambda row: row.update(twin_ids=[2**63] * len(row["twin_ids"])),
        "twin_ids that are not a list",
    ),
    "a negative token": (put("input_ids", 3, -1), "holds token -1"),
    "another vocabulary": (put("input_ids", 3, 96), "holds token 96"),
    "too far": (put("position_ids", 3, 256), "has position 256"),
    "a window after the text": (put("window_start", -1, 100), "window_start 100"),
    "a window before the text": (put("window_start", -1, -1), "window_start -1"),
    "a twin outside": (put("twin_ids", -1, 999), "has twin 999"),
    "a twin elsewhere": (put("twin_ids", -1, 0), "has twin 0"),
    "noise without text": (put("seq_ids", -1, 1), "sample 1, which has no text"),
    "a block of its own kind": (put("block_ids", 3, -2), "block_ids below -1"),
}


NOT_IN_ARROW = ("a list for a token", "a tensor for a twin", "a twin beyond all numbers")


@pytest.mark.parametrize("kind", ["list", "dataset", "shuffled"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_row_that_was_edited_is_named_at_construction(tmp_path, edit, kind):
    change, message = EDITS[edit]
    data = copy.deepcopy(packed(70))
    change(data[WRONG])
    number = WRONG
    if kind != "list" and edit not in NOT_IN_ARROW:
        data = Dataset.from_list(data, features=PACKED_FEATURES)
    if kind == "shuffled" and isinstance(data, Dataset):
        order = [*range(1, 70), 0]
        data, number = data.select(order), order.index(WRONG)
    with pytest.raises(ValueError, match=rf"row {number} of `train_dataset` .*{message}"):
        trainer_of(tiny_model(), tmp_path, data=data)


@pytest.mark.parametrize("settings", [{}, {"max_length": 200}, {"window_size": 1}])
def test_rows_as_they_are_packed_are_taken(tmp_path, settings):
    data = packed(70, **settings)
    trainer_of(tiny_model(), tmp_path, data=data, eval_dataset={"one": Dataset.from_list(data).with_format("torch")})


class OfTorch(torch.utils.data.Dataset):
    """Defines no iteration of its own, and returns tensors."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return {column: torch.tensor(values) for column, values in self.data[index].items()}


def test_rows_of_torch_are_looked_at(tmp_path):
    trainer_of(tiny_model(), tmp_path, data=OfTorch(packed(3)))
    wrong = copy.deepcopy(packed(3))
    wrong[2]["twin_ids"][-1] = 0
    with pytest.raises(ValueError, match="row 2 of `train_dataset` has twin 0"):
        trainer_of(tiny_model(), tmp_path, data=OfTorch(wrong))


def test_rows_of_a_stream_are_looked_at_as_they_come(tmp_path):
    data = copy.deepcopy(packed(70))
    data[WRONG]["labels"].pop()
    stream = IterableDataset.from_generator(lambda: iter(data))
    trainer = trainer_of(tiny_model(), tmp_path, data=stream, max_steps=20)
    with pytest.raises(ValueError, match="46 labels, but 47 input_ids"):
        trainer.train()


def test_other_data_for_an_evaluation_are_looked_at(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path)
    wrong = copy.deepcopy(packed(2))
    wrong[1]["labels"].pop()
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="lacks the columns"):
            evaluate(Dataset.from_list([{"a": 1}]))
        with pytest.raises(ValueError, match=r"row 1 of `(eval|test)_dataset` has 45 labels"):
            evaluate(wrong)
    with pytest.raises(ValueError, match="row 1 of `eval_dataset`"):
        trainer.evaluate({"a": rows(2), "b": wrong})


@pytest.mark.parametrize("row", [None, [1, 2], "text"])
def test_what_is_no_row_is_named(tmp_path, row):
    with pytest.raises(UsageError, match="row 1 of `train_dataset` has no columns"):
        trainer_of(tiny_model(), tmp_path, data=[packed(1)[0], row])


def test_columns_of_unsigned_numbers_are_looked_at_beside_others(tmp_path):
    """NumPy turns them into floats when they are mixed with signed numbers."""
    plain, unsigned = packed(2)
    unsigned["input_ids"] = np.array(unsigned["input_ids"], dtype=np.uint64)
    trainer_of(tiny_model(), tmp_path, data=[plain, unsigned]).train()
    kinds = {key: pyarrow.uint64() if key == "twin_ids" else pyarrow.int64() for key in COLUMNS}
    values = {key: [[2**64 - 1] * 9 if key == "twin_ids" else [0] * 9] for key in COLUMNS}
    wide = Dataset(pyarrow.table({key: pyarrow.array(values[key], pyarrow.list_(kinds[key])) for key in COLUMNS}))
    with pytest.raises(UsageError, match="row 0 of `train_dataset` has twin_ids that are not a list of whole numbers"):
        trainer_of(tiny_model(), tmp_path, data=wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": 5}, "`train_dataset` must be what pack_trajectories returns, got int"),
        ({"processing_class": "name"}, "`processing_class` must be a tokenizer, got 'name'"),
        ({"peft_config": {"r": 4}}, "`peft_config` must be a PEFT configuration, got dict"),
    ],
)
def test_arguments_of_another_kind_are_named(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        trainer_of(tiny_model(), tmp_path, **arguments)


def test_evaluation_sets_that_are_not_there_are_named(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, eval_dataset={"a": rows(2)})
    with pytest.raises(UsageError, match=r"no evaluation set 'b': the names are \['a'\]"):
        trainer.evaluate("b")
    with pytest.raises(UsageError, match="`test_dataset` is missing"):
        trainer.predict(None)
    assert "eval_loss" in trainer.evaluate("a")
