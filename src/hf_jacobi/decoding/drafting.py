"""
What one sequence tries next: the sources of guesses (`DraftSource`), and the rule that combines them (`DraftRule`).

This file needs no model and no tensors: `DraftRule` receives the accepted tokens and the model's other predictions,
and returns the next `Draft`. A new source is one class here, named in `FIRST_GUESSES` and `JacobiConfig.draft_init`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .adaptive import DRAFTED, DRAFTED_PRIOR, LEAST, Choice, Copied, Economy, Outlook, Own, Tabled
from .config import JacobiConfig
from .errors import UsageError
from .ngram_pool import CONTEXT_LENGTHS, LONGEST_MATCH, NgramPool
from .ngram_table import LONGEST, NgramTable


CONTEXT = max(CONTEXT_LENGTHS)  # the largest number of tokens by which n-grams are looked up
MASK = (1 << 64) - 1
LEAST_AHEAD = 0.03  # chance below which the search for the next tokens ends, since each takes some microseconds
MEMORY = 0.7  # weight of the past in the running mean of how far a source is correct


def matching_prefix(guess: list[int], text: list[int]) -> int:
    """The number of tokens at the start of a guess that equal those of the text."""
    count = 0
    for guessed, token in zip(guess, text):
        if guessed != token:
            break
        count += 1
    return count


class Draft:
    """
    The tokens that one forward scores for one sequence: a chain, and branches off it.

    Node 0 is the newest committed token, whose keys and values are not cached yet; the others are guesses. A branch
    shares the nodes of the chain with which it begins.

    Args:
        chain: the newest committed token and the guesses after it.

    Attributes:
        tokens: the token of each node; the chain comes first.
        parents: the node before each node, always a lower number; -1 for node 0.
        depths: the distance of each node from node 0.
        children: for each node, the nodes after it by their tokens.
        chain_length: the number of nodes of the chain.
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
        """Adds a candidate continuation of node 0, which shares the existing nodes."""
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

        They are those at the nodes below `node`, and then those at the rest of the chain.

        Args:
            node: the last accepted node.
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
    A source of guesses.

    Args:
        prompt: the tokens of the prompt, without padding.
        pool: the n-grams of the sequence.
        draw: the random number generator to use.
        vocabulary: the number of tokens of the model; `None` if unknown.
        table: the n-grams of other text of the model, if there is a table.
    """

    leads = False  # whether its guesses can precede the model's own while they are correct further

    def __init__(
        self,
        prompt: list[int],
        pool: NgramPool,
        draw: random.Random,
        vocabulary: int | None = None,
        table: NgramTable | None = None,
    ):
        self.prompt, self.pool, self.draw, self.vocabulary, self.table = prompt, pool, draw, vocabulary, table

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        """
        Up to `count` guesses for the next tokens.

        Args:
            text: all committed tokens.
            drafted: guesses of other sources for the positions after the text, which these guesses continue.
            count: the largest number of guesses.
        """
        raise NotImplementedError

    def observe(self, accepted: list[int], predicted: list[int]) -> None:
        """
        Updates the source after a forward.

        Args:
            accepted: the tokens that were committed.
            predicted: the model's own predictions for the positions after them, in order.
        """


class OwnPredictions(DraftSource):
    """The model's own predictions beyond the accepted tokens: Jacobi iteration."""

    def __init__(self, *known):
        super().__init__(*known)
        self.predicted: list[int] = []

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        return self.predicted[len(drafted) : len(drafted) + count]

    def observe(self, accepted: list[int], predicted: list[int]) -> None:
        self.predicted = predicted


class Ngrams(DraftSource):
    """The tokens that followed the last tokens at an earlier place in the text or in a rejected draft."""

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


class TableNgrams(DraftSource):
    """The tokens that usually follow the last tokens in other text of the model."""

    leads = True

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        if self.table is None:
            return []
        context = (text[-LONGEST:] + drafted[-LONGEST:])[-LONGEST:]
        guess: list[int] = []
        while len(guess) < count and (found := self.table.next(context + guess)):
            guess.append(found[0])
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
    """Tokens drawn from the whole vocabulary: noise that is independent of the text (UNO, arXiv 2609.04010)."""

    def __init__(self, *known):
        super().__init__(*known)
        self.seed = self.draw.getrandbits(64)
        if not self.vocabulary:
            raise UsageError(
                'draft_init="vocabulary" draws from all tokens of the model, whose number is not known here.'
            )
        self.size = self.vocabulary

    def propose(self, text: list[int], drafted: list[int], count: int) -> list[int]:
        start = len(text) + len(drafted)
        return [scattered(self.seed, position) % self.size for position in range(start, start + count)]


def scattered(seed: int, position: int) -> int:
    """A 64-bit number that depends on the seed and the position alone (SplitMix64)."""
    mixed = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & MASK
    return mixed ^ (mixed >> 31)


# `JacobiConfig.draft_init` -> the sources for positions that the model has not predicted yet, tried in order.
FIRST_GUESSES: dict[str, tuple[type[DraftSource], ...]] = {
    "ngram": (TableNgrams, Ngrams, PromptTokens, RepeatLast),
    "prompt": (PromptTokens, RepeatLast),
    "repeat": (RepeatLast,),
    "vocabulary": (VocabularyTokens,),
}


class Lead:
    """
    Which source comes first: the model's own predictions, or another one that leads while it is correct further.

    A running mean compares all sources with every committed token, whether or not they were tried. A model trained to
    decode in parallel leads itself; for other models, repetitions in the text lead.
    """

    def __init__(self, sources: list[DraftSource]):
        self.sources = sources  # the first one leads until another is correct further
        self.said: list[list[int]] = [[] for _ in sources]
        self.ahead = [0.0] * len(sources)

    def observe(self, accepted: list[int]) -> None:
        """Compares the last guesses of each source with the tokens that were committed."""
        correct = [matching_prefix(said, accepted) for said in self.said]
        self.ahead = [
            MEMORY * ahead + (1 - MEMORY) * (count - correct[0]) for ahead, count in zip(self.ahead, correct)
        ]

    def propose(self, text: list[int], count: int) -> list[int]:
        """Up to `count` tokens after the text: those of the leading source, continued by the others."""
        self.said = [source.propose(text, [], count) for source in self.sources]
        order = sorted(range(len(self.sources)), key=lambda index: -self.ahead[index])  # stable
        drafted = self.said[order[0]]
        for index in order[1:]:
            drafted = drafted + self.sources[index].propose(text, drafted, count - len(drafted))
        return drafted


class Tree:
    """
    Possible continuations of the text, merged where they begin with the same tokens, and ranked by their chances.

    Args:
        ways: `(tokens, chances)` of each continuation; the chances fall along it.
    """

    def __init__(self, ways: list[tuple[list[int], list[float]]]):
        self.ways: list[tuple[list[int], list[int]]] = []  # (tokens, their nodes) of each continuation
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
        """The part of each continuation that belongs to the `guesses` nodes with the best chances."""
        return [tokens[: sum(self.rank[node] < guesses for node in nodes)] for tokens, nodes in self.ways]


class DraftRule:
    """
    The draft of one sequence: one real-active block and up to `max_blocks` - 1 pseudo-active ones after it.

    Since attention is causal, one chain holds all blocks. A later block is refined on the unverified tokens before it;
    if those are correct, its own correct tokens are accepted in the same forward, on the true prefix.

    Args:
        config: the settings.
        prompt: the tokens of the prompt, without padding.
        seed: the seed of everything random.
        vocabulary: the number of tokens of the model, for first guesses drawn from all of them.
        table: the n-grams of other text of the model, if there is a table.

    Attributes:
        start, end: the blocks in flight cover these positions, counted from the first token of the prompt; the token
            at `start` is the newest committed one.
        draft: the last proposal.
        spawned: the number of pseudo-active blocks so far.
        is_drafted: whether the predictions beyond the text are those of a draft-only adapter.
    """

    def __init__(
        self,
        config: JacobiConfig,
        prompt: list[int],
        seed: str,
        vocabulary: int | None = None,
        table: NgramTable | None = None,
    ):
        self.config = config
        self.table = table
        self.size = config.size
        self.text = list(prompt)
        self.pool = NgramPool()
        if config.pool_prompt:
            self.pool.extend(prompt)
        known = (list(prompt), self.pool, random.Random(seed), vocabulary, table)
        self.first_guesses = [source(*known) for source in FIRST_GUESSES[config.draft_init]]
        self.own, self.tabled = OwnPredictions(*known), TableNgrams(*known)
        # How many candidates from earlier text the settings allow.
        self._copies = max(config.pool_size, any(source.leads for source in self.first_guesses))
        self.lead = Lead([self.own, *(source for source in self.first_guesses if source.leads)])
        self.start = self.end = len(prompt)
        self.draft = Draft([])
        self.candidates: list[list[int]] = []
        self.spawned = 0
        self.is_drafted = False
        if config.adapts:
            depths = self.size * config.max_blocks
            self.worth_of_own, self.worth_of_drafted = Own(depths), Own(depths, DRAFTED, DRAFTED_PRIOR)
            self.worth_of_copied, self.worth_of_tabled = Copied(), Tabled()

    def begin(self, token: int) -> None:
        """Appends the token from the prefill, before the first proposal."""
        self._append([token])
        self._move([])

    @property
    def is_idle(self) -> bool:
        """Whether the model has predicted nothing beyond the text, for instance because nothing was tried."""
        return not self.own.predicted

    def outlook(self, room: int, own: bool = True) -> Outlook:
        """
        The chances of the tokens that can be tried next, and of those that could be if more had been predicted.

        Args:
            room: as for `propose`.
            own: whether they include the predictions of the model itself, or of a draft-only adapter.
        """
        length = min(self.end - self.start, room) - 1
        copied = self._mixed(length) + self._copied(length)
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
        The tokens to score next: the chain, and candidates of the pool as branches.

        Args:
            room: the largest number of tokens of a path, the newest committed one included.
            guesses: how many of the tokens found by `outlook` to try, if the draft adapts.
            probes: whether to try this number of the model's own predictions instead.
        """
        length = min(self.end - self.start, room) - 1
        if guesses is None:
            chain = self._chain(self.lead.propose(self.text, length), length)
            reach = min(self.config.ngram_size, room - 1)
            self.candidates = self._recycled(reach)
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
        """The guesses, extended by first guesses up to `length`."""
        for source in self.first_guesses:
            if len(guesses) < length:
                guesses = guesses + source.propose(self.text, guesses, length - len(guesses))
        return guesses

    def _recycled(self, length: int) -> list[list[int]]:
        """Candidates of the pool and of the table, of at most `length` tokens each, as many as the settings allow."""
        most = self.config.pool_size
        tabled = self.tabled.propose(self.text, [], length) if most else []
        found = [tabled] if tabled else []
        return found + self.pool.continuations(self.text[-CONTEXT:], length, most - len(found))

    def _mixed(self, length: int) -> list[tuple[list[int], list[float]]]:
        """The continuation that takes each token from the table or from earlier text, whichever is likelier."""
        if self.table is None:
            return []
        tokens: list[int] = []
        chances: list[float] = []
        chance = 1.0
        while len(tokens) < length:
            context = (self.text[-LONGEST:] + tokens)[-LONGEST:]
            earlier = self.pool.matches(context, 1, min(1, self._copies))
            guesses = [(self.worth_of_copied.chance(match), ahead[0]) for match, ahead in earlier]
            if found := self.table.next(context):
                guesses.append((self.worth_of_tabled.chance(found[1]), found[0]))
            likelier, token = max(guesses, default=(0.0, 0))
            chance *= likelier
            if chance < LEAST_AHEAD:
                break
            tokens.append(token)
            chances.append(chance)
        return [(tokens, chances)] if tokens else []

    def _copied(self, length: int) -> list[tuple[list[int], list[float]]]:
        """Continuations copied from earlier text, of at most `length` tokens each, with their chances."""
        found = self.pool.matches(self.text[-LONGEST_MATCH:], length, self._copies)
        ways = []
        for rank, (match, tokens) in enumerate(found):
            while not rank and len(tokens) < length:  # a copy that reaches the end of the text continues with itself
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
        Updates the rule after the forward over the last proposal.

        Args:
            accepted: the committed tokens: the prediction at each node of `path`.
            predictions: the model's prediction at each node of the draft.
            path: the accepted nodes, node 0 first.
            drafted: the predictions of a draft-only adapter at each token of the chain, `None` without one; the next
                draft is taken from them.
            by_adapter: whether `drafted` comes from an adapter; else it comes from the model itself, for a draft
                without branches.
        """
        own: list[int] = []
        if len(self.draft) > 1 and (drafted is None or (by_adapter and self.config.adapts)):
            own = self.draft.predictions_beyond(path[-1], predictions)
        if drafted is not None:
            predicted, self.is_drafted = drafted[len(path) :], by_adapter
        elif len(self.draft) > 1:
            predicted, self.is_drafted = own, False
        else:
            predicted = self._confirmed(accepted)
        self.lead.observe(accepted)
        self._commit(accepted, predicted, own)

    def follow(self, accepted: list[int]) -> None:
        """
        Appends tokens that were committed although the last proposal was not scored, as a server may do.

        Earlier predictions of the model stay in the draft if these tokens confirm them. The statistics of guesses do
        not change.
        """
        self.draft = Draft([])
        self._commit(accepted, self._confirmed(accepted))

    def _confirmed(self, accepted: list[int]) -> list[int]:
        """The model's earlier predictions for the tokens after these, if it also predicted these correctly."""
        said = self.own.predicted
        return said[len(accepted) :] if said[: len(accepted)] == accepted else []

    def _commit(self, accepted: list[int], predicted: list[int], own: Sequence[int] = ()) -> None:
        """
        Appends committed tokens, and stores the predictions beyond them.

        Args:
            accepted: the tokens.
            predicted: the next draft.
            own: the model's own predictions, if `predicted` is a draft-only adapter's.
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
        """Appends tokens to the text, and compares them with what earlier text suggested."""
        for token in tokens:
            if self.config.adapts:
                limit = max(self.config.pool_size, 1)
                self.worth_of_copied.see(self.pool.matches(self.text[-LONGEST_MATCH:], 1, limit), token)
                self.worth_of_tabled.see(self.table.next(self.text) if self.table else None, token)
            self.text.append(token)
            self.pool.extend([token])

    def _move(self, predicted: list[int]) -> None:
        """Moves the blocks in flight to the newest committed token, and spawns the next block if it is due."""
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
        """Whether at least the share r of the newest block is committed or was left unchanged by the last forward."""
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
    The choice of `Economy.decide` for sequences that share a forward.

    Args:
        economy: the economy of the forward.
        rules: the rule of each sequence, with its room (`DraftRule.propose`).
    """
    idle = all(rule.is_idle for rule, _ in rules)
    drafted = not idle and all(rule.is_idle or rule.is_drafted for rule, _ in rules)
    return economy.decide([rule.outlook(room, own=not idle) for rule, room in rules], idle, drafted)
