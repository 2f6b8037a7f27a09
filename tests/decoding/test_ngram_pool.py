"""The pool finds the longest and latest match, and never grows without bound."""

from __future__ import annotations

from hf_jacobi.decoding.ngram_pool import CONTEXT_LENGTHS, KEPT_PER_CONTEXT, LONGEST_MATCH, NgramPool


def pool_of(*tokens: int) -> NgramPool:
    pool = NgramPool()
    pool.extend(list(tokens))
    return pool


def test_the_latest_match_comes_first():
    assert pool_of(1, 2, 3, 1, 4, 5, 1).continuations([1], length=2, limit=4) == [[4, 5], [2, 3]]


def test_the_longest_match_comes_before_a_later_one():
    pool = pool_of(7, 1, 2, 9, 8, 1, 3, 3)
    assert pool.continuations([7, 1], length=1, limit=2) == [[2], [3]]


def test_a_single_candidate_counts():
    assert pool_of(1, 2).continuations([1], length=3, limit=4) == [[2]]


def test_matches_say_how_long_they_are_and_begin_differently():
    pool = pool_of(5, 6, 7, 1, 2, 9, 7, 1, 3, 4, 1, 3, 8, 8)
    assert pool.matches([5, 6, 7, 1], length=2, limit=4) == [(4, [2, 9]), (2, [3, 4])]
    assert pool.matches([5, 6, 7, 1], length=9, limit=1) == [(4, [2, 9, 7, 1, 3, 4, 1, 3, 8])]
    assert pool.matches([0, 1], length=2, limit=4) == [(1, [3, 8]), (1, [2, 9])], "among equals the latest first"
    assert pool.matches([0, 0], 2, 4) == pool.matches([], 2, 4) == pool.matches([1], 0, 4) == []
    assert len(pool.matches([1], 1, 1)) == 1


def test_a_match_is_compared_so_far_and_no_further():
    pool = pool_of(*range(20), 99)
    assert pool.matches(list(range(20)), length=1, limit=1) == [(LONGEST_MATCH, [99])]


def test_the_end_of_the_text_itself_is_no_match():
    assert pool_of(1, 2, 3).continuations([3], length=3, limit=4) == []


def test_rejected_drafts_are_found_but_do_not_join_the_text():
    pool = pool_of(1, 2)
    pool.recycle([5, 6, 7])
    assert pool.continuations([5], length=4, limit=1) == [[6, 7]]
    pool.extend([8])
    assert pool.continuations([7], length=4, limit=1) == []
    assert pool.continuations([2], length=4, limit=1) == [[8]]


def test_a_match_that_ended_the_text_grows_with_it():
    pool = pool_of(1, 2, 1)
    pool.extend([3])
    assert pool.continuations([1], length=2, limit=2) == [[3], [2, 1]]


def test_same_continuations_are_given_once():
    assert pool_of(1, 2, 1, 2, 1, 2, 1).continuations([1], length=1, limit=4) == [[2]]


def test_nothing_is_asked_for():
    assert pool_of(1, 2).continuations([1], length=0, limit=4) == []
    assert pool_of(1, 2).continuations([1], length=4, limit=0) == []
    assert pool_of(1, 2).continuations([], length=4, limit=4) == []


def test_old_matches_are_forgotten():
    pool = NgramPool()
    for token in range(100):
        pool.extend([1, 10 + token])
    found = pool.continuations([1], length=1, limit=100)
    assert found == [[10 + token] for token in range(99, 99 - KEPT_PER_CONTEXT, -1)]
    assert all(len(ends) <= KEPT_PER_CONTEXT for ends in pool._ends.values())
    assert {len(key) for key in pool._ends} == set(CONTEXT_LENGTHS)
