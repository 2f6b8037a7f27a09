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
    def completions(self) -> int:
        """Completions written or given, those left out included."""
        return self.prompts - self.long_prompts - self.empty_prompts - self.bad_prompts

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

    @property
    def unusable(self) -> dict[str, int]:
        """How many prompts have no completion, by reason."""
        return {
            "too long": self.long_prompts,
            "without text": self.empty_prompts,
            "not encodable": self.bad_prompts,
        }

    @property
    def findings(self) -> dict[str, int]:
        """How many completions were left out or are unusual, by reason; `CollectSettings` says what is left out."""
        unended = "without an end token" if self.given_tokens else "cut at max_new_tokens"
        return {
            "not the model's text": self.other_text,
            "only an end token": self.empty,
            "ending in a loop": self.repetitive,
            unended: self.overlong,
        }

    def shortfall(self) -> str:
        """Why no completion was kept, or that over half are empty, without a period; `""` if neither is so."""
        if not self.sequences:
            counts = {"prompts": self.prompts} | self.unusable | self.findings
            shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            return f"no completion was kept ({shown})"
        if 2 * self.empty > self.completions:
            return f"{self.empty} of {self.completions} completions hold only an end token"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """All counts and figures, JSON-serializable."""
        names = ("blocks_per_second", "iterations_per_block", "tokens_per_iteration")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def table(self) -> str:
        """The report as a table for the terminal."""
        rare = ("not encodable", "not the model's text")  # shown only if there are any
        left_out, findings = (
            [(f"  {name}", f"{count}") for name, count in counts.items() if count or name not in rare]
            for counts in (self.unusable, self.findings)
        )
        lines = [
            ("prompts", f"{self.prompts}"),
            *left_out,
            ("completions", f"{self.completions}"),
            *findings,
            ("completions kept", f"{self.sequences}"),
            ("tokens", f"{self.tokens}"),
            *([("  the model's own", f"{self.own_tokens} of {self.given_tokens}")] if self.given_tokens else []),
            ("blocks", f"{self.blocks}"),
            ("iterations per block", f"{self.iterations_per_block:.2f}"),
            ("tokens per iteration", f"{self.tokens_per_iteration:.2f}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("blocks per second", f"{self.blocks_per_second:.2f}"),
        ]
        return "\n".join(f"{name:24}{value:>12}" for name, value in lines)
