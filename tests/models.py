"""Tiny models of every architecture the tests cover: random ones, and trained ones whose drafts are accepted."""

from __future__ import annotations

import torch
from fixtures import with_kept_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast


VOCABULARY = 96
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNSET = object()  # a setting of BASE that an architecture does not take
NO_GROUPS = {"num_key_value_heads": 4}
UNTIED = {"tie_word_embeddings": False}  # tied, the wide random weights below repeat their input
WINDOW = 8
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (model type, what differs from BASE)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1} | MIXED),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "gemma": ("gemma", UNTIED),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8} | UNTIED | MIXED),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8} | UNTIED | MIXED),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("gpt_neox", NO_GROUPS),
    "olmo2": ("olmo2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "cohere": ("cohere", {}),
    "stablelm": ("stablelm", {}),
    "mixtral": ("mixtral", MOE),
    "qwen3_moe": ("qwen3_moe", MOE),
    "gpt_oss": ("gpt_oss", MOE | MIXED),
    "phi": ("phi", {}),
    "olmo": ("olmo", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "alibi": False, "num_kv_heads": 2, "head_dim": UNSET}),
    "cohere2": ("cohere2", MIXED),
    "glm4": ("glm4", {}),
    "exaone4": ("exaone4", MIXED),
    "nemotron": ("nemotron", {}),
    "olmoe": ("olmoe", MOE),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 32}),
    "deepseek_v3": (
        "deepseek_v3",
        NO_GROUPS
        | {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "head_dim": UNSET,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "gemma3n": (
        "gemma3n_text",
        {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
        | UNTIED
        | MIXED,
    ),
}


def tiny_config(name: str, **changes):
    """The configuration of a tiny model of the named architecture."""
    model_type, differences = ARCHITECTURES[name]
    settings = {key: value for key, value in (BASE | differences | changes).items() if value is not UNSET}
    return CONFIG_MAPPING[model_type](**settings)


def tiny_model(name: str = "llama", *, seed: int = 0, attention: str | None = None, **changes):
    """
    A tiny random model in float32, in evaluation mode.

    Its weights have a larger variance than usual: with the usual one, every model of this size repeats a single token,
    and text that never changes tests nothing.
    """
    torch.manual_seed(seed)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05 if "emb" in name or "wte" in name else 0.4, generator=generator)
    return model


def trained_model(name: str = "llama", *, attention: str | None = None, dtype: torch.dtype = torch.float32):
    """
    A tiny model, in evaluation mode, whose drafts and n-grams are often accepted (`train_tiny_models.TinyLanguage`).

    Each architecture has weights of its own.
    """
    kwargs = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32, **kwargs).eval()
    return with_kept_weights(model, name).to(dtype)


def padded_prompts(rows: int, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """`rows` random prompts of different lengths, left-padded to `length`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows):
        padding = (3 * row) % (length - 2)
        input_ids[row, :padding] = 0
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def last_new_tokens(model, inputs: dict[str, torch.Tensor], max_new_tokens: int = 40) -> list[int]:
    """For each row the token that appears latest in its text: as end tokens, these end the rows late and apart."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
    texts = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return [max(text, key=text.index) for text in texts]


def tokens_per_forward(out) -> float:
    """Mean over the rows of an output, each by its own forwards: above 1, drafts were accepted."""
    rows = out.jacobi_stats.per_sequence
    return sum(row.new_tokens for row in rows) / sum(row.forwards for row in rows)


def tiny_tokenizer(template: bool = True, size: int = VOCABULARY, special: tuple[str, ...] = ("<pad>", "<s>", "</s>")):
    """A tokenizer of `size` words, "w3 w4 ..."; with `special`, ids 0 to 2 are padding, beginning and end."""
    words = dict(zip(special, range(3))) | {f"w{token}": token for token in range(len(special), size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=next(iter(words))))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), list(words)[:3]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if template:
        fast.chat_template = (
            "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
        )
    return fast
