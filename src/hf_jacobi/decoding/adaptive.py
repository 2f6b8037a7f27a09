"""
How many tokens are worth trying, given how often guesses were correct and what positions cost.

Every guessed token has a chance to be committed by the next forward: the chance of all guesses before it on its path,
times its own. The guesses are tried in order of their chances, as many as yield the most tokens per cost (`Economy`).
A chance is the running share of correct guesses of its kind (`Odds`). Most kinds cost nothing to learn, since a guess
is compared with the text that follows whether or not it was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .costs import CostCurve
from .ngram_pool import LONGEST_MATCH
from .ngram_table import chance_of


MEMORY = 0.97  # weight of the past in the running share of correct guesses
# Correct shares in chat, code and arithmetic of a small model, by the length of the match, from one token up.
MATCHED = (0.18, 0.45, 0.55, 0.65, 0.75, 0.8, 0.8, 0.85)
SECOND = 0.1  # correct share of what followed the same tokens elsewhere
OWN = 0.3  # of the model's own predictions
TABLED = 0.8  # correct guesses of an n-gram table, per one that its chances promise
DRAFTED = 0.5  # of the predictions of a draft-only adapter
PRIOR = 4.0  # observations that each of these shares counts for
OWN_PRIOR = 1.0  # the same for the model's own predictions, which vary much between models
TABLED_PRIOR = 4.0  # correct guesses that `TABLED` counts for
DRAFTED_PRIOR = 3.0  # the same for those of a draft-only adapter, which was trained for them
SUREST = 0.97  # chance of any guess of a table at most
LEAST = 0.01  # chance below which a guess is ignored

AHEAD = 8  # forwards with drafts of a draft-only adapter that follow one without, as far as is known
WORTHWHILE = 1.03  # tokens per cost above which guesses are tried
PROBE = 3  # guesses of a probe
PROBES = 0.01  # share of the time spent on probes where nothing pays
# The loss allowed, in forwards over one position: FREE in all, and ALLOWED for each token.
FREE = 0.3
ALLOWED = 0.01
TRIAL = 0.6  # in place of FREE for forwards in which a draft-only adapter takes part, which have their own account
# The expected gain of guesses offsets their cost in that account: a share SURE of it, at first no more than a forward
# for EARLY tokens of text; all of it where they promise CLEAR tokens per cost; never more than CREDIT forwards.
SURE = 0.6
EARLY = 16
CLEAR = 2.2
CREDIT = 1.5
BEYOND = 0.5  # by which losses so far may exceed the account where guesses promise more than they cost


class Odds:
    """The running share of correct guesses of one kind; `share`, worth `weight` guesses, is the prior."""

    def __init__(self, share: float, weight: float):
        self.correct, self.tried = share * weight, weight

    def see(self, correct: bool) -> None:
        """Counts one guess."""
        self.correct = MEMORY * self.correct + correct
        self.tried = MEMORY * self.tried + 1

    @property
    def share(self) -> float:
        return self.correct / self.tried


class Copied:
    """
    How often guesses copied from earlier text are correct.

    The best predictor is the length of the match: how many tokens before the guess equal those before the place that
    it was copied from. Each correct guess extends the match.
    """

    def __init__(self):
        self.best = [Odds(share, PRIOR) for share in MATCHED]
        self.others = Odds(SECOND, PRIOR)

    def see(self, candidates: list[tuple[int, list[int]]], token: int) -> None:
        """Compares the first token of candidates, `(match, tokens)` with the best first, with the token that came."""
        for rank, (match, tokens) in enumerate(candidates):
            (self.others if rank else self.best[match - 1]).see(tokens[0] == token)

    def chance(self, match: int) -> float:
        """The chance that the first token of the best candidate is correct."""
        return self.best[match - 1].share

    def chances(self, rank: int, match: int, count: int) -> list[float]:
        """The chances that the first 1, 2, ..., `count` tokens of a candidate are correct."""
        chance, found = 1.0, []
        for place in range(count):
            odds = self.others if rank and not place else self.best[min(match + place, LONGEST_MATCH) - 1]
            chance *= odds.share
            found.append(chance)
        return found


class Tabled:
    """
    How often guesses of an n-gram table are correct, by the chance that the table gives.

    One running ratio of correct to promised guesses corrects all chances, since a table promises too much for text of
    another kind than that which it was built from.
    """

    def __init__(self):
        self.correct, self.promised = TABLED * TABLED_PRIOR, TABLED_PRIOR

    def see(self, guess: tuple[int, int] | None, token: int) -> None:
        """Compares a guess, `(token, level)`, with the token that came."""
        if guess:
            self.correct = MEMORY * self.correct + (guess[0] == token)
            self.promised = MEMORY * self.promised + chance_of(guess[1])

    def chance(self, level: int) -> float:
        """The chance that a guess of this level is correct."""
        return min(chance_of(level) * self.correct / self.promised, SUREST)


class Own:
    """
    How often the model's own predictions are correct, by how far ahead they are, from one token up.

    Where little is known of a distance, the share of the one before it serves as its prior, so that drafts grow while
    their last tokens are correct.

    Args:
        depths: the largest distance.
        share: the correct share to assume while nothing is known.
        weight: the number of predictions that this share counts for.
    """

    def __init__(self, depths: int, share: float = OWN, weight: float = OWN_PRIOR):
        self.share, self.weight = share, weight
        self.odds = [Odds(0.0, 0.0) for _ in range(depths)]
        self.pending: list[tuple[int, list[int]]] = []  # guesses correct so far: (depth of the first, tokens)

    def see(self, accepted: list[int], predicted: list[int]) -> None:
        """Compares earlier predictions with the accepted tokens, and keeps what the model predicts after those."""
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
        """The chances that the first 1, 2, ..., `count` predictions are correct."""
        chance, share, found = 1.0, self.share, []
        for odds in self.odds[:count]:
            share = (odds.correct + self.weight * share) / (odds.tried + self.weight)
            chance *= share
            found.append(chance)
        return found


class Choice(NamedTuple):
    """
    What the rows of a forward try.

    Attributes:
        guesses: the largest number for each row.
        probes: whether these are the model's own predictions, whatever other guesses are known.
        adapter: whether a draft-only adapter predicts beside the model in this forward, for the next drafts.
    """

    guesses: int
    probes: bool = False
    adapter: bool = False


class Outlook(NamedTuple):
    """
    The chances of one row's guesses to be committed by the next forward, in falling order.

    Attributes:
        hand: of the guesses known now.
        own: of the model's own predictions, if they were known.
        drafted: of the predictions of a draft-only adapter, if they were known.
        copied: of the best candidate copied from earlier text, which is always known.
    """

    hand: Sequence[float]
    own: Sequence[float] = ()
    drafted: Sequence[float] = ()
    copied: Sequence[float] = ()


class Economy:
    """
    How many guesses a forward tries: the number that yields the most tokens per cost, and none if they do not pay.

    Where nothing pays, the model's own predictions are still probed from time to time, since nothing else shows how
    good they are. An account of all forwards so far bounds the loss against one token per forward: a forward is
    not tried if it is expected to bring the loss above `FREE` forwards plus `ALLOWED` for each token. Every decision
    depends on the tokens and the curve alone, so a call with a given curve is reproducible.

    A draft-only adapter scores each guess a second time, in the same forward, and its predictions are the next draft.
    It takes part while its drafts yield more tokens per cost than those without it, its own positions included. Its
    first forward yields nothing, which the next ones have to repay; a failed trial is paid from a separate account, so
    that it does not keep other guesses from being tried.

    The rows of a batch share a forward, which is as wide as its widest row. One number of guesses therefore serves all
    rows, and the shortest row measures progress, since a batch is done when its last row is.

    Args:
        curve: what a forward costs.
        with_adapter: what a forward costs in which the second half of the positions is a draft-only adapter's; `None`
            without one.
        width: gives the positions of a forward for a number of nodes, where forwards have fixed shapes.
    """

    def __init__(self, curve: CostCurve, with_adapter: CostCurve | None = None, width: Callable[[int], int] = int):
        self.width = width
        self.probing = 0.0  # what probes have cost, in forwards over one position
        self.began = False  # whether the last forward scored arbitrary guesses, to be replaced by its predictions
        self.progress = 1  # forwards that decoding one token at a time would have taken
        self.lost = {False: 0.0, True: 0.0}  # by forwards without a draft-only adapter, and by those with it
        self.follow(curve, with_adapter)

    @property
    def spent(self) -> float:
        """What all forwards have cost, the prefill included, in forwards over one position."""
        return self.progress + sum(self.lost.values())

    def follow(self, curve: CostCurve, with_adapter: CostCurve | None = None) -> None:
        """Changes the curves, for instance when the batch has fewer rows."""
        self.curve, self.with_adapter = curve, with_adapter
        self._costs: dict[bool, list[float]] = {False: [], True: []}

    def cost(self, guesses: int, adapter: bool = False) -> float:
        """The cost of a forward over `guesses` guesses in each row, with a draft-only adapter or without."""
        costs = self._costs[adapter]
        while len(costs) <= guesses:
            curve = self.with_adapter if adapter else self.curve
            assert curve is not None  # without a curve for it, no adapter is considered
            positions = (1 + adapter) * self.width(1 + len(costs)) if costs else 1
            costs.append(curve.cost(positions))
        return costs[guesses]

    def decide(self, rows: list[Outlook], idle: bool = False, drafted: bool = False) -> Choice:
        """
        What the rows try.

        Args:
            rows: the chances of each row's guesses.
            idle: whether the model has predicted nothing yet. Trying its own predictions then takes two forwards: one
                over arbitrary guesses, all of which may be wrong, and one over what it predicts at them.
            drafted: whether the guesses known now are those of a draft-only adapter.
        """
        began, self.began = self.began, False
        adapter = self._adapter_pays(rows)
        if adapter and not drafted:
            if guesses := self._begin([row.drafted for row in rows], adapter=True):
                return Choice(guesses, idle, True)
            adapter = False
        guesses, loss, _ = self._best([row.hand for row in rows], adapter=adapter)
        if guesses and (began or self._may_lose(loss, adapter)):
            return Choice(guesses, False, adapter or self._may_probe_adapter(guesses))
        if idle and (guesses := self._begin([row.own for row in rows])):
            return Choice(guesses, True)
        return self._probe()

    def _begin(self, chances: Sequence[Sequence[float]], adapter: bool = False) -> int:
        """How many guesses to try in two forwards, of which the first only makes the predictions; 0 for none."""
        guesses, loss, _ = self._best(chances, idle=1, paying=AHEAD if adapter else 1, adapter=adapter)
        self.began = guesses > 0 and self._may_lose(loss, adapter)
        return guesses if self.began else 0

    def _probe(self) -> Choice:
        """A few of the model's own predictions if a probe is due, else nothing."""
        adapter = self.with_adapter is not None
        loss = self.cost(PROBE, adapter) - 1
        if self.probing <= PROBES * self.progress and self._may_lose(loss):
            self.probing += loss
            return Choice(PROBE, True, adapter)
        return Choice(0)

    def _adapter_pays(self, rows: list[Outlook]) -> bool:
        """Whether drafts of a draft-only adapter yield more tokens per cost than those without it."""
        if self.with_adapter is None:
            return False
        _, _, drafted = self._best([max(row.drafted, row.copied, key=sum) for row in rows], adapter=True)
        _, _, plain = self._best([max(row.own, row.copied, key=sum) for row in rows])
        return drafted > plain

    def _may_probe_adapter(self, guesses: int) -> bool:
        """Whether an adapter that does not pay takes part anyway, since nothing else shows how good it is."""
        if self.with_adapter is None:
            return False
        loss = self.cost(guesses, True) - self.cost(guesses)
        if self.probing + loss > PROBES * self.progress or not self._may_lose(loss):
            return False
        self.probing += loss
        return True

    def _best(
        self, chances: Sequence[Sequence[float]], idle: int = 0, paying: int = 1, adapter: bool = False
    ) -> tuple[int, float, float]:
        """
        The number of guesses that yields the most tokens per cost in `paying` forwards, after `idle` ones that commit
        one token each; the loss at stake until the first of the former, in forwards over one position; and the tokens
        per cost.
        """
        rows, more = len(chances), 0.0
        best, count, stake = WORTHWHILE, 0, 0.0
        for guesses in range(1, max(map(len, chances), default=0) + 1):
            more += sum(row[guesses - 1] for row in chances if len(row) >= guesses) / rows
            cost = self.cost(guesses, adapter)
            rate = (idle + paying * (1 + more)) / ((idle + paying) * cost)
            if rate > best:
                credit = more if rate > CLEAR else min(SURE * more, self.progress / EARLY)
                best, count, stake = rate, guesses, (idle + 1) * (cost - 1) - min(credit, CREDIT)
        return count, stake, best

    def _may_lose(self, loss: float, adapter: bool = False) -> bool:
        """
        Whether the account allows a forward with this expected loss.

        What the adapter has lost does not count against other guesses, nor the reverse; what either has gained does.
        """
        lost = min(self.lost[adapter], sum(self.lost.values()))
        return lost + max(loss, -BEYOND) <= (TRIAL if adapter else FREE) + ALLOWED * self.progress

    def took(self, guesses: int, progress: int, adapter: bool = False) -> None:
        """Counts a forward: how many guesses it tried, and how many tokens the shortest row now has."""
        cost = self.cost(guesses, adapter and guesses > 0)
        self.lost[adapter] += cost - (progress - self.progress)
        self.progress = progress
