"""Counts what packed training rows hold: clean text, noise, and noise levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset


READ = ("seq_ids", "block_ids", "position_ids", "window_start", "labels", "twin_ids")
BINS = 10  # of noise levels above 0; converged blocks are counted separately


@dataclass
class PackingStatistics:
    """
    Counts of packed rows.

    Attributes:
        trajectories: how many trajectories were packed, if known; some can be too long for any row.
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

    def add(self, row: Mapping[str, Sequence[int]]) -> None:
        """Counts a row."""
        self._add({name: np.asarray(row[name]) for name in READ}, np.array([len(row["seq_ids"])]))

    def add_table(self, rows: pyarrow.Table) -> None:
        """Counts the rows of an Arrow table."""
        if len(rows):
            columns = {name: rows.column(name).combine_chunks() for name in READ}
            flat = {name: column.flatten().to_numpy() for name, column in columns.items()}
            self._add(flat, columns["seq_ids"].value_lengths().to_numpy())

    def _add(self, columns: dict[str, np.ndarray], lengths: np.ndarray) -> None:
        """Counts concatenated rows of the given lengths."""
        sequences, blocks, positions, windows = (columns[name] for name in READ[:4])
        begins = np.cumsum(lengths) - lengths
        noisy = np.flatnonzero(blocks >= 0)
        self.rows += len(lengths)
        self.samples += int((np.maximum.reduceat(sequences, begins) + 1).sum())
        self.label_tokens += int(np.count_nonzero(columns["labels"] != -100))
        self.noisy_tokens += len(noisy)
        self.clean_tokens += int(np.count_nonzero((blocks < 0) & (sequences >= 0)))
        if not len(noisy):
            return
        rows = np.repeat(np.arange(len(lengths)), lengths)
        shifts = positions - np.arange(len(positions))  # constant within a block, different in its next copy
        heads = noisy[_changes(rows[noisy], sequences[noisy], blocks[noisy], shifts[noisy])]
        ends = np.append(np.searchsorted(noisy, heads[1:]), len(noisy))
        sizes = np.diff(ends, prepend=0)
        wrong = np.add.reduceat((columns["twin_ids"][noisy] >= 0).astype(np.int64), ends - sizes)
        self.twin_tokens += int(wrong.sum())
        falls = (heads > begins[rows[heads]]) & (positions[heads] <= positions[heads - 1])  # where a copy begins
        order = np.arange(len(heads))
        starts = falls | np.isin(order, _changes(rows[heads], sequences[heads], windows[heads]))
        self._add_blocks(wrong / sizes, order - np.maximum.accumulate(np.where(starts, order, 0)))

    def _add_blocks(self, noise: np.ndarray, places: np.ndarray) -> None:
        """Counts blocks by their noise levels and their places in the window."""
        self.blocks += len(noise)
        some = noise[noise > 0]
        self.converged_blocks += len(noise) - len(some)
        bins = np.minimum(BINS - 1, (some * BINS - 1e-9).astype(int))
        added = np.bincount(bins, minlength=BINS).tolist()
        self.histogram = [before + more for before, more in zip(self.histogram, added)]
        counts = np.bincount(places)
        known = [self.by_place.get(place, (0, 0.0)) for place in range(len(counts))]
        totals = np.array([total for _, total in known])
        np.add.at(totals, places, noise)  # one by one: the sum must not depend on how rows are grouped
        for place, (count, total) in enumerate(zip(counts.tolist(), totals.tolist())):
            if count:
                self.by_place[place] = (known[place][0] + count, total)

    def counts(self) -> dict[str, float]:
        """All counts as one flat dictionary of numbers that can be summed; `from_counts` reads it back."""
        flat = {name: value for name, value in vars(self).items() if name not in ("histogram", "by_place")}
        flat |= {f"histogram/{index}": value for index, value in enumerate(self.histogram)}
        for place, (count, total) in self.by_place.items():
            flat |= {f"count/{place}": count, f"noise/{place}": total}
        return flat

    @classmethod
    def from_counts(cls, flat: Mapping[str, float]) -> PackingStatistics:
        """Restores the statistics that `counts` returned, or a sum of several."""
        statistics = cls()
        for name, value in flat.items():
            if "/" not in name:
                setattr(statistics, name, int(value))
        places = sorted(int(name.split("/")[1]) for name in flat if name.startswith("count/"))
        statistics.by_place = {place: (int(flat[f"count/{place}"]), flat[f"noise/{place}"]) for place in places}
        statistics.histogram = [int(flat.get(f"histogram/{index}", 0)) for index in range(BINS)]
        return statistics

    def to_dict(self) -> dict[str, Any]:
        """Counts and figures, JSON-serializable."""
        shown = {name: value for name, value in vars(self).items() if name != "by_place"}
        return shown | {"converged_share": self.converged_share, "mean_noise_by_place": self.mean_noise_by_place}

    def table(self) -> str:
        """The statistics as a table for the terminal."""
        lines = [
            ("rows", f"{self.rows}"),
            ("samples", f"{self.samples}"),
            *([("  left out, too long", f"{self.trajectories - self.samples}")] if self.trajectories else []),
            ("clean tokens", f"{self.clean_tokens}"),
            ("  of completions", f"{self.label_tokens}"),
            ("noisy tokens", f"{self.noisy_tokens}"),
            ("  from an error on", f"{self.twin_tokens}"),
            ("noisy blocks", f"{self.blocks}"),
            ("  without an error", f"{self.converged_share:.1%}"),
        ]
        text = [f"{name:24}{value:>12}" for name, value in lines]
        most = max([self.converged_blocks, *self.histogram, 1])
        text += ["", "noise level of blocks"]
        levels = [("0", self.converged_blocks)]
        levels += [(f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", count) for i, count in enumerate(self.histogram)]
        text += [f"  {name:10}{count:>10}  {'#' * round(40 * count / most)}" for name, count in levels]
        noises = " ".join(f"{noise:.2f}" for noise in self.mean_noise_by_place)
        return "\n".join([*text, "", f"mean noise level by place in the window\n  {noises}"])


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Where any column differs from its previous entry; the first entry counts as different."""
    differs = np.ones(len(columns[0]), bool)
    differs[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(differs)


def packing_statistics(packed: Iterable[Mapping[str, Sequence[int]]]) -> PackingStatistics:
    """
    Counts packed rows, whether packed here or converted.

    Args:
        packed: rows as `pack_trajectories` returns them.
    """
    statistics = PackingStatistics()
    if isinstance(packed, Dataset):
        for table in packed.select_columns(list(READ)).with_format("arrow").iter(1000):
            statistics.add_table(table)
    else:
        for row in packed:
            statistics.add(row)
    return statistics
