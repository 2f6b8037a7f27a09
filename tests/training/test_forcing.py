"""All stages at the smallest scale: prompts, trajectories, packing, training, and a model that decodes faster."""

import copy
import math

import pytest
import torch
from fixtures import CHAIN_VOCABULARY, word_chain, word_chain_model
from models import tiny_tokenizer

from hf_jacobi import JacobiForcingConfig, JacobiForcingTrainer, collect_trajectories, pack_trajectories


@pytest.fixture(scope="module")
def base():
    return word_chain_model()


@pytest.fixture(scope="module")
def trajectories(base):
    generator = torch.Generator().manual_seed(5)
    prompts = [" ".join(f"w{token}" for token in word_chain(generator)[0]) for _ in range(1500)]
    tokenizer = tiny_tokenizer(size=CHAIN_VOCABULARY, special=())
    return collect_trajectories(base, tokenizer, prompts, 8, 64, batch_size=64, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["all", "draft"])
def test_a_model_learns_to_decode_in_parallel(base, trajectories, scope, tmp_path, monkeypatch):
    """
    Tokens per forward rise well above the untrained model's. A draft-only adapter keeps every token of the text; full
    fine-tuning keeps perplexity within 2%.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    layout = (4, "linear") if scope == "all" else (1, "random")
    packed = pack_trajectories(trajectories, *layout)
    held_out, rows = packed.select(range(16)), packed.select(range(16, len(packed)))
    arguments = JacobiForcingConfig(
        output_dir=str(tmp_path / "out"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=16,
        max_steps=300,
        learning_rate=1e-3 if scope == "all" else 5e-3,
        ar_loss_weight=10.0,
        save_strategy="no",
        eval_prompts=16,
        eval_max_new_tokens=64,
        adapter_scope=scope,
    )
    peft_config = None
    if scope == "draft":
        peft_config = pytest.importorskip("peft").LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    trainer = JacobiForcingTrainer(
        copy.deepcopy(base),
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tiny_tokenizer(size=CHAIN_VOCABULARY, special=()),
        peft_config=peft_config,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    print({key: (before[key], after[key]) for key in after if key in before})
    assert after["eval_consistency_loss"] < 0.5 * before["eval_consistency_loss"]
    assert before["eval_tokens_per_forward"] < 1.3
    assert after["eval_tokens_per_forward"] > 1.6
    if scope == "draft":
        assert after["eval_agreement"] == 1.0
        assert after["eval_ar_loss"] == pytest.approx(before["eval_ar_loss"], rel=1e-3)
    else:
        assert after["eval_agreement"] > 0.8
        assert math.exp(after["eval_ar_loss"] - before["eval_ar_loss"]) < 1.02
