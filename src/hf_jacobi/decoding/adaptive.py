"""
How many tokens are worth trying: what guesses have been worth, against what positions cost.

Every guessed token has a chance to be committed by the next forward: that of all guesses before it on its path, times
its own. The guesses are taken in order of their chances, as many as bring most tokens per cost (`Economy`). Chances
are running shares of the guesses of a kind that came true (`Odds`), and most of them cost nothing to learn: a guess
is compared with the text that comes, whether it was tried or not.
"""

from __future__ import annotations

from collections.abc import Callable

from .costs import CostCurve
from .ngram_pool import LONGEST_MATCH


MEMORY = 0.97  # weight of the past in the running share of guesses that came true
# Shares that came true in chat, code and arithmetic of a small model, by the length of the match, from one token on.
MATCHED = (0.18, 0.45, 0.55, 0.65, 0.75, 0.8, 0.8, 0.85)
SECOND = 0.1  # of what stood elsewhere after the same tokens
OWN = 0.3
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
    """

    def __init__(self, depths: int):
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
        chance, share, found = 1.0, OWN, []
        for odds in self.odds[:count]:
            share = (odds.right + OWN_PRIOR * share) / (odds.tried + OWN_PRIOR)
            chance *= share
            found.append(chance)
        return found


class Economy:
    """
    How many guesses a forward tries: those that bring most tokens per cost, none where that is no more than one.

    Where nothing pays, the model's own predictions are tried now and then, as they are known no other way. An account
    of all forwards so far bounds what trying loses against one token a forward: nothing is tried that is expected to
    leave more than `FREE` forwards, and `ALLOWED` of one for each token, lost. All this depends on tokens and on the
    curve alone: a call with a given curve can be repeated.

    The rows of a batch share a forward, which is as wide as its widest row. So one number of guesses serves all of
    them, and what counts is the progress of the row that is behind: the text of a batch is done when its last row is.

    Args:
        curve: what a forward costs.
        columns: positions that a token takes where something is tried (two with a draft-only adapter, which scores
            each again).
        width: how many positions a forward has for so many nodes, where it has few shapes.
    """

    def __init__(self, curve: CostCurve, columns: int = 1, width: Callable[[int], int] = int):
        self.curve, self.columns, self.width = curve, columns, width
        self.costs: list[float] = []
        self.spent, self.probing = 1.0, 0.0  # in forwards over one position, the prefill among them
        self.began = False  # whether the last forward was over guesses that its predictions were to take the place of
        self.progress = 1  # forwards that one token at a time would have taken

    def cost(self, guesses: int) -> float:
        """Of a forward over so many guesses in each row."""
        while len(self.costs) <= guesses:
            positions = self.columns * self.width(1 + len(self.costs)) if self.costs else 1
            self.costs.append(self.curve.cost(positions))
        return self.costs[guesses]

    def decide(self, chances: list[list[float]], promises: list[list[float]] | None = None) -> tuple[int, bool]:
        """
        How many guesses each row is to try at most, and whether these are to be predictions of the model's own.

        Args:
            chances: those of each row's guesses, falling.
            promises: where the model has predicted nothing yet, the chances that its own predictions would have. They
                take two forwards: one over any guesses, of which none may be right, and one over what it says to them.
        """
        began, self.began = self.began, False
        guesses, loss = self._best(chances)
        if guesses and (began or self._may_lose(loss)):
            return guesses, False
        guesses, loss = self._best(promises or [], forwards=2)
        if guesses and self._may_lose(loss):
            self.began = True
            return guesses, True
        loss = self.cost(PROBE) - 1
        if self.probing <= PROBES * self.progress and self._may_lose(loss):
            self.probing += loss
            return PROBE, True
        return 0, False

    def _best(self, chances: list[list[float]], forwards: int = 1) -> tuple[int, float]:
        """
        How many guesses bring most tokens per cost, the last of so many forwards alone more than one; and how many
        forwards over one position are at stake in that.
        """
        rows, tokens = len(chances), float(forwards)
        best, count, stake = WORTHWHILE, 0, 0.0
        for guesses in range(1, max(map(len, chances), default=0) + 1):
            tokens += sum(row[guesses - 1] for row in chances if len(row) >= guesses) / rows
            cost = forwards * self.cost(guesses)
            if tokens > best * cost:
                more = tokens - forwards
                credit = more if tokens > CLEAR * cost else min(SURE * more, self.progress / EARLY)
                best, count, stake = tokens / cost, guesses, cost - forwards - min(credit, CREDIT)
        return count, stake

    def _may_lose(self, loss: float) -> bool:
        """Whether the account allows a forward that is expected to lose so much."""
        return self.spent + loss <= FREE + (1 + ALLOWED) * self.progress

    def follow(self, curve: CostCurve) -> None:
        """Goes on with another curve, as where the batch has fewer rows."""
        if curve is not self.curve:
            self.curve, self.costs = curve, []

    def took(self, guesses: int, progress: int) -> None:
        """Takes in how many guesses a forward tried, and how many tokens the shortest row has by now."""
        self.spent += self.cost(guesses)
        self.progress = progress
