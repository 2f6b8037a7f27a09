"""Packed rows for the training tests."""

from __future__ import annotations

import random

from models import VOCABULARY

from hf_jacobi.trajectories.packing import PackSettings, packed_rows


def trajectories(count: int, *, block_size: int = 4, length: int = 22, seed: int = 0) -> list[dict]:
    """Made-up trajectories: random text, and states that converge a few tokens at a time."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = generator.choices(range(3, VOCABULARY), k=3 + number % 4)
        text = generator.choices(range(3, VOCABULARY), k=length - number % 5)
        blocks = []
        for start in range(0, len(text), block_size):
            final = text[start : start + block_size]
            states, right = [], 0
            while right < len(final):
                states.append(final[:right] + [token % 90 + 4 for token in final[right:]])
                right += generator.randint(1, 2)
            blocks.append([*states, final])
        rows.append({"prompt_ids": prompt, "completion_ids": text, "block_size": block_size, "trajectories": blocks})
    return rows


def packed(
    count: int, *, window_size: int = 3, max_length: int | None = None, seed: int = 0, noisy_copies: int = 1, **others
) -> list[dict]:
    """Packed rows; several samples each if `max_length` is given."""
    settings = PackSettings(window_size, "random", 0.0, 1.0, max_length, max_length is not None, seed, noisy_copies)
    return list(packed_rows(trajectories(count, seed=seed, **others), settings))


def one_copy_each(rows: list[dict]) -> list[dict]:
    """Rows of one sample with several noisy copies, as rows of the same text with one copy each."""
    parted = []
    for row in rows:
        text = row["block_ids"].count(-1)
        starts = [
            index for index in range(text, len(row["input_ids"]))
            if row["position_ids"][index] <= row["position_ids"][index - 1]
        ]  # fmt: skip
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])]):
            parted.append({column: values[:text] + values[start:end] for column, values in row.items()})
    return parted
