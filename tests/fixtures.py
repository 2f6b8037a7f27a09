"""A model with high acceptance: trained for seconds on sequences that look back sixteen tokens."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


PERIOD = 16
SYMBOLS = 64


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


def train_permuted_copy(steps: int = 400) -> LlamaForCausalLM:
    """
    A 2-layer Llama trained on `permuted_copy_batch`.

    Every token depends on the one sixteen before it and on nothing else, so a whole block comes out right at once, and
    no n-gram ever repeats within a period: ideal for Jacobi decoding, useless to n-gram look-up.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
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
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = permuted_copy_batch(16, 96, generator)
        logits = model(batch).logits
        targets = batch[:, PERIOD:]
        loss = torch.nn.functional.cross_entropy(logits[:, PERIOD - 1 : -1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.final_loss = loss.item()
    return model.eval()
