"""What packed training rows consist of: how much clean text, how much noise, and how noisy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


BINS = 10  # of noise levels above 0; converged blocks are counted by themselves


@dataclass
class PackingStatistics:
    """
    Counts of packed rows.

    Attributes:
        trajectories: what they were packed from, if that is known; the rest of them fitted into no row.
        rows: rows.
        samples: sequences in them.
        clean_tokens, noisy_tokens: tokens of either half.
        label_tokens: clean tokens with a label, those of completions.
        twin_tokens: noisy tokens with a twin, from their block's first wrong token on.
        blocks: noisy blocks.
        converged_blocks: of these, blocks without a wrong token.
        histogram: blocks with a wrong token by noise level: (0, 0.1], (0.1, 0.2], ... (0.9, 1].
        by_place: for each place in a window the number of blocks there and the sum of their noise levels.
    """

    trajectories: int = 0
    rows: int = 0
    samples: int = 0
    clean_tokens: int = 0
    noisy_tokens: int = 0
    label_tokens: int = 0
    twin_tokens: int = 0
    blocks: int = 0
    converged_blocks: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)
    by_place: dict[int, tuple[int, float]] = field(default_factory=dict)

    @property
    def converged_share(self) -> float:
        """The share of noisy blocks that have no wrong token."""
        return self.converged_blocks / self.blocks if self.blocks else 0.0

    @property
    def mean_noise_by_place(self) -> list[float]:
        """The mean noise level at each place in a window."""
        return [total / count for _, (count, total) in sorted(self.by_place.items())]

    def add(self, row: dict[str, list[int]]) -> None:
        """Counts a row."""
        self.rows += 1
        self.samples += max(row["seq_ids"]) + 1
        self.label_tokens += sum(label != -100 for label in row["labels"])
        noisy = [index for index, block in enumerate(row["block_ids"]) if block >= 0]
        self.noisy_tokens += len(noisy)
        self.clean_tokens += sum(
            block < 0 and sequence >= 0 for block, sequence in zip(row["block_ids"], row["seq_ids"])
        )
        places: Counter = Counter()
        for (sequence, *_), block in groupby(
            noisy,  # positions go on within a block, and not from one copy of it to the next
            key=lambda index: (row["seq_ids"][index], row["block_ids"][index], row["position_ids"][index] - index),
        ):
            indices = list(block)
            if indices[0] and row["position_ids"][indices[0]] <= row["position_ids"][indices[0] - 1]:
                places.clear()
            wrong = sum(row["twin_ids"][index] >= 0 for index in indices)
            self.twin_tokens += wrong
            window = (sequence, row["window_start"][indices[0]])
            self._add_block(wrong / len(indices), places[window])
            places[window] += 1

    def _add_block(self, noise: float, place: int) -> None:
        self.blocks += 1
        if noise == 0:
            self.converged_blocks += 1
        else:
            self.histogram[min(BINS - 1, int(noise * BINS - 1e-9))] += 1
        count, total = self.by_place.get(place, (0, 0.0))
        self.by_place[place] = (count + 1, total + noise)

    def counts(self) -> dict[str, float]:
        """All of it as one flat dictionary of numbers, which can be added up; `from_counts` reads it back."""
        flat = {name: value for name, value in vars(self).items() if name not in ("histogram", "by_place")}
        flat |= {f"histogram/{index}": value for index, value in enumerate(self.histogram)}
        for place, (count, total) in self.by_place.items():
            flat |= {f"count/{place}": count, f"noise/{place}": total}
        return flat

    @classmethod
    def from_counts(cls, flat: Mapping[str, float]) -> PackingStatistics:
        """The statistics that `counts` gave, or a sum of several."""
        plain = {name: value for name, value in flat.items() if "/" not in name}
        places = [int(name.split("/")[1]) for name in flat if name.startswith("count/")]
        by_place = {place: (flat[f"count/{place}"], flat[f"noise/{place}"]) for place in sorted(places)}
        histogram = [flat.get(f"histogram/{index}", 0) for index in range(BINS)]
        return cls(**plain, histogram=histogram, by_place=by_place)

    def to_dict(self) -> dict[str, Any]:
        """Counts and figures, JSON-serializable."""
        shown = {name: value for name, value in vars(self).items() if name != "by_place"}
        return shown | {"converged_share": self.converged_share, "mean_noise_by_place": self.mean_noise_by_place}

    def table(self) -> str:
        """The statistics for the terminal."""
        lines = [
            ("rows", f"{self.rows}"),
            ("samples", f"{self.samples}"),
            *([("  left out, too long", f"{self.trajectories - self.samples}")] if self.trajectories else []),
            ("clean tokens", f"{self.clean_tokens}"),
            ("  with a label", f"{self.label_tokens}"),
            ("noisy tokens", f"{self.noisy_tokens}"),
            ("  with a twin", f"{self.twin_tokens}"),
            ("noisy blocks", f"{self.blocks}"),
            ("  converged", f"{self.converged_share:.1%}"),
        ]
        text = [f"{name:24}{value:>12}" for name, value in lines]
        most = max([self.converged_blocks, *self.histogram, 1])
        text += ["", "noise level of blocks"]
        levels = [("0", self.converged_blocks)]
        levels += [(f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", count) for i, count in enumerate(self.histogram)]
        text += [f"  {name:10}{count:>10}  {'#' * round(40 * count / most)}" for name, count in levels]
        noises = " ".join(f"{noise:.2f}" for noise in self.mean_noise_by_place)
        return "\n".join([*text, "", f"mean noise level by place in the window\n  {noises}"])


def packing_statistics(packed: Iterable[dict[str, list[int]]]) -> PackingStatistics:
    """
    Counts packed rows, whether ours or converted ones.

    Args:
        packed: rows as `pack_trajectories` returns them.
    """
    statistics = PackingStatistics()
    for row in packed:
        statistics.add(row)
    return statistics
