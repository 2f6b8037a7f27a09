"""MODEL and `--adapter` are resolved, and errors name checkpoints that cannot be read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from models import tiny_tokenizer, trained_model
from peft import LoraConfig, get_peft_model

from hf_jacobi import cli
from hf_jacobi.cli.models import find, load
from hf_jacobi.decoding.errors import MissingFile, UsageError
from hf_jacobi.evaluation import bench as bench_module
from hf_jacobi.evaluation import tune as tune_module
from hf_jacobi.trajectories.prompts import open_prompts


SETTINGS = {"decoding": "jacobi", "jacobi": {"block_size": 6, "pool_size": 0}}
SHORT = ["--count", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base model, and two adapters for it: a draft-only one, and one for all tokens."""
    folder = tmp_path_factory.mktemp("places")
    trained_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name, scope in (("draft", {"alora_invocation_tokens": [-1]}), ("full", {})):
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **scope)
        model = get_peft_model(trained_model(), config)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        torch.manual_seed(0)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.02)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def spoilt(places, tmp_path) -> Path:
    """A copy of the base model."""
    return Path(shutil.copytree(places / "base", tmp_path / "model"))


def has_layers(model) -> bool:
    return any(hasattr(module, "get_base_layer") for module in model.modules())


@pytest.mark.parametrize("name", ["draft", "full"])
def test_an_adapters_folder_means_the_adapter_on_its_base_model(places, tmp_path, monkeypatch, name):
    """In every spelling, `bench` compares the same models, with AR in its fastest form."""
    (tmp_path / "link").symlink_to(places / name)
    monkeypatch.setenv("HOME", str(places))
    monkeypatch.chdir(places)
    races, race = [], bench_module.race

    def watched(contestants, *arguments):
        races.append(contestants)
        return race(contestants, *arguments)

    monkeypatch.setattr(bench_module, "race", watched)
    typed = [["base", "--adapter", name], ["base", f"--adapter=~/{name}"], [name], [f"{name}/"], [f"~/{name}"]]
    typed += [[str(tmp_path / "link")], [str(places / name)]]
    reports = []
    for arguments in typed:
        assert cli.main(["bench", *arguments, *SHORT, "--output", str(tmp_path / "bench.json")]) == 0
        reports.append(json.loads((tmp_path / "bench.json").read_text()))
    for report, contestants in zip(reports, races):
        assert (report["setup"]["model"], report["setup"]["adapter"]) == ("base", name)
        figures = [(row["decoding"], row["tokens_per_forward"], row["identical"]) for row in report["results"]]
        assert figures == [(row["decoding"], row["tokens_per_forward"], 1) for row in reports[0]["results"]]
        assert not has_layers(contestants["AR"][0]) and not has_layers(contestants["prompt lookup"][0])
        assert has_layers(contestants["Jacobi, the adapter's"][0]) == (name == "draft")
    assert figures[2][0] == "Jacobi, the adapter's" and figures[2][1] > 1


def test_demo_and_tune_accept_an_adapters_folder(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(places)
    demo = ["demo", "--prompt", "w5 w6", "--max-new-tokens", "16", "--json"]
    reports = []
    for arguments in (["--model", "draft"], ["--model", "base", "--adapter", "draft"]):
        assert cli.main([*demo, *arguments]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for report in reports:
        assert (report["model"], report["adapter"], report["trained"]) == ("base", "draft", True)
        assert report["jacobi_config"]["block_size"] == 6 and report["jacobi"]["tokens_per_forward"] > 1
        assert report["jacobi"]["forwards"] == reports[0]["jacobi"]["forwards"]
    seen, race = [], tune_module.race
    monkeypatch.setattr(tune_module, "race", lambda them, *others: seen.append(them) or race(them, *others))
    grid = tune_module.tune.__kwdefaults__ | {"grid": ({"block_size": 4},)}
    monkeypatch.setattr(tune_module.tune, "__kwdefaults__", grid)
    base = (places / "base" / "generation_config.json").read_text()
    for arguments in (["draft"], ["base", "--adapter", "draft"]):
        written = places / "draft" / "generation_config.json"
        written.write_text(json.dumps(SETTINGS))
        assert cli.main(["tune", *arguments, *SHORT]) == 0
        assert written.read_text() != json.dumps(SETTINGS), "the adapter's folder gets the settings"
        assert not has_layers(seen[-1]["AR"][0])
        written.write_text(json.dumps(SETTINGS))
    assert (places / "base" / "generation_config.json").read_text() == base


def test_trajectories_of_a_model_with_an_adapter(places, tmp_path, monkeypatch):
    monkeypatch.chdir(places)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6 w7"}\n')
    texts = {}
    command = ["collect", "--dataset", str(tmp_path / "prompts.jsonl"), "--block-size", "4", "--max-new-tokens", "24"]
    for typed in ("base", "base --adapter full", "full", "base --adapter draft"):
        folder = str(tmp_path / typed.replace(" ", ""))
        assert cli.main([*command, "--output-dir", folder, "--model", *typed.split()]) == 0
        (row,) = open_prompts(folder)
        texts[typed] = row["completion_ids"]
    assert texts["base --adapter full"] == texts["full"] != texts["base"]
    assert texts["base --adapter draft"] == texts["base"]


def test_an_adapter_on_the_hub_means_the_adapter_on_its_base_model(places, monkeypatch):
    def hf_hub_download(name, file):
        if name != "someone/adapter":
            raise EntryNotFoundError("there is none")
        return str(places / "draft" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(places / "draft"))
    found = find("someone/adapter")
    assert (found.base, found.adapter) == (str(places / "base"), places / "draft")
    assert (found.name, found.adapter_name) == ("base", "someone/adapter")
    assert found.folder is None, "settings are not written into the cache"
    assert find(places / "base", "someone/adapter").adapter == found.adapter
    assert find("someone/model").adapter is None


def test_a_cached_model_needs_no_access_to_the_hub(monkeypatch):
    def hf_hub_download(name, file):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: "config.json")
    assert find("someone/model").name == "someone/model"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(MissingFile, match="sub/folder: there is no such folder here, and on the Hub: no connection"):
        find("sub/folder")


def test_an_adapter_and_its_base_model_can_share_a_folder(places, tmp_path):
    """transformers loads both of them."""
    folder = Path(shutil.copytree(places / "base", tmp_path / "both"))
    for file in (places / "full").glob("adapter_*"):
        shutil.copy(file, folder)
    found = find(folder)
    assert found.base == str(folder) == str(found.adapter)
    assert not has_layers(found.load().writer)


def test_collecting_uses_a_model_with_an_adapter_in_its_fastest_form(places):
    model, tokenizer = load(str(places / "full"))
    assert not has_layers(model) and tokenizer.vocab_size == tiny_tokenizer().vocab_size


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["draft", "--adapter", "draft"], "is itself an adapter"),
        (["base", "--adapter", "base"], "holds no adapter"),
        (["base", "--adapter", ""], "is empty"),
        ([""], "is empty"),
        (["   "], "is empty"),
        (["./none"], "there is no folder ./none"),
        (["none/"], "there is no folder none/"),
        (["a/b/c"], "there is no folder a/b/c"),
        (["base/config.json"], "is a file"),
        (["nameless"], "does not name its base model"),
        (["orphan"], "is an adapter for /no/such/base"),
        (["chained"], "which is an adapter too"),
        (["empty"], "holds no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_names_are_reported_at_once(places, monkeypatch, capsys, typed, said):
    monkeypatch.chdir(places)
    for name, base in (("nameless", None), ("orphan", "/no/such/base"), ("chained", "draft")):
        (places / name).mkdir(exist_ok=True)
        (places / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (places / "empty").mkdir(exist_ok=True)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    for command in (["bench", *typed], ["tune", *typed, "--dry-run"], ["demo", "--model", *typed]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"hf-jacobi {command[0]}: ") and said in error


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def pickle_more_than_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": pytest.fail}, folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"lm_head.weight": "model-00001-of-00002.safetensors", "model.norm.weight": "model-2.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
FAULTS = {
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "copied in part"),
    "a git-lfs pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "a pointer to the tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "git lfs pull"),
    "a pickle": (pickle_more_than_weights, "UnpicklingError"),
    "a lost shard": (lose_a_shard, "model-2.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("*token*")], "holds no tokenizer"),
    "a broken tokenizer": (lambda folder: truncate(folder / "tokenizer.json"), "model: "),
    "a broken config": (lambda folder: truncate(folder / "config.json"), "config.json"),
    "a template that is refused": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        "SecurityError",
    ),
    "a template that is broken": (lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"), "template"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_reported_in_a_sentence(spoilt, capsys, fault):
    spoil, said = FAULTS[fault]
    spoil(spoilt)
    for command in (["bench", str(spoilt), "--count", "1"], ["demo", "--model", str(spoilt), "--prompt", "w5"]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"hf-jacobi {command[0]}: ") and said in error


def test_a_bug_keeps_its_traceback(spoilt, monkeypatch):
    def broken(*arguments, **settings):
        raise TypeError("a fault of ours")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
    with pytest.raises(TypeError, match="a fault of ours"):
        cli.main(["bench", str(spoilt), "--count", "1"])


def test_invalid_json_files_are_named(places, tmp_path):
    folder = Path(shutil.copytree(places / "draft", tmp_path / "draft"))
    for file in ("adapter_config.json", "generation_config.json"):
        content = (folder / file).read_text()
        for wrong in ("{", "[]"):
            (folder / file).write_text(wrong)
            with pytest.raises(UsageError, match=file):
                find(folder).load()
        (folder / file).write_text(content)
