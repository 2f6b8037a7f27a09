"""The blocks of one sequence that are in flight: which tokens to try next, and where."""

from __future__ import annotations

import random

from .adaptive import MEMORY, AdaptiveWindow
from .config import JacobiConfig
from .ngram_pool import NgramPool


def agreement(guess: list[int], text: list[int]) -> int:
    """How many tokens of a guess, from its first on, are those of the text."""
    count = 0
    for guessed, token in zip(guess, text):
        if guessed != token:
            break
        count += 1
    return count


class Blocks:
    """
    The draft of one sequence: one real-active block and up to `max_blocks` - 1 pseudo-active ones behind it.

    Positions count from the sequence's first token. The draft covers `start` to `end`: `draft[0]` is the newest
    committed token, whose keys and values are not cached yet, the others are guesses. As attention is causal, one row
    holds all blocks: a later block is refined on the unverified tokens before it, and when those turn out right its
    own right tokens are accepted in the same forward, on the true prefix.

    Args:
        config: the settings.
        start: position of the first token to be decoded.
        first_guess: the guess for positions never predicted before.
    """

    def __init__(self, config: JacobiConfig, start: int, first_guess: FirstGuess):
        self.config = config
        self.size = config.size
        self.window = AdaptiveWindow(self.size, config.position_cost) if config.adapts else None
        self.first_guess = first_guess
        self.start = start
        self.end = start
        self.draft: list[int] = []
        self.spawned = 0
        self.better = BetterGuess()

    def advance(self, text: list[int], guesses: list[int], room: int) -> None:
        """
        Moves on to the newest committed token.

        Args:
            text: all committed tokens; the last one becomes `draft[0]`.
            guesses: the model's own predictions for the positions after it, in order.
            room: how many tokens the draft may have at most.
        """
        before = dict(zip(range(self.start, self.end), self.draft))
        self.better.update(text[self.start + 1 :])
        if self.window:
            self.window.update(agreement(self.draft[1:], text[self.start + 1 :]))
        self.start = len(text) - 1
        draft = [text[-1], *guesses]
        converged = self._newest_converged(before, draft)
        if self.window and self.window.size < self.size:
            self.end, converged = self.start + self.window.size, False
        elif self.config.window == "sliding":
            self.end = max(self.end, self.start + self.size)
        while self.end <= self.start:
            self.end += self.size
        if converged and self._in_flight() < self.config.max_blocks:
            self.end += self.size
            self.spawned += 1
        length = min(self.end - self.start, room)
        draft = [text[-1], *self.better.choose(draft[1:length], self.first_guess.ngram(text, length - 1))]
        if len(draft) < length:
            draft += self.first_guess(text[:-1] + draft, length - len(draft))
        self.draft = draft

    def _in_flight(self) -> int:
        return -(-(self.end - self.start) // self.size)

    def _newest_converged(self, before: dict[int, int], draft: list[int]) -> bool:
        """Whether the share of the newest block that is committed, or that the last forward left as it was, is r."""
        if not before:
            return False
        first = self.end - self.size
        position = max(first, self.start + 1)
        while position < self.end:
            index = position - self.start
            if index >= len(draft) or before.get(position) != draft[index]:
                break
            position += 1
        return position - first >= self.config.spawn_ratio * self.size


class BetterGuess:
    """
    Which of two drafts to try: the model's own rejected predictions, or the n-gram that continues the text.

    Both are compared with every token that is committed, tried or not; the one that was right further, in a running
    mean, is tried next. A model trained to decode in parallel is drafted by itself, another one by what repeats.
    """

    def __init__(self):
        self.own: list[int] = []
        self.ngram: list[int] = []
        self.lead = 0.0

    def update(self, committed: list[int]) -> None:
        """Compares both guesses with the tokens that came instead."""
        lead = agreement(self.ngram, committed) - agreement(self.own, committed)
        self.lead = MEMORY * self.lead + (1 - MEMORY) * lead

    def choose(self, own: list[int], ngram: list[int]) -> list[int]:
        """The guess for the positions after the newest committed token."""
        self.own, self.ngram = own, ngram
        return ngram + own[len(ngram) :] if self.lead > 0 else own


class FirstGuess:
    """
    Fills positions that the model has not predicted yet, as `JacobiConfig.draft_init` says.

    Args:
        kind: `"prompt"`, `"ngram"` or `"repeat"`.
        prompt: the tokens of the prompt, without padding.
        pool: the sequence's n-grams.
        seed: of the draw from the prompt.
    """

    def __init__(self, kind: str, prompt: list[int], pool: NgramPool, seed: str):
        self.kind = kind
        self.prompt = prompt
        self.pool = pool
        self.random = random.Random(seed)

    def __call__(self, tokens: list[int], count: int) -> list[int]:
        """`count` tokens to follow `tokens`."""
        if self.kind == "repeat" or not self.prompt:
            return [tokens[-1]] * count
        guess = self.ngram(tokens, count)
        return guess + self.random.choices(self.prompt, k=count - len(guess))

    def ngram(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens that follow `tokens` according to the n-gram pool, if guesses come from there."""
        guess: list[int] = []
        while self.kind == "ngram" and len(guess) < count:
            continuation = self.pool.continuations((tokens[-3:] + guess)[-3:], count - len(guess), 1)
            if not continuation:
                break
            guess += continuation[0]
        return guess
