"""`hf-jacobi tune` with a tiny checkpoint."""

import json
import os
import runpy

import pytest
from models import tiny_model, tiny_tokenizer, trained_model
from transformers import GenerationConfig

from hf_jacobi import JacobiConfig, cli
from hf_jacobi.cli.tune import print_report, write_into
from hf_jacobi.evaluation import tune
from hf_jacobi.hub.carried import ABOUT


def test_the_fastest_settings_are_written_into_the_checkpoint(tmp_path, monkeypatch, capsys):
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


def test_every_setting_of_the_grid_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    grid = [{**settings, "adaptive": True, "position_cost": 0.0123} for settings in tune.GRID]
    report = {
        "setup": {"device": "AMD EPYC 9V74 80-Core Processor, 128 cores", "threads": 64, "dtype": "bfloat16"},
        "costs": {
            "tokens": tune.SIZES,
            "seconds": {"1": [1.2345] * len(tune.SIZES), "16": [1.2345] * 5},
            "overhead": 0.0,
        },
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


def test_without_a_checkpoint_a_folder_for_the_settings_is_required(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_JACOBI_CACHE", str(tmp_path))
    monkeypatch.setattr("hf_jacobi.cli.tune.packaged", lambda: None)
    assert cli.main(["tune"]) == 2
    assert "--save-to" in capsys.readouterr().err


def test_a_model_on_the_hub_needs_a_folder_for_the_settings(capsys):
    assert cli.main(["tune", "someone/model"]) == 2
    assert "--save-to" in capsys.readouterr().err


COMMAND = ["--count", "2", "--max-new-tokens", "8"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A model whose drafts are accepted, tuned over two settings."""
    monkeypatch.setattr(tune.tune, "__kwdefaults__", tune.tune.__kwdefaults__ | {"grid": ({}, {"block_size": 4})})
    trained_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_settings_replace_a_link_and_leave_its_target(checkpoint, tmp_path, link):
    file, blob = checkpoint / "generation_config.json", tmp_path / "blob"
    file.rename(blob)
    before = blob.read_bytes()
    link(blob, file)
    assert cli.main(["tune", str(checkpoint), *COMMAND]) == 0
    assert blob.read_bytes() == before
    assert not file.is_symlink() and json.loads(file.read_text())["jacobi"]
    assert not [one for one in checkpoint.iterdir() if one.name.startswith(".")]


def test_a_failed_write_leaves_the_old_settings(checkpoint, tmp_path, monkeypatch, capsys):
    file = checkpoint / "generation_config.json"
    before = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_jacobi.decoding.files.os.replace", full)
    assert cli.main(["tune", str(checkpoint), *COMMAND]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert not [one for one in checkpoint.iterdir() if one.name.startswith(".")], "no temporary file is left"


@pytest.mark.parametrize("fails", ["write_json", "write_into"])
def test_a_failure_to_write_the_report_or_the_settings_does_not_lose_the_other(
    checkpoint, tmp_path, monkeypatch, capsys, fails
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    before = (checkpoint / "generation_config.json").read_bytes()
    monkeypatch.setattr(f"hf_jacobi.cli.tune.{fails}", full)
    output = tmp_path / "tune.json"
    assert cli.main(["tune", str(checkpoint), *COMMAND, "--output", str(output)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert output.exists() == (fails == "write_into")
    assert ((checkpoint / "generation_config.json").read_bytes() == before) == (fails == "write_into")


def test_unwritable_files_are_reported_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "generation_config.json").write_text("{")
    (tmp_path / "blocked" / "generation_config.json").mkdir(parents=True)
    model = str(checkpoint)
    for command, said in (
        ([model, "--output", str(tmp_path)], "is a folder"),
        ([model, "--output", f"{model}/config.json/x.json"], "cannot be written"),
        ([model, "--save-to", str(tmp_path / "none")], "is no folder"),
        ([model, "--save-to", str(tmp_path / "broken")], "generation_config.json is not a JSON file"),
        ([model, "--save-to", str(tmp_path / "blocked")], "is a folder"),
        ([model, "--prompts", "none.jsonl"], "there is no file or folder none.jsonl"),
        (["someone/model"], "--save-to"),
    ):
        assert cli.main(["tune", *command]) == 2
        assert said in capsys.readouterr().err

    def read_only(*arguments, **settings):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("hf_jacobi.cli.options.tempfile.TemporaryFile", read_only)
    assert cli.main(["tune", model]) == 2
    assert "generation_config.json cannot be written (Read-only file system)" in capsys.readouterr().err


def test_the_settings_are_also_written_into_a_carried_decoder(checkpoint, capsys):
    carried = checkpoint / "custom_generate"
    carried.mkdir()
    (carried / "settings.py").write_text(f"{ABOUT}\nADAPTER = True\nDECODING = 'ar'\nJACOBI = {{'block_size': 36}}\n")
    (checkpoint / "adapter_config.json").write_text("{}")
    (checkpoint / "evaluation.json").write_text("{}")
    print(write_into(checkpoint, "jacobi", {"block_size": 4}))
    written = json.loads((checkpoint / "generation_config.json").read_text())
    settings = runpy.run_path(str(carried / "settings.py"))
    assert settings["ADAPTER"] is True
    assert (settings["DECODING"], settings["JACOBI"]) == (written["decoding"], written["jacobi"])
    said = capsys.readouterr().out
    assert "settings.py" in said and "evaluation.json" in said
