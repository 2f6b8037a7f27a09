"""No published file contains a path of this machine, and an adapter's base model is on the Hub."""

import logging
import os
import sys

import pytest
from checkpoints import FakeHub, adapter, change, checkpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_jacobi
from hf_jacobi.hub.places import is_on_hub, without_local_paths


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", fake)
    return fake


@pytest.mark.parametrize(
    "base",
    [
        "/home/me/models/tiny",
        "./tiny",
        "../models/tiny",
        "~/models/tiny",
        "models/a/tiny",
        "models\\tiny",
        "C:/models/tiny",
        "C:\\models\\tiny",
        "file:///models/tiny",
        "",
        None,
        5,
    ],
)
def test_an_adapter_on_a_path_is_refused_before_anything_is_written(tmp_path, hub, base):
    source = adapter(tmp_path / "out", base)
    with pytest.raises(hf_jacobi.UsageError, match="publish that first"):
        hf_jacobi.publish(source, "someone/fast", output_dir=tmp_path / "pushed")
    assert not (tmp_path / "pushed").exists() and hub.pushed is None


@pytest.mark.parametrize("place", [".", "runs", "runs/out", "elsewhere"])
def test_a_base_that_lies_here_or_beside_the_adapter_or_above_it_is_a_path(tmp_path, hub, monkeypatch, place):
    source = adapter(tmp_path / "runs" / "out", "someone/base")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / place / "someone" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(hf_jacobi.UsageError, match="publish that first"):
        hf_jacobi.publish(source, "someone/fast")
    os.rmdir(tmp_path / place / "someone" / "base")
    assert hf_jacobi.publish(source, "someone/fast") == "commit"


def test_a_base_that_the_hub_does_not_know_is_refused_from_wherever_it_is_pushed(tmp_path, hub, monkeypatch):
    source = adapter(tmp_path / "a" / "out", "models/tiny")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(hf_jacobi.UsageError, match="others cannot load models/tiny"):
        hf_jacobi.publish(source, "someone/fast")
    assert hub.pushed is None


def test_a_dry_run_says_what_a_push_would_say_of_the_base(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for base in ("models/a/tiny", "someone/base"):
            hf_jacobi.publish(adapter(tmp_path / "out", base), "a/b", output_dir=tmp_path / base, dry_run=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "would be refused: others cannot load models/a/tiny" in caplog.messages[0]
    assert "would check that someone/base, the adapter's base model, is on the Hub" in caplog.messages[1]


def test_no_file_that_goes_names_a_place_on_this_machine(tmp_path):
    place = str(tmp_path / "models" / "tiny")
    source = adapter(tmp_path / "out", place)
    checkpoint(tmp_path / "model")
    change(tmp_path / "model" / "config.json", _name_or_path=place, log=f"in {place}", text={"_name_or_path": place})
    for folder in (source, tmp_path / "model"):
        names = {"name_or_path": place, "tokenizer_file": f"{place}/tokenizer.json", "other": [place]}
        change(folder / "tokenizer_config.json", **names)
        note = {"base_model": place, "dataset": place, "remark": f"made in {place}.", "settings": {"a": place}}
        change(folder / "jacobi_forcing.json", **note)
        change(folder / "evaluation.json", measured_on=f"{place} here", results=[], command=[place])
        target = tmp_path / f"pushed-{folder.name}"
        hf_jacobi.publish(folder, "someone/fast", output_dir=target, dry_run=True)
        texts = {file.name: file.read_text() for file in target.rglob("*") if file.suffix in (".json", ".md", ".py")}
        assert len(texts) > 10
        assert not [name for name, text in texts.items() if str(tmp_path) in text]
        assert "name_or_path" not in texts.get("config.json", "") + texts.get("adapter_config.json", "")
        assert "made in tiny." in texts["README.md"]


def test_a_model_from_memory_does_not_say_where_it_came_from(tmp_path):
    checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for number, one in enumerate((model, get_peft_model(model, config))):
        target = tmp_path / str(number)
        hf_jacobi.publish(one, "someone/fast", tokenizer, target, dry_run=True)
        texts = [file.read_text() for file in target.rglob("*") if file.suffix in (".json", ".md", ".py", ".jinja")]
        assert not [text for text in texts if str(tmp_path) in text]


def test_names_on_the_hub_stay(tmp_path):
    names = {"_name_or_path": "someone/base", "url": "https://huggingface.co/someone/base", "cost": "tokens/s, and/or"}
    assert without_local_paths(names, tmp_path) == names
    tokens = {"eos_token": "/home/x/y", "added_tokens_decoder": {"5": {"content": "/home/x/y"}}, "a": "/think"}
    assert without_local_paths(tokens) == tokens
    assert without_local_paths({"_name_or_path": "", "name_or_path": "./x", "vocab_file": "/a/vocab.txt"}) == {}
    said = "C:\\Users\\me\\runs, \\\\disk\\me\\data, ~/models, file:///home/me/x and (/home/me/runs/)"
    assert without_local_paths([said]) == ["runs, data, models, x and (runs)"]
    assert is_on_hub("gpt2") and not is_on_hub("a b") and not is_on_hub(None)
