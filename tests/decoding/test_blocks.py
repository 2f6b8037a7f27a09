"""Which tokens are tried next: the window, the blocks in flight, the first guess."""

from __future__ import annotations

import itertools

import pytest

from hf_jacobi import JacobiConfig
from hf_jacobi.decoding.adaptive import FIRST_REST, PROBE, AdaptiveReach, AdaptiveWindow
from hf_jacobi.decoding.blocks import BetterGuess, Blocks, FirstGuess
from hf_jacobi.decoding.ngram_pool import NgramPool


class Zeros:
    """A first guess that knows nothing."""

    def __call__(self, tokens, count):
        return [0] * count

    def ngram(self, tokens, count):
        return []


def blocks_of(**settings) -> Blocks:
    blocks = Blocks(JacobiConfig(**settings), 3, Zeros())
    blocks.advance([9, 9, 9, 10], [], 99)
    return blocks


def test_a_block_starts_as_one_committed_token_and_first_guesses():
    for window in ("block", "sliding"):
        blocks = blocks_of(block_size=4, window=window)
        assert (blocks.start, blocks.end, blocks.draft) == (3, 7, [10, 0, 0, 0])


def test_a_block_shrinks_until_it_has_converged_then_the_next_one_starts():
    blocks = blocks_of(block_size=4, window="block")
    blocks.advance([9, 9, 9, 10, 11], [21, 22, 23], 99)
    assert (blocks.start, blocks.end, blocks.draft) == (4, 7, [11, 21, 22])
    blocks.advance([9, 9, 9, 10, 11, 12, 13], [31], 99)
    assert (blocks.start, blocks.end, blocks.draft) == (6, 7, [13])
    blocks.advance([9, 9, 9, 10, 11, 12, 13, 14], [], 99)
    assert (blocks.start, blocks.end, blocks.draft) == (7, 11, [14, 0, 0, 0])


def test_a_branch_that_ends_inside_the_next_block_leaves_the_grid_as_it_was():
    blocks = blocks_of(block_size=4, window="block")
    blocks.advance([9, 9, 9, 10, 11, 12, 13, 14, 15], [], 99)
    assert (blocks.start, blocks.end, blocks.draft) == (8, 11, [15, 0, 0])


def test_a_sliding_window_is_refilled():
    blocks = blocks_of(block_size=4, window="sliding")
    blocks.advance([9, 9, 9, 10, 11, 12], [22, 23], 99)
    assert (blocks.start, blocks.end, blocks.draft) == (5, 9, [12, 22, 23, 0])


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_a_block_is_spawned_once_the_newest_has_converged_far_enough(window):
    blocks = blocks_of(block_size=4, window=window, max_blocks=2, spawn_ratio=0.75)
    blocks.advance([9, 9, 9, 10, 11], [21, 22], 99)
    assert blocks.spawned == 0
    blocks.advance([9, 9, 9, 10, 11, 12], [22] if window == "block" else [22, 0, 0], 99)
    assert blocks.spawned == 1
    assert blocks.end - blocks.start > 4


def test_no_more_than_max_blocks_are_in_flight():
    blocks = blocks_of(block_size=2, window="block", max_blocks=3, spawn_ratio=0.5)
    text = [9, 9, 9, 10]
    for token in range(50):
        text = [*text, token]
        blocks.advance(text, [0] * 10, 99)
        assert blocks.end - blocks.start <= 3 * 2
    assert blocks.spawned > 0


@pytest.mark.parametrize("kind", ["prompt", "ngram", "repeat"])
def test_first_guess(kind):
    pool = NgramPool()
    pool.extend([5, 6, 7, 8])
    guess = FirstGuess(kind, [5, 6, 7, 8], pool, "seed")([1, 6], 5)
    assert len(guess) == 5
    if kind == "repeat":
        assert guess == [6] * 5
    else:
        assert set(guess) <= {5, 6, 7, 8}
    if kind == "ngram":
        assert guess[:2] == [7, 8]
    assert FirstGuess(kind, [5, 6, 7, 8], pool, "seed")([1, 6], 5) == guess, "the same seed guesses the same"


def test_first_guess_without_a_prompt():
    assert FirstGuess("prompt", [], NgramPool(), "seed")([4], 2) == [4, 4]


def test_adaptive_window_grows_with_acceptance():
    window = AdaptiveWindow(64, 0.05)
    sizes = []
    for _ in range(12):
        window.update(accepted=window.size - 1)
        sizes.append(window.size)
    assert sizes == sorted(sizes) and sizes[-1] == 64


def test_adaptive_window_rests_and_probes_ever_more_rarely():
    window = AdaptiveWindow(16, 0.05)
    assert window.size == PROBE
    drafting = []
    for step in range(400):
        if window.size > 1:
            drafting.append(step)
        window.update(accepted=0)
    assert len(drafting) < 20
    pauses = [b - a for a, b in itertools.pairwise(drafting) if b - a > 1]
    assert pauses[0] > FIRST_REST and pauses == sorted(pauses) and len(pauses) >= 2
    for _ in range(1000):
        window.update(accepted=4)
    assert window.size == 16, "a probe that succeeds ends the rest"
    assert AdaptiveWindow(2, 0.05).size == 2 < PROBE


@pytest.mark.parametrize(("cost", "size"), [(0.2, 2), (0.05, 8), (0.02, 32), (0.0, 64)])
def test_where_positions_cost_less_the_window_grows_further(cost, size):
    window = AdaptiveWindow(64, cost)
    for _ in range(50):
        window.update(accepted=min(1.9, window.size - 1))
    assert window.size == size


def test_reach_follows_the_candidates():
    reach = AdaptiveReach(16)
    for _ in range(5):
        reach.update(tried=reach.tokens, accepted=reach.tokens)
    assert reach.tokens == 16
    reach.update(tried=16, accepted=3)
    reach.update(tried=0, accepted=0)
    assert reach.tokens == 16, "neither a part nor no candidate at all is a failure"
    for _ in range(6):
        reach.update(tried=reach.tokens, accepted=0)
    assert reach.tokens == 1


def test_the_guess_that_was_right_further_is_tried_next():
    better = BetterGuess()
    assert better.choose([1, 2, 3], [7]) == [1, 2, 3], "the model's own where nothing is known"
    better.update([7])
    assert better.choose([1, 2, 3], [8]) == [8, 2, 3]
    for _ in range(3):
        better.update([1, 2, 9])
        better.choose([1, 2, 3], [8])
    assert better.choose([4], [5, 6]) == [4]


def test_with_other_first_guesses_n_grams_never_replace_the_draft():
    pool = NgramPool()
    pool.extend([5, 6, 7, 8, 5])
    assert FirstGuess("ngram", [5], pool, "").ngram([5], 3) == [6, 7, 8]
    assert FirstGuess("prompt", [5], pool, "").ngram([5], 3) == FirstGuess("repeat", [5], pool, "").ngram([5], 3) == []


def test_a_draft_is_never_longer_than_there_is_room_for():
    blocks = Blocks(JacobiConfig(block_size=10**9), 3, Zeros())
    blocks.advance([9, 9, 9, 10], [], 5)
    assert blocks.draft == [10, 0, 0, 0, 0]
