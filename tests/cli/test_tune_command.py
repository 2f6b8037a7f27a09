"""`hf-jacobi tune` on a tiny checkpoint."""

import json

from models import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from hf_jacobi import JacobiConfig, cli
from hf_jacobi.cli.tune import print_report
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
    table, _, place = capsys.readouterr().out.rpartition("written to ")
    assert "block_size=4" in table and str(folder) in place
    assert max(map(len, table.splitlines())) <= 80


def test_every_setting_of_the_grid_fits_the_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    grid = [{**settings, "adaptive": True, "position_cost": 0.0123} for settings in tune.GRID]
    report = {
        "setup": {"device": "AMD EPYC 9V74 80-Core Processor, 128 cores", "threads": 64, "dtype": "bfloat16"},
        "knee": {"tokens": tune.SIZES, "seconds": [1.2345] * len(tune.SIZES), "overhead": 0.0},
        "grid": [
            {"settings": one, "tokens_per_forward": 12.3, "positions_per_forward": 123.4, "predicted": 23456.7}
            for one in grid
        ],
        "checked": {"AR": {"tokens_per_second": 12345.6}, str(grid[-1]): {"tokens_per_second": 23456.7}},
        "decoding": "jacobi",
        "jacobi": grid[-1],
        "speedup": 1.9,
    }
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    assert all(", ".join(f"{name}={value}" for name, value in one.items()) in shown for one in grid)
    assert "12345.6 AR" in shown and "23456.7 23456.7 block_size=32" in shown


def test_without_a_checkpoint_of_ones_own_the_settings_need_a_place(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_JACOBI_CACHE", str(tmp_path))
    monkeypatch.setattr("hf_jacobi.cli.tune.packaged", lambda: None)
    assert cli.main(["tune"]) == 2
    assert "--save-to" in capsys.readouterr().err


def test_there_must_be_a_folder_to_write_into(capsys):
    assert cli.main(["tune", "someone/model"]) == 2
    assert "--save-to" in capsys.readouterr().err
