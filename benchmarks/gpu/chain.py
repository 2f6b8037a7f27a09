"""A model of any shape whose text is known in advance, and drafts that are correct with a given probability."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hf_jacobi.decoding.drafting import Draft, DraftRule


QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def shaped_model(shape: dict, device, dtype: torch.dtype, attention: str = "sdpa"):
    """A Qwen2 of the given shape with random weights, made on the device."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


@torch.no_grad()
def chain_model(shape: dict, device, dtype: torch.dtype):
    """
    Such a model that writes t + 1 after token t (modulo the vocabulary), with a margin larger than any rounding error.

    Its embeddings outweigh what the layers add, and its head is those embeddings shifted by one row. It does the same
    computation as any model of its shape.
    """
    model = shaped_model(shape, device, dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.mlp.down_proj.weight.mul_(0.01)
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    return model


def chain_prompt(rows: int, length: int, vocabulary: int, device) -> torch.Tensor:
    """`[rows, length]` random tokens."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(vocabulary, (rows, length), generator=generator).to(device)


def chain_text(prompt: torch.Tensor, count: int, vocabulary: int) -> torch.Tensor:
    """`[rows, count]`: the tokens that such a model writes after a prompt."""
    return (prompt[:, -1:] + 1 + torch.arange(count, device=prompt.device)) % vocabulary


def forced_chain(right: float, vocabulary: int):
    """`forced_drafts` for such a model."""
    return forced_drafts(
        right, lambda text, count: [(text[-1] + 1 + index) % vocabulary for index in range(count)], vocabulary
    )


@contextmanager
def forced_drafts(right: float, known: Callable[[list[int], int], list[int]], vocabulary: int):
    """
    While this is open, each draft token is the known one with probability `right`, otherwise a different one.

    With long drafts, a forward then commits 1 / (1 - right) tokens on average.

    Args:
        right: that probability.
        known: returns up to the given number of tokens that follow a text (of one row, without padding).
        vocabulary: the number of tokens.
    """
    draw = random.Random(0)
    propose = DraftRule.propose

    def forced(self, room, *choice):
        draft = propose(self, room, *choice)
        chain = list(draft.chain)
        for index, token in enumerate(known(self.text, len(chain) - 1), 1):
            wrong = 0 if draw.random() < right else 1 + draw.randrange(vocabulary - 2)
            chain[index] = (token + wrong) % vocabulary
        self.draft = Draft(chain)
        for candidate in self.candidates:
            self.draft.add_branch(candidate)
        return self.draft

    DraftRule.propose = forced
    try:
        yield
    finally:
        DraftRule.propose = propose
