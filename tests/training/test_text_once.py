"""Draft-only training in two forwards, the text once for all noise, is what it was in one."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from packed_rows import packed
from test_trainer import assert_same, lora, rows, trainer_of


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


def loss_and_gradients(folder, name="llama", data=None, one_forward=False, attention=None, targets=None, **settings):
    """Of one batch, of an adapter that does something from the start."""
    model = tiny_model(name, attention=attention)
    torch.manual_seed(1)
    adapter = peft.LoraConfig(r=4, target_modules=targets or MODELS[name], init_lora_weights=False)
    trainer = trainer_of(model, folder, rows(4) if data is None else data, adapter_scope="draft", peft_config=adapter, **settings)
    if one_forward:
        trainer.text_once = None
    else:
        assert trainer.text_once is not None
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(trainer.train_dataset))])
    trainer.model.train()
    if settings.get("activation_checkpointing"):
        trainer.model.gradient_checkpointing_enable()
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
