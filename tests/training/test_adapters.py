"""A draft-only adapter leaves the base model unchanged, whatever PEFT can do to it."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from test_trainer import lora, rows, trainer_of

import hf_jacobi


peft = pytest.importorskip("peft")
DRAFT_ONLY = {"alora_invocation_tokens": [-1], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def config(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(tmp_path, way):
    with pytest.raises(ValueError, match=rf"must leave the base .* changed .*q_proj\.weight .*{way}"):
        trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=config(init_lora_weights=way))
    made = peft.get_peft_model(tiny_model(), config(init_lora_weights=way, **DRAFT_ONLY))
    with pytest.raises(ValueError, match=rf"must leave the base .*{way}"):
        trainer_of(made, tmp_path, adapter_scope="draft")


@pytest.mark.parametrize("scope", ["all", "draft"])
def test_an_adapter_begins_alike_whatever_was_drawn_before(tmp_path, scope):
    found = []
    for seed in (7, 7, 8):
        model = tiny_model()
        torch.manual_seed(len(found))
        trainer = trainer_of(model, tmp_path, adapter_scope=scope, peft_config=config(), seed=seed)
        found.append(next(weight for name, weight in trainer.model.named_parameters() if "lora_A" in name))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model.model.norm.weight.data.add_(1e-3),
        lambda model: model.lm_head.weight.data.copy_(model.lm_head.weight.data.flip(0)),
        lambda model: model.model.rotary_emb.inv_freq.mul_(1.5),
        lambda model: model.model.layers[0].mlp.to(torch.bfloat16).to(torch.float32),
        lambda model: model.model.layers.append(tiny_model().model.layers[1]),
    ],
)
def test_whatever_peft_comes_to_change_is_seen(tmp_path, monkeypatch, touch):
    """Changes that a future way to initialize an adapter might make."""
    make = peft.get_peft_model

    def changing(model, *arguments, **settings):
        touch(model)
        return make(model, *arguments, **settings)

    monkeypatch.setattr(peft, "get_peft_model", changing)
    with pytest.raises(ValueError, match="must leave the base model as it is, but PEFT changed"):
        trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=lora())


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
def test_the_text_of_a_harmless_one_is_that_of_the_base(tmp_path, settings):
    base = hf_jacobi.enable(tiny_model())
    trainer = trainer_of(
        tiny_model(), tmp_path, adapter_scope="draft", peft_config=config(**settings), max_steps=2,
        learning_rate=1e-2, eval_dataset=rows(2), eval_prompts=2, eval_max_new_tokens=16,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_agreement"] == 1.0
    trainer.save_model(tmp_path / "out")
    tuned = hf_jacobi.enable(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "out"))
    settings = {"max_new_tokens": 24, "do_sample": False}
    tokens = torch.tensor([[5, 6, 7]])
    text = tuned.generate(input_ids=tokens, decoding="jacobi", **settings)
    assert torch.equal(text, base.generate(tokens, decoding="ar", **settings))


def test_more_layers_than_the_base_has_are_refused(tmp_path):
    twice = [(0, 2), (1, 2)]
    with pytest.raises(ValueError, match="drop layer_replication"):
        trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=config(layer_replication=twice))
    made = peft.get_peft_model(tiny_model(), config(layer_replication=twice, **DRAFT_ONLY))
    with pytest.raises(ValueError, match="drop layer_replication"):
        trainer_of(made, tmp_path, adapter_scope="draft")
    made.peft_config["default"].layer_replication = None
    made.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="has 3 layers where its configuration says 2"):
        trainer_of(made, tmp_path, adapter_scope="draft")


def test_weights_of_the_base_that_would_be_trained_are_refused(tmp_path):
    made = peft.get_peft_model(tiny_model(), config(**DRAFT_ONLY))
    made.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head\.weight would be trained"):
        trainer_of(made, tmp_path, adapter_scope="draft")


def test_experts_are_refused_in_the_words_for_experts(tmp_path):
    asked = config(target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="experts of a mixture, which get tokens without their rows"):
        trainer_of(tiny_model("mixtral"), tmp_path, adapter_scope="draft", peft_config=asked)


def test_layers_with_copies_of_the_configuration_train_alike_with_every_attention(tmp_path):
    losses = {}
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        trainer = trainer_of(
            tiny_model(attention=attention), tmp_path, peft_config=config(layer_replication=[(0, 2), (1, 2)]),
            max_steps=2, learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        assert len(trainer.head.model.model.layers) == 3
        assert all(
            layer.self_attn.config._attn_implementation == attention for layer in trainer.head.model.model.layers
        )
        losses[attention] = [line["consistency_loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-4)


def test_agreement_is_with_the_base_that_an_adapter_changed_at_once(tmp_path):
    trainer = trainer_of(
        tiny_model(), tmp_path, peft_config=config(layer_replication=[(0, 2), (0, 2)]), learning_rate=0.0,
        eval_dataset=rows(4), eval_prompts=4, eval_max_new_tokens=16,
    )  # fmt: skip
    assert trainer.evaluate()["eval_agreement"] < 0.9


def test_an_adapter_that_may_not_be_trained_is_refused(tmp_path):
    peft.get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer_of(loaded, tmp_path).train()


def test_the_best_of_an_adapter_of_another_name_is_refused(tmp_path):
    named = peft.get_peft_model(tiny_model(), lora(), adapter_name="mine")
    settings = {"eval_dataset": rows(2), "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"named 'default', but the active ones are \['mine'\]"):
        trainer_of(named, tmp_path, load_best_model_at_end=True, eval_steps=1, **settings)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"init_lora_weights": "mica"}])
def test_what_peft_cannot_combine_with_a_draft_only_adapter_is_said(tmp_path, settings):
    with pytest.raises(hf_jacobi.UsageError, match=r"PEFT cannot make a draft-only adapter .*linear layers"):
        trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=config(**settings))


def test_an_activated_adapter_for_all_tokens_is_refused(tmp_path):
    with pytest.raises(hf_jacobi.UsageError, match="adapter_scope='draft' only"):
        trainer_of(tiny_model(), tmp_path, peft_config=config(**DRAFT_ONLY))


def test_agreement_is_with_the_base_whatever_an_adapter_begins_with(tmp_path):
    adapter = config(init_lora_weights=False, lora_alpha=400)
    trainer = trainer_of(
        tiny_model(), tmp_path, peft_config=adapter, eval_dataset=rows(2), eval_prompts=2, eval_max_new_tokens=16
    )
    assert trainer.evaluate()["eval_agreement"] < 1.0


def test_an_adapter_that_is_merged_is_refused(tmp_path):
    """Its forward leaves the adapter out, so the adapter gets no gradient."""
    made = peft.get_peft_model(tiny_model(), config())
    made.merge_adapter()
    with pytest.raises(hf_jacobi.UsageError, match=r"is merged into the weights.* unmerge_adapter\(\) first"):
        trainer_of(made, tmp_path)
    made.unmerge_adapter()
    trainer_of(made, tmp_path).train()
