"""The noise of sampled text: a hash of (seed, row, position, token), identical on every device and in any order."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


SPREADS_TOKENS = -1640531527  # 2**32 over the golden ratio, odd, as a signed integer
MULTIPLIERS = (2146121005, -2073254261)  # those of the hash "lowbias32", signed
LARGEST = 1 - 2**-24  # the largest float32 below 1
AT_ONCE = 2**23  # scores that get their noise at a time, which takes three times their memory


class GumbelNoise:
    """
    Gumbel noise keyed by (seed, row, position): the same key gives the same noise, whatever was drawn before.

    The token argmax(log-probability + noise) is an exact sample of the distribution (the Gumbel-max trick). A token
    drawn twice with the same noise tends to be the same, so drafts converge.

    Args:
        seed: the seed.
        names: the name of each row in the key of its noise.
    """

    def __init__(self, seed: int, names: list[str]):
        digests = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
        self.rows = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        self._tokens: torch.Tensor | None = None

    def keys(self, rows: list[int], positions: np.ndarray) -> np.ndarray:
        """
        The keys of the noise of some positions.

        Args:
            rows: `[B]`, the number of each row.
            positions: `[B, Q]`, the positions of the tokens to draw.

        Returns:
            `[2, B, Q, 1]` int32.
        """
        mixed = self.rows[rows, None] + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(multiplier)
        mixed ^= mixed >> np.uint64(31)
        halves = mixed.view(np.int32).reshape(*positions.shape, 2)
        return np.ascontiguousarray(halves.transpose(2, 0, 1)[..., None])

    def add_to(self, scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        Adds the noise to scores, in place.

        Args:
            scores: `[B, Q, V]` float32.
            keys: `[2, B, Q, 1]` int32, on the device of the scores.
        """
        if self._tokens is None or (self._tokens.shape[0], self._tokens.device) != (scores.shape[-1], scores.device):
            tokens = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
            self._tokens = tokens * SPREADS_TOKENS
        if scores.numel() > AT_ONCE and scores.shape[:2] != (1, 1):
            positions = max(1, AT_ONCE // scores.shape[-1])
            parts = scores.view(1, -1, scores.shape[-1]).split(positions, 1)
            for part, own in zip(parts, keys.view(2, 1, -1, 1).split(positions, 2)):
                self.add_to(part, own)
            return scores
        first, second = keys.unbind()
        bits = self._tokens + first
        bits ^= bits >> 16
        bits *= MULTIPLIERS[0]
        bits ^= second  # otherwise two positions could share a run of noise, shifted by some tokens
        bits ^= bits >> 15
        bits *= MULTIPLIERS[1]
        bits ^= bits >> 16
        bits &= 0x7FFFFFFF
        # Uniform in (0, 1), with the full precision of float32 near 0, which gives the largest noise.
        uniform = bits.to(torch.float32).mul_(-(2.0**-31)).clamp_(-LARGEST, -(2.0**-32))
        return scores.sub_(uniform.log1p_().neg_().log_())
