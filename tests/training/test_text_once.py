"""Draft-only training in two forwards, with the text once for all noise, gives the results of one forward."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from models import tiny_model
from packed_rows import one_copy_each, packed
from test_trainer import assert_same, lora, rows, trainer_of
from transformers import TrainerCallback

from hf_jacobi.decoding.compat import is_checkpointing


peft = pytest.importorskip("peft")
MODELS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": "all-linear",
    "mistral-window": "all-linear",
    "gemma2": "all-linear",
    "gemma3": "all-linear",
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt_oss": ["q_proj", "k_proj"],
    "llama4": ["q_proj", "k_proj"],
}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def loss_and_gradients(
    folder, name="llama", data=None, one_forward=False, attention=None, targets=None, required=True, **settings
):
    """For one batch, with an adapter that has an effect from the start."""
    model = tiny_model(name, attention=attention)
    torch.manual_seed(1)
    adapter = peft.LoraConfig(r=4, target_modules=targets or MODELS[name], init_lora_weights=False)
    trainer = trainer_of(
        model, folder, rows(4) if data is None else data, adapter_scope="draft", peft_config=adapter, **settings
    )
    if one_forward:
        trainer.text_once = None
    else:
        assert trainer.text_once is not None or not required
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(trainer.train_dataset))])
    trainer.model.train()
    if settings.get("activation_checkpointing"):
        trainer.model.gradient_checkpointing_enable()
        assert is_checkpointing(trainer.model)
    with trainer._one_batch():
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_one_forward(tmp_path, name, attention):
    if attention == "sdpa" and name in ("gemma2", "gpt_oss"):
        attention = None
    loss, ours = loss_and_gradients(tmp_path, name, attention=attention)
    expected, theirs = loss_and_gradients(tmp_path, name, one_forward=True, attention=attention)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("samples", [{}, {"max_length": 150}])
@pytest.mark.parametrize("one_forward", [False, True])
def test_copies_of_noise_count_as_rows_of_their_own(tmp_path, name, samples, one_forward):
    data = packed(6, noisy_copies=3, **samples)
    if not samples:
        assert len(one_copy_each(data)) == 3 * len(data)
        loss, ours = loss_and_gradients(tmp_path, name, Dataset.from_list(data), one_forward)
        expected, theirs = loss_and_gradients(tmp_path, name, Dataset.from_list(one_copy_each(data)), True)
    else:
        loss, ours = loss_and_gradients(tmp_path, name, Dataset.from_list(data), one_forward)
        expected, theirs = loss_and_gradients(
            tmp_path, name, Dataset.from_list(one_copy_each(packed(6, noisy_copies=3))), True
        )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_whole_model_learns_from_copies_as_from_rows(tmp_path, name):
    found = {}
    for way, data in (("copies", packed(4, noisy_copies=3)), ("rows", one_copy_each(packed(4, noisy_copies=3)))):
        model = tiny_model(name)
        trainer = trainer_of(model, tmp_path, Dataset.from_list(data))
        with trainer._one_batch():
            loss = trainer.compute_loss(model, trainer.data_collator(data))
            loss.backward()
        found[way] = (loss.item(), {name: weight.grad for name, weight in model.named_parameters()})
    assert found["copies"][0] == pytest.approx(found["rows"][0], rel=1e-5)
    assert_same(found["copies"][1], found["rows"][1])


def test_activations_computed_again_make_no_difference(tmp_path):
    _, ours = loss_and_gradients(tmp_path, activation_checkpointing=True)
    _, theirs = loss_and_gradients(tmp_path, one_forward=True)
    assert_same(ours, theirs)


def test_the_text_is_run_once_without_a_gradient(tmp_path, monkeypatch):
    from hf_jacobi.training import text_once

    seen = []
    run = text_once.run_decoder

    def spy(model, **inputs):
        seen.append((inputs["input_ids"].shape, torch.is_grad_enabled()))
        return run(model, **inputs)

    data = packed(2, noisy_copies=4)
    trainer = trainer_of(
        tiny_model(), tmp_path, Dataset.from_list(data), adapter_scope="draft", peft_config=lora(), max_steps=1
    )
    monkeypatch.setattr(text_once, "run_decoder", spy)
    trainer.train()
    (text, of_text), (noise, of_noise) = seen
    assert text == (2, max(row["block_ids"].count(-1) for row in data)) and not of_text
    assert noise.numel() > 2 * text.numel() and of_noise


def test_the_state_of_the_layers_is_put_back(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=lora(), max_steps=2)
    trainer.train()
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_half_precision_differs_by_rounding_alone(tmp_path):
    loss, ours = loss_and_gradients(tmp_path, bf16=True)
    expected, theirs = loss_and_gradients(tmp_path, one_forward=True, bf16=True)
    assert loss == pytest.approx(expected, rel=1e-2)
    assert_same(ours, theirs, 5e-2)


@pytest.mark.parametrize("name", ["mixtral", "phi3", "cohere2", "deepseek_v3", "gemma3n"])
def test_other_models_are_tried_and_train_as_before(tmp_path, name):
    """Two forwards, or one if a few tokens came out differently when the trainer was made."""
    targets = {"deepseek_v3": ["o_proj"], "phi3": ["qkv_proj", "o_proj"]}.get(name, ["q_proj", "v_proj"])
    found = [
        loss_and_gradients(tmp_path, name, targets=targets, one_forward=way, required=False) for way in (False, True)
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_same(found[0][1], found[1][1])


def test_what_gives_another_text_in_two_forwards_trains_in_one(tmp_path, monkeypatch):
    from hf_jacobi.training import text_once

    update = text_once.TextLayer.update
    monkeypatch.setattr(
        text_once.TextLayer, "update", lambda self, keys, *others, **settings: update(self, 2 * keys, *others)
    )
    trainer = trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=lora())
    assert trainer.text_once is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_compiled_layers_see_the_text_through_their_attention(tmp_path, monkeypatch, attention):
    """Uncompiled here; `test_compiled_layers_give_the_same_gradients` compiles them."""
    monkeypatch.setattr("hf_jacobi.training.trainer.compiled_layers", lambda model: nullcontext())
    loss, ours = loss_and_gradients(tmp_path, "qwen3", attention=attention, compile_layers=True)
    expected, theirs = loss_and_gradients(tmp_path, "qwen3", one_forward=True, attention=attention)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "settings", [{"adapter_scope": "all"}, {"compile_layers": True, "activation_checkpointing": True}]
)
def test_what_needs_one_forward_has_one(tmp_path, settings):
    trainer = trainer_of(tiny_model(), tmp_path, **{"adapter_scope": "draft", "peft_config": lora()} | settings)
    assert trainer.text_once is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_loss_between_steps_leaves_the_adapter_off(tmp_path, monkeypatch):
    """A compiled training keeps the layers' forwards for all steps, and text must stay the base model's meanwhile."""
    monkeypatch.setattr("hf_jacobi.training.trainer.compiled_layers", lambda model: nullcontext())
    tokens, texts = torch.arange(3, 13).unsqueeze(0), []

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.compute_loss(trainer.model, trainer.data_collator(packed(2)))
            with torch.no_grad():
                texts.append(trainer.head.model(tokens).logits)

    model = tiny_model()
    before = model(tokens).logits
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = trainer_of(
        model, tmp_path, adapter_scope="draft", peft_config=adapter, max_steps=2, compile_layers=True,
        callbacks=[Between()],
    )  # fmt: skip
    assert trainer.text_once is not None
    trainer.train()
    assert len(texts) == 2 and all(torch.allclose(text, before, atol=1e-5) for text in texts)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_that_sdpa_would_change_trains_compiled_in_one_forward(tmp_path, name):
    settings = {"adapter_scope": "draft", "peft_config": lora(), "compile_layers": True}
    trainer = trainer_of(tiny_model(name, attention="eager"), tmp_path, **settings)
    assert trainer.text_once is None
    assert not any("jacobi_text" in vars(module) for module in trainer.model.modules())
