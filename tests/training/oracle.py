"""The slow way: a separate causal forward for each noisy block."""

from __future__ import annotations

import torch


def sequences_of(row: dict[str, list[int]]):
    """For each sample of a packed row, the indices of its text and those of each of its noisy blocks."""
    result = []
    for number in range(max(row["seq_ids"]) + 1):
        indices = [index for index, seq in enumerate(row["seq_ids"]) if seq == number]
        clean = [index for index in indices if row["block_ids"][index] < 0]
        blocks = sorted({row["block_ids"][index] for index in indices} - {-1})
        noisy = {block: [index for index in indices if row["block_ids"][index] == block] for block in blocks}
        result.append((clean, noisy))
    return result


def oracle_logits(model, row: dict[str, list[int]]) -> torch.Tensor:
    """
    `[L, V]`, the logits at each token of a packed row. One causal forward scores the text; another one per noisy block
    scores the text before its window, the earlier noisy blocks of the window, and the block itself.
    """
    logits: dict[int, torch.Tensor] = {}
    tokens = row["input_ids"]
    for clean, noisy in sequences_of(row):
        text = model(torch.tensor([[tokens[index] for index in clean]])).logits[0]
        logits |= dict(zip(clean, text))
        for block, indices in noisy.items():
            start = row["window_start"][indices[0]]
            before = [tokens[index] for index in clean if row["position_ids"][index] < start]
            window = [
                index
                for other, members in noisy.items()
                if other < block and row["window_start"][members[0]] == start
                for index in members
            ]
            context = before + [tokens[index] for index in window]
            output = model(torch.tensor([context + [tokens[index] for index in indices]])).logits[0]
            logits |= dict(zip(indices, output[len(context) :]))
    return torch.stack([logits[index] for index in range(len(tokens))])
