"""A table of n-grams: what it says, where it is found, and that drafts from it leave the text as it is."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from models import last_new_tokens, padded_prompts, trained_model
from transformers import AutoModelForCausalLM

import hf_jacobi
from hf_jacobi import JacobiConfig, UsageError, build_ngram_table
from hf_jacobi.decoding import ngram_table
from hf_jacobi.decoding.ngram_table import TABLE, NgramTable, find_table, key_of, load_table, loaded_from


NEW_TOKENS = 48
CONFIGS = {
    "adaptive": {"position_cost": 0.02},
    "sliding": {"block_size": 8, "pool_size": 0},
    "recycling": {"block_size": 8, "pool_size": 4},
    "block": {"block_size": 8, "window": "block"},
    "candidates": {"block_size": 1, "pool_size": 2, "draft_init": "repeat"},
}


def table_of(entries: dict[tuple[int, ...], tuple[int, int]]) -> NgramTable:
    keyed = sorted((key_of(context), *entry) for context, entry in entries.items())
    return NgramTable(*map(list, zip(*keyed)), order=max(map(len, entries)))


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs))


@pytest.fixture(scope="module")
def model():
    return hf_jacobi.enable(trained_model("llama"))


@pytest.fixture(scope="module")
def table(model, tmp_path_factory):
    """The folder of a table of the model's greedy text for three prompts."""
    inputs = padded_prompts(3)
    texts = generate(model, inputs, eos_token_id=None)[:, inputs["input_ids"].shape[1] :].tolist()
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    rows = [{"prompt_ids": prompt, "completion_ids": text} for prompt, text in zip(prompts, texts)]
    return build_ngram_table(rows, tmp_path_factory.mktemp("table")).parent


def test_the_longest_known_context_decides():
    table = table_of({(1,): (5, 3), (2, 1): (6, 9), (3, 2, 1): (7, 15)})
    assert table.next([1]) == (5, 3)
    assert table.next([9, 1]) == (5, 3)
    assert table.next([9, 2, 1]) == (6, 9)
    assert table.next([4, 3, 2, 1]) == (7, 15)
    assert table.next([1, 2]) is None and table.next([]) is None


def test_keys_tell_contexts_apart():
    contexts = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**30, 7), (7, 2**30)]
    assert len({key_of(context) for context in contexts}) == len(contexts)
    assert all(0 <= key_of(context) < 2**63 for context in contexts)


@pytest.mark.parametrize("label", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_is_that_of_ar_and_more_of_it_is_accepted(model, table, label, rows):
    inputs = padded_prompts(rows)
    kwargs = {"eos_token_id": None if rows == 1 else last_new_tokens(model, inputs)[1]}
    expected = generate(model, inputs, **kwargs)
    rates = []
    for place in (None, str(table)):
        config = CONFIGS[label] | {"ngram_table": place}
        out = generate(model, inputs, decoding="jacobi", jacobi_config=config, return_dict_in_generate=True, **kwargs)
        assert torch.equal(out.sequences, expected)
        rates.append(out.jacobi_stats.tokens_per_forward)
    assert rates[1] > 1.25 * rates[0] and rates[1] > 1.5, rates


def test_sampled_text_does_not_depend_on_the_table(model, table):
    inputs = padded_prompts(2)
    kwargs = {"do_sample": True, "decoding": "jacobi", "return_dict_in_generate": True, "eos_token_id": None}
    plain = generate(model, inputs, jacobi_config={"seed": 3, "position_cost": 0.02}, **kwargs)
    config = {"seed": 3, "position_cost": 0.02, "ngram_table": str(table)}
    drafted = generate(model, inputs, jacobi_config=config, **kwargs)
    assert torch.equal(plain.sequences, drafted.sequences)
    assert drafted.jacobi_stats.tokens_per_forward > 1


def test_a_checkpoint_names_its_own_table(table, tmp_path):
    trained_model("llama").save_pretrained(tmp_path / "model")
    shutil.copy(table / TABLE, tmp_path / "model" / TABLE)
    model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    inputs = padded_prompts(1)
    config = {"position_cost": 0.02, "ngram_table": TABLE}
    kwargs = {"decoding": "jacobi", "return_dict_in_generate": True, "eos_token_id": None}
    found = generate(model, inputs, jacobi_config=config, **kwargs).jacobi_stats.tokens_per_forward
    loaded_from(model, tmp_path)  # as for an adapter, in whose folder there is no table
    missed = generate(model, inputs, jacobi_config=config, **kwargs).jacobi_stats.tokens_per_forward
    assert found > 1.25 * missed
    assert load_table(TABLE, "") is None


def test_a_table_is_found_by_its_file_its_folder_or_its_repository(table, monkeypatch):
    assert find_table(str(table), "") == find_table(str(table / TABLE), "") == table / TABLE
    asked = []

    def hub(*names):
        asked.append(names)
        if len(asked) == 1:
            raise OSError("the network is down")
        return str(table / TABLE)

    monkeypatch.setattr("transformers.utils.cached_file", hub)
    monkeypatch.setattr(ngram_table, "_ASKED", {})
    assert find_table("someone/model", "") is find_table("someone/model", "") is None
    assert len(asked) == 1, "what was not found is not asked for again at once"
    monkeypatch.setattr(ngram_table, "PATIENCE", 0.0)
    assert find_table("someone/model", "") == find_table(TABLE, "someone/model") == table / TABLE
    assert asked == [("someone/model", TABLE)] * 2, "what was found is not asked for again"


def test_a_table_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match=r"`ngram_table` names .* where there is no table: build one with"):
        generate(model, padded_prompts(1), decoding="jacobi", jacobi_config={"ngram_table": str(tmp_path)})
    for name in ("~no such user/x", "x" * 300, "./a", "a/b/c"):
        with pytest.raises(UsageError, match="`ngram_table` names "):
            find_table(name, "")


def test_a_table_for_another_model_is_refused(model, tmp_path):
    build_ngram_table([{"prompt_ids": [1], "completion_ids": [2, 999_999, 2, 999_999]}], tmp_path)
    with pytest.raises(UsageError, match="is not for this model: it has tokens up to 999999"):
        generate(model, padded_prompts(1), decoding="jacobi", jacobi_config={"ngram_table": str(tmp_path)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "is not a table of n-grams"),
        ({"weight": np.zeros(3), "keys": None}, "is not a table of n-grams"),
        ({"order": None}, "is not a table of n-grams"),
        ({"order": np.array("four")}, "is not a table of n-grams"),
        ({"keys": np.array([{}])}, "is not a table of n-grams"),
        ({"format": np.array(2)}, "has format 2, and this hf_jacobi reads format 1"),
        ({"order": np.array(0)}, "is damaged"),
        ({"keys": np.zeros(1, np.int64)}, "is damaged"),
        ({"keys": np.zeros(0, np.int64)}, "is damaged"),
        ({"tokens": np.full((2, 2), 1, np.int32)}, "is damaged"),
        ({"tokens": np.array([-1, 1], np.int32)}, "is damaged"),
        ({"levels": np.array([0, 99], np.uint8)}, "is damaged"),
    ],
)
def test_a_damaged_table_is_refused(table, tmp_path, changes, message):
    file = tmp_path / TABLE
    columns = {
        "keys": np.array([1, 2]),
        "tokens": np.array([1, 2], np.int32),
        "levels": np.array([1, 2], np.uint8),
        "format": np.array(1),
        "order": np.array(4),
    }
    np.savez(file, **columns)
    assert len(NgramTable.read(file)) == 2
    if changes is None:
        file.write_bytes((table / TABLE).read_bytes()[:-50])
    else:
        np.savez(file, **{name: column for name, column in (columns | changes).items() if column is not None})
    os.utime(file, ns=(1, 1))
    with pytest.raises(UsageError, match=message):
        NgramTable.read(file)


def test_the_setting_is_a_name():
    assert JacobiConfig.from_dict(JacobiConfig(ngram_table="a/b").to_dict()).ngram_table == "a/b"
    with pytest.raises(UsageError, match="`ngram_table` must be the name of a file"):
        JacobiConfig(ngram_table=3)
    with pytest.raises(UsageError, match="`ngram_table` must be the name of a file"):
        JacobiConfig(ngram_table=" ")
