"""A draft-only adapter as a plain LoRA: what is written, and that it drafts as before once loaded."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from checkpoints import change, files_of
from models import padded_prompts, tiny_model, tiny_tokenizer, tokens_per_forward, trained_model
from safetensors.torch import load_file, save_file

import hf_jacobi
from hf_jacobi.decoding.draft_adapter import is_draft_only
from hf_jacobi.hub.card import NOTE


SETTINGS = {"max_new_tokens": 40, "do_sample": False, "decoding": "jacobi", "return_dict_in_generate": True}
DRAFT_ONLY = {"alora_invocation_tokens": [-1]}


def adapted(base=trained_model, **settings):
    """A model with a draft-only adapter whose drafts are often accepted and differ from the base's."""
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | DRAFT_ONLY | settings
    )
    model = peft.get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    settings = model.base_model.model.generation_config
    settings.decoding, settings.jacobi = "jacobi", {"block_size": 6, "pool_size": 0, "seed": 0}
    return hf_jacobi.enable(model)


def plain(model, folder, **settings):
    return hf_jacobi.publish(model, "someone/fast", tiny_tokenizer(), folder, dry_run=True, format="lora", **settings)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 9}])
def test_it_comes_back_with_the_same_text_and_the_same_drafts(tmp_path, settings):
    model, prompts = adapted(**settings), padded_prompts(3)
    expected = model.generate(**prompts, **SETTINGS)
    loaded = hf_jacobi.load_draft_adapter(trained_model(), plain(model, tmp_path / "pushed"))
    out = loaded.generate(**prompts, **SETTINGS)
    assert torch.equal(out.sequences, expected.sequences)
    assert tokens_per_forward(out) == tokens_per_forward(expected) > 1
    assert torch.equal(out.sequences, hf_jacobi.enable(trained_model()).generate(**prompts, **SETTINGS).sequences)
    without = hf_jacobi.enable(trained_model()).generate(
        **prompts, **SETTINGS, jacobi_config={"block_size": 6, "pool_size": 0, "seed": 0}
    )
    assert tokens_per_forward(without) != tokens_per_forward(expected), "the adapter's drafts differ from the base's"


def test_what_is_written_is_what_peft_writes_of_a_plain_lora(tmp_path):
    ours, theirs = tmp_path / "pushed", tmp_path / "theirs"
    plain(adapted(), ours)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(trained_model(), config).save_pretrained(theirs)
    written, expected = (load_file(place / "adapter_model.safetensors") for place in (ours, theirs))
    assert {name: value.shape for name, value in written.items()} == {
        name: value.shape for name, value in expected.items()
    }
    written, expected = (json.loads((place / "adapter_config.json").read_text()) for place in (ours, theirs))
    for name in (
        "alora_invocation_tokens",
        "base_model_name_or_path",
    ):  # absent, and a local folder
        expected.pop(name)
    expected["target_modules"], written["target_modules"] = (
        sorted(config.pop("target_modules")) for config in (expected, written)
    )
    assert written == expected
    assert not [name for name in files_of(ours) if name.startswith("custom_generate")]
    assert json.loads((ours / NOTE).read_text())["kind"] == "draft-only adapter"
    card = (ours / "README.md").read_text()
    assert "load_draft_adapter" in card and "--uno-lora-path" in card and "not tried" in card
    assert "custom_generate" not in card


def test_peft_reads_it_as_a_lora_for_every_token(tmp_path):
    folder = plain(adapted(), tmp_path / "pushed")
    loaded = peft.PeftModel.from_pretrained(trained_model(), folder)
    assert not is_draft_only(loaded.peft_config["default"])


def test_it_can_be_published_again_and_trained_on(tmp_path):
    plain(adapted(), tmp_path / "pushed")
    again = plain(tmp_path / "pushed", tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (
        tmp_path / "pushed" / "adapter_config.json"
    ).read_text()
    loaded = hf_jacobi.load_draft_adapter(trained_model(), again, is_trainable=True)
    assert is_draft_only(loaded.peft_config["default"])
    assert all("lora_" in name for name, weight in loaded.named_parameters() if weight.requires_grad)
    assert any(weight.requires_grad for weight in loaded.parameters())


def test_the_commands_take_it_for_what_it_is(tmp_path):
    from hf_jacobi.cli.models import with_adapter

    plain(adapted(), tmp_path / "pushed")
    found = with_adapter(trained_model(), tmp_path / "pushed")
    prompts = padded_prompts(2)
    text = hf_jacobi.enable(found.model).generate(**prompts, **SETTINGS).sequences
    assert torch.equal(text, hf_jacobi.enable(trained_model()).generate(**prompts, **SETTINGS).sequences)


def test_other_adapters_are_not_written_so(tmp_path):
    other = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (other, tiny_model()):
        with pytest.raises(hf_jacobi.UsageError, match="format='lora' is for a draft-only adapter"):
            plain(model, tmp_path / "pushed")
    with pytest.raises(hf_jacobi.UsageError, match="`format` must be 'lora'"):
        hf_jacobi.publish(other, "someone/fast", tiny_tokenizer(), tmp_path / "out", dry_run=True, format="gguf")


def test_what_other_engines_may_not_read_is_said(tmp_path):
    said = []
    plain(adapted(rank_pattern={"q_proj": 2}), tmp_path / "pushed", tell=said.append)
    assert any("may ignore rank_pattern" in line for line in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alora_invocation_tokens": [5]}, "activated LoRA for tokens of the text"),
        ({"use_dora": True}, "changes the base model .use_dora"),
        ({"bias": "all"}, "changes the base model .bias"),
        ({"peft_type": "IA3"}, "but a draft-only adapter is a LoRA"),
        ({"init_lora_weights": "pissa"}, "changes the weights of the base model"),
        ({"init_lora_weights": "olora"}, "changes the weights of the base model"),
        ({"r": 8}, "pushed cannot be read for this model: .*size mismatch"),
        ({"peft_type": "NEWEST"}, "pushed cannot be read for this model: .*NEWEST"),
    ],
)
def test_what_cannot_only_draft_is_refused(tmp_path, changes, said):
    plain(adapted(), tmp_path / "pushed")
    change(tmp_path / "pushed" / "adapter_config.json", **changes)
    with pytest.raises(hf_jacobi.UsageError, match=said):
        hf_jacobi.load_draft_adapter(trained_model(), tmp_path / "pushed")


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"peft_type": "NEWEST"}, {"init_lora_weights": "pissa"}])
def test_what_could_not_be_loaded_is_not_written(tmp_path, changes):
    plain(adapted(), tmp_path / "pushed")
    change(tmp_path / "pushed" / "adapter_config.json", **changes)
    with pytest.raises(hf_jacobi.UsageError, match=r"changes the|is a LoRA"):
        plain(tmp_path / "pushed", tmp_path / "again")


def weights_of_another(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(".layers.", ".blocks."): value for name, value in load_file(file).items()}, file)
    change(folder / "adapter_config.json", target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is not a JSON file"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is not a JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "contains neither adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"abc"), "contains no readable weights"),
        (weights_of_another, "is not for this LlamaForCausalLM, which has no layer for .*blocks"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(tmp_path, damage, said):
    plain(adapted(), tmp_path / "pushed")
    damage(tmp_path / "pushed")
    with pytest.raises(hf_jacobi.UsageError, match=said) as caught:
        hf_jacobi.load_draft_adapter(trained_model(), tmp_path / "pushed")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"subfodler": "draft"},  # PEFT would ignore it, and load another adapter
        {"device": "cpu"},
        {"config": peft.LoraConfig()},
        {"repo_id": "someone/adapter"},
        {"kwargs": {}},
    ],
)
def test_arguments_that_peft_does_not_have_are_refused(tmp_path, given):
    plain(adapted(), tmp_path / "pushed")
    with pytest.raises(hf_jacobi.UsageError, match=f"does not support {next(iter(given))}: pass"):
        hf_jacobi.load_draft_adapter(trained_model(), tmp_path / "pushed", **given)


def test_arguments_of_peft_and_of_its_downloads_reach_it(tmp_path):
    plain(adapted(), tmp_path / "pushed" / "draft")
    given = {"subfolder": "draft", "revision": "main", "torch_device": "cpu", "autocast_adapter_dtype": False}
    given |= {"local_files_only": True, "low_cpu_mem_usage": True, "device_map": "auto", "use_safetensors": True}
    assert hf_jacobi.load_draft_adapter(trained_model(), tmp_path / "pushed", **given).peft_config


@pytest.mark.parametrize("path", ["/nowhere/adapter", "./nowhere", "~/nowhere/a/b", None, 3])
def test_a_path_that_leads_nowhere_is_named(path):
    with pytest.raises(hf_jacobi.UsageError, match=r"there is no folder|must be the folder or the Hub id"):
        hf_jacobi.load_draft_adapter(tiny_model(), path)


def test_a_model_that_is_none_or_carries_an_adapter_is_refused(tmp_path):
    model = adapted()
    plain(model, tmp_path / "pushed")
    for other in (model, model.get_base_model(), "someone/base"):
        with pytest.raises(hf_jacobi.UsageError, match="must be a base model of transformers"):
            hf_jacobi.load_draft_adapter(other, tmp_path / "pushed")


def test_an_adapter_of_another_model_and_a_folder_without_one_are_refused(tmp_path):
    plain(adapted(), tmp_path / "pushed")
    with pytest.raises(hf_jacobi.UsageError):
        hf_jacobi.load_draft_adapter(tiny_model(hidden_size=64), tmp_path / "pushed")
    with pytest.raises(hf_jacobi.UsageError, match="contains no adapter_config"):
        hf_jacobi.load_draft_adapter(tiny_model(), tmp_path)
