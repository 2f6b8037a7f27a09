"""Pictures of the library's own outputs, in plain matplotlib. Each function draws into axes and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ..trajectories.statistics import BINS, PackingStatistics


PROMPT, COMPLETION, RIGHT, WRONG, PADDING = "#d9d9d9", "#9ecae1", "#a1d99b", "#fdae6b", "#ffffff"
SHOWN = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "seq_ids", "twin_ids")


def noise_levels(statistics: PackingStatistics, axes: Axes | None = None) -> Axes:
    """
    How noisy the blocks of packed rows are: a histogram of noise levels.

    Args:
        statistics: what `packing_statistics` counted.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(6, 3.5)).subplots()
    shares = [count / max(1, statistics.blocks) for count in (statistics.converged_blocks, *statistics.histogram)]
    centers = [-0.05] + [(index + 0.5) / BINS for index in range(BINS)]
    axes.bar(centers, shares, width=0.09, color=[RIGHT] + [WRONG] * BINS)
    axes.set_xticks([-0.05, *(index / BINS for index in range(BINS + 1))])
    axes.set_xticklabels(["0", "", *(f"{index / BINS:.1f}" for index in range(1, BINS + 1))])
    axes.set(xlabel="noise level of the block (0: converged)", ylabel="share of blocks")
    axes.set_title(f"{statistics.blocks:,} noisy blocks, {statistics.converged_share:.0%} converged")
    return axes


def packed_row(row: dict[str, Sequence[int]], axes: Axes | None = None) -> Axes:
    """
    A packed row, token by token: what each column holds, and which tokens are prompt, text, right or wrong noise.

    Args:
        row: a row of what `pack_trajectories` returns; a short one, as every token is written out.
        axes: where to draw; new axes if left out.
    """
    length = len(row["input_ids"])
    axes = axes or pyplot.figure(figsize=(1.2 + 0.48 * length, 0.42 * (len(SHOWN) + 2))).subplots()
    for index in range(length):
        for line, column in enumerate(SHOWN):
            color = _kind(row, index) if line == 0 else "white"
            axes.add_patch(Rectangle((index, -line), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.5))
            value = row[column][index]
            axes.text(index + 0.5, 0.5 - line, "·" if value == -100 else value, ha="center", va="center", fontsize=8)
    for line, column in enumerate(SHOWN):
        axes.text(-0.2, 0.5 - line, column, ha="right", va="center", fontsize=8, family="monospace")
    kinds = {"prompt": PROMPT, "completion": COMPLETION, "noisy, right so far": RIGHT, "noisy, has a twin": WRONG}
    handles = [Patch(facecolor=color, edgecolor="#888888", label=name) for name, color in kinds.items()]
    axes.legend(handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=8)
    axes.set(xlim=(-3.2, length + 0.05), ylim=(0.95 - len(SHOWN), 1.05))
    axes.axis("off")
    return axes


def _kind(row: dict[str, Sequence[int]], index: int) -> str:
    if row["seq_ids"][index] < 0:
        return PADDING
    if row["block_ids"][index] < 0:
        return PROMPT if row["labels"][index] == -100 else COMPLETION
    return RIGHT if row["twin_ids"][index] < 0 else WRONG


def bench_bars(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    Speed-up over the first way of decoding, by batch size, with the range over batches.

    Args:
        report: what `bench` returned.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(8, 4)).subplots()
    rows = report["results"]
    names = list(dict.fromkeys(row["decoding"] for row in rows))
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    width = 0.8 / len(sizes)
    for place, size in enumerate(sizes):
        found = [row for row in rows if row["batch_size"] == size]
        heights = [names.index(row["decoding"]) + (place - (len(sizes) - 1) / 2) * width for row in found]
        speed = [row["speedup"] for row in found]
        below = [max(0.0, row["speedup"] - row["slowest"]) for row in found]
        above = [max(0.0, row["fastest"] - row["speedup"]) for row in found]
        axes.barh(heights, speed, height=0.9 * width, xerr=[below, above], label=f"batch of {size}")
        for height, row in zip(heights, found):
            axes.text(0.02, height, f"TPF {row['tokens_per_forward']:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel(f"tokens per second against {names[0]}")
    if len(sizes) > 1:
        axes.legend()
    return axes
