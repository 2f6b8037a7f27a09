"""What the steps of an engine cost by how many positions they score, learned from those that go by. No torch."""

from __future__ import annotations

from collections import deque
from statistics import median

from ..decoding.costs import CostCurve


KEPT = 9  # of the newest times of steps that are alike
ENOUGH = 3  # of them, from which they are believed
PAUSE = 4.0  # times longer than such steps took so far: the engine waited for something else


class StepTimes:
    """
    Times of steps, by the number of requests and of positions, each rounded up to a power of two.

    An engine's steps hold its scheduling and sampling, too, so that they cannot be timed beforehand. The median of the
    newest steps that are alike counts: other work on the machine slows some of them.
    """

    def __init__(self):
        self.seconds: dict[tuple[int, int], deque[float]] = {}

    def saw(self, requests: int, positions: int, seconds: float) -> None:
        """
        Takes in a step.

        Args:
            requests: that it served.
            positions: that it scored for all of them together.
            seconds: it took.
        """
        key = _power_of_two(requests), _power_of_two(-(-positions // requests))
        times = self.seconds.setdefault(key, deque(maxlen=KEPT))
        if len(times) < ENOUGH or seconds < PAUSE * median(times):
            times.append(seconds)

    def curve(self, requests: int, default: CostCurve) -> CostCurve:
        """
        What steps for so many requests cost, by the positions of each.

        Args:
            requests: how many run.
            default: counts as long as nothing else is known. Beyond what is known its shape is gone on with.
        """
        requests = _power_of_two(requests)
        known = {
            width: median(times)
            for (rows, width), times in self.seconds.items()
            if rows == requests and len(times) >= ENOUGH
        }
        if len(known) < 2 or 1 not in known:
            return default
        points = [(width, known[width] / known[1]) for width in sorted(known)]
        last, cost = points[-1]
        points += [(width, cost * default.cost(width) / default.cost(last)) for width in (2 * last, 4 * last)]
        return CostCurve.of([list(point) for point in points])


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
