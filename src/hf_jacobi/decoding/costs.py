"""What a forward costs by how many positions it scores: the curve that adaptive decoding decides on. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .errors import UsageError


@dataclass(frozen=True)
class CostCurve:
    """
    The cost of a forward by the number of positions it scores in each row, in forwards over one position.

    Between two points it is a line, beyond the last one that of the last two goes on. It never falls: more positions
    cost at least as much.

    Args:
        points: `(positions, cost)`, in any unit; the first is that of one position, the positions rise.

    Example:

    ```python
    >>> CostCurve.of([[1, 77], [2, 130], [16, 216]]).cost(2)  # milliseconds will do
    1.6883116883116882
    ```
    """

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, cost: float | Sequence | Mapping, rows: int = 1) -> CostCurve:
        """
        The curve that `JacobiConfig.position_cost` gives.

        Args:
            cost: what one more position adds; or `[positions, cost]` pairs; or those by the number of rows of the
                batch, of which the nearest counts.
            rows: of the batch.
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
        """Of a forward over so many positions in each row."""
        if len(self.points) == 1:
            return self.points[0][1]
        ends = next((pair for pair in pairwise(self.points) if positions <= pair[1][0]), self.points[-2:])
        (first, low), (last, high) = ends
        return low + (high - low) * (positions - first) / (last - first)


def check_cost(cost) -> None:
    """Raises `UsageError` where `cost` is no `JacobiConfig.position_cost`."""
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
    """Of a batch; JSON makes the keys of a dict strings."""
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


# Where nothing is measured: by the type of the device. On a CPU those of a machine on which a second position costs
# much (an AMD without AMX took 1.7, an Intel with AMX 1.06), so that what is tried there pays anywhere.
CPU = ((1, 1.0), (2, 1.5), (8, 1.9), (16, 2.5))
GPU = ((1, 1.0), (16, 1.05), (64, 1.3))


def default_curve(device: str) -> CostCurve:
    """What forwards cost on such a device (`torch.device.type`), roughly."""
    return CostCurve(GPU if device in ("cuda", "xpu", "npu") else CPU)
