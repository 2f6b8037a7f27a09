"""
How many tokens are worth trying: what guesses have been worth, against what positions cost.

Every guessed token has a chance to be committed by the next forward: that of all guesses before it on its path, times
its own. The guesses are taken in order of their chances, as many as bring most tokens per cost (`Economy`). Chances
are running shares of the guesses of a kind that came true (`Odds`), and most of them cost nothing to learn: a guess
is compared with the text that comes, whether it was tried or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .costs import CostCurve
from .ngram_pool import LONGEST_MATCH


MEMORY = 0.97  # weight of the past in the running share of guesses that came true
# Shares that came true in chat, code and arithmetic of a small model, by the length of the match, from one token on.
MATCHED = (0.18, 0.45, 0.55, 0.65, 0.75, 0.8, 0.8, 0.85)
SECOND = 0.1  # of what stood elsewhere after the same tokens
OWN = 0.3
DRAFTED = 0.6  # of those of a draft-only adapter
PRIOR = 4.0  # observations that such a share counts for
OWN_PRIOR = 1.0  # the same of the model's own predictions, which differ much from model to model
LEAST = 0.01  # chance below which a guess is not looked at

WORTHWHILE = 1.03  # tokens per cost from which guesses are tried at all
PROBE = 3  # guesses of a probe
PROBES = 0.01  # share of the time that goes into them where nothing pays
# What trying may lose: so many forwards over one position, and so many more for each token.
FREE = 0.3
ALLOWED = 0.01
# What guesses promise to win back counts in the account: a share of it, at first no more than a forward for so many
# tokens of text; all of it where they promise so many tokens per cost; and at most so many forwards.
SURE = 0.6
EARLY = 16
CLEAR = 2.2
CREDIT = 1.5


class Odds:
    """The running share of guesses of one kind that came true, from a first belief on."""

    def __init__(self, share: float, weight: float):
        self.right, self.tried = share * weight, weight

    def see(self, right: bool) -> None:
        """Takes in one guess."""
        self.right = MEMORY * self.right + right
        self.tried = MEMORY * self.tried + 1

    @property
    def share(self) -> float:
        return self.right / self.tried


class Copied:
    """
    What guesses copied from earlier text are worth.

    How many tokens before the guess are those before the place it is copied from says most about it. Each right guess
    makes that match longer.
    """

    def __init__(self):
        self.best = [Odds(share, PRIOR) for share in MATCHED]
        self.others = Odds(SECOND, PRIOR)

    def see(self, candidates: list[tuple[int, list[int]]], token: int) -> None:
        """Takes in the token that came where candidates, `(match, tokens)` with the best first, said their first."""
        for rank, (match, tokens) in enumerate(candidates):
            (self.others if rank else self.best[match - 1]).see(tokens[0] == token)

    def chances(self, rank: int, match: int, count: int) -> list[float]:
        """That the first 1, 2, ... of so many tokens of a candidate come true."""
        chance, found = 1.0, []
        for place in range(count):
            odds = self.others if rank and not place else self.best[min(match + place, LONGEST_MATCH) - 1]
            chance *= odds.share
            found.append(chance)
        return found


class Own:
    """
    What the model's own predictions are worth, by how far ahead they are, from one token on.

    What is not known of far ones is taken from those before them, so that drafts grow while their end comes true.

    Args:
        depths: how far ahead, at most.
        share: of those that come true, as long as nothing is known.
    """

    def __init__(self, depths: int, share: float = OWN):
        self.share = share
        self.odds = [Odds(0.0, 0.0) for _ in range(depths)]
        self.pending: list[tuple[int, list[int]]] = []  # guesses that came true so far: (depth of the first, tokens)

    def see(self, accepted: list[int], predicted: list[int]) -> None:
        """Takes in the tokens that came, and what the model predicts for those after them."""
        waiting, self.pending = self.pending, [(0, predicted)] if predicted else []
        for depth, tokens in waiting:
            for guess, token in zip(tokens, accepted):
                if depth < len(self.odds):
                    self.odds[depth].see(guess == token)
                if guess != token:
                    break
                depth += 1
            else:
                if len(tokens) > len(accepted):
                    self.pending.append((depth, tokens[len(accepted) :]))

    def chances(self, count: int) -> list[float]:
        """That the first 1, 2, ... of so many come true."""
        chance, share, found = 1.0, self.share, []
        for odds in self.odds[:count]:
            share = (odds.right + OWN_PRIOR * share) / (odds.tried + OWN_PRIOR)
            chance *= share
            found.append(chance)
        return found


class Choice(NamedTuple):
    """
    What the rows of a forward are to try.

    Attributes:
        guesses: of each row, at most.
        probes: whether these are to be predictions of the model's own, whatever else is known.
        adapter: whether a draft-only adapter predicts beside the model in this forward, for the next drafts.
    """

    guesses: int
    probes: bool = False
    adapter: bool = False


class Outlook(NamedTuple):
    """
    The chances of the guesses of one row to be committed by the next forward, falling.

    Attributes:
        hand: of those that are known now.
        own: of the model's own predictions, if they were known.
        drafted: of the predictions of a draft-only adapter, if they were known.
        copied: of what is copied from earlier text, of which the best is known always.
    """

    hand: Sequence[float]
    own: Sequence[float] = ()
    drafted: Sequence[float] = ()
    copied: Sequence[float] = ()


class Economy:
    """
    How many guesses a forward tries: those that bring most tokens per cost, none where that is no more than one.

    Where nothing pays, the model's own predictions are tried now and then, as they are known no other way. An account
    of all forwards so far bounds what trying loses against one token a forward: nothing is tried that is expected to
    leave more than `FREE` forwards, and `ALLOWED` of one for each token, lost. All this depends on tokens and on the
    curve alone: a call with a given curve can be repeated.

    A draft-only adapter scores each guess again, in the same forward, and what it says is the next draft. It takes
    part while drafts of its kind bring more tokens per cost than those without it, its own positions counted.

    The rows of a batch share a forward, which is as wide as its widest row. So one number of guesses serves all of
    them, and what counts is the progress of the row that is behind: the text of a batch is done when its last row is.

    Args:
        curve: what a forward costs.
        with_adapter: what one costs of whose positions the second half is a draft-only adapter's; `None` without one.
        width: how many positions a forward has for so many nodes, where it has few shapes.
    """

    def __init__(self, curve: CostCurve, with_adapter: CostCurve | None = None, width: Callable[[int], int] = int):
        self.width = width
        self.spent, self.probing = 1.0, 0.0  # in forwards over one position, the prefill among them
        self.began = False  # whether the last forward was over guesses that its predictions were to take the place of
        self.progress = 1  # forwards that one token at a time would have taken
        self.follow(curve, with_adapter)

    def follow(self, curve: CostCurve, with_adapter: CostCurve | None = None) -> None:
        """Goes on with other curves, as where the batch has fewer rows."""
        self.curve, self.with_adapter = curve, with_adapter
        self._costs: dict[bool, list[float]] = {False: [], True: []}

    def cost(self, guesses: int, adapter: bool = False) -> float:
        """Of a forward over so many guesses in each row, with a draft-only adapter or without."""
        costs, curve = self._costs[adapter], self.with_adapter if adapter else self.curve
        while len(costs) <= guesses:
            positions = (1 + adapter) * self.width(1 + len(costs)) if costs else 1
            costs.append(curve.cost(positions))
        return costs[guesses]

    def decide(self, rows: list[Outlook], idle: bool = False, drafted: bool = False) -> Choice:
        """
        What the rows are to try.

        Args:
            rows: the chances of each row's guesses.
            idle: whether the model has predicted nothing yet. Its own predictions take two forwards then: one over
                any guesses, of which none may be right, and one over what it says to them.
            drafted: whether what is known now is what a draft-only adapter said.
        """
        began, self.began = self.began, False
        hand = [row.hand for row in rows]
        adapter = self._adapter_pays(rows)
        if adapter and not drafted:
            guesses, loss, _ = self._best([row.drafted for row in rows], forwards=2, adapter=True)
            if guesses and self._may_lose(loss):
                self.began = True
                return Choice(guesses, idle, True)
            adapter = False
        guesses, loss, _ = self._best(hand, adapter=adapter)
        if guesses and (began or self._may_lose(loss)):
            return Choice(guesses, False, adapter or self._may_probe_adapter(guesses))
        if idle:
            guesses, loss, _ = self._best([row.own for row in rows], forwards=2)
            if guesses and self._may_lose(loss):
                self.began = True
                return Choice(guesses, True)
        adapter = self.with_adapter is not None
        loss = self.cost(PROBE, adapter) - 1
        if self.probing <= PROBES * self.progress and self._may_lose(loss):
            self.probing += loss
            return Choice(PROBE, True, adapter)
        return Choice(0)

    def _adapter_pays(self, rows: list[Outlook]) -> bool:
        """Whether drafts of a draft-only adapter bring more tokens per cost than those without it."""
        if self.with_adapter is None:
            return False
        _, _, drafted = self._best([max(row.drafted, row.copied, key=sum) for row in rows], adapter=True)
        _, _, plain = self._best([max(row.own, row.copied, key=sum) for row in rows])
        return drafted > plain

    def _may_probe_adapter(self, guesses: int) -> bool:
        """Whether an adapter that does not pay takes part all the same, as what it says is known no other way."""
        if self.with_adapter is None or self.probing > PROBES * self.progress:
            return False
        loss = self.cost(guesses, True) - self.cost(guesses)
        if not self._may_lose(loss):
            return False
        self.probing += loss
        return True

    def _best(
        self, chances: Sequence[Sequence[float]], forwards: int = 1, adapter: bool = False
    ) -> tuple[int, float, float]:
        """
        How many guesses bring most tokens per cost, the last of so many forwards alone more than one; how many
        forwards over one position are at stake in that; and how many tokens per cost they bring.
        """
        rows, tokens = len(chances), float(forwards)
        best, count, stake = WORTHWHILE, 0, 0.0
        for guesses in range(1, max(map(len, chances), default=0) + 1):
            tokens += sum(row[guesses - 1] for row in chances if len(row) >= guesses) / rows
            cost = forwards * self.cost(guesses, adapter)
            if tokens > best * cost:
                more = tokens - forwards
                credit = more if tokens > CLEAR * cost else min(SURE * more, self.progress / EARLY)
                best, count, stake = tokens / cost, guesses, cost - forwards - min(credit, CREDIT)
        return count, stake, best

    def _may_lose(self, loss: float) -> bool:
        """Whether the account allows a forward that is expected to lose so much."""
        return self.spent + loss <= FREE + (1 + ALLOWED) * self.progress

    def took(self, guesses: int, progress: int, adapter: bool = False) -> None:
        """Takes in how many guesses a forward tried, and how many tokens the shortest row has by now."""
        self.spent += self.cost(guesses, adapter and guesses > 0)
        self.progress = progress
