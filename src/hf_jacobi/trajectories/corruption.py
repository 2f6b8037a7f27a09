"""Packs plain completions into training rows for draft-only adapters, with noise that needs no trajectories."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..decoding.errors import UsageError, check_range
from .checks import check_whole
from .packing import pack_rows
from .pieces import token_array
from .samples import Sample, lay_out_arrays


NOISES = ("uniform", "corrupt")


def share_for(noise: str, corrupt_share: float | None) -> float:
    """The share of tokens to replace, by default 0.5. Raises `UsageError` for a share that `noise` does not use."""
    if corrupt_share is not None and noise == "uniform":
        raise UsageError("`corrupt_share` is for noise='corrupt', not 'uniform', which replaces every token: drop it.")
    return 0.5 if corrupt_share is None else corrupt_share


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
    columns: ClassVar[tuple[str, ...]] = ("prompt_ids", "completion_ids")
    what: ClassVar[str] = "completions"

    def __post_init__(self):
        if self.noise not in NOISES:
            raise UsageError(f"`noise` must be one of {NOISES}, got {self.noise!r}.")
        check_whole("block_size", self.block_size, 2)
        check_whole("noisy_copies", self.noisy_copies, 1)
        check_range("`corrupt_share`", self.corrupt_share, above=0, most=1)
        if self.pack_samples and self.max_length is None:
            raise UsageError("`pack_samples=True` fills rows up to `max_length`: pass it too.")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable."""
        allowed = [self.allowed[0], self.allowed[-1], len(self.allowed)]
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"allowed": allowed}

    def sample(self, row: dict[str, Any], number: int) -> Sample | None:
        """See `Packing.sample`; the row's place and the seed decide what is drawn."""
        prompt, text = _checked(row, number)
        if self.max_length is not None:
            room = max(0, self.max_length - len(prompt)) // (1 + self.noisy_copies)
            text = text if len(text) <= room else text[: room - room % self.block_size]
        if not len(text):
            return None
        noise, sizes = [], []
        for copy in range(self.noisy_copies):
            generator = random.Random(f"{self.seed}/{number}/{copy}")
            first = generator.randint(1, self.block_size) if copy else self.block_size
            starts = np.array([0, *range(first, len(text), self.block_size)])
            noise.append(self.copy(text, starts, generator))
            sizes.append(np.diff(starts, append=len(text)))
        return lay_out_arrays(prompt, text, np.concatenate(noise), np.concatenate(sizes), window_size=1)

    def copy(self, text: np.ndarray, starts: np.ndarray, generator: random.Random) -> np.ndarray:
        """
        A noisy version of a text, in which the first token of each block stays as it is.

        Args:
            text: the completion.
            starts: where its blocks begin.
            generator: the source of the noise.
        """
        replaced = np.ones(len(text), bool)
        replaced[starts] = False
        noisy = text.copy()
        if self.noise == "uniform" or self.corrupt_share == 1.0:
            drawn = _draw(len(self.allowed), int(replaced.sum()), generator)
            noisy[replaced] = drawn if isinstance(self.allowed, range) else self._allowed_array[drawn]
            return noisy
        for place in np.flatnonzero(replaced).tolist():
            if generator.random() < self.corrupt_share:
                noisy[place] = self.allowed[generator.randrange(len(self.allowed))]
        return noisy

    @cached_property
    def _allowed_array(self) -> np.ndarray:
        return np.asarray(self.allowed)


def pack_completions(
    completions: Iterable[dict],
    tokenizer,
    block_size: int = 16,
    noise: str = "uniform",
    *,
    corrupt_share: float | None = None,
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

    Noise is drawn from the vocabulary instead. A block begins with a token of the text, as a draft begins with the
    newest committed token, and noise follows; see `pack_trajectories` for the layout of rows.

    Args:
        completions: rows with `prompt_ids` and `completion_ids`, such as trajectories: a `datasets.Dataset` or
            anything that can be iterated more than once. Prefer the model's own greedy text: an adapter learns to
            predict the model on the text it is given.
        tokenizer: the tokenizer, from which all tokens except its special ones are drawn; or a number of tokens, from
            which all are drawn.
        block_size: n, one token of the text and the n - 1 positions after it.
        noise: `"uniform"`, whole blocks of random tokens (UNO, arXiv 2609.04010), or `"corrupt"`, the text with a
            share of its tokens replaced by random ones.
        corrupt_share: the probability that a token is replaced; only for `"corrupt"`, by default 0.5.
        noisy_copies: how many noisy versions of the text follow it in a row. After the first copy, each one has
            different block boundaries.
        max_length, pack_samples, output_dir, shard_size, progress: as in `pack_trajectories`.
        seed: of the noise; each sample draws independently of the others.

    Returns:
        A `datasets.Dataset` with the columns of `pack_trajectories`.

    Raises:
        `ValueError`: as in `pack_trajectories`.

    Example:

    ```python
    >>> rows = [{"prompt_ids": tokenizer("2 + 2 =").input_ids, "completion_ids": tokenizer(" 4, of course").input_ids}]
    >>> packed = hf_jacobi.pack_completions(rows, tokenizer, noisy_copies=4)
    ```
    """
    share = share_for(noise, corrupt_share)
    settings = NoiseSettings(
        noise, block_size, share, noisy_copies, max_length, pack_samples, seed, _allowed(tokenizer)
    )
    return pack_rows(completions, settings, output_dir, shard_size, progress)


def _draw(below: int, count: int, generator: random.Random) -> np.ndarray:
    """What `count` calls of `generator.randrange(below)` return; each redraws until the number is below."""
    bits = below.bit_length()
    found = np.zeros(0, np.int64)
    while len(found) < count:
        words = 2 * (count - len(found)) + 16
        drawn = np.frombuffer(generator.getrandbits(32 * words).to_bytes(4 * words, "little"), "<u4") >> (32 - bits)
        found = np.concatenate([found, drawn[drawn < below].astype(np.int64)])
    return found[:count]


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


def _checked(row: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt and the completion of a row."""
    columns = NoiseSettings.columns
    if not isinstance(row, Mapping) or any(row.get(column) is None for column in columns):
        raise UsageError(f"completion {number} needs {list(columns)}, got {row!r:.80}.")
    prompt, text = (token_array(row[column], f"{column} of completion {number}") for column in columns)
    return prompt, text
