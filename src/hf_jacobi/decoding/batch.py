"""One row of the batch: its text, its status, its draft rule and its statistics."""

from __future__ import annotations

from .adaptive import Economy
from .config import JacobiConfig
from .drafting import Draft, DraftRule, choose
from .ngram_table import NgramTable
from .stats import JacobiStats, Trajectory, TrajectoryStep


class Row:
    """
    One row of the batch.

    Args:
        number: its number in the batch.
        tokens: the prompt, padding included.
        padding: how many of them are padding.
        config: the settings.
        max_length: the length beyond which nothing is tried, `None` for no limit.
        last_position: the last index that the model has a position for, `None` for no limit. If the model allows it,
            text can go beyond; drafts do not, since they may be cut short before.
        records: whether to keep every draft.
        vocabulary: the number of tokens of the model, `None` if unknown.
        table: the n-grams of other text of the model, if there is a table.

    Attributes:
        tokens: the text so far, padding included.
        stopped: whether a stopping criterion has ended the row.
        finished: whether decoding of the row is over: it stopped, and `generate` pads stopped rows.
        place: its index among the rows of a forward, which become fewer.
    """

    def __init__(
        self,
        number: int,
        tokens: list[int],
        padding: int,
        config: JacobiConfig,
        max_length: int | None,
        last_position: int | None = None,
        records: bool = False,
        vocabulary: int | None = None,
        table: NgramTable | None = None,
    ):
        self.number = self.place = number
        self.tokens = list(tokens)
        self.prompt_length = len(tokens)
        self.padding = padding
        self.max_length = max_length
        self.last_position = last_position
        self.stopped = False
        self.finished = False
        self.rule = DraftRule(config, self.tokens[padding:], f"{config.seed or 0}/{number}", vocabulary, table)
        self.stats = JacobiStats()
        self.trajectory = Trajectory(self.prompt_length) if records else None
        self.scores: list = []
        self.logits: list = []

    @property
    def length(self) -> int:
        """Number of tokens, padding included."""
        return len(self.tokens)

    @property
    def position(self) -> int:
        """Position of the next token, padding not counted."""
        return self.length - self.padding

    @property
    def room(self) -> int:
        """How many tokens can be tried next, the newest committed one included."""
        newest = self.length - 1
        rooms = [self.max_length - self.length] if self.max_length is not None else []
        if self.last_position is not None and newest <= self.last_position:
            rooms.append(self.last_position - newest + 1)
        return max(1, min(rooms, default=self.rule.size * self.rule.config.max_blocks))

    def propose(self, guesses: int | None = None, probes: bool = False) -> Draft:
        """
        The nodes to score next; one arbitrary token for a finished row. The arguments are those of
        `DraftRule.propose`.
        """
        return Draft([0]) if self.finished else self.rule.propose(self.room, guesses, probes)

    def commit(
        self, draft: Draft, start: int, path: list[int], predictions: list[int], drafted: list[int] | None = None
    ) -> None:
        """
        Updates the row after a forward whose tokens have been appended.

        Args:
            draft: the draft that was scored.
            start: index in the sequence of node 0.
            path: the accepted nodes, node 0 first; one token was appended for each.
            predictions: the model's prediction at each node.
            drafted: what a draft-only adapter predicted at each token of the chain, `None` without one.
        """
        accepted = self.tokens[start + 1 : start + 1 + len(path)]
        recycled = sum(node >= draft.chain_length for node in path)
        self.stats.count(len(path), len(draft) + len(drafted or ()))
        self.stats.recycled_tokens += recycled
        if self.trajectory:
            predicted = predictions[: draft.chain_length]
            self.trajectory.steps.append(TrajectoryStep(start, draft.chain, predicted, accepted, recycled))
            self.trajectory.tokens += accepted
        if self.finished:
            return
        if self.stats.forwards == 1:  # the prefill, for which nothing was drafted
            self.rule.begin(accepted[0])
        else:
            self.rule.observe(accepted, predictions, path, drafted)
        self.stats.blocks_spawned = self.rule.spawned


def propose(rows: list[Row], economy: Economy | None) -> tuple[list[Draft], bool]:
    """
    The drafts of all rows, and whether a draft-only adapter predicts beside the model. If drafts adapt, `economy`
    decides their size.
    """
    if economy is None:
        return [row.propose() for row in rows], True
    choice = choose(economy, [(row.rule, row.room) for row in rows if not row.finished])
    return [row.propose(choice.guesses, choice.probes) for row in rows], choice.adapter


def account(rows: list[Row], economy: Economy | None, drafts: list[Draft], adapter: bool) -> None:
    """Tells `economy`, if drafts adapt, what a forward over the drafts cost and how far all rows are."""
    live = [row.stats.new_tokens for row in rows if not row.finished]
    if economy is not None and live:
        economy.took(max(map(len, drafts)) - 1, min(live), adapter)
