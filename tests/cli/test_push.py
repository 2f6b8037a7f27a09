"""Dry runs of `hf-jacobi push`."""

import json

import pytest
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from hf_jacobi import cli


def test_a_dry_run_writes_and_lists_the_files_of_a_push(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"large")
    evaluation = {"measured_on": "paper", "results": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    command = ["push", str(tmp_path / "model"), "someone/fast", "--dry-run"]
    assert cli.main(command) == 2
    assert "there is no tokenizer" in capsys.readouterr().err
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--evaluation", str(tmp_path / "evaluation.json")]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(command) == 0
    listed, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert last == "nothing was pushed; --output-dir keeps these files in a folder"
    assert sorted(tmp_path.rglob("*")) == before
    command += ["--output-dir", str(tmp_path / "pushed")]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith(listed)
    files = {file.relative_to(tmp_path / "pushed").as_posix() for file in (tmp_path / "pushed").rglob("*.*")}
    assert files == {line[9:].strip() for line in said.splitlines() if line[9:11] == "  "}
    assert "what stays in" in said and "optimizer.pt" in said and "does not say with which settings" in said
    assert said.splitlines()[-1] == f"nothing was pushed; written to {tmp_path / 'pushed'}"
    assert (tmp_path / "pushed" / "custom_generate" / "generate.py").exists()
    assert "# someone/fast" in (tmp_path / "pushed" / "README.md").read_text()


def test_a_dry_run_says_that_a_push_of_an_adapter_for_a_local_folder_would_be_refused(tmp_path, capsys):
    model = tiny_model()
    model.config._name_or_path = str(tmp_path / "base")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "out")
    tiny_tokenizer().save_pretrained(tmp_path / "out")
    command = ["push", str(tmp_path / "out"), "someone/fast"]
    assert cli.main([*command, "--dry-run", "--output-dir", str(tmp_path / "pushed")]) == 0
    assert "A push would be refused: others cannot load" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "pushed" / "adapter_config.json").read_text()
    assert cli.main(command) == 2
    assert "publish that first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["", "someone/fast"], "is empty"),
        (["MODEL", ""], "Repo id"),
        (["MODEL", "someone/fast", "--tokenizer", ""], "is empty"),
        (["MODEL", "someone/fast", "--evaluation", " "], "is empty"),
        (["MODEL", "someone/fast", "--output-dir", ""], "is empty"),
        (["MODEL", "fast"], "user/name"),
        (["nowhere", "someone/fast"], "there is no folder nowhere"),
        (["MODEL", "someone/fast", "--evaluation", "nowhere.json"], "there is no file nowhere.json"),
        (["MODEL", "someone/fast", "--evaluation", "MODEL/broken.json"], "broken.json is not a JSON file"),
        (["MODEL", "someone/fast", "--tokenizer", "MODEL/broken"], "no tokenizer can be loaded from"),
    ],
)
def test_mistakes_are_reported_in_a_sentence_before_the_network_is_used(tmp_path, capsys, typed, said):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (model / "broken").mkdir()
    (model / "broken.json").write_text("{")
    (model / "broken" / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert cli.main(["push", *(one.replace("MODEL", str(model)) for one in typed)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("hf-jacobi push: ")
