"""The cost of an engine's steps by the number of positions they score, measured while it runs. Without torch."""

from __future__ import annotations

from collections import deque
from statistics import median

from ..decoding.costs import CostCurve


KEPT = 9  # newest times of steps of one size
ENOUGH = 3  # times from which a median counts
PAUSE = 4.0  # times the median: a longer step includes a pause of the engine


class StepTimes:
    """
    Times of steps by size: the number of requests and the number of positions of each, both rounded up to a power of
    two.

    A step includes the engine's scheduling and sampling, so it cannot be timed in advance. What counts is the median
    of the newest steps of one size, because other work on the machine slows some of them down.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, int], deque[float]] = {}

    def saw(self, requests: int, positions: int, seconds: float) -> None:
        """
        Records a step.

        Args:
            requests: the number of requests in it.
            positions: the number of positions that it scored for all of them together.
            seconds: its duration.
        """
        key = _power_of_two(requests), _power_of_two(-(-positions // requests))
        times = self.seconds.setdefault(key, deque(maxlen=KEPT))
        if len(times) < ENOUGH or seconds < PAUSE * median(times):
            times.append(seconds)

    def curve(self, requests: int, default: CostCurve) -> CostCurve:
        """
        The cost of a step by the number of positions of each request.

        Args:
            requests: the number of running requests.
            default: the curve to use until enough steps are timed; beyond the widest of them its shape continues.
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
