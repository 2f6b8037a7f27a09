"""Noise levels compared with a loop in plain Python, and the shapes of the schedules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_jacobi.trajectories import nearest_state, noise_level, noise_targets


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_noise_level_is_the_unconverged_share(pairs):
    state, final = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    prefix = 0
    while prefix < len(final) and state[prefix] == final[prefix]:
        prefix += 1
    assert noise_level(state, final) == (len(final) - prefix) / len(final)


def test_schedules():
    assert noise_targets("linear", 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert noise_targets("reverse", 3, 0.2, 0.8) == pytest.approx([0.8, 0.5, 0.2])
    assert noise_targets("constant", 2, 0.1, 0.6) == [0.6, 0.6]
    assert noise_targets("linear", 1, 0.0, 0.7) == noise_targets("reverse", 1, 0.0, 0.7) == [0.7]
    drawn = noise_targets("random", 100, 0.3, 0.6, random.Random(1))
    assert drawn == noise_targets("random", 100, 0.3, 0.6, random.Random(1)) != sorted(drawn)
    assert 0.3 <= min(drawn) < 0.33 and 0.57 < max(drawn) <= 0.6
    assert noise_targets(lambda index, size, generator: index / size, 4) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "arguments", [("linear", 0), ("linear", 4, 0.5, 0.2), ("linear", 4, -0.1, 1.0), ("cosine", 4), (lambda *_: 1.5, 4)]
)
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"noise|window_size"):
        noise_targets(*arguments)


def test_the_nearest_state_and_the_noisier_of_two():
    states = [[1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]]  # levels 0.75, 0.5, 0.25, 0
    assert [nearest_state(states, target) for target in (1.0, 0.75, 0.6, 0.25, 0.1, 0.0)] == [0, 0, 1, 2, 3, 3]
    assert nearest_state(states, 0.625) == 0
    assert nearest_state([[5]], 1.0) == 0
