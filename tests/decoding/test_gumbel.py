"""The noise of sampled text: Gumbel distributed, independent of other noise, few operations for any batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_jacobi.decoding import gumbel
from hf_jacobi.decoding.gumbel import GumbelNoise


def noise_of(positions: int, vocabulary: int, seed: int = 0, names: tuple[str, ...] = ("0",)) -> torch.Tensor:
    """`[rows, positions, vocabulary]`."""
    noise = GumbelNoise(seed, list(names))
    grid = np.arange(positions)[None].repeat(len(names), 0)
    keys = torch.from_numpy(noise.keys(list(range(len(names))), grid))
    return noise.add_to(torch.zeros(len(names), positions, vocabulary), keys)


def test_it_is_gumbel_distributed():
    found = noise_of(400, 2000).flatten().sort().values.double()
    expected = torch.exp(-torch.exp(-found))
    steps = torch.arange(1, len(found) + 1) / len(found)
    assert (steps - expected).abs().max() * math.sqrt(len(found)) < 1.95  # Kolmogorov-Smirnov, by chance 1 in 1,000
    assert found.isfinite().all() and found[-1] > 12, "the tail exists"


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(lambda: noise_of(1001, 500)[0, 1:], id="next positions"),
        pytest.param(lambda: noise_of(1000, 1000)[0, :, 500:], id="other tokens"),
        pytest.param(lambda: noise_of(1000, 500, names=("0", "1"))[1], id="next row"),
        pytest.param(lambda: noise_of(1000, 500, seed=1)[0], id="next seed"),
    ],
)
def test_it_is_independent_of(others):
    one, other = noise_of(1000, 500)[0], others()
    pair = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert abs(pair) < 4 / math.sqrt(one.numel())
    # The tokens that win a draw of 16, in pairs: chi-squared with 255 degrees of freedom.
    wins = one[:, :496].reshape(-1, 16).argmax(-1) * 16 + other[:, :496].reshape(-1, 16).argmax(-1)
    expected = len(wins) / 256
    statistic = ((torch.bincount(wins, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(statistic - 255) < 4 * math.sqrt(2 * 255)


def test_it_is_keyed():
    assert torch.equal(noise_of(3, 100), noise_of(9, 100)[:, :3])
    rows = noise_of(2, 100, names=("a", "b"))
    assert torch.equal(rows[:1], noise_of(2, 100, names=("a",)))
    assert torch.equal(rows[1:], noise_of(2, 100, names=("b",)))
    assert not torch.equal(rows[0], rows[1])


def test_it_is_float32_whatever_the_default():
    expected = noise_of(4, 100)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            noise = GumbelNoise(0, ["0"])
            scores = torch.zeros(1, 4, 100, dtype=torch.float32)
            noise.add_to(scores, torch.from_numpy(noise.keys([0], np.arange(4)[None])))
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(scores, expected)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("rows", [1, 8])
def test_it_takes_at_most_20_operations(rows):
    noise = GumbelNoise(0, [str(row) for row in range(rows)])
    keys = torch.from_numpy(noise.keys(list(range(rows)), np.arange(16)[None].repeat(rows, 0)))
    scores = torch.zeros(rows, 16, 1000)
    noise.add_to(scores, keys)  # the first call prepares the tokens
    with Operations() as operations:
        noise.add_to(scores, keys)
    assert 0 < operations.count <= 20


def test_it_comes_in_parts_where_scores_are_many(monkeypatch):
    expected = noise_of(7, 100, names=("a", "b", "c"))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if "log" in str(function):
                sizes.append(result.numel())
            return result

    monkeypatch.setattr(gumbel, "AT_ONCE", 450)
    with Sizes():
        found = noise_of(7, 100, names=("a", "b", "c"))
    assert torch.equal(found, expected) and max(sizes) == 400
    monkeypatch.setattr(gumbel, "AT_ONCE", 50)
    assert torch.equal(noise_of(7, 100, names=("a", "b", "c")), expected), "at least one position at a time"
