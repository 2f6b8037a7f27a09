"""The noise schedule: the noise level aimed at for each block of a window, and the state nearest to it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np

from ..decoding.drafting import matching_prefix
from ..decoding.errors import UsageError
from .checks import check_whole


NoiseSchedule = str | Callable[[int, int, random.Random], float]
SCHEDULES = ("linear", "random", "reverse", "constant")


def converged_prefix(state: Sequence[int], fixed_point: Sequence[int]) -> int:
    """The number of leading tokens in which a state equals the fixed point."""
    return matching_prefix(list(state), list(fixed_point))


def noise_level(state: Sequence[int], fixed_point: Sequence[int]) -> float:
    """The unconverged share of a state, (n - converged prefix) / n: 0 at the fixed point, at most 1."""
    return (len(fixed_point) - converged_prefix(state, fixed_point)) / len(fixed_point)


def noise_targets(
    schedule: NoiseSchedule,
    window_size: int,
    min_noise: float = 0.0,
    max_noise: float = 1.0,
    generator: random.Random | None = None,
) -> list[float]:
    """
    The noise level aimed at for each block of a window (paper, section 3.2).

    Args:
        schedule: `"linear"` (from `min_noise` to `max_noise`, progressive: the paper's best), `"reverse"` (from
            `max_noise` to `min_noise`), `"random"` (uniform between them, independently per block), `"constant"`
            (`max_noise` throughout), or a callable `(index, window_size, generator) -> level`.
        window_size: w, the number of blocks.
        min_noise, max_noise: the range, within 0 to 1. A callable need not respect it.
        generator: where `"random"` draws from.

    Returns:
        `window_size` levels. A window of one block gets `max_noise` from every deterministic schedule.

    Raises:
        `ValueError`: an unknown schedule, a window of no blocks, or levels outside 0 to 1.
    """
    check_whole("window_size", window_size, 1)
    if not 0.0 <= min_noise <= max_noise <= 1.0:
        raise UsageError(f"noise must satisfy 0 <= min_noise <= max_noise <= 1, got {min_noise} and {max_noise}.")
    generator = generator or random.Random(0)
    if callable(schedule):
        return [_level_of(schedule, index, window_size, generator) for index in range(window_size)]
    if schedule == "random":
        return [generator.uniform(min_noise, max_noise) for _ in range(window_size)]
    if schedule == "constant" or (window_size == 1 and schedule in SCHEDULES):
        return [max_noise] * window_size
    step = (max_noise - min_noise) / (window_size - 1) if window_size > 1 else 0.0
    if schedule == "linear":
        return [min_noise + step * index for index in range(window_size)]
    if schedule == "reverse":
        return [max_noise - step * index for index in range(window_size)]
    raise UsageError(f"`noise_schedule` must be one of {SCHEDULES} or a callable, got {schedule!r}.")


def _level_of(schedule: Callable, index: int, window_size: int, generator: random.Random) -> float:
    """The level that a user's schedule returns for a block."""
    try:
        inspect.signature(schedule).bind(index, window_size, generator)
    except TypeError as error:
        raise UsageError(
            f"`noise_schedule` is called with (index, window_size, generator), but yours does not take them: {error}."
        ) from None
    except ValueError:  # a function without a signature
        pass
    level = schedule(index, window_size, generator)
    if not isinstance(level, Real) or not 0.0 <= float(level) <= 1.0:
        raise UsageError(f"`noise_schedule` must return a level from 0 to 1, it returned {level!r} for block {index}.")
    return float(level)


def nearest_state(states: Sequence[Sequence[int]], target: float) -> int:
    """
    The index of the state whose noise level is nearest to `target`, the noisier one of a tie.

    Args:
        states: a block's trajectory, the last state being its fixed point.
        target: a noise level.
    """
    levels = [noise_level(state, states[-1]) for state in states]
    return min(range(len(states)), key=lambda index: (abs(levels[index] - target), -levels[index], index))


def nearest_states(levels: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    `nearest_state` of all blocks of a sequence at once.

    Args:
        levels: `[states]`, the noise levels of the states of all blocks.
        targets: `[copies, blocks]`, the levels aimed at.
        counts: `[blocks]`, the states of each block.

    Returns:
        `[copies, blocks]`, which of the states.
    """
    starts = np.cumsum(counts) - counts
    distances = np.abs(levels - np.repeat(targets, counts, axis=1))
    near = distances == np.repeat(np.minimum.reduceat(distances, starts, axis=1), counts, axis=1)
    noisiest = np.maximum.reduceat(np.where(near, levels, -1.0), starts, axis=1)
    best = near & (levels == np.repeat(noisiest, counts, axis=1))
    return np.minimum.reduceat(np.where(best, np.arange(len(levels)), len(levels)), starts, axis=1)
