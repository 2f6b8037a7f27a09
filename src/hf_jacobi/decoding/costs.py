"""What a forward costs by the number of positions it scores: the basis of adaptive decoding. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .errors import UsageError


FLAT = 0.1  # the largest share by which measured costs of one plateau differ


@dataclass(frozen=True)
class CostCurve:
    """
    The cost of a forward by the number of positions it scores in each row, in forwards over one position.

    It is linear between two points, and the line through the last two continues beyond them. It never falls: more
    positions cost at least as much.

    Args:
        points: `(positions, cost)` pairs, in any unit; the first is for one position, and the positions rise.

    Example:

    ```python
    >>> CostCurve.of([[1, 77], [2, 130], [16, 216]]).cost(2)  # any unit, here milliseconds
    1.6883116883116882
    ```
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, cost: float | Sequence | Mapping, rows: int = 1) -> CostCurve:
        """
        The curve of a `JacobiConfig.position_cost`.

        Args:
            cost: what one more position adds; or `[positions, cost]` pairs; or such pairs by the number of rows of
                the batch, of which the nearest is used.
            rows: the number of rows of the batch.
        """
        if isinstance(cost, Mapping):
            nearest = min(cost, key=lambda size: abs(math.log(int(size) / rows)))
            return cls.of(cost[nearest])
        if isinstance(cost, (int, float)):
            return cls(((1, 1.0), (2, 1.0 + cost)))
        points, highest = [], 0.0
        for positions, value in cost:
            highest = max(highest, value / cost[0][1])
            points.append((int(positions), highest))
        return cls(tuple(points))

    def cost(self, positions: int) -> float:
        """The cost of a forward over `positions` positions in each row."""
        if len(self.points) == 1:
            return self.points[0][1]
        ends = next((pair for pair in pairwise(self.points) if positions <= pair[1][0]), self.points[-2:])
        (first, low), (last, high) = ends
        return low + (high - low) * (positions - first) / (last - first)

    def levelled(self) -> CostCurve:
        """This curve, with a plateau wherever the cost of neighbouring points differs by at most the share `FLAT`."""
        points = list(self.points[:2])
        for (first, low), (last, high) in pairwise(self.points[1:]):
            if last > first + 1 and low < high <= (1 + FLAT) * low:
                points.append((first + 1, high))
            points.append((last, high))
        return CostCurve(tuple(points))

    @property
    def plateaus(self) -> list[tuple[int, int]]:
        """The first and last number of positions, from two up, between which the cost does not rise."""
        return [(first, last) for (first, low), (last, high) in pairwise(self.points) if first > 1 and high <= low]


def check_cost(cost) -> None:
    """Raises `UsageError` if `cost` is not a valid `JacobiConfig.position_cost`."""
    if cost is None or (_is_number(cost) and 0.0 <= cost < math.inf):
        return
    curves = list(cost.values()) if isinstance(cost, Mapping) and cost else [cost]
    sizes = list(cost) if isinstance(cost, Mapping) else []
    if not (all(map(_is_curve, curves)) and all(map(_is_size, sizes))):
        raise UsageError(
            "JacobiConfig: `position_cost` must be a number of at least 0, a list of [positions, cost] pairs that "
            "starts with 1 position and rises, a dict of such lists by batch size, or None (measured), got "
            f"{cost!r}."
        )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_size(size) -> bool:
    """Whether it is a batch size; JSON turns the keys of a dict into strings."""
    if isinstance(size, str):
        return size.isdecimal() and int(size) > 0
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def _is_curve(curve) -> bool:
    if not isinstance(curve, Sequence) or isinstance(curve, str) or not curve:
        return False
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_number, pair)) for pair in curve):
        return False
    positions, costs = zip(*curve)
    rises = all(before < after for before, after in pairwise(positions))
    return (
        positions[0] == 1 and rises and all(map(_is_size, positions)) and all(0.0 < cost < math.inf for cost in costs)
    )


# Used without a measurement, by the positions of all rows together. The CPU's are those of a machine on which a second
# position is expensive (an AMD without AMX took 1.7, an Intel with AMX 1.06), so that what pays there pays anywhere.
CPU = CostCurve(((1, 1.0), (2, 1.5), (8, 1.9), (16, 2.5)))
GPU = CostCurve(((1, 1.0), (16, 1.05), (64, 1.3), (256, 2.5)))


def default_curve(device: str, rows: int = 1) -> CostCurve:
    """A rough curve for a device (`torch.device.type`) and a number of rows."""
    whole = GPU if device in ("cuda", "xpu", "npu") else CPU
    return CostCurve.of([(positions, whole.cost(positions * rows)) for positions in (1, 2, 4, 8, 16, 32)])
