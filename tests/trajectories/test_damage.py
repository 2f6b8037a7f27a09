"""Damaged files are named, and folders of any name are opened."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
from datasets import Dataset
from models import tiny_model, tiny_tokenizer
from packing_example import ROW

import hf_jacobi
from hf_jacobi import UsageError
from hf_jacobi.cli import main
from hf_jacobi.trajectories import collect_trajectories, pack_trajectories, read_report
from hf_jacobi.trajectories.prompts import open_prompts
from hf_jacobi.trajectories.shards import check_file
from hf_jacobi.trajectories.upstream import PackedRows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def collect(folder, prompts=("w3", "w4", "w5", "w6")):
    return collect_trajectories(
        tiny_model(), tiny_tokenizer(), list(prompts), 4, 8, output_dir=folder, shard_size=2, progress=False
    )


def flip(path, first: int, last: int) -> None:
    content = bytearray(path.read_bytes())
    content[first:last] = bytes(byte ^ 255 for byte in content[first:last])
    path.write_bytes(content)


@pytest.mark.parametrize("bytes_", [(60, 160), (200, 201), (40, 44)])
def test_a_shard_damaged_in_its_middle_is_named_by_all_who_read_it(tmp_path, bytes_, capsys):
    folder = tmp_path / "out"
    collect(folder)
    flip(folder / "trajectories-00001.parquet", *bytes_)
    named = r"trajectories-00001\.parquet is broken.*: delete it and make it again"
    for read in (
        lambda: collect(folder),
        lambda: read_report(folder),
        lambda: open_prompts(folder) and pack_trajectories(open_prompts(folder)),
        lambda: pack_trajectories(open_prompts(folder / "trajectories-00001.parquet")),
    ):
        with pytest.raises(UsageError, match=named):
            read()
    assert main(["pack", "--trajectories", str(folder), "--output-dir", str(tmp_path / "packed")]) == 2
    assert "trajectories-00001.parquet is broken" in capsys.readouterr().err
    (folder / "trajectories-00001.parquet").unlink()
    assert len(collect(folder)) == 4


def test_no_bit_of_a_shard_that_is_flipped_is_passed_over(tmp_path):
    """In an uncompressed page, other readers silently read another token; in a name, they miss a column."""
    folder = tmp_path / "out"
    expected = collect(folder).to_list()
    shard = folder / "trajectories-00001.parquet"
    whole = shard.read_bytes()
    name = whole.index(b"completion_ids")
    noticed = 0
    for place in [*range(190, 560, 23), *range(name, name + 14, 5)]:
        flip(shard, place, place + 1)
        for read in (collect, lambda folder: open_prompts(folder)):
            try:
                assert read(folder).to_list() == expected
            except UsageError as error:
                noticed += 1
                assert shard.name in str(error) or "other data" in str(error)
        shard.write_bytes(whole)
    assert noticed > 20


def test_a_damaged_packed_shard_is_named(tmp_path):
    folder = tmp_path / "packed"
    pack_trajectories([ROW] * 4, 2, output_dir=folder, shard_size=2)
    flip(folder / "packed-00001.parquet", 60, 90)
    for read in (
        lambda: pack_trajectories([ROW] * 4, 2, output_dir=folder, shard_size=2),
        lambda: open_prompts(folder),
    ):
        with pytest.raises(UsageError, match=r"packed-00001\.parquet is broken"):
            read()
    with pytest.raises(UsageError, match=r"packed-00001\.parquet is broken"):
        next(iter(PackedRows(folder / "packed-00001.parquet", window_size=2)))


@pytest.mark.parametrize("content", [b"", b'{"kind": "tra', b"[]", b"\xff\xfe{}"])
def test_damaged_settings_are_named(tmp_path, content):
    collect(tmp_path / "out")
    (tmp_path / "out" / ".hf_jacobi.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.hf_jacobi\.json is damaged.*or name another folder"):
        collect(tmp_path / "out")


def test_settings_that_are_lost_are_asked_for(tmp_path):
    """As after `cp folder/*`."""
    collect(tmp_path / "out")
    (tmp_path / "out" / ".hf_jacobi.json").unlink()
    with pytest.raises(UsageError, match=r"without its settings: restore the hidden file \.hf_jacobi\.json"):
        collect(tmp_path / "out")


EMPTY = ("empty", "blank", "no", "head")  # harmless among others
FILES = {
    "cut.jsonl": (b'{"prompt": "w3"}\n{"prompt": ', r"cut\.jsonl, line 2 is not JSON"),
    "list.jsonl": (b'{"prompt": "w3"}\n[1]\n', r"list\.jsonl, line 2 is not an object"),
    "empty.jsonl": (b"", r"empty\.jsonl is empty"),
    "empty.csv": (b"", r"empty\.csv is empty"),
    "blank.jsonl": (b"\n", r"blank\.jsonl is empty"),
    "cut.json": (b'[{"prompt": "w3"}, {"prompt"', r"cut\.json could not be read: \S"),
    "bytes.txt": (b"w3\xff\nw4", r"bytes\.txt could not be read: .*position 2"),
    "no.json": (b"[]", r"no\.json holds no rows"),
    "head.csv": (b"prompt\n", r"head\.csv holds no rows"),
    "wide.csv": (b"prompt,b\n1,2\n3,4,5\n", r"wide\.csv could not be read: .*line 3"),
    "text.parquet": (b"no parquet", r"text\.parquet is broken"),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "file") for name in FILES] + [(name, "folder") for name in FILES if name.split(".")[0] not in EMPTY],
)
def test_a_file_that_cannot_be_read_is_named_and_its_row_if_one_is_to_blame(tmp_path, name, where):
    content, message = FILES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    for good in ("a", "z"):
        Dataset.from_dict({"prompt": ["w3"]}).to_parquet(folder / f"{good}.parquet")
        (folder / f"{good}.jsonl").write_text('{"prompt": "w3"}\n')
        if name.split(".")[1] != "parquet":
            (folder / f"{good}.parquet").unlink()
        if name.split(".")[1] != "jsonl":
            (folder / f"{good}.jsonl").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_prompts(folder / name if where == "file" else folder)


def test_parquet_files_without_rows_are_not_called_damaged(tmp_path, capsys):
    schema, folder = pyarrow.schema({"prompt": pyarrow.string()}), tmp_path / "rows"
    folder.mkdir()
    pyarrow.parquet.write_table(schema.empty_table(), folder / "a.parquet")
    pyarrow.parquet.ParquetWriter(folder / "b.parquet", schema).close()
    for source in (folder, folder / "a.parquet", folder / "b.parquet"):
        with pytest.raises(UsageError, match=rf"{source.name} holds no rows\.$"):
            open_prompts(source)
    (folder / ".hf_jacobi.json").write_text('{"kind": "trajectories"}')  # as earlier versions left it
    assert main(["pack", "--trajectories", str(folder), "--output-dir", str(tmp_path / "packed")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hf-jacobi pack: {folder} holds no completions."


@pytest.mark.parametrize("name", ["[v1]", "a*b", "a?b", "x[1]y", "{a,b}", "**"])
def test_a_folder_of_any_name_is_opened_and_it_alone(tmp_path, name, monkeypatch, capsys):
    for other, prompts in (("a*b", ["w3"]), ("axb", ["w4"] * 2), ("a?b", ["w5"] * 3), (name, ["w6", "w7", "w8"])):
        if not (tmp_path / other).exists():
            collect(tmp_path / other, prompts)
    expected = read_report(tmp_path / name).prompts
    assert len(open_prompts(tmp_path / name)) == expected
    packed = ["pack", "--trajectories", str(tmp_path / name), "--output-dir", str(tmp_path / name / "packed")]
    assert main(packed) == 0 and f"rows{expected:>24}"[-3:] in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / name)
    assert len(open_prompts("packed")) == len(open_prompts("./packed/packed-00000.parquet")) == expected
    (tmp_path / name / "p[1].txt").write_text("w3\nw4")
    assert len(open_prompts("p[1].txt")) == 2


def test_splits_of_a_folder_of_any_name_are_found(tmp_path):
    folder = tmp_path / "[v1]"
    folder.mkdir()
    for split, count in (("train", 2), ("test", 1)):
        Dataset.from_dict({"prompt": ["w3"] * count}).to_parquet(folder / f"{split}.parquet")
    (folder / "README.md").write_text("# Data")
    assert (len(open_prompts(folder)), len(open_prompts(folder, "test"))) == (2, 1)
    with pytest.raises(UsageError, match="validation"):
        open_prompts(folder, "validation")
    empty = tmp_path / "[none]"
    empty.mkdir()
    with pytest.raises(UsageError, match="holds no data"):
        open_prompts(empty)


# What is not a set of trajectories


@pytest.mark.parametrize("token", [None, -5, 3.5, "a", 2**31, 2**40])
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids", "trajectories"])
def test_what_is_no_token_is_not_packed(tmp_path, token, column):
    wrong = json.loads(json.dumps(ROW))
    (wrong[column] if column != "trajectories" else wrong[column][0][0])[0] = token
    for settings in ({}, {"output_dir": tmp_path / "out"}):
        with pytest.raises(UsageError, match=f"trajectory 1 holds {token!r}, which is not a token"):
            pack_trajectories([ROW, wrong], **settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": 1}, "got a dictionary of"),
        ("folder", "got the path 'folder'"),
        ([3], "must be rows with columns"),
        ([ROW, 3], "trajectory 1 is not a row"),
        ([{"prompt_ids": [1]}], r"need the columns \['completion_ids', .*: those found are \['prompt_ids'\]"),
        ([ROW | {"trajectories": [None]}], "must be a list of blocks"),
        ([ROW | {"trajectories": 3}], "must be a list of blocks"),
        ([ROW | {"block_size": 2.0}], "`block_size of trajectory 0` must be a whole number"),
        ([ROW | {"completion_ids": [], "trajectories": []}], "every completion is empty"),
    ],
)
def test_what_is_no_set_of_trajectories_is_refused_by_what_it_is(rows, message):
    with pytest.raises(UsageError, match=message):
        pack_trajectories(rows)


def test_what_is_packed_already_is_refused():
    with pytest.raises(UsageError, match="packed already"):
        pack_trajectories(pack_trajectories([ROW]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 2.5}, "`window_size` must be a whole number"),
        ({"shard_size": 0}, "`shard_size` must be at least 1"),
        ({"shard_size": -1}, "`shard_size` must be at least 1"),
        ({"max_length": 12.5}, "`max_length` must be a whole number"),
        ({"min_noise": float("nan")}, "min_noise"),
        ({"noise_schedule": lambda index, size, generator: None}, "`noise_schedule` must return a level"),
        ({"noise_schedule": lambda index, size, generator: float("nan")}, "`noise_schedule` must return a level"),
        ({"noise_schedule": lambda index, size: 0.5}, "`noise_schedule` is called with"),
    ],
)
def test_arguments_of_packing_are_refused_by_name(settings, message):
    with pytest.raises(UsageError, match=message):
        hf_jacobi.pack_trajectories([ROW], **settings)


def test_arrays_are_packed_into_a_folder_as_lists_are(tmp_path):
    import numpy as np

    arrays = ROW | {name: np.array(ROW[name]) for name in ("prompt_ids", "completion_ids")}
    packed = pack_trajectories([arrays], 2, output_dir=tmp_path / "out")
    assert packed[:] == pack_trajectories([ROW], 2, output_dir=tmp_path / "out")[:]


def test_columns_in_a_dictionary_are_told_from_splits():
    with pytest.raises(UsageError, match="dictionary of columns"):
        open_prompts({"prompt": ["w3"]})
    with pytest.raises(UsageError, match="several splits"):
        open_prompts({"train": ["w3"]})


@pytest.mark.parametrize("error", [MemoryError("no room"), PermissionError(13, "Permission denied", "shard")])
def test_a_file_is_not_called_broken_for_what_is_not_its_fault(tmp_path, monkeypatch, error):
    file = tmp_path / "rows.parquet"
    Dataset.from_list([{"a": 1}]).to_parquet(file)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
    with pytest.raises(type(error)):
        check_file(file)
