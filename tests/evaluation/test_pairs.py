"""A model with an adapter is compared in its fastest form, so AR never runs through PEFT's layers."""

import pytest
import torch
from models import padded_prompts, tiny_tokenizer, trained_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_jacobi
from hf_jacobi.evaluation import bench as bench_module
from hf_jacobi.evaluation import measuring
from hf_jacobi.evaluation import tune as tune_module
from hf_jacobi.evaluation.bench import bench
from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Method, race
from hf_jacobi.evaluation.pairs import fastest_pair
from hf_jacobi.evaluation.tune import tune


DRAFT_ONLY = {"alora_invocation_tokens": [-1]}
PROMPTS = [[3 + (row + column) % 5 for column in range(10)] for row in range(2)]
JACOBI = Method("Jacobi", "jacobi", {"block_size": 8})


def adapted(scale: float = 0.02, **settings) -> PeftModel:
    """A model whose drafts are accepted, with a LoRA that changes it slightly."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(trained_model(), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    return model


def has_layers(model) -> bool:
    return any(hasattr(module, "get_base_layer") for module in model.modules())


def loaded_by_transformers(folder, **settings):
    """A model that transformers loads from an adapter's folder: with PEFT's layers, but without PEFT's wrapper."""
    trained_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(folder / "adapter")
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


def contestants_of(monkeypatch, module) -> dict:
    """The contestants of the race that a module runs."""
    seen = {}
    race = module.race

    def watched(contestants, *arguments):
        seen.update(contestants)
        return race(contestants, *arguments)

    monkeypatch.setattr(module, "race", watched)
    return seen


def test_with_a_draft_only_adapter_the_base_model_decodes_by_ar_and_shares_the_weights():
    model = adapted(**DRAFT_ONLY)
    fast, writer = fastest_pair(model)
    assert fast is model and has_layers(model) and not has_layers(writer)
    weights = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in weights for weight in writer.parameters())


def test_a_lora_for_all_tokens_is_merged_in_a_copy():
    model = adapted()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fast, writer = fastest_pair(model)
    assert fast is writer and not has_layers(writer) and has_layers(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(writer(**padded_prompts(1)).logits, model(**padded_prompts(1)).logits)


@pytest.mark.parametrize("settings", [{}, DRAFT_ONLY], ids=["all tokens", "draft only"])
def test_a_model_that_transformers_loads_from_an_adapters_folder_is_supported(tmp_path, settings):
    model = loaded_by_transformers(tmp_path, **settings)
    assert has_layers(model) and not isinstance(model, PeftModel)
    fast, writer = fastest_pair(model)
    assert not has_layers(writer) and (fast is model) == bool(settings)
    with torch.no_grad():
        torch.testing.assert_close(writer(**padded_prompts(1)).logits, model(**padded_prompts(1)).logits)


def test_a_model_without_an_adapter_is_returned_unchanged():
    model = trained_model()
    assert fastest_pair(model) == (model, model)
    assert fastest_pair(adapted(), model)[1] is model


def test_a_base_with_an_adapter_loses_pefts_layers_too():
    model = adapted(**DRAFT_ONLY)
    assert not has_layers(fastest_pair(model, model)[1])


def test_an_adapter_that_is_off_is_not_merged():
    model = adapted()
    model.disable_adapter_layers()
    fast, writer = fastest_pair(model)
    assert fast is writer and not has_layers(writer)
    with torch.no_grad():
        assert torch.equal(writer(**padded_prompts(1)).logits, trained_model()(**padded_prompts(1)).logits)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["from a token on", "virtual tokens"],
)
def test_an_adapter_that_cannot_be_merged_needs_a_base(config):
    model = hf_jacobi.enable(get_peft_model(trained_model(), config))
    with pytest.raises(ValueError, match="pass `base`"):
        bench(model, tiny_tokenizer(), PROMPTS, (AR, JACOBI), max_new_tokens=4)


def test_a_model_with_a_replaced_forward_is_refused():
    model = adapted()
    inner = model.get_base_model()
    inner.forward = inner.forward  # as torch.compile and hooks do
    with pytest.raises(ValueError, match="was replaced"):
        fastest_pair(model)


@pytest.mark.parametrize("settings", [{}, DRAFT_ONLY], ids=["all tokens", "draft only"])
def test_bench_and_tune_run_ar_without_pefts_layers(monkeypatch, settings):
    model = hf_jacobi.enable(adapted(**settings))
    seen = contestants_of(monkeypatch, bench_module)
    report = bench(model, tiny_tokenizer(), PROMPTS, (AR, PROMPT_LOOKUP, JACOBI), max_new_tokens=24)
    assert not has_layers(seen["AR"][0]) and not has_layers(seen["prompt lookup"][0])
    assert has_layers(seen["Jacobi"][0]) == bool(settings)
    rows = {row["decoding"]: row for row in report["results"]}
    assert rows["Jacobi"]["tokens_per_forward"] > 1 and all(row["identical"] == 1 for row in rows.values())
    seen = contestants_of(monkeypatch, tune_module)
    tune(model, tiny_tokenizer(), PROMPTS[:1], grid=({"block_size": 4},), max_new_tokens=8)
    assert not has_layers(seen["AR"][0])


def test_a_race_runs_ar_without_pefts_layers(monkeypatch):
    model = hf_jacobi.enable(adapted(**DRAFT_ONLY))
    raced, measure = [], measuring.measure

    def watched(model, inputs, method, *arguments):
        raced.append((method.name, has_layers(model)))
        return measure(model, inputs, method, *arguments)

    monkeypatch.setattr(measuring, "measure", watched)
    list(race({"AR": (model, AR), "Jacobi": (model, JACOBI)}, [padded_prompts(1)], 8, warm_up=0))
    assert raced == [("AR", False), ("Jacobi", True)]
