"""The counts of a call, `JacobiStats`, and the record of its drafts, `Trajectory` (`output_trajectory=True`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.generation import GenerateDecoderOnlyOutput


@dataclass
class JacobiStats:
    """
    Counts of one `generate` call, or of one of its rows.

    A forward that serves several rows counts once for the call and once for each row that was unfinished then.

    Attributes:
        new_tokens: tokens generated, including the end-of-sequence token but not padding.
        forwards: forward passes; the prefill counts as one.
        positions: positions scored in those forwards; the prefill counts as one per row.
        recycled_tokens: tokens accepted from candidates of the n-gram pool rather than from the chain.
        blocks_spawned: pseudo-active blocks spawned.
        accepted_per_forward: tokens committed by each forward, in order.
        per_sequence: the counts of each row, in order; empty in a row's own stats.
    """

    new_tokens: int = 0
    forwards: int = 0
    positions: int = 0
    recycled_tokens: int = 0
    blocks_spawned: int = 0
    accepted_per_forward: list[int] = field(default_factory=list)
    per_sequence: list[JacobiStats] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        """TPF: `new_tokens / forwards`."""
        return self.new_tokens / self.forwards if self.forwards else 0.0

    @property
    def positions_per_token(self) -> float:
        """Positions scored per token generated: the price of the speed in arithmetic."""
        return self.positions / self.new_tokens if self.new_tokens else 0.0

    def count(self, accepted: int, positions: int) -> None:
        """Adds one forward that scored `positions` and committed `accepted` tokens."""
        self.forwards += 1
        self.positions += positions
        self.new_tokens += accepted
        self.accepted_per_forward.append(accepted)

    def to_dict(self) -> dict[str, Any]:
        """All counts and ratios, JSON-serializable."""
        counts = {name: value for name, value in vars(self).items() if name != "per_sequence"}
        ratios = {"tokens_per_forward": self.tokens_per_forward, "positions_per_token": self.positions_per_token}
        return counts | ratios | {"per_sequence": [row.to_dict() for row in self.per_sequence]}


@dataclass
class TrajectoryStep:
    """
    One Jacobi iteration of one sequence.

    Attributes:
        start: index in the sequence of the first token of the draft.
        draft: the tokens tried: the newest committed one, then the guesses.
        predictions: the model's prediction after each token of `draft`; if logits processors read the text, a guess
            that does not apply them.
        accepted: the tokens committed by this forward.
        recycled: how many of them came from a candidate of the n-gram pool.
    """

    start: int
    draft: list[int]
    predictions: list[int]
    accepted: list[int]
    recycled: int = 0


@dataclass
class Trajectory:
    """
    Every draft of one sequence; `blocks` gives the trajectory of each block.

    Attributes:
        prompt_length: number of tokens before the first generated one, padding included.
        steps: one entry per forward, the prefill first.
        tokens: the generated tokens.
    """

    prompt_length: int
    steps: list[TrajectoryStep] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def blocks(self, block_size: int) -> list[list[list[int]]]:
        """
        The trajectory of each block of `block_size` tokens: its states from the first guess to the fixed point.

        There is one state for every forward before which the whole block was committed or in flight; the last state is
        the text itself. The last block can be shorter. The blocks of `window="block"` lie on this grid; with
        `"sliding"`, a block's states begin when its last token enters the draft.
        """
        result = []
        for first in range(0, len(self.tokens), block_size):
            final = self.tokens[first : first + block_size]
            begin, end = self.prompt_length + first, self.prompt_length + first + len(final)
            states = []
            for step in self.steps:
                if step.start < end <= step.start + len(step.draft):
                    done = max(0, step.start - begin)
                    states.append(final[:done] + step.draft[max(0, begin - step.start) :][: len(final) - done])
            if not states or states[-1] != final:
                states.append(list(final))
            result.append(states)
        return result


@dataclass
class JacobiOutput(GenerateDecoderOnlyOutput):
    """
    The output of `generate(decoding="jacobi", return_dict_in_generate=True)`: transformers' own, with two more fields.

    Attributes:
        jacobi_stats: the counts of the call.
        trajectory: with `output_trajectory=True` one `Trajectory` per row, else `None`.
    """

    jacobi_stats: JacobiStats | None = None
    trajectory: list[Trajectory] | None = None
