"""How many tokens are worth trying: the draft and the recycled n-grams follow the acceptance seen so far."""

from __future__ import annotations


PROBE = 4  # size of the window when nothing is known yet
MEMORY = 0.7  # weight of the past in the running mean of accepted guesses
# Accepted guesses, in costs of all positions of the window, from which it grows and below which it shrinks.
GROWS = 5.0
SHRINKS = 2.5
RESTS = 8.0  # accepted guesses, in costs of a position and at most one, below which drafting rests
FIRST_REST = 32  # forwards until the next probe, doubled each time that probe fails


class AdaptiveWindow:
    """
    The size of one sequence's window, between 1 (no draft) and `largest`.

    It doubles while the guesses that are accepted are worth what the window's positions cost, with something to spare,
    and halves when they are not; at a cost of 0.05, while a quarter of the window is accepted and when less than an
    eighth is. When next to nothing is accepted, drafting rests and is probed again after a while, so a model or a
    passage that cannot be decoded in parallel pays for a few small drafts only. The size depends on the tokens alone,
    not on the clock: a call can be repeated.

    Args:
        largest: the size it may grow to.
        cost: of one more position, in forwards over one token (`JacobiConfig.position_cost`).
    """

    def __init__(self, largest: int, cost: float):
        self.largest = largest
        self.cost = cost
        self.rest = FIRST_REST
        self._probe()

    def _probe(self) -> None:
        self.size = min(PROBE, self.largest)
        self.accepted = 1.0
        self.resting = 0

    def update(self, accepted: int) -> None:
        """Takes in how many guesses of the draft the last forward accepted."""
        if self.resting:
            self.resting -= 1
            if not self.resting:
                self._probe()
            return
        self.accepted = MEMORY * self.accepted + (1 - MEMORY) * accepted
        if self.accepted < min(1.0, RESTS * self.cost):
            self.size, self.resting = 1, self.rest
            self.rest *= 2
        elif self.accepted >= GROWS * self.cost * self.size:
            self.size = min(2 * self.size, self.largest)
        elif self.accepted < SHRINKS * self.cost * self.size:
            self.size = max(1, self.size // 2)
        if self.size > PROBE:
            self.rest = FIRST_REST


class AdaptiveReach:
    """
    How far recycled n-grams are followed, between 1 token and `largest`.

    It doubles when an n-gram was accepted to its end and halves when none of its tokens was, so text that repeats
    itself is copied in long strides and text that does not costs one position more.
    """

    def __init__(self, largest: int):
        self.largest = largest
        self.tokens = min(2, largest)

    def update(self, tried: int, accepted: int) -> None:
        """Takes in how many tokens the longest candidate had, and how many tokens of a candidate came true."""
        if not tried:
            return
        if accepted >= tried:
            self.tokens = min(2 * self.tokens, self.largest)
        elif not accepted:
            self.tokens = max(1, self.tokens // 2)
