"""What cannot be decoded is refused before the first forward, in one sentence that names the alternative."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from models import padded_prompts, tiny_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    FalconConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaForCausalLM,
    MambaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MptConfig,
    OpenAIGPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
)

import hf_jacobi
from hf_jacobi.decoding.compat import CACHE, cache_of


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
    assert str(error.value).count(". ") == 0 and "'ar'" in str(error.value), "one sentence that names the alternative"


def test_other_generation_modes():
    refused(tiny_model(), "beam", num_beams=2)
    refused(tiny_model(), "beam", num_beams=2, do_sample=True)
    refused(tiny_model(), "assisted", prompt_lookup_num_tokens=3, inputs=padded_prompts(1))


def test_settings_that_cannot_be_served():
    refused(tiny_model(), "use_cache", use_cache=False)
    refused(tiny_model(), "use_cache", generation_config=GenerationConfig(use_cache=False, max_new_tokens=4))
    refused(tiny_model(), "hidden", output_hidden_states=True, return_dict_in_generate=True)
    refused(tiny_model(), "cache_implementation", cache_implementation="offloaded_static")
    model = tiny_model()
    refused(model, "holds 16 tokens", **{CACHE: StaticCache(config=model.config, max_cache_len=16)})


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
    refused(model, "flash-attn package")
    model.config._attn_implementation = "flex_attention"
    refused(model, "flex_attention")


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


# State that models pass from step to step


def widened(model):
    """Weights wide enough that the text changes, as in `tiny_model`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05 if "emb" in name else 0.4, generator=generator)
    return hf_jacobi.enable(model.eval())


def same_as_ar(model, inputs, **kwargs):
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | kwargs
    expected = model.generate(**inputs, **settings, decoding="ar")
    settings |= {"jacobi_config": {"position_cost": 0.0}, "return_dict_in_generate": True}
    out = model.generate(**inputs, **settings, decoding="jacobi")
    assert torch.equal(out.sequences, expected)
    assert out.jacobi_stats.tokens_per_forward > 1


class Carrying(LlamaForCausalLM):
    """Passes a state from step to step, as a checkpoint's own code can."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


class Looping(LlamaForCausalLM):
    def _sample(self, *args, **kwargs):
        return super()._sample(*args, **kwargs)


class Counting(LlamaForCausalLM):
    """Counts positions itself."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return super().prepare_inputs_for_generation(*args, **kwargs) | {"position_ids": None}


class Masked(LlamaForCausalLM):
    """Takes an argument with an entry for each token of the prompt."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        return_dict=None,
        image_attention_mask=None,
    ):
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        return super().forward(**given, attention_mask=attention_mask, **{CACHE: past_key_values}, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "match"), [(Carrying, "hands more than"), (Looping, "loop"), (Counting, "counts positions itself")]
)
def test_models_with_ways_of_their_own(kind, match):
    refused(kind(tiny_model().config).eval(), match)


def test_a_hook_put_on_the_model_itself():
    model = tiny_model()
    plain = model._update_model_kwargs_for_generation
    model._update_model_kwargs_for_generation = lambda *args, **kwargs: plain(*args, **kwargs)
    refused(model, "hands more than")


@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 3), (2, 1, 12)])
def test_arguments_with_an_entry_for_each_token_of_the_prompt(shape):
    model = Masked(tiny_model().config).eval()
    refused(model, "image_attention_mask", image_attention_mask=torch.ones(shape))
    inputs = {"inputs_embeds": model.get_input_embeddings()(padded_prompts(2)["input_ids"])}
    refused(model, "image_attention_mask", inputs, image_attention_mask=torch.ones(shape))
    hf_jacobi.enable(model).generate(
        **padded_prompts(2), image_attention_mask=torch.ones(2, 5), decoding="jacobi", max_new_tokens=3
    )


def idefics():
    vision = {"embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = IdeficsConfig(
        **TINY | {"eos_token_id": 2},
        additional_vocab_size=2,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=256,
        cross_layer_interval=1,
        perceiver_config={"use_resampler": False},
        vision_config=vision | {"image_size": 16, "patch_size": 8},
    )
    return IdeficsForVisionText2Text(config).eval()


def test_image_masks_that_move_with_the_text():
    mask = torch.zeros(1, 14, 2, dtype=torch.long)
    mask[:, :11, 0] = mask[:, 11:, 1] = 1
    inputs = {"input_ids": torch.randint(3, 90, (1, 14)), "pixel_values": torch.randn(1, 2, 3, 16, 16)}
    refused(idefics(), "hands more than", inputs | {"image_attention_mask": mask})


def mllama():
    text = TINY | {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"cross_attention_layers": [1], "bos_token_id": 1}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    config = MllamaConfig(image_token_index=90, text_config=text, vision_config=vision)
    return widened(MllamaForConditionalGeneration(config))


def test_cross_attention_to_an_image():
    """Text is served; an image is not, nor text that continues from one."""
    model = mllama()
    ids = torch.randint(3, 89, (1, 14), generator=torch.Generator().manual_seed(0))
    same_as_ar(model, {"input_ids": ids})
    ids[0, 3] = 90
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 1, 3, 16, 16)}
    inputs |= {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long)}
    inputs |= {"aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    inputs |= {"cross_attention_mask": torch.ones(1, 14, 1, 1, dtype=torch.long)}
    refused(model, "hands more than", inputs)
    ar = model.generate(**inputs, max_new_tokens=4, decoding="ar", return_dict_in_generate=True)
    longer = {"input_ids": torch.cat([ar.sequences, ids[:, 4:6]], 1), CACHE: cache_of(ar)}
    refused(model, "something else", longer)


def test_models_that_attend_to_another_model():
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True, eos_token_id=2)
    refused(AutoModelForCausalLM.from_config(config), "cross-attention")


def test_a_known_hook_is_known_to_do_no_harm():
    text = {"model_type": "gemma", "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = PaliGemmaConfig(
        text_config=TINY | text | {"head_dim": 8, "max_position_embeddings": 128},
        vision_config=vision
        | {"image_size": 16, "patch_size": 8, "projection_dim": 32, "model_type": "siglip_vision_model"},
        image_token_index=90,
        projection_dim=32,
        hidden_size=32,
    )
    model = widened(PaliGemmaForConditionalGeneration(config))
    ids = torch.randint(3, 89, (1, 14), generator=torch.Generator().manual_seed(0))
    ids[0, :4] = 90
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    same_as_ar(model, inputs | {"pixel_values": torch.randn(1, 3, 16, 16)})


ENCODERS = ["bert", "roberta", "electra", "camembert", "xlm-roberta", "data2vec-text", "ernie", "megatron-bert"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_that_were_not_set_up_as_decoders(kind):
    settings = TINY | {"num_attention_heads": 4, "intermediate_size": 48, "embedding_size": 32, "pad_token_id": 1}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings))
    refused(model, "KV cache.*is_decoder=True")
    decoder = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings, is_decoder=True))
    ids = torch.randint(3, 89, (1, 8), generator=torch.Generator().manual_seed(0))
    same_as_ar(widened(decoder), {"input_ids": ids})


def test_models_that_take_a_cache_and_give_none_back():
    config = CONFIG_MAPPING["xlm"](vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64)
    refused(AutoModelForCausalLM.from_config(config), "KV cache", padded_prompts(1), pad_token_id=0)


class OldCode(Masked):
    """Returns a tuple instead of a cache."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, position_ids, past_key_values, return_dict=True)
        outputs[CACHE] = ((torch.zeros(1), torch.zeros(1)),)
        return outputs


def test_a_cache_of_an_older_kind_is_named():
    """This cannot be known before the first forward."""
    model = hf_jacobi.enable(OldCode(tiny_model().config).eval())
    with pytest.raises(hf_jacobi.UsageError, match=r"tuple in place of.*'ar'"):
        model.generate(**padded_prompts(1), decoding="jacobi", max_new_tokens=4)


def test_continuous_batching():
    refused(tiny_model(), "continuous batching", cache_implementation="paged")
    paged = GenerationConfig(cache_implementation="paged", max_new_tokens=4)
    refused(tiny_model(), "continuous batching", generation_config=paged)
    model = tiny_model()
    model.generation_config.cache_implementation = "paged"
    refused(model, "continuous batching")


# What cannot be exact


def warned(model) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.generate(**padded_prompts(1), max_new_tokens=3, decoding="jacobi")
    return [str(one.message) for one in caught if "quantise" in str(one.message)]


class Linear8bitLt(torch.nn.Linear):
    """Has the name of bitsandbytes' layer, but computes in full precision."""

    def __init__(self, inner, threshold):
        super().__init__(inner.in_features, inner.out_features, bias=False)
        self.weight, self.state = inner.weight, SimpleNamespace(threshold=threshold)


def with_layer(change):
    model = hf_jacobi.enable(tiny_model())
    part = model.model.layers[0].mlp
    part.up_proj = change(part.up_proj)
    return model


def rounding(layer, **attributes):
    """A layer whose weight has the attributes of torchao's."""
    for name, value in attributes.items():
        setattr(layer.weight, name, value)
    return layer


def test_activations_quantised_over_a_forward_are_warned_of_once():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(tiny_model(), {torch.nn.Linear}, dtype=torch.qint8)
    for model in (
        hf_jacobi.enable(dynamic),
        with_layer(lambda layer: Linear8bitLt(layer, 6.0)),
        with_layer(lambda layer: rounding(layer, act_quant_kwargs=object())),
    ):
        (message,) = warned(model)
        assert "'ar'" in message
    for model in (
        hf_jacobi.enable(tiny_model()),
        with_layer(lambda layer: Linear8bitLt(layer, 0.0)),
        with_layer(lambda layer: rounding(layer, act_quant_kwargs=None)),
        with_layer(lambda layer: rounding(layer, act_quant_kwargs=object(), act_quant_scale=torch.ones(1))),
    ):
        assert not warned(model)
