"""The mask compared with one causal forward per noisy block: the same logits, the same gradients."""

import shutil

import pytest
import torch
from models import tiny_model
from oracle import oracle_logits
from packed_rows import packed
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    MambaConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_jacobi.training.collator import PackedCollator
from hf_jacobi.training.mask import FLEX_MULTIPLE, RowTensors, dense_mask, flex_mask, refuse_untrainable, visible
from hf_jacobi.training.windows import attending_by_windows, can_be_windowed, segments


def batch_of(rows, multiple=1):
    return PackedCollator(pad_token_id=0, multiple=multiple)(rows)


def masked_logits(model, batch, mask) -> torch.Tensor:
    return model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask, use_cache=False
    ).logits


def errors(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "qwen3", "mistral-window", "qwen2-mixed-window", "gemma2", "gemma3", "gpt_oss", "llama4"],
)
@pytest.mark.parametrize("samples", [1, 2])
def test_dense_mask_gives_the_oracles_logits_and_gradients(name, attention, samples):
    if (name, attention) in (("gpt_oss", "sdpa"), ("gemma2", "sdpa")):
        pytest.skip("needs eager attention")
    model = tiny_model(name, attention=attention)
    rows = packed(3) if samples == 1 else packed(4, max_length=100)
    assert max(rows[0]["seq_ids"]) + 1 == samples
    batch = batch_of(rows)
    mask = dense_mask(RowTensors.of(batch), model.config.get_text_config(), torch.float32)
    check_against_oracle(model, rows, batch, masked_logits(model, batch, mask))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "qwen3_moe", "granite"])
@pytest.mark.parametrize("samples", [1, 2])
def test_windowed_attention_gives_the_oracles_logits_and_gradients(name, samples):
    model = tiny_model(name)
    assert can_be_windowed(model)
    rows = packed(3) if samples == 1 else packed(4, max_length=100)
    batch = batch_of(rows, 8)
    with attending_by_windows(model):
        logits = masked_logits(model, batch, segments(RowTensors.of(batch)))
    check_against_oracle(model, rows, batch, logits)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["mistral-window", "gemma3", "qwen2-mixed-window", "llama4"])
def test_layers_with_a_window_of_their_own_keep_the_dense_mask(name):
    assert not can_be_windowed(tiny_model(name))
    assert not can_be_windowed(tiny_model(attention="eager"))


def check_against_oracle(model, rows, batch, ours):
    """Logits, and gradients of some function of them."""
    weights = torch.randn(ours.shape[-1], generator=torch.Generator().manual_seed(0))
    real = batch["seq_ids"] >= 0
    (ours[real].log_softmax(-1) @ weights).square().mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    theirs = torch.cat([oracle_logits(model, row) for row in rows])
    assert errors(ours[real], theirs) < 1e-5 * max(1.0, float(theirs.abs().max()))
    (theirs.log_softmax(-1) @ weights).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert errors(gradients[name], parameter.grad) <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), name


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_flex_mask_is_the_dense_one(name):
    model = tiny_model(name, attention="sdpa")
    batch = batch_of(packed(4, max_length=100), FLEX_MULTIPLE)
    rows, config = RowTensors.of(batch), model.config.get_text_config()
    blocks, dense = flex_mask(rows, config), dense_mask(rows, config, torch.float32)
    tokens = torch.arange(batch["input_ids"].shape[1])
    for kind in dense if isinstance(dense, dict) else [None]:
        block = blocks[kind] if kind else blocks
        mask = dense[kind] if kind else dense
        seen = torch.stack(
            [block.mask_mod(torch.tensor(b), torch.tensor(0), tokens[:, None], tokens) for b in range(len(mask))]
        )
        assert torch.equal(seen, mask[:, 0] == 0)
        assert block.shape == (len(mask), 1, len(tokens), len(tokens))


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled, which needs a C++ compiler here")
def test_flex_attention_gives_the_logits_of_the_dense_mask():
    """On a CPU FlexAttention has no backward pass, but its forward agrees."""
    model = tiny_model(attention="sdpa")
    batch = batch_of(packed(4, max_length=100), FLEX_MULTIPLE)
    rows, config = RowTensors.of(batch), model.config.get_text_config()
    dense_logits = masked_logits(model, batch, dense_mask(rows, config, torch.float32))
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        flex_logits = masked_logits(model.eval(), batch, flex_mask(rows, config))
    real = batch["seq_ids"] >= 0
    assert errors(flex_logits[real], dense_logits[real]) < 1e-4


def test_the_rule_token_by_token():
    row = packed(2, max_length=100)[0]
    rows = RowTensors.of(batch_of([row], multiple=16))
    length = rows.seq_ids.shape[1]
    for query in range(length):
        for key in range(length):
            seq, block, start, position = (
                [int(column[0, index]) for index in (query, key)]
                for column in (rows.seq_ids, rows.block_ids, rows.window_start, rows.position_ids)
            )
            if seq[0] != seq[1] or seq[0] < 0:
                expected = False
            elif block[0] < 0:
                expected = block[1] < 0 and position[1] <= position[0]
            elif block[1] < 0:
                expected = position[1] < start[0]
            else:
                same_window = start[0] == start[1]
                expected = same_window and (
                    block[1] < block[0] or (block[1] == block[0] and position[1] <= position[0])
                )
            expected = expected or query == key
            assert bool(visible(rows, torch.tensor(0), torch.tensor(query), torch.tensor(key))) == expected


def test_a_window_of_one_block_sees_clean_text_alone():
    """CLLM's mask."""
    batch = batch_of(packed(1, window_size=1))
    rows = RowTensors.of(batch)
    tokens = torch.arange(rows.seq_ids.shape[1])
    seen = visible(rows, torch.tensor(0), tokens[:, None], tokens)
    noisy = rows.block_ids[0] >= 0
    other = noisy[:, None] & noisy & (rows.block_ids[0][:, None] != rows.block_ids[0])
    assert not bool((seen & other).any())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)),
            "state",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                Qwen3NextConfig(
                    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_experts=4
                )
            ),
            "linear_attention",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=2, d_kv=16)
            ),
            "encoder-decoder",
        ),
        (lambda: tiny_model(attention="flex_attention"), "no backward pass on a CPU"),
        (
            lambda: AutoModelForCausalLM.from_config(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
            "ALiBi",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                GPTNeoConfig(
                    vocab_size=96,
                    hidden_size=32,
                    num_layers=2,
                    num_heads=4,
                    attention_types=[[["global", "local"], 1]],
                )
            ),
            "a mask of its own",
        ),
    ],
)
def test_models_that_would_leak_noise_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        refuse_untrainable(model())
