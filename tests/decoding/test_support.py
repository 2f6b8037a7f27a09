"""What cannot be decoded is refused before the first forward, in one sentence with the way out."""

from __future__ import annotations

import pytest
import torch
from models import padded_prompts, tiny_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    FalconConfig,
    GenerationConfig,
    GPTNeoConfig,
    MambaConfig,
    MptConfig,
    OpenAIGPTConfig,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
)

import hf_jacobi
from hf_jacobi.decoding.compat import CACHE


TINY = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 2}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
QWEN3_NEXT = TINY | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}


def refused(model, match, inputs=None, **kwargs):
    hf_jacobi.enable(model)
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=match) as error:
        model.generate(**(inputs or padded_prompts(2)), max_new_tokens=8, decoding="jacobi", **kwargs)
    assert not forwards, "refused before the first forward"
    assert str(error.value).count(". ") == 0 and "'ar'" in str(error.value), "one sentence with the way out"


def test_other_generation_modes():
    refused(tiny_model(), "beam", num_beams=2)
    refused(tiny_model(), "beam", num_beams=2, do_sample=True)
    refused(tiny_model(), "assisted", prompt_lookup_num_tokens=3, inputs=padded_prompts(1))


def test_settings_that_cannot_be_served():
    refused(tiny_model(), "use_cache", use_cache=False)
    refused(tiny_model(), "use_cache", generation_config=GenerationConfig(use_cache=False, max_new_tokens=4))
    refused(tiny_model(), "hidden", output_hidden_states=True, return_dict_in_generate=True)
    refused(tiny_model(), "cache_implementation", cache_implementation="static")
    model = tiny_model()
    refused(model, "StaticCache", **{CACHE: StaticCache(config=model.config, max_cache_len=64)})


def test_adapters_with_virtual_tokens():
    wrapped = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    refused(wrapped, "PREFIX_TUNING")


def test_adapters_that_switch_on_within_a_text():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    refused(get_peft_model(tiny_model(), config), "activated LoRA")


def test_gradient_checkpointing_in_training_mode():
    model = tiny_model().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.23
    enable()
    refused(model, "gradient checkpointing")


def test_token_healing():
    refused(tiny_model(), "token_healing", token_healing=True)


def test_models_without_a_cache():
    config = OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    refused(AutoModelForCausalLM.from_config(config), "has none")


def test_encoder_decoder_models():
    refused(AutoModelForSeq2SeqLM.from_config(T5Config(**T5)), "encoder-decoder")


@pytest.mark.parametrize("config", [MambaConfig(**TINY), Qwen3NextConfig(**QWEN3_NEXT)])
def test_models_with_recurrent_state(config):
    refused(AutoModelForCausalLM.from_config(config), "rolls the KV cache back")


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
        MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4),
        FalconConfig(**TINY, num_attention_heads=4, alibi=True),
    ],
)
def test_models_with_alibi(config):
    refused(AutoModelForCausalLM.from_config(config), "position|mask", use_cache=True)


def test_attention_with_a_mask_of_its_own():
    config = GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    refused(AutoModelForCausalLM.from_config(config), "custom mask")


def test_attention_that_takes_no_custom_mask():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    refused(model, "flash_attention_2")


def test_rotary_embeddings_that_change_on_the_way():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    }
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=16, max_position_embeddings=64)
    refused(model, "position 16")
    embeds = {"inputs_embeds": model.get_input_embeddings()(padded_prompts(2)["input_ids"])}
    refused(model, "position 16", inputs=embeds)
    refused(tiny_model("llama", rope_parameters=rope | {"factor": 4.0}), "position 16")
    refused(
        tiny_model(
            "llama",
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            max_position_embeddings=16,
        ),
        "position 16",
    )
    short = model.generate(**padded_prompts(1), max_new_tokens=4, do_sample=False, decoding="jacobi")
    assert torch.equal(short, model.generate(**padded_prompts(1), max_new_tokens=4, do_sample=False))
