"""`hf-jacobi tune` on a tiny checkpoint."""

import json

from models import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from hf_jacobi import JacobiConfig, cli
from hf_jacobi.evaluation import tune


def test_the_winner_is_written_into_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune.tune, "__kwdefaults__", tune.tune.__kwdefaults__ | {"grid": ({}, {"block_size": 4})})
    folder = tmp_path / "model"
    model = tiny_model()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    before = (folder / "generation_config.json").read_text()
    command = ["tune", str(folder), "--count", "2", "--max-new-tokens", "8"]
    assert cli.main([*command, "--dry-run", "--plots", str(tmp_path / "plots")]) == 0
    assert (folder / "generation_config.json").read_text() == before
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    assert cli.main([*command, "--output", str(tmp_path / "tune.json")]) == 0
    report = json.loads((tmp_path / "tune.json").read_text())
    config = GenerationConfig.from_pretrained(folder)
    assert config.decoding == report["decoding"] and config.temperature == 0.5
    assert config.jacobi == JacobiConfig(**report["jacobi"]).to_dict()
    out = capsys.readouterr().out
    assert "tokens/s, predicted" in out and str(folder) in out


def test_there_must_be_a_folder_to_write_into(capsys):
    assert cli.main(["tune", "someone/model"]) == 2
    assert "--save-to" in capsys.readouterr().err
