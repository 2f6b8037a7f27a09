"""A published folder, loaded as a user of the Hub loads it."""

import json
import os
import re
import subprocess
import sys
from math import nan

import numpy
import pytest
import torch
import yaml
from checkpoints import FakeHub, change, checkpoint
from models import tiny_model, tiny_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import hf_jacobi
from hf_jacobi.decoding.config import write_settings
from hf_jacobi.hub.card import NOTE
from hf_jacobi.hub.carried import rewrite_settings


PROMPT = [[5, 6, 7, 5, 6, 7, 5]]
EVALUATION = {
    "measured_on": "two cores",
    "results": [
        {"dataset": "problems", "decoding": "AR", "metrics": {"tokens_per_forward": 1.0, "solve_rate": 0.9}},
        {"dataset": "problems", "decoding": "jacobi", "metrics": {"tokens_per_forward": 4.25}},
        {"dataset": "other problems", "decoding": "jacobi", "metrics": {"tokens_per_forward": 2.5}},
    ],
}
WITHOUT_US = """
import sys
sys.modules["hf_jacobi"] = None  # as if it were not installed
import torch
from {package} import {loader}
model = {loader}.from_pretrained("{folder}", {trust})
inputs = dict(input_ids=torch.tensor({prompt}), attention_mask=torch.ones(1, {length}, dtype=torch.long))
output = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, {call})
print(output.sequences[0].tolist(), type(output).__name__, output.jacobi_stats.forwards)
cache = getattr(output, "cache" if hasattr(output, "cache") else "past_key_values")
assert cache.get_seq_length() == output.sequences.shape[1] - 1
plain = model.generate(**inputs, max_new_tokens=24, do_sample=False, decoding="ar", {call})
print(plain[0].tolist())
sampled = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=True, {call})
assert sampled.shape[1] > {length}
"""


def publish(model, folder, **settings):
    tokenizer = settings.pop("tokenizer", tiny_tokenizer())
    return hf_jacobi.publish(model, "someone/fast", tokenizer, folder, dry_run=True, **settings)


def run_without_us(tmp_path, folder, adapter: bool):
    """
    The text that a process without `hf_jacobi` decodes, with Jacobi decoding and with AR.

    `$PUBLISHED_PYTHON` selects the interpreter, for another transformers (scripts/test-published).
    """
    script = tmp_path / "use.py"
    call = f'custom_generate="{folder}", trust_remote_code=True' if adapter else ""
    values = {"package": "peft", "loader": "AutoPeftModelForCausalLM", "trust": ""}
    if not adapter:
        values = {"package": "transformers", "loader": "AutoModelForCausalLM", "trust": "trust_remote_code=True"}
    script.write_text(WITHOUT_US.format(**values, folder=folder, call=call, prompt=PROMPT, length=len(PROMPT[0])))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    python = os.environ.get("PUBLISHED_PYTHON", sys.executable)
    if python == sys.executable:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run([python, script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    jacobi, plain = done.stdout.splitlines()[-2:]
    return json.loads(jacobi[: jacobi.index("]") + 1]), json.loads(plain), jacobi


def greedy(model, **settings) -> tuple[list[int], int]:
    """The text that this library decodes, and its number of forwards."""
    inputs = torch.tensor(PROMPT)
    output = hf_jacobi.enable(model).generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=24,
        do_sample=False,
        decoding="jacobi",
        return_dict_in_generate=True,
        **settings,
    )
    return output.sequences[0].tolist(), output.jacobi_stats.forwards


def test_a_published_model_decodes_fast_without_this_library(tmp_path):
    model = tiny_model()
    expected, forwards = greedy(model, jacobi_config={"block_size": 8})
    model.generation_config.decoding = "jacobi"
    model.generation_config.jacobi = {"block_size": 8}
    folder = publish(model, tmp_path / "pushed")
    text, plain, line = run_without_us(tmp_path, folder, adapter=False)
    assert text == plain == expected
    assert "JacobiOutput" in line and int(line.split()[-1]) == forwards < 24


def test_a_published_draft_adapter_leaves_the_text_of_its_base(tmp_path):
    base = tiny_model()
    expected, _ = greedy(base)
    hf_jacobi.disable(base)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[-1])
    folder = publish(get_peft_model(model, config), tmp_path / "pushed", tokenizer=None)
    assert json.loads((tmp_path / "pushed" / NOTE).read_text())["kind"] == "draft-only adapter"
    change(tmp_path / "pushed" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))  # left out
    text, plain, _ = run_without_us(tmp_path, folder, adapter=True)
    assert text == plain == expected
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_card_says_what_was_measured(tmp_path):
    folder = publish(tiny_model(), tmp_path / "pushed", evaluation=EVALUATION)
    card = (tmp_path / "pushed" / "README.md").read_text()
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert {"hf_jacobi", "custom_generate"} <= set(metadata["tags"])
    found = {
        result["dataset"]["name"]: [metric["value"] for metric in result["metrics"]]
        for result in metadata["model-index"][0]["results"]
    }
    assert found == {"problems": [1.0, 0.9, 4.25], "other problems": [2.5]}
    assert "| problems | jacobi | 4.25 |  |" in card and "two cores" in card and "someone/fast" in card
    again = publish(folder, tmp_path / "again", tokenizer=None)
    assert (tmp_path / "again" / "README.md").read_text() == card and again != folder


def test_a_folder_of_the_trainer_is_published_without_its_checkpoints(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "checkpoint-1").mkdir()
    (source / "optimizer.pt").write_bytes(b"large")
    publish(source, tmp_path / "pushed", tokenizer=None)
    names = {path.name for path in (tmp_path / "pushed").iterdir()}
    assert {"model.safetensors", "config.json", "custom_generate", "README.md", "generation_config.json"} <= names
    assert not {"checkpoint-1", "optimizer.pt"} & names
    assert json.loads((tmp_path / "pushed" / "generation_config.json").read_text())["decoding"] == "jacobi"


def test_the_decoder_imports_only_itself_torch_and_transformers(tmp_path):
    publish(tiny_model(), tmp_path / "pushed")
    for file in (tmp_path / "pushed" / "custom_generate").glob("*.py"):
        source = file.read_text()
        for name in re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE):
            assert (file.parent / f"{name}.py").exists()
        assert "from .." not in source and "import hf_jacobi" not in source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": None}, "pass `tokenizer`"),
        ({"evaluation": {"results": []}}, "`measured_on`"),
        ({"evaluation": {"measured_on": "x", "results": [{"dataset": "a"}]}}, "`measured_on`"),
        ({"evaluation": {"measured_on": "x", "results": [{"dataset": None, "decoding": "AR", "metrics": {}}]}}, "`m"),
        ({"evaluation": {"measured_on": "x", "results": [EVALUATION["results"][0] | {"metrics": {"a": nan}}]}}, "`m"),
        ({"evaluation": {"measured_on": "x", "results": [EVALUATION["results"][0] | {"metrics": {5: 1}}]}}, "`m"),
        (
            {"evaluation": {"measured_on": "x", "results": [EVALUATION["results"][0] | {"metrics": {"a": 10**400}}]}},
            "`m",
        ),
    ],
)
def test_bad_input_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        publish(tiny_model(), tmp_path / "pushed", **settings)
    assert not list(tmp_path.iterdir()), "nothing is left half-written"


def test_an_adapter_on_a_folder_is_not_pushed(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="publish that first"):
        hf_jacobi.publish(model, "someone/fast", tiny_tokenizer())


def test_a_dry_run_without_a_folder_only_lists_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    settings = {"dry_run": True, "tell": said.append}
    assert hf_jacobi.publish(tiny_model(), "someone/fast", tiny_tokenizer(), **settings) == ""
    assert any(line.endswith("  model.safetensors") for line in said) and not list(tmp_path.iterdir())


def test_bad_places_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        publish(tiny_model(), tmp_path / "full")
    with pytest.raises(ValueError, match="no weights"):
        publish(tmp_path / "full", tmp_path / "new")
    (tmp_path / "full" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="no config"):
        publish(tmp_path / "full", tmp_path / "new")
    with pytest.raises(ValueError, match="user/name"):
        hf_jacobi.publish(tiny_model(), "fast", tiny_tokenizer(), tmp_path / "new", dry_run=True)
    with pytest.raises(ValueError, match="Repo id"):
        hf_jacobi.publish(tiny_model(), "not a name!", tiny_tokenizer(), tmp_path / "new", dry_run=True)


def test_another_tokenizer_replaces_that_of_the_folder(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    tiny_tokenizer(template=True).save_pretrained(source)
    publish(source, tmp_path / "pushed", tokenizer=tiny_tokenizer(template=False))
    assert AutoTokenizer.from_pretrained(tmp_path / "pushed").chat_template is None


def test_a_model_that_was_not_trained_is_not_called_so(tmp_path):
    publish(tiny_model(), tmp_path / "pushed")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "trained with Jacobi Forcing" not in card and "jacobi-forcing\n" not in card and "relation" not in card


def test_a_generation_config_is_kept_even_where_it_is_odd(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "decoding": "ar"}))
    publish(source, tmp_path / "pushed")
    kept = json.loads((tmp_path / "pushed" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.5 and kept["decoding"] == "ar"


def test_a_push_replaces_what_it_wrote_before_and_nothing_else(monkeypatch):
    ours = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "custom_generate/old.py", "vocab.json"]
    others = [
        "LICENSE",
        "custom_generate/notes.txt",
        "tokenizer_notes.txt",
        "old.safetensors",
        "additional_chat_templates/notes.md",
        "handler.py",
        "v1/model.safetensors",
        "onnx/model.onnx",
        "original/tokenizer.model",
        "README.md",
    ]
    hub = FakeHub([NOTE, *ours, *others, "model.safetensors", "custom_generate/generate.py"])
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", hub)
    assert hf_jacobi.publish(tiny_model(), "someone/fast", tiny_tokenizer()) == "commit"
    assert hub.deleted == set(ours)


def test_what_no_push_of_ours_wrote_stays_unless_it_would_be_loaded_before_the_new(monkeypatch):
    stays = ["config.json", "custom_generate/own.py", "evaluation.json", "preprocessor_config.json", "notes[1].jinja"]
    model = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    tokenizer = ["vocab.json", "additional_chat_templates/a[1].jinja"]
    hub = FakeHub([*stays, *model, *adapter, *tokenizer])
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", hub)
    hf_jacobi.publish(tiny_model(), "someone/fast", tiny_tokenizer())
    tokenizer = ["vocab.json", "additional_chat_templates/a[[]1].jinja"]  # as patterns
    assert hub.deleted == {*model, *adapter, *tokenizer}
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "someone/base"
    hf_jacobi.publish(adapted, "someone/fast", tiny_tokenizer())
    assert hub.deleted == {"adapter_model.bin", *tokenizer}, "a complete model beside an adapter is not loaded"


@pytest.mark.parametrize("base", [None, "runs/base/final", "C:\\models\\base"])
def test_an_adapter_on_what_is_not_on_the_hub_is_not_pushed(monkeypatch, tmp_path, base):
    monkeypatch.setattr(sys.modules["hf_jacobi.hub.publish"], "HfApi", FakeHub())
    adapter = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.peft_config["default"].base_model_name_or_path = base
    with pytest.raises(ValueError, match="publish that first"):
        hf_jacobi.publish(adapter, "someone/fast", tiny_tokenizer())
    adapter.peft_config["default"].base_model_name_or_path = "someone/base"
    assert hf_jacobi.publish(adapter, "someone/fast", tiny_tokenizer()) == "commit"
    publish(adapter, tmp_path / "pushed")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "An adapter for [someone/base]" in card and "as it is" not in card


def test_a_model_without_a_note_is_not_said_to_be_its_base(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "someone/base"
    publish(model, tmp_path / "pushed")
    assert "model derived from [someone/base]" in (tmp_path / "pushed" / "README.md").read_text()


def test_only_code_that_the_model_needs_goes_with_it(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_own.py").write_text("from .layers_own import Layer\n")
    (source / "layers_own.py").write_text("Layer = None\n")
    (source / "train.py").write_text("KEY = 'secret'\n")
    (source / "LICENSE").write_text("free\n")
    publish(source, tmp_path / "pushed", tokenizer=None)
    names = {path.name for path in (tmp_path / "pushed").iterdir()}
    assert {"modeling_own.py", "layers_own.py", "LICENSE"} <= names and "train.py" not in names


def test_what_a_folder_holds_counts_for_more_than_an_old_note(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    (source / NOTE).write_text(json.dumps({"kind": "adapter", "settings": {"learning_rate": 1e-4}}))
    publish(source, tmp_path / "pushed")
    assert "AutoPeftModelForCausalLM" not in (tmp_path / "pushed" / "README.md").read_text()


def test_an_adapter_decodes_with_its_own_settings_not_with_those_of_its_base(tmp_path):
    base = tiny_model()
    base.generation_config.decoding = "ar"
    base.generation_config.jacobi = {"block_size": 2, "pool_size": 0}
    base.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[-1]),
    )
    adapter.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps({"jacobi": {"block_size": 8}}))
    folder = publish(tmp_path / "out", tmp_path / "pushed")
    change(tmp_path / "pushed" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    text, plain, line = run_without_us(tmp_path, folder, adapter=True)
    assert text == plain and "JacobiOutput" in line


def test_a_card_says_that_jacobi_decoding_has_to_be_requested(tmp_path):
    model = tiny_model()
    model.generation_config.decoding = "ar"
    publish(model, tmp_path / "pushed")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "request Jacobi decoding explicitly" in card and card.count('decoding="jacobi"') == 2


def test_settings_may_be_a_config_and_an_installed_decoder_takes_the_place_of_the_one_that_came_along(tmp_path):
    model = tiny_model()
    expected, _ = greedy(model)
    model.generation_config.decoding, model.generation_config.jacobi = "jacobi", hf_jacobi.JacobiConfig(block_size=8)
    folder = publish(model, tmp_path / "pushed")
    settings = json.loads((tmp_path / "pushed" / "generation_config.json").read_text())
    assert settings["jacobi"]["block_size"] == 8
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    call = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    call |= {"attention_mask": torch.ones(1, len(PROMPT[0])), "jacobi_config": hf_jacobi.JacobiConfig(block_size=4)}
    carried = model.generate(torch.tensor(PROMPT), **call)
    enabled = hf_jacobi.enable(model).generate(torch.tensor(PROMPT), **call)
    assert carried.sequences[0].tolist() == enabled.sequences[0].tolist() == expected
    assert isinstance(enabled, hf_jacobi.JacobiOutput) and not isinstance(carried, hf_jacobi.JacobiOutput)
    again = hf_jacobi.disable(model).generate(torch.tensor(PROMPT), **call)
    assert type(again) is type(carried)


def test_models_that_cannot_take_tokens_back_are_refused(tmp_path):
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="rolled back, which mamba"):
        publish(MambaForCausalLM(config), tmp_path / "pushed")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        publish(get_peft_model(tiny_model(), prompts), tmp_path / "pushed")


def test_numbers_of_an_evaluation_may_be_numpys(tmp_path):
    metrics = {"speed": numpy.float32(20001.23), "rate": numpy.float64(0.00001234), "count": numpy.int64(3)}
    row = {"dataset": "a\nb | c", "decoding": "AR", "metrics": metrics}
    publish(tiny_model(), tmp_path / "pushed", evaluation={"measured_on": "x", "results": [row]})
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "| a b / c | AR | 20,001 | 1.234e-05 | 3 |" in card
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    values = [metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]]
    assert values == [20001.2, 1.234e-05, 3]


def test_named_chat_templates_and_odd_prompts_arrive(tmp_path):
    source = tmp_path / "out"
    tiny_model().save_pretrained(source)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "d{{1}}", "tool_use": "t{{1}}"}
    tokenizer.save_pretrained(source)
    (source / NOTE).write_text(json.dumps({"example": 'hi \U0001f600 "you"'}))
    publish(source, tmp_path / "pushed", tokenizer=None)
    assert AutoTokenizer.from_pretrained(tmp_path / "pushed").chat_template == tokenizer.chat_template
    assert 'tokenizer("hi \U0001f600 \\"you\\""' in (tmp_path / "pushed" / "README.md").read_text(encoding="utf-8")


def test_an_adapter_of_another_name_is_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="draft")
    with pytest.raises(ValueError, match="'default'"):
        publish(model, tmp_path / "pushed")


@pytest.mark.parametrize("lying_there", [True, False])
def test_figures_of_other_settings_are_refused(tmp_path, lying_there):
    source = checkpoint(tmp_path / "out")
    change(source / "generation_config.json", decoding="jacobi", jacobi={"block_size": 8})
    measured = {"decoding": "jacobi", "jacobi": {"block_size": 8}}  # the other settings are the defaults
    evaluation = EVALUATION | {"settings": measured}

    def dry_run(target):
        if lying_there:
            change(source / "evaluation.json", **evaluation)
        else:
            change(tmp_path / "measured.json", **evaluation)
        file = None if lying_there else tmp_path / "measured.json"
        return publish(source, tmp_path / target, tokenizer=None, evaluation=file)

    dry_run("pushed")
    kept = json.loads((tmp_path / "pushed" / "evaluation.json").read_text())
    assert kept["settings"]["jacobi"]["block_size"] == 8
    for tuned in ({"jacobi": {"block_size": 4}}, {"decoding": "ar"}):
        change(source / "generation_config.json", decoding="jacobi", jacobi={"block_size": 8})
        change(source / "generation_config.json", **tuned)
        with pytest.raises(
            hf_jacobi.UsageError, match=r"other settings.*hf-jacobi bench MODEL --evaluation.*or delete"
        ):
            dry_run("again")
    assert not (tmp_path / "again").exists()


def test_an_evaluation_that_does_not_name_its_settings_is_taken_with_a_word_of_doubt(tmp_path, caplog):
    publish(tiny_model(), tmp_path / "pushed", evaluation=EVALUATION)
    assert "does not say with which settings" in caplog.text
    caplog.clear()
    settings = {"decoding": "jacobi", "jacobi": {}}
    publish(tiny_model(), tmp_path / "again", evaluation=EVALUATION | {"settings": settings})
    assert "settings" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        {},
        {"decoding": "beams"},
        {"decoding": "jacobi", "jacobi": {"size": 1}},
        {"decoding": "ar", "speed": 1},
    ],
)
def test_settings_of_an_evaluation_that_are_none_are_refused(tmp_path, settings):
    with pytest.raises(hf_jacobi.UsageError, match=r"settings"):
        publish(tiny_model(), tmp_path / "pushed", evaluation=EVALUATION | {"settings": settings})


def test_a_report_of_bench_is_told_from_an_evaluation(tmp_path):
    change(tmp_path / "bench.json", setup={}, results=[])
    with pytest.raises(hf_jacobi.UsageError, match=r"bench\.json: .*bench --output.*bench MODEL --evaluation FILE"):
        publish(tiny_model(), tmp_path / "pushed", evaluation=tmp_path / "bench.json")


def test_a_published_adapter_that_is_tuned_afterwards_decodes_with_the_new_settings(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[-1])
    folder = tmp_path / "pushed"
    publish(get_peft_model(model, lora), folder)
    inputs = torch.tensor(PROMPT)
    call = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    call |= {"return_dict_in_generate": True, "custom_generate": str(folder), "trust_remote_code": True}
    positions = []
    for block_size in (16, 2):
        settings = write_settings(folder, "jacobi", {"block_size": block_size, "pool_size": 0})
        assert rewrite_settings(folder, settings)
        positions.append(model.generate(inputs, **call).jacobi_stats.positions)
    assert positions[1] < positions[0] / 4
    assert not rewrite_settings(tmp_path / "base", settings), "it contains no decoder"


def test_settings_of_the_carried_decoder_are_not_written_through_a_link(tmp_path):
    folder = tmp_path / "pushed"
    publish(tiny_model(), folder)
    file, blob = folder / "custom_generate" / "settings.py", tmp_path / "blob"
    before = file.read_text()
    file.rename(blob)
    file.symlink_to(blob)
    rewrite_settings(folder, write_settings(folder, "jacobi", {"block_size": 3}))
    assert blob.read_text() == before and not file.is_symlink() and "'block_size': 3" in file.read_text()
    file.write_text("SOMEONE = 'else'\n")
    assert not rewrite_settings(folder, write_settings(folder)) and file.read_text() == "SOMEONE = 'else'\n"


@pytest.mark.parametrize("given", [{"model": None}, {"model": 5}, {"tokenizer": 5}, {"tokenizer": ["a"]}], ids=str)
def test_what_is_no_model_or_tokenizer_is_refused_at_once(tmp_path, given):
    given = {"model": tiny_model(), "tokenizer": tiny_tokenizer()} | given
    with pytest.raises(ValueError, match="must be a name or an object with `save_pretrained`"):
        hf_jacobi.publish(given["model"], "someone/fast", given["tokenizer"], tmp_path / "pushed", dry_run=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["", None, ["llama"], 5])
def test_a_config_that_names_no_kind_of_model_is_refused(tmp_path, kind):
    source = checkpoint(tmp_path / "model")
    change(source / "config.json", model_type=kind)
    with pytest.raises(ValueError, match=r"config.json names no `model_type`"):
        publish(source, tmp_path / "pushed", tokenizer=None)


def test_the_list_of_what_stays_can_be_read_whatever_files_are_called(tmp_path):
    source = checkpoint(tmp_path / "model")
    for name in ("a\n  9 B  model.bin", "\x1b[31mred", " tokenizer.json", "-rf", "é"):
        (source / name).touch()
    said = []
    publish(source, source / "out", tokenizer=None, tell=said.append)
    assert said[-1] == (rf"what stays in {source}: '\x1b[31mred', ' tokenizer.json', -rf, 'a\n  9 B  model.bin', é"), (
        "one line, nothing for the terminal, and no folder of the push's own"
    )


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 12,
        "ghp_" + "a1B2" * 9,
        "github_pat_" + "a1_" * 20,
        "AKIA" + "ABCD" * 4,
        "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "mine.py", "chat_template.jinja", "LICENSE", "evaluation.json"])
def test_a_secret_is_not_published_whatever_file_holds_it(tmp_path, secret, name):
    source = checkpoint(tmp_path / "model")
    (source / "mine.py").write_text("class K: ...\n")
    change(source / "config.json", auto_map={"AutoConfig": "mine.K"})
    evaluation = {"measured_on": "x", "results": []}
    publish(source, tmp_path / "before", tokenizer=None, evaluation=evaluation)
    if name == "evaluation.json":
        evaluation["host"] = secret
    elif name == "config.json":
        change(source / name, hub_token=secret)
    else:
        (source / name).write_text(f"# one\n# {secret}\n")
    with pytest.raises(ValueError, match=f"{name} contains what looks like an access token"):
        publish(source, tmp_path / "pushed", tokenizer=None, evaluation=evaluation)
    assert not (tmp_path / "pushed").exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [("/no/such", "there is no folder /no/such"), ("./no", "there is no folder ./no"), ("FILE", "is a file: name")],
)
def test_a_tokenizer_that_is_nowhere_is_told_as_such(tmp_path, place, said):
    (tmp_path / "tokenizer.json").write_text("{}")
    place = place.replace("FILE", str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=said):
        publish(tiny_model(), tmp_path / "pushed", tokenizer=place)
