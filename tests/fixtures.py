"""Stored weights; two small models with a language each, and texts in these languages."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM


WEIGHTS = Path(__file__).parent / "weights"  # made by train_tiny_models.py


def with_kept_weights(model, name: str):
    """The model with the weights that `keep_weights` kept."""
    parameters = dict(model.named_parameters())
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file, torch.no_grad():
        scales = json.loads(file.metadata()["scales"])
        assert scales.keys() == parameters.keys(), "these are another model's weights: see train_tiny_models.py"
        for key, scale in scales.items():
            parameters[key].copy_(file.get_tensor(key).float() * scale)
    return model


def keep_weights(model, name: str) -> None:
    """Writes the weights of a model to `tests/weights/`, as integers of 8 bits: forty models in a megabyte."""
    weights = {key: parameter.detach().float() for key, parameter in model.named_parameters()}
    scales = {key: max(float(weight.abs().max()), 1e-8) / 127 for key, weight in weights.items()}
    integers = {key: (weight / scales[key]).round().to(torch.int8) for key, weight in weights.items()}
    WEIGHTS.mkdir(exist_ok=True)
    save_file(integers, WEIGHTS / f"{name}.safetensors", metadata={"scales": json.dumps(scales)})


PERIOD = 16
SYMBOLS = 64
PERMUTED_COPY = LlamaConfig(
    vocab_size=SYMBOLS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def permutation() -> torch.Tensor:
    """The map from a token to the one sixteen positions later."""
    return torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(7))


def permuted_copy_batch(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`[rows, length]`: sixteen random tokens, then x[i] = perm[x[i - 16]]."""
    perm = permutation()
    batch = torch.randint(0, SYMBOLS, (rows, PERIOD), generator=generator)
    while batch.shape[1] < length:
        batch = torch.cat([batch, perm[batch[:, -PERIOD:]]], dim=1)
    return batch[:, :length]


def permuted_copy_model() -> LlamaForCausalLM:
    """
    A 2-layer Llama that was trained on `permuted_copy_batch`.

    Every token depends only on the one sixteen before it, so a whole block converges at once, and no n-gram repeats
    within a period: ideal for Jacobi decoding, useless for n-gram look-up.
    """
    return with_kept_weights(LlamaForCausalLM(PERMUTED_COPY), "permuted_copy").eval()


WORDS, WORD_LENGTH, MODES = 12, 6, 3
CHAIN_VOCABULARY = 64  # 0 padding, 1 beginning, 2 end, 3 to 5 the modes, the rest letters
WORD_CHAIN = LlamaConfig(
    vocab_size=CHAIN_VOCABULARY,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def words() -> torch.Tensor:
    """`[WORDS, WORD_LENGTH]`: fixed words of random letters."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3 + MODES, CHAIN_VOCABULARY, (WORDS, WORD_LENGTH), generator=generator)


def word_chain(generator: torch.Generator, length: int = 8) -> tuple[list[int], list[int]]:
    """
    A prompt (a few random words and a mode) and the text that follows it: `length` words, each determined by the
    previous word and the mode, then the end.
    """
    draw = lambda bound: int(torch.randint(bound, (), generator=generator))  # noqa: E731
    prefix = [draw(WORDS) for _ in range(1 + draw(3))]
    mode = draw(MODES)
    step = (1, 5, 7)[mode]
    chain, word = [], prefix[-1]
    for _ in range(length):
        word = (word + step) % WORDS
        chain.append(word)
    letters = words()
    prompt = [1, *letters[prefix].flatten().tolist(), 3 + mode]
    return prompt, [*letters[chain].flatten().tolist(), 2]


def word_chain_model() -> LlamaForCausalLM:
    """
    A 2-layer Llama that continues chains of words: sure of every next token, but not trained to predict further ahead,
    which is what Jacobi Forcing teaches.
    """
    return with_kept_weights(LlamaForCausalLM(WORD_CHAIN), "word_chain").eval()
