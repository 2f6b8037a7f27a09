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


WORDS, WORD_LENGTH, MODES = 12, 6, 3
CHAIN_VOCABULARY = 64  # 0 padding, 1 beginning, 2 end, 3 to 5 the modes, the rest letters


def words() -> torch.Tensor:
    """`[WORDS, WORD_LENGTH]`: fixed words of random letters."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(3 + MODES, CHAIN_VOCABULARY, (WORDS, WORD_LENGTH), generator=generator)


def word_chain(generator: torch.Generator, length: int = 8) -> tuple[list[int], list[int]]:
    """
    A prompt and the text that follows it: a few words at random and a mode, then `length` words, each of which follows
    from the one before and the mode, then the end.
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


def train_word_chain(steps: int = 500) -> LlamaForCausalLM:
    """
    A 2-layer Llama that continues chains of words: sure of every token given the one before, and never asked to look
    further ahead. What Jacobi Forcing is for.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
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
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = [word_chain(generator) for _ in range(16)]
        width = max(len(prompt) + len(text) for prompt, text in rows)
        ids = torch.tensor([prompt + text + [0] * (width - len(prompt) - len(text)) for prompt, text in rows])
        labels = torch.tensor(
            [[-100] * len(prompt) + text + [-100] * (width - len(prompt) - len(text)) for prompt, text in rows]
        )
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.final_loss = loss.item()
    return model.eval()
