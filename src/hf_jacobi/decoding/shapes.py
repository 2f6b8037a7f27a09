"""Which shapes a step may have: those that its drafts happen to need, or few ones, each compiled once."""

from __future__ import annotations

from bisect import bisect_left


WIDTHS = (1, 4, 8, 16, 32, 64)  # nodes a row; beyond the last, its multiples
FEWEST_SLOTS = 1024  # that attention goes over; beyond them, twice as many each time
FINENESS = 32  # the number of slots in all has so many steps from one power of two to the next


class GrowingShapes:
    """As many nodes and slots as there are."""

    def width(self, nodes: int) -> int:
        """Q, the nodes a row that a step lays out, for the longest draft of its rows."""
        return nodes

    def slots(self, end: int) -> int:
        """S, how many slots attention goes over, for one past the last that is written."""
        return end


class FixedShapes:
    """
    Few of them: more nodes cost little beside compiling, or capturing, another step.

    Args:
        tokens: how many the longest text may have.
        nodes: how many a row a step may have, at most.
    """

    def __init__(self, tokens: int, nodes: int):
        needed = tokens + nodes
        step = max(1, (1 << needed.bit_length()) // (2 * FINENESS))
        self.total = -(-needed // step) * step

    @staticmethod
    def width(nodes: int) -> int:
        """As `GrowingShapes.width`."""
        if nodes > WIDTHS[-1]:
            return -(-nodes // WIDTHS[-1]) * WIDTHS[-1]
        return WIDTHS[bisect_left(WIDTHS, nodes)]

    def slots(self, end: int) -> int:
        """As `GrowingShapes.slots`."""
        slots = FEWEST_SLOTS
        while slots < end:
            slots *= 2
        return min(slots, self.total)
