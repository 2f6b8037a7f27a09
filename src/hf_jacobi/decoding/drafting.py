"""
What one sequence tries next: where guesses come from (`DraftSource`), and the rule that puts them together.

Nothing here knows a model or a tensor: `DraftRule` is told which tokens were accepted and what the model predicted
beside them, and answers with the next `Draft`. A new source is a class here and its name in `FIRST_GUESSES` and
`JacobiConfig.draft_init`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .adaptive import DRAFTED, LEAST, Choice, Copied, Economy, Outlook, Own
from .config import JacobiConfig
from .errors import UsageError
from .ngram_pool import CONTEXT_LENGTHS, LONGEST_MATCH, NgramPool


CONTEXT = max(CONTEXT_LENGTHS)  # tokens that n-grams are looked up by, at most
MASK = (1 << 64) - 1
MEMORY = 0.7  # weight of the past in the running mean of how far a source is right


def agreement(guess: list[int], text: list[int]) -> int:
    """How many tokens of a guess, from its first on, are those of the text."""
    count = 0
    for guessed, token in zip(guess, text):
        if guessed != token:
            break
        count += 1
    return count


class Draft:
    """
    The tokens one forward scores for one sequence: a chain, and branches off it.

    Node 0 is the newest committed token, whose keys and values are not cached yet; the others are guesses. A branch
    shares the nodes of the chain that it begins with.

    Args:
        chain: the newest committed token and the guesses after it.

    Attributes:
        tokens: the token of each node; the chain comes first.
        parents: the node before each node, -1 for node 0; always a lower number.
        depths: the distance of each node from node 0.
        children: for each node, token to node of those after it.
        chain_length: how many nodes the chain has.
    """

    def __init__(self, chain: list[int]):
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.children: list[dict[int, int]] = []
        for index, token in enumerate(chain):
            self._append(token, index - 1)
        self.chain_length = len(chain)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def chain(self) -> list[int]:
        """The tokens of the chain."""
        return self.tokens[: self.chain_length]

    def _append(self, token: int, parent: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.children.append({})
        if parent >= 0:
            self.children[parent][token] = node
        return node

    def add_branch(self, tokens: list[int]) -> None:
        """Adds a candidate continuation of node 0, sharing the nodes already there."""
        node = 0
        for token in tokens:
            child = self.children[node].get(token)
            node = self._append(token, node) if child is None else child

    def path(self, node: int) -> list[int]:
        """The nodes from node 0 to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def predictions_beyond(self, node: int, predictions: list[int]) -> list[int]:
        """
        The model's own predictions for the positions beyond the token predicted at `node`: its next draft.

        They are read off the nodes below `node`, then off the chain where those end.

        Args:
            node: the last accepted one.
            predictions: the token predicted at each node.
        """
        found: list[int] = []
        depth = self.depths[node]
        while below := self.children[node]:
            node = below.get(predictions[node], next(iter(below.values())))
            found.append(predictions[node])
        return found + predictions[depth + 1 + len(found) : self.chain_length]


class DraftSource:
    """
    Where guesses come from.

    Args:
        prompt: the tokens of the prompt, without padding.
        pool: the n-grams of the sequence.
        draw: where anything random is drawn from.
        vocabulary: how many tokens the model has; `None` where that is not known.
    """

    leads = False  # whether its guess may come before the model's own while it turns out right further

    def __init__(self, prompt: list[int], pool: NgramPool, draw: random.Random, vocabulary: int | None = None):
        self.prompt, self.pool, self.draw, self.vocabulary = prompt, pool, draw, vocabulary

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        """
        Up to `count` tokens that go on.

        Args:
            text: all committed tokens.
            drafted: guesses of other sources for the positions after them.
            count: how many tokens are wanted at most.
        """
        raise NotImplementedError

    def observe(self, accepted: list[int], predicted: list[int]) -> None:
        """
        Takes in what a forward brought.

        Args:
            accepted: the tokens that were committed.
            predicted: the model's own predictions for the positions after them, in order.
        """


class OwnPredictions(DraftSource):
    """What the model itself predicted beyond the accepted tokens: Jacobi iteration."""

    def __init__(self, *known):
        super().__init__(*known)
        self.predicted: list[int] = []

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        return self.predicted[len(drafted) : len(drafted) + count]

    def observe(self, accepted: list[int], predicted: list[int]) -> None:
        self.predicted = predicted


class Ngrams(DraftSource):
    """What followed the last tokens when they stood in the text or in a rejected draft before."""

    leads = True

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        context = (text[-CONTEXT:] + drafted[-CONTEXT:])[-CONTEXT:]
        guess: list[int] = []
        while len(guess) < count:
            found = self.pool.continuations((context + guess)[-CONTEXT:], count - len(guess), 1)
            if not found:
                break
            guess += found[0]
        return guess


class PromptTokens(DraftSource):
    """Tokens drawn from the prompt: the paper's first guess."""

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        return self.draw.choices(self.prompt, k=count) if self.prompt else []


class RepeatLast(DraftSource):
    """The last token again."""

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        return [(drafted or text)[-1]] * count


class VocabularyTokens(DraftSource):
    """Tokens drawn from the whole vocabulary: noise that says nothing of the text (UNO, arXiv 2609.04010)."""

    def __init__(self, *known):
        super().__init__(*known)
        self.seed = self.draw.getrandbits(64)
        if not self.vocabulary:
            raise UsageError(
                'draft_init="vocabulary" draws from the tokens of a model, whose number is not known here.'
            )

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        start = len(text) + len(drafted)
        return [scattered(self.seed, position) % self.vocabulary for position in range(start, start + count)]


def scattered(seed: int, position: int) -> int:
    """A number of 64 bits that depends on both alone, whatever was drawn before (SplitMix64)."""
    mixed = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & MASK
    return mixed ^ (mixed >> 31)


# `JacobiConfig.draft_init` -> the sources of positions that the model has not predicted yet, tried in order.
FIRST_GUESSES: dict[str, tuple[type[DraftSource], ...]] = {
    "ngram": (Ngrams, PromptTokens, RepeatLast),
    "prompt": (PromptTokens, RepeatLast),
    "repeat": (RepeatLast,),
    "vocabulary": (VocabularyTokens,),
}


class Lead:
    """
    Which source comes first: the model's own predictions, or another one that leads while it is right further.

    All are compared with every token that is committed, tried or not, in a running mean. A model trained to decode in
    parallel is drafted by itself, another one by what repeats.
    """

    def __init__(self, sources: list[DraftSource]):
        self.sources = sources  # the first one leads until another has earned it
        self.said: list[list[int]] = [[] for _ in sources]
        self.ahead = [0.0] * len(sources)

    def observe(self, accepted: list[int]) -> None:
        """Compares what each source said last with the tokens that came instead."""
        right = [agreement(said, accepted) for said in self.said]
        self.ahead = [MEMORY * ahead + (1 - MEMORY) * (count - right[0]) for ahead, count in zip(self.ahead, right)]

    def propose(self, text: list[int], count: int) -> list[int]:
        """Up to `count` tokens after the text: those of the source ahead, then of the others where it ends."""
        self.said = [source.propose(text, [], count) for source in self.sources]
        order = sorted(range(len(self.sources)), key=lambda index: -self.ahead[index])  # stable
        drafted = self.said[order[0]]
        for index in order[1:]:
            drafted = drafted + self.sources[index].propose(text, drafted, count - len(drafted))
        return drafted


class Tree:
    """
    Ways the text may go on, merged where they begin alike, as tokens in the order of their chances.

    Args:
        ways: `(tokens, chances)` each; the chances fall along a way.
    """

    def __init__(self, ways: list[tuple[list[int], list[float]]]):
        self.ways: list[tuple[list[int], list[int]]] = []  # (tokens, their nodes) of each
        chances: list[float] = []
        nodes: dict[tuple[int, int], int] = {}
        for tokens, of_tokens in ways:
            node, found = -1, []
            for token, chance in zip(tokens, of_tokens):
                if chance < LEAST:
                    break
                node = nodes.setdefault((node, token), len(chances))
                if node == len(chances):
                    chances.append(chance)
                chances[node] = max(chances[node], chance)
                found.append(node)
            self.ways.append((tokens, found))
        order = sorted(range(len(chances)), key=lambda node: -chances[node])  # stable: no token before its parent
        self.rank = {node: place for place, node in enumerate(order)}
        self.chances = [chances[node] for node in order]

    def cut(self, guesses: int) -> list[list[int]]:
        """Of each way what belongs to the so many tokens of the best chances."""
        return [tokens[: sum(self.rank[node] < guesses for node in nodes)] for tokens, nodes in self.ways]


class DraftRule:
    """
    The draft of one sequence: one real-active block and up to `max_blocks` - 1 pseudo-active ones after it.

    As attention is causal, one chain holds all blocks: a later block is refined on the unverified tokens before it,
    and when those turn out right its own right tokens are accepted in the same forward, on the true prefix.

    Args:
        config: the settings.
        prompt: the tokens of the prompt, without padding.
        seed: of what is drawn.
        vocabulary: how many tokens the model has; for first guesses that are drawn from them.

    Attributes:
        start, end: the blocks in flight cover these positions, counted from the first token of the prompt; the token
            at `start` is the newest committed one.
        draft: what was proposed last.
        spawned: how many pseudo-active blocks there were.
        is_drafted: whether what is predicted beyond the text is what a draft-only adapter said.
    """

    def __init__(self, config: JacobiConfig, prompt: list[int], seed: str, vocabulary: int | None = None):
        self.config = config
        self.size = config.size
        self.text = list(prompt)
        self.pool = NgramPool()
        if config.pool_prompt:
            self.pool.extend(prompt)
        known = (list(prompt), self.pool, random.Random(seed), vocabulary)
        self.first_guesses = [source(*known) for source in FIRST_GUESSES[config.draft_init]]
        self.own = OwnPredictions(*known)
        self.lead = Lead([self.own, *(source for source in self.first_guesses if source.leads)])
        self.start = self.end = len(prompt)
        self.draft = Draft([])
        self.candidates: list[list[int]] = []
        self.spawned = 0
        self.is_drafted = False
        if config.adapts:
            depths = self.size * config.max_blocks
            self.worth_of_own, self.worth_of_drafted = Own(depths), Own(depths, DRAFTED)
            self.worth_of_copied = Copied()

    def begin(self, token: int) -> None:
        """Takes in the token that the prefill brought, before anything is proposed."""
        self._append([token])
        self._move([])

    @property
    def is_idle(self) -> bool:
        """Whether the model has predicted nothing beyond the text, as where nothing was tried."""
        return not self.own.predicted

    def outlook(self, room: int, own: bool = True) -> Outlook:
        """
        The chances of the tokens that may be tried next, and of those that might be if more had been predicted.

        Args:
            room: as for `propose`.
            own: whether the model's own predictions, or a draft-only adapter's, are among them.
        """
        length = min(self.end - self.start, room) - 1
        copied = self._copied(length)
        chances = self.worth_of_own.chances(length), self.worth_of_drafted.chances(length)
        ways = list(copied)
        if own:
            ways.insert(0, (self._chain(self.own.propose(self.text, [], length), length), chances[self.is_drafted]))
        if ways and not self.config.pool_size:
            ways = [max(ways, key=lambda way: sum(way[1]))]
        self.tree = Tree(ways)
        return Outlook(self.tree.chances, *chances, max((worth for _, worth in copied), key=sum, default=[]))

    def propose(self, room: int, guesses: int | None = None, probes: bool = False) -> Draft:
        """
        The tokens to score next: the chain, and candidates out of the pool as branches.

        Args:
            room: how many tokens a path may have at most, the newest committed one included.
            guesses: how many of those that `outlook` found are tried, where the draft adapts.
            probes: whether so many of the model's own predictions are tried instead.
        """
        length = min(self.end - self.start, room) - 1
        if guesses is None:
            chain = self._chain(self.lead.propose(self.text, length), length)
            reach = min(self.config.ngram_size, room - 1)
            self.candidates = self.pool.continuations(self.text[-CONTEXT:], reach, self.config.pool_size)
        elif probes:
            length = min(length, guesses)
            chain, self.candidates = self._chain(self.own.propose(self.text, [], length), length), []
        else:
            chain, *self.candidates = self.tree.cut(guesses) or [[]]
        self.draft = Draft([self.text[-1], *chain])
        for candidate in self.candidates:
            self.draft.add_branch(candidate)
        return self.draft

    def _chain(self, guesses: list[int], length: int) -> list[int]:
        """Guesses, and after them first guesses up to `length`."""
        for source in self.first_guesses:
            if len(guesses) < length:
                guesses = guesses + source.propose(self.text, guesses, length - len(guesses))
        return guesses

    def _copied(self, length: int) -> list[tuple[list[int], list[float]]]:
        """What may be copied from earlier text, at most `length` tokens each, with their chances."""
        limit = max(self.config.pool_size, any(source.leads for source in self.first_guesses))
        found = self.pool.matches(self.text[-LONGEST_MATCH:], length, limit)
        ways = []
        for rank, (match, tokens) in enumerate(found):
            while not rank and len(tokens) < length:  # what ends with the text goes round
                more = self.pool.matches((self.text + tokens)[-LONGEST_MATCH:], length - len(tokens), 1)
                if not more:
                    break
                tokens = tokens + more[0][1]
            ways.append((tokens, self.worth_of_copied.chances(rank, match, len(tokens))))
        return ways

    def observe(
        self,
        accepted: list[int],
        predictions: list[int],
        path: list[int],
        drafted: list[int] | None = None,
        by_adapter: bool = True,
    ) -> None:
        """
        Takes in what the forward over the last proposal brought.

        Args:
            accepted: the committed tokens: one for each node of `path`, predicted there.
            predictions: the model's prediction at each node of the draft.
            path: the accepted nodes, node 0 first.
            drafted: what a draft-only adapter predicted at each token of the chain, if there is one: the next draft
                is read off that instead.
            by_adapter: whether these are an adapter's; else they are the model's own, of a draft without branches.
        """
        own: list[int] = []
        if len(self.draft) > 1 and (drafted is None or (by_adapter and self.config.adapts)):
            own = self.draft.predictions_beyond(path[-1], predictions)
        if drafted is not None:
            predicted, self.is_drafted = drafted[len(path) :], by_adapter
        elif len(self.draft) > 1:
            predicted, self.is_drafted = own, False
        else:
            predicted = self._borne_out(accepted)
        self.lead.observe(accepted)
        self._commit(accepted, predicted, own)

    def follow(self, accepted: list[int]) -> None:
        """
        Takes in tokens that were committed without the last proposal having been scored, as a server may do.

        What the model predicted before stays its guess if they bear it out; nothing is learnt of how good guesses are.
        """
        self.draft = Draft([])
        self._commit(accepted, self._borne_out(accepted))

    def _borne_out(self, accepted: list[int]) -> list[int]:
        """What the model predicted earlier for the tokens after these, if these are what it predicted, too."""
        said = self.own.predicted
        return said[len(accepted) :] if said[: len(accepted)] == accepted else []

    def _commit(self, accepted: list[int], predicted: list[int], own: Sequence[int] = ()) -> None:
        """
        Appends committed tokens, and takes in what is predicted beyond them.

        Args:
            accepted: the tokens.
            predicted: the next draft.
            own: what the model predicted beside a draft-only adapter.
        """
        for source in (self.own, *self.first_guesses):
            source.observe(accepted, predicted)
        self._append(accepted)
        if self.config.adapts:
            self.worth_of_own.see(accepted, list(own) if self.is_drafted else predicted)
            self.worth_of_drafted.see(accepted, predicted if self.is_drafted else [])
        self.pool.recycle(predicted)
        self._move(predicted)

    def _append(self, tokens: list[int]) -> None:
        """Goes on with the text, and compares it with what earlier text said."""
        for token in tokens:
            if self.config.adapts:
                limit = max(self.config.pool_size, 1)
                self.worth_of_copied.see(self.pool.matches(self.text[-LONGEST_MATCH:], 1, limit), token)
            self.text.append(token)
            self.pool.extend([token])

    def _move(self, predicted: list[int]) -> None:
        """Moves the blocks in flight on to the newest committed token, and spawns the next one."""
        before = dict(enumerate(self.draft.chain, self.start))
        self.start = len(self.text) - 1
        converged = self._newest_converged(before, [self.text[-1], *predicted])
        if self.config.window == "sliding":
            self.end = max(self.end, self.start + self.size)
        while self.end <= self.start:
            self.end += self.size
        if converged and self._in_flight() < self.config.max_blocks:
            self.end += self.size
            self.spawned += 1

    def _in_flight(self) -> int:
        return -(-(self.end - self.start) // self.size)

    def _newest_converged(self, before: dict[int, int], chain: list[int]) -> bool:
        """Whether the share of the newest block that is committed, or that the last forward left as it was, is r."""
        if not before:
            return False
        first = self.end - self.size
        position = max(first, self.start + 1)
        while position < self.end:
            index = position - self.start
            if index >= len(chain) or before.get(position) != chain[index]:
                break
            position += 1
        return position - first >= self.config.spawn_ratio * self.size


def choose(economy: Economy, rules: list[tuple[DraftRule, int]]) -> Choice:
    """
    What `Economy.decide` says of sequences that share a forward.

    Args:
        economy: of the forward.
        rules: of each sequence, with its room (`DraftRule.propose`).
    """
    idle = all(rule.is_idle for rule, _ in rules)
    drafted = not idle and all(rule.is_idle or rule.is_drafted for rule, _ in rules)
    return economy.decide([rule.outlook(room, own=not idle) for rule, room in rules], idle, drafted)
