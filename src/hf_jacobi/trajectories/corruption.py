"""Packs plain completions into training rows: noise that needs no trajectories, for draft-only adapters."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..decoding.errors import UsageError
from .checks import check_real, check_whole
from .packing import Sample, check_tokens, lay_out_sample, pack_rows


NOISES = ("uniform", "corrupt")


@dataclass(frozen=True)
class NoiseSettings:
    """How completions are packed; see `pack_completions`. `allowed` are the tokens that may be drawn."""

    noise: str
    block_size: int
    corrupt_share: float
    noisy_copies: int
    max_length: int | None
    pack_samples: bool
    seed: int
    allowed: Sequence[int]
    columns = ("prompt_ids", "completion_ids")
    what = "completions"

    def __post_init__(self):
        if self.noise not in NOISES:
            raise UsageError(f"`noise` must be one of {NOISES}, got {self.noise!r}.")
        check_whole("block_size", self.block_size, 2)
        check_whole("noisy_copies", self.noisy_copies, 1)
        check_real("corrupt_share", self.corrupt_share)
        if not 0.0 < self.corrupt_share <= 1.0:
            raise UsageError(f"`corrupt_share` must lie in (0, 1], got {self.corrupt_share!r}.")
        if self.pack_samples and self.max_length is None:
            raise UsageError("`pack_samples=True` fills rows up to `max_length`: pass it too.")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable."""
        allowed = [self.allowed[0], self.allowed[-1], len(self.allowed)]
        return vars(self) | {"allowed": allowed}

    def sample(self, row: dict[str, Any], number: int) -> Sample | None:
        """See `Packing.sample`; the place of a row decides, with the seed, what is drawn."""
        prompt, text = _checked(row, number)
        if self.max_length is not None:
            room = max(0, self.max_length - len(prompt)) // (1 + self.noisy_copies)
            text = text if len(text) <= room else text[: room - room % self.block_size]
        if not text:
            return None
        copies = [
            self.copy(text, random.Random(f"{self.seed}/{number}/{copy}"), shifted=copy > 0)
            for copy in range(self.noisy_copies)
        ]
        return lay_out_sample(prompt, text, copies, window_size=1)

    def copy(self, text: list[int], generator: random.Random, shifted: bool) -> list[list[int]]:
        """
        A noisy version of each block of a text, whose first token stays as it is.

        Args:
            text: the completion.
            generator: where noise is drawn from.
            shifted: whether the first block is cut short, at a place that is drawn, so that others begin elsewhere.
        """
        first = generator.randint(1, self.block_size) if shifted else self.block_size
        starts = [0, *range(first, len(text), self.block_size)]
        share = 1.0 if self.noise == "uniform" else self.corrupt_share
        return [
            [
                token if place == start or (share < 1.0 and generator.random() >= share) else self.draw(generator)
                for place, token in enumerate(text[start:end], start)
            ]
            for start, end in zip(starts, [*starts[1:], len(text)])
        ]

    def draw(self, generator: random.Random) -> int:
        """A random token."""
        return self.allowed[generator.randrange(len(self.allowed))]


def pack_completions(
    completions: Iterable[dict],
    tokenizer,
    block_size: int = 16,
    noise: str = "uniform",
    *,
    corrupt_share: float = 0.5,
    noisy_copies: int = 1,
    max_length: int | None = None,
    pack_samples: bool = False,
    seed: int = 0,
    output_dir: str | Path | None = None,
    shard_size: int = 256,
    progress: bool = False,
) -> Dataset:
    """
    Turns plain completions into training rows for a draft-only adapter, without trajectories.

    Noise is drawn from the vocabulary instead. A block begins with a token of the text, as a draft does with the
    newest committed one, and noise follows; see `pack_trajectories` for how rows look.

    Args:
        completions: rows with `prompt_ids` and `completion_ids`; a `datasets.Dataset` or anything that can be run
            through again. Trajectories are such rows, too. Best the model's own greedy text: an adapter learns to
            foresee the model, on whatever text it is given.
        tokenizer: the tokenizer, whose tokens are drawn, but not its special ones; or a number of tokens, all of
            which are.
        block_size: n, a token of the text and n - 1 after it.
        noise: `"uniform"`, whole blocks of random tokens (UNO, arXiv 2609.04010), or `"corrupt"`, the text with a
            share of its tokens replaced by random ones.
        corrupt_share: the chance of each token to be replaced, with `"corrupt"`.
        noisy_copies: how many noisy versions of the text follow it in a row. The blocks of each but the first begin
            at places of their own.
        max_length, pack_samples, output_dir, shard_size, progress: as of `pack_trajectories`.
        seed: of the noise; each sample draws by itself, so the result does not depend on the others.

    Returns:
        A `datasets.Dataset` with the columns of `pack_trajectories`.

    Raises:
        `ValueError`: as of `pack_trajectories`.

    Example:

    ```python
    >>> rows = [{"prompt_ids": tokenizer("2 + 2 =").input_ids, "completion_ids": tokenizer(" 4, of course").input_ids}]
    >>> packed = hf_jacobi.pack_completions(rows, tokenizer, noisy_copies=4)
    ```
    """
    settings = NoiseSettings(
        noise, block_size, corrupt_share, noisy_copies, max_length, pack_samples, seed, _allowed(tokenizer)
    )
    return pack_rows(completions, settings, output_dir, shard_size, progress)


def _allowed(tokenizer) -> Sequence[int]:
    """The tokens that noise is drawn from."""
    if isinstance(tokenizer, int) and not isinstance(tokenizer, bool):
        check_whole("tokenizer", tokenizer, 1)
        return range(tokenizer)
    if not hasattr(tokenizer, "get_vocab"):
        raise UsageError(f"`tokenizer` must be a tokenizer, or a number of tokens, got {tokenizer!r:.60}.")
    tokens = sorted(set(tokenizer.get_vocab().values()))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return [token for token in tokens if token not in special] or tokens


def _checked(row: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """The prompt and the completion of a row."""
    columns = NoiseSettings.columns
    if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
        raise UsageError(f"completion {number} needs {list(columns)}, got {row!r:.80}.")
    for column in columns:
        check_tokens(row[column], f"{column} of completion {number}")
    return list(row["prompt_ids"]), list(row["completion_ids"])
