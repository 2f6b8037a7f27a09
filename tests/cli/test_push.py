"""`hf-jacobi push`, dry."""

import json

from models import tiny_model, tiny_tokenizer

from hf_jacobi import cli


def test_push_writes_what_would_be_pushed(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    evaluation = {"measured_on": "paper", "results": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    command = ["push", str(tmp_path / "model"), "someone/fast", "--dry-run"]
    assert cli.main(command) == 2
    assert "output_dir" in capsys.readouterr().err
    command += ["--output-dir", str(tmp_path / "pushed")]
    assert cli.main(command) == 2, "no tokenizer"
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--evaluation", str(tmp_path / "evaluation.json")]
    assert cli.main(command) == 0
    assert str(tmp_path / "pushed") in capsys.readouterr().out
    assert (tmp_path / "pushed" / "custom_generate" / "generate.py").exists()
    assert "# someone/fast" in (tmp_path / "pushed" / "README.md").read_text()
