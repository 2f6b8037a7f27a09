"""Which shapes a step can have: whatever its drafts need, or a few fixed ones, each of which is compiled once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


WIDTHS = (1, 4, 8, 16, 32, 64)  # nodes per row; above the last one, its multiples
FEWEST_SLOTS = 1024  # that attention covers; the number doubles from there
FINENESS = 32  # steps for the total number of slots between one power of two and the next


class GrowingShapes:
    """
    As many nodes and slots as the step needs.

    Attributes:
        total: the number of slots of the cache; `None` because it grows.
        plateaus: `(first, last)` numbers of positions between which the cost does not rise (`CostCurve.plateaus`).
    """

    total: int | None = None
    plateaus: Sequence[tuple[int, int]] = ()

    def width(self, nodes: int) -> int:
        """Q, the nodes per row that a step lays out when the longest draft of its rows has `nodes`."""
        return nodes

    def padded(self, positions: int) -> int:
        """
        The number of positions that a forward over `positions` is padded to.

        Matrix products on CPUs can take longer over 10 rows than over 16, so a step inside a plateau takes all of it.
        """
        return next((last for first, last in self.plateaus if first <= positions < last), positions)

    def slots(self, end: int) -> int:
        """S, the number of slots that attention covers when `end` is one past the last slot written."""
        return end


class FixedShapes:
    """
    A few shapes: extra nodes cost little compared with compiling or capturing another step.

    Args:
        tokens: the length of the longest text.
        nodes: the largest number of nodes per row in a step.

    Attributes:
        total: as in `GrowingShapes`.
    """

    def __init__(self, tokens: int, nodes: int):
        needed = tokens + nodes
        step = max(1, (1 << needed.bit_length()) // (2 * FINENESS))
        self.total: int = -(-needed // step) * step

    @staticmethod
    def width(nodes: int) -> int:
        """As `GrowingShapes.width`."""
        if nodes > WIDTHS[-1]:
            return -(-nodes // WIDTHS[-1]) * WIDTHS[-1]
        return WIDTHS[bisect_left(WIDTHS, nodes)]

    @staticmethod
    def padded(positions: int) -> int:
        """As `GrowingShapes.padded`."""
        return positions

    def slots(self, end: int) -> int:
        """As `GrowingShapes.slots`."""
        slots = FEWEST_SLOTS
        while slots < end:
            slots *= 2
        return min(slots, self.total)
