"""The problems of the miniature, and which of them are held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


HELD_OUT = 20  # one key in this many


@dataclass(frozen=True)
class Problem:
    """
    One problem with its worked solution.

    Args:
        task: `"math"` or `"sql"`.
        key: template and numbers; problems with the same key are all held out or all for training.
        prompt: the input of the model.
        completion: what it should write.
        answer: the reference for the task's scorer.
    """

    task: str
    key: str
    prompt: str
    completion: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT == 0


def problems(make: Callable[[random.Random], Problem], seed: str, held_out: bool) -> Iterator[Problem]:
    """Endless problems of one side of the split, without duplicate prompts."""
    draw = random.Random(f"{seed} {held_out}")
    seen = set()
    while True:
        problem = make(draw)
        if problem.is_held_out == held_out and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem
