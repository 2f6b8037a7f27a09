"""The report of a collection of trajectories: counts, and the figures derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class CollectReport:
    """
    Counts of a trajectory data set, and how long it took.

    Attributes:
        prompts: prompts read.
        long_prompts, empty_prompts, bad_prompts: prompts left out because they are too long, have no
            tokens, or could not be encoded.
        empty, repetitive, overlong: completions that hold only an end token; that end in a loop; that
            reached the limit.
        other_text: given completions left out because they are not the model's greedy text.
        given_tokens, own_tokens: tokens of given completions, and how many of them the model itself predicts.
        sequences: completions kept.
        tokens, blocks, states: what these completions hold.
        seconds: time spent completing and refining, summed over processes.
        skipped: which prompts were left out and why, one sentence each.
    """

    prompts: int = 0
    long_prompts: int = 0
    empty_prompts: int = 0
    bad_prompts: int = 0
    empty: int = 0
    repetitive: int = 0
    overlong: int = 0
    other_text: int = 0
    given_tokens: int = 0
    own_tokens: int = 0
    sequences: int = 0
    tokens: int = 0
    blocks: int = 0
    states: int = 0
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def from_counts(cls, counts: Mapping[str, float], skipped: Iterable[str] = ()) -> CollectReport:
        """Makes the report from the counts of `Collector` and the prompts that were left out."""
        names = (one.name for one in fields(cls) if one.name != "skipped")
        report = cls(skipped=list(skipped))
        for name in names:
            setattr(report, name, counts.get(name, 0))
        return report

    @property
    def blocks_per_second(self) -> float:
        """Blocks refined per second, decoding included."""
        return self.blocks / self.seconds if self.seconds else 0.0

    @property
    def iterations_per_block(self) -> float:
        """Jacobi iterations from first guess to fixed point, on average."""
        return (self.states - self.blocks) / self.blocks if self.blocks else 0.0

    @property
    def tokens_per_iteration(self) -> float:
        """Mean number of tokens that converge per iteration, as in vanilla Jacobi decoding of this text."""
        iterations = self.states - self.blocks
        return self.tokens / iterations if iterations else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All counts and figures, JSON-serializable."""
        names = ("blocks_per_second", "iterations_per_block", "tokens_per_iteration")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def table(self) -> str:
        """The report as a table for the terminal."""
        lines = [
            ("prompts", f"{self.prompts}"),
            ("  too long, or empty", f"{self.long_prompts}, {self.empty_prompts}"),
            *([("  not encodable", f"{self.bad_prompts}")] if self.bad_prompts else []),
            *([("  other text", f"{self.other_text}")] if self.other_text else []),
            ("completions kept", f"{self.sequences}"),
            ("  empty", f"{self.empty}"),
            ("  ending in a loop", f"{self.repetitive}"),
            ("  without an end", f"{self.overlong}"),
            ("tokens", f"{self.tokens}"),
            *([("  the model's own", f"{self.own_tokens} of {self.given_tokens}")] if self.given_tokens else []),
            ("blocks", f"{self.blocks}"),
            ("iterations per block", f"{self.iterations_per_block:.2f}"),
            ("tokens per iteration", f"{self.tokens_per_iteration:.2f}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("blocks per second", f"{self.blocks_per_second:.2f}"),
        ]
        return "\n".join(f"{name:24}{value:>12}" for name, value in lines)
