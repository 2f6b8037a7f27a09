"""Mistakes of users are reported in one sentence, before a model is loaded, and no option is ignored."""

import json
import shutil

import pytest
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from hf_jacobi import cli
from hf_jacobi.cli import models


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a model, an adapter for it, and prompts."""
    folder = tmp_path_factory.mktemp("places")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[-1])
    adapter = get_peft_model(tiny_model(), config)
    adapter.peft_config["default"].base_model_name_or_path = "model"
    adapter.save_pretrained(folder / "adapter")
    (folder / "p.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w4 w5"}\n')
    (folder / "UPPER.JSONL").write_text('{"prompt": "w1 w2 w3"}\n')
    return folder


@pytest.fixture
def here(places, monkeypatch):
    """The folder as the working directory; loading a model fails the test."""

    def refused(*arguments, **settings):
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models.Found, "load", refused)
    return places


def said_of(typed, capsys) -> str:
    try:
        status = cli.main(typed)
    except SystemExit as end:
        status = end.code
    assert status == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Errno" not in said
    return " ".join(said.split())


TRAIN = ["train", "--train_dataset", "p.jsonl", "--model_name_or_path", "model", "--use_cpu"]
NOISE = ["pack", "--trajectories", "p.jsonl", "--output-dir", "k", "--noise", "uniform", "--tokenizer"]
GIVEN = ["collect", "--model", "model", "--completions", "p.jsonl", "--output-dir", "t"]
COLLECT = ["collect", "--model", "model", "--dataset", "p.jsonl", "--output-dir"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["bench", "model", "--config", "null"], "give an object"),
        (["bench", "model", "--config", "{}", "--config", "{}"], "--config appears twice with the default settings"),
        (["bench", "model", "--max-new-tokens", "1" + "0" * 20], "at most 2147483647"),
        (["bench", "model", "--max-new-tokens", "1e3"], "must be a whole number, got '1e3'"),
        (["pack", "--trajectories", "p.jsonl", "--output-dir", "k", "--window-size", "1" + "0" * 11], "at most 21474"),
        (["bench", "model", "--prompt-column", "question"], "--prompt-column needs your own prompts"),
        (["tune", "model", "--as-chat", "--dry-run"], "--as-chat needs your own prompts"),
        (["bench", "model", "--dataset-split", "test"], "--dataset-split needs your own prompts"),
        (["bench", "model", "--prompts", "p.jsonl", "--dataset-split", "test"], "a file, which has no split 'test'"),
        (["bench", "model", "--dataset", "p.jsonl", "--dataset-name", "x"], "has no configurations: drop 'x'"),
        (["bench", "model", "--prompts", "model"], "config.json holds one JSON object over several lines"),
        (["bench", "model", "--output", "p.jsonl/x.json"], "p.jsonl is a file"),
        (["bench", "~no-such-user/model"], "an unknown user"),
        (["push", "~no-such-user/model", "a/b"], "an unknown user"),
        (["bench", "model", "--output", "~no-such-user/x.json"], "an unknown user"),
        (["collect", "--model", "model", "--dataset", "", "--output-dir", "t"], "the name of the data is empty"),
        (["pack", "--trajectories", " ", "--output-dir", "k"], "the name of the data is empty"),
        ([*COLLECT, ""], "--output-dir: the name is empty"),
        ([*COLLECT, "p.jsonl"], "p.jsonl is a file: name a folder"),
        ([*COLLECT, "p.jsonl/t"], "p.jsonl is a file"),
        ([*COLLECT, "t", "--prompt-column", "question"], "no column 'question'"),
        (["pack", "--trajectories", "p.jsonl", "--output-dir", ""], "--output-dir: the name is empty"),
        (["pack", "--trajectories", "p.jsonl", "--output-dir", "p.jsonl"], "p.jsonl is a file: name a folder"),
        (["pack", "--trajectories", "p.jsonl", "--output-dir", "k", "--plot", ""], "--plot: the name is empty"),
        ([*NOISE, "/gone"], "there is no folder /gone, and it is not a Hub id"),
        ([*NOISE, "p.jsonl"], "p.jsonl is a file: name the folder that holds the tokenizer"),
        ([*NOISE, "adapter"], "no tokenizer can be loaded from adapter"),
        ([*NOISE, "model", "--window-size", "2"], "--window-size cannot be used with --noise: drop it"),
        ([*GIVEN, "--do-sample"], "--do-sample does not apply to --completions"),
        ([*GIVEN, "--check"], "need a column `completion`"),
        ([*COLLECT, "t", "--check"], "--check is for --completions"),
        ([*TRAIN[:3], "--model_name_or_path", " ", "--use_cpu"], "name the model"),
        ([*TRAIN, "--eval_rows", "-1"], "the number of rows must be at least 0"),
        ([*TRAIN, "--output_dir", "p.jsonl"], "p.jsonl is a file: name a folder"),
        ([*TRAIN, "--config"], "--config names no file"),
        ([*TRAIN, "--config", ""], "--config names no file"),
        ([*TRAIN, "--config", "--bf16"], "--config names no file"),
        ([*TRAIN, "--config", "gone.yaml"], "gone.yaml cannot be read (No such file or directory)"),
        ([*TRAIN, "--config=gone.yaml"], "gone.yaml cannot be read (No such file or directory)"),
        ([*TRAIN, "--config", "model"], "model cannot be read (Is a directory)"),
        ([*TRAIN, "--config", "a.yaml", "--config", "b.yaml"], "--config appears twice"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_in_a_sentence_before_a_model_is_loaded(here, capsys, typed, said):
    assert said in said_of(typed, capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1,\n b: :", "is not valid YAML: while parsing"),
        (b"a: !!python/object:os.system x", "is not valid YAML: could not determine"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"a:\tb: c", "is not valid YAML"),
        (b"1: 2", "must hold options"),
        (b"- a", "must hold options"),
        (b"", "must hold options"),
        (b"no_such_option: 1", "no_such_option"),
    ],
)
def test_an_invalid_settings_file_is_named(here, tmp_path, capsys, content, said):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    told = said_of([*TRAIN, "--config", str(file)], capsys)
    assert said in told and (b"no_such" in content or str(file) in told)


@pytest.mark.parametrize("spelt", [["--config", "FILE"], ["--config=FILE"]], ids=" ".join)
def test_a_settings_file_is_read_in_both_spellings_of_the_option(here, tmp_path, capsys, spelt):
    (tmp_path / "good.yaml").write_text(
        "train_dataset: p.jsonl\nmodel_name_or_path: model\nuse_cpu: true\neval_rows: -7"
    )
    spelt = [one.replace("FILE", str(tmp_path / "good.yaml")) for one in spelt]
    assert "eval_rows=-7" in said_of(["train", *spelt], capsys)


def test_data_that_is_neither_local_nor_on_the_hub_is_reported(here, monkeypatch, capsys):
    def gone(*arguments, **settings):
        raise ValueError("it is not cached in None")

    monkeypatch.setattr("hf_jacobi.trajectories.prompts.load_dataset", gone)
    said = said_of(["bench", "model", "--dataset", "gone/gone"], capsys)
    assert "there is no file or folder gone/gone here, and on the Hub it could not be read: it is not cached" in said


def test_the_suffix_of_a_file_can_be_in_capitals(here, capsys):
    arguments = ["bench", "model", "--prompts", "UPPER.JSONL", "--count", "1"]
    with pytest.raises(AssertionError, match="a model is loaded"):
        cli.main(arguments)


def test_warnings_of_this_package_are_printed_without_their_source_line(places, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": 5}\n')
    arguments = ["--dataset", str(tmp_path / "p.jsonl"), "--output-dir", str(tmp_path / "t"), "--max-new-tokens", "4"]
    assert cli.main(["collect", "--model", str(places / "model"), *arguments, "--block-size", "4"]) == 0
    said = capsys.readouterr().err
    assert "hf-jacobi: 1 of 2 prompts were left out: prompt 1" in said and ".py:" not in said


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "adapter_config.json",
            {"peft_type": "NO_SUCH"},
            "`peft_type` is 'NO_SUCH', which the installed PEFT does not support",
        ),
        ("adapter_config.json", {"peft_type": None}, "`peft_type` is None"),
        ("adapter_config.json", {"peft_type": ["LORA"]}, "`peft_type` is ['LORA']"),
        ("adapter_config.json", {"base_model_name_or_path": 5}, "does not name its base model"),
        ("adapter_config.json", {"base_model_name_or_path": ["model"]}, "does not name its base model"),
        ("adapter_config.json", {"base_model_name_or_path": " "}, "does not name its base model"),
        (
            "generation_config.json",
            {"decoding": "beam"},
            "generation_config.json: `decoding` must be 'jacobi' or 'ar'",
        ),
        ("generation_config.json", {"jacobi": {"no_such": 1}}, "generation_config.json: JacobiConfig: unknown"),
        ("adapter_model.safetensors", None, "holds neither adapter_model.safetensors nor adapter_model.bin"),
    ],
)
def test_an_adapter_with_invalid_settings_or_a_missing_file_is_reported(
    places, tmp_path, monkeypatch, capsys, file, content, said
):
    folder = shutil.copytree(places / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(places)
    if content is None:
        (folder / file).unlink()
    else:
        before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(before | content))
    assert said in said_of(["bench", str(folder), "--count", "1", "--max-new-tokens", "4"], capsys)


def test_an_adapters_folder_with_a_model_config_is_still_an_adapter(places, tmp_path, monkeypatch):
    """Some trainers also write the base model's config there."""
    folder = shutil.copytree(places / "adapter", tmp_path / "adapter")
    shutil.copy(places / "model" / "config.json", folder)
    monkeypatch.chdir(places)
    found = models.find(folder)
    assert (found.name, found.adapter_name) == ("model", "adapter")
    assert found.load().writer is not None
