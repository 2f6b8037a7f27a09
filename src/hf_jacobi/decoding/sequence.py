"""One row of the batch: its text, its blocks, its n-grams, and what was counted of it."""

from __future__ import annotations

from .acceptance import guesses_after
from .adaptive import AdaptiveReach
from .blocks import Blocks, FirstGuess, agreement
from .candidates import TokenTree
from .config import JacobiConfig
from .ngram_pool import NgramPool
from .stats import JacobiStats, Trajectory, TrajectoryStep


class Sequence:
    """
    One row of the batch.

    Args:
        row: its index in the batch.
        tokens: the prompt, padding included.
        padding: how many of them are padding.
        config: the settings.
        max_length: length beyond which nothing is tried, `None` if there is none.
        last_position: the last index that the model has a position for, `None` if there is none. Text may go beyond
            it if the model lets it, but drafts do not, as they may be cut short before.
        records: whether to keep every draft.
    """

    def __init__(
        self,
        row: int,
        tokens: list[int],
        padding: int,
        config: JacobiConfig,
        max_length: int | None,
        last_position: int | None = None,
        records: bool = False,
    ):
        self.row = row
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.config = config
        self.max_length = max_length
        self.last_position = last_position
        self.padding = padding
        self.stopped = False  # a criterion has said stop
        self.finished = False  # nothing more is decoded: it stopped, and `generate` pads rows that did
        self.stats = JacobiStats()
        self.trajectory = Trajectory(self.prompt_length) if records else None
        self.scores: list = []
        self.logits: list = []
        self.pool = NgramPool()
        prompt = self.tokens[padding:]
        if config.pool_prompt:
            self.pool.extend(prompt)
        guess = FirstGuess(config.draft_init, prompt, self.pool, f"{config.seed or 0}/{row}")
        self.candidates: list[list[int]] = []
        self.reach = AdaptiveReach(config.size) if config.adapts else None
        self.blocks = Blocks(config, self.prompt_length, guess)

    @property
    def length(self) -> int:
        """Number of tokens, padding included."""
        return len(self.tokens)

    @property
    def room(self) -> int:
        """How many tokens may be tried next, the newest committed one included."""
        newest = self.length - 1
        rooms = [self.max_length - self.length] if self.max_length is not None else []
        if self.last_position is not None and newest <= self.last_position:
            rooms.append(self.last_position - newest + 1)
        return max(1, min(rooms, default=self.config.size * self.config.max_blocks))

    def propose(self) -> TokenTree:
        """The tokens to score next: the draft, and candidates out of the pool, none beyond where text may go."""
        room = self.room
        tree = TokenTree(self.blocks.draft)
        length, limit = self.config.ngram_size, self.config.pool_size
        if self.reach:
            length, limit = self.reach.tokens, min(limit, self.reach.tokens)
        self.candidates = self.pool.continuations(self.tokens[-3:], min(length, room - 1), limit)
        for candidate in self.candidates:
            tree.add_branch(candidate)
        return tree

    def commit(
        self,
        tree: TokenTree,
        start: int,
        path: list[int],
        predictions: list[int],
        drafted: list[int] | None = None,
    ) -> None:
        """
        Takes in what a forward brought, after its tokens were appended: the pool and the blocks move on.

        Args:
            tree: what was scored.
            start: index in the sequence of node 0.
            path: the accepted nodes, node 0 first; one token was appended for each.
            predictions: the model's prediction at each node.
            drafted: what a draft-only adapter predicted at each token of the draft, if there is one.
        """
        accepted = self.tokens[start + 1 : start + 1 + len(path)]
        recycled = sum(node >= tree.draft_length for node in path)
        self.stats.count(len(path), len(tree) + len(drafted or ()))
        self.stats.recycled_tokens += recycled
        if self.trajectory:
            draft, predicted = tree.tokens[: tree.draft_length], predictions[: tree.draft_length]
            self.trajectory.steps.append(TrajectoryStep(start, draft, predicted, accepted, recycled))
            self.trajectory.tokens += accepted
        if self.finished:
            return
        if self.reach:
            self.reach.update(
                max(map(len, self.candidates), default=0),
                max((agreement(candidate, accepted) for candidate in self.candidates), default=0),
            )
        if drafted is None:
            guesses = guesses_after(tree.children, tree.draft_length, tree.depths, predictions, path[-1])
        else:
            guesses = drafted[len(path) :]
        self.pool.extend(accepted)
        self.pool.recycle(guesses)
        self.blocks.advance(self.tokens, guesses, self.room)
        self.stats.blocks_spawned = self.blocks.spawned
