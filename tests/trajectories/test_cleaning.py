"""Loops are found and cut, and dropped completions are counted."""

from collections import Counter

import pytest

from hf_jacobi.trajectories.cleaning import clean, repetition_start


EOS = 2
KEEP = {"repetition": "keep", "overlong": "keep", "empty": "keep"}
PROSE = list(range(10, 60))


@pytest.mark.parametrize(("piece", "times", "found"), [([7], 32, True), ([7], 31, False), ([7, 8], 16, True)])
def test_a_loop_is_many_tokens_of_the_same_piece(piece, times, found):
    assert repetition_start(PROSE + piece * times) == ((50, len(piece)) if found else None)


def test_a_long_piece_must_come_four_times():
    piece = list(range(100, 120))
    assert repetition_start(PROSE + piece * 4) == (50, 20)
    assert repetition_start(PROSE + piece * 3) is None
    assert repetition_start(PROSE + piece * 4 + piece[:7]) == (50, 20)
    assert repetition_start(PROSE + piece * 4 + [9]) is None, "a loop that the text leaves is none"


def test_the_beginning_of_a_loop_stays():
    counts = Counter()
    assert clean(PROSE + [7, 8] * 20, [EOS], **KEEP | {"repetition": "cut"}, counts=counts) == [*PROSE, 7, 8]
    assert clean(PROSE + [7, 8] * 20 + [EOS], [EOS], **KEEP | {"repetition": "drop"}, counts=counts) is None
    assert clean(PROSE + [7, 8] * 20, [EOS], **KEEP, counts=counts) == PROSE + [7, 8] * 20
    assert counts == {"repetitive": 3, "overlong": 2}
    assert clean([3, 4] * 30, [EOS], **KEEP | {"repetition": "cut", "overlong": "drop"}, counts=counts) is None


def test_text_without_an_end_is_overlong():
    counts = Counter()
    assert clean(PROSE, [EOS], **KEEP | {"overlong": "drop"}, counts=counts) is None
    assert clean([*PROSE, EOS], [EOS], **KEEP | {"overlong": "drop"}, counts=counts) == [*PROSE, EOS]
    assert counts == {"overlong": 1}


def test_an_end_alone_is_empty():
    counts = Counter()
    assert clean([EOS], [EOS], **KEEP, counts=counts) == [EOS]
    assert clean([EOS], [EOS], **KEEP | {"empty": "drop"}, counts=counts) is None
    assert counts == {"empty": 2}
