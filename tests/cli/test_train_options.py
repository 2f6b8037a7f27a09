"""`hf-jacobi train` reads its options without importing the libraries that define them."""

import importlib.util
import sys

import pytest
from trl import ModelConfig, TrlParser

from hf_jacobi import JacobiForcingConfig, cli
from hf_jacobi.cli.train import DataArguments
from hf_jacobi.cli.train_options import SOURCES, options_of, read_options


@pytest.fixture(scope="module")
def parser() -> TrlParser:
    return TrlParser((DataArguments, JacobiForcingConfig, ModelConfig), prog="hf-jacobi train")


@pytest.fixture(scope="module")
def options() -> dict:
    groups = read_options()
    assert list(groups) == [title for title, *_ in SOURCES]
    return {option.name: option for group in groups.values() for option in group}


def test_the_options_are_those_of_trls_parser(parser, options):
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {action.dest for action in actions} == set(options)
    assert {string[2:].replace("-", "_") for action in actions for string in action.option_strings} == {
        name for option in options.values() for name in option.names
    }
    for action in actions:
        if not action.option_strings[0].startswith("--no_"):
            option = options[action.dest]
            assert option.help == (action.help or "")
            assert option.default in (action.default, None, ""), "our default, not that of the base class"


def test_the_help_names_every_option_and_fits_80_columns(options, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in options)
    assert max(map(len, out.splitlines())) <= 80
    assert "steps between two logs (default: 10)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--train_datset", "x", "--model_name_or_path", "m"], "unrecognized arguments: --train_datset"),
        (["--model_name_or_path=m", "--bf16"], "required: --train_dataset"),
        ([], "required: --train_dataset, --model_name_or_path"),
    ],
)
def test_a_mistyped_or_missing_option_is_reported_at_once(typed, said, monkeypatch, capsys):
    monkeypatch.setattr("trl.TrlParser", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *typed])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "typed",
    [
        ["--train-dataset", "x", "--model_name", "m", "--no_average_tokens_across_devices", "--bf16=true"],
        ["--config", "training.yaml"],
    ],
)
def test_valid_options_are_passed_to_trls_parser(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training.yaml").write_text("bf16: true")

    def parse(self, args):
        raise ValueError(f"parsed {args}")

    monkeypatch.setattr("trl.TrlParser.parse_args_and_config", parse)
    assert cli.main(["train", *typed]) == 2
    assert f"parsed {typed}" in capsys.readouterr().err


def test_without_trl_the_help_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else find(name))
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert "--learning_rate FLOAT" in out and "--lora_r" not in out and "pip install '.[train]'" in out
    assert cli.main(["train", "--lora_r", "4"]) == 2
    assert "needs trl, from the extra 'train'" in capsys.readouterr().err


def test_a_field_is_read_from_its_source():
    source = (
        "class Other:\n    kept: int = field(default=1, metadata={'help': 'no'})\n"
        "class Wanted:\n    a: int | None = field(default=None, metadata={'help': 'one ' 'two'})\n"
        "    b: bool = field(default=True, metadata={'help': 'three'})\n    c: int = 3\n"
    )
    first, second = options_of(source, "Wanted")
    assert (first.name, first.type, first.default, first.help) == ("a", "int | None", None, "one two")
    assert second.names == ("b", "no_b")
