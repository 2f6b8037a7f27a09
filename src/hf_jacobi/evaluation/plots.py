"""Pictures of the library's own outputs, in plain matplotlib. Each function draws into axes and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from ..decoding.errors import UsageError
from ..decoding.stats import JacobiStats, Trajectory, TrajectoryStep
from ..trajectories.statistics import BINS, PackingStatistics


PROMPT, COMPLETION, RIGHT, WRONG, PADDING = "#d9d9d9", "#9ecae1", "#a1d99b", "#fdae6b", "#ffffff"
ACCEPTED, RECYCLED = "#31a354", "#3182bd"
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "frameon": False}  # where a legend hides nothing
CURVES = ("consistency_loss", "ar_loss", "noisy_accuracy", "eval_tokens_per_forward", "eval_agreement")
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


def packed_row(row: dict[str, Sequence[int]], axes: Axes | None = None, first: int = 0, tokens: int = 64) -> Axes:
    """
    A packed row, token by token: what each column holds, and which tokens are prompt, text, right or wrong noise.

    Args:
        row: a row of what `pack_trajectories` returns.
        axes: where to draw; new axes if left out.
        first: the first token that is drawn.
        tokens: how many are; the title names the part of a row that is longer.

    Raises:
        `ValueError`: the row has no such token.
    """
    length = len(row["input_ids"])
    if not 0 <= first < length or tokens < 1:
        raise UsageError(f"the row has tokens 0 to {length - 1}: {tokens} from {first} on are none of them.")
    shown = range(first, min(first + tokens, length))
    axes = axes or pyplot.figure(figsize=(1.2 + 0.48 * len(shown), 0.42 * (len(SHOWN) + 2))).subplots()
    for index in shown:
        for line, column in enumerate(SHOWN):
            color = _kind(row, index) if line == 0 else "white"
            axes.add_patch(Rectangle((index, -line), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.5))
            value = row[column][index]
            axes.text(index + 0.5, 0.5 - line, "·" if value == -100 else value, ha="center", va="center", fontsize=8)
    for line, column in enumerate(SHOWN):
        axes.text(first - 0.2, 0.5 - line, column, ha="right", va="center", fontsize=8, family="monospace")
    kinds = {"prompt": PROMPT, "completion": COMPLETION, "noisy, right so far": RIGHT, "noisy, has a twin": WRONG}
    handles = [Patch(facecolor=color, edgecolor="#888888", label=name) for name, color in kinds.items()]
    axes.legend(handles=handles, ncols=4, fontsize=8, **ABOVE)
    if len(shown) < length:
        axes.set_title(f"tokens {first} to {shown[-1]} of 0 to {length - 1}", loc="left", fontsize=9, pad=24)
    axes.set(xlim=(first - 3.2, shown[-1] + 1.05), ylim=(0.95 - len(SHOWN), 1.05))
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
    rows = report["results"]
    axes = axes or pyplot.figure(figsize=(8, max(4, 0.2 * len(rows)))).subplots()
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
    if len(sizes) > 1:  # beside the axes, where no bar is
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return axes


def trajectory(
    record: Trajectory | Sequence[Trajectory],
    tokenizer=None,
    first: int = 0,
    forwards: int = 24,
    axes: Axes | None = None,
    row: int = 0,
) -> Axes:
    """
    How a text came about: one line per forward, one column per position.

    Each line shows the draft of that forward. Green was right and committed; blue was committed out of the pool; pale
    green right, but behind something wrong; orange wrong. Grey is text that was there before.

    Args:
        record: `output.trajectory`, or one of it.
        tokenizer: writes the tokens into the cells; left out, they stay empty.
        first: the first forward shown; 0 is the prefill, which drafts nothing.
        forwards: how many are shown.
        axes: where to draw; new axes if left out.
        row: which text of `output.trajectory` is drawn; the title names it where there are several.

    Raises:
        `ValueError`: nothing was recorded, or there is no such text.
    """
    several = not hasattr(record, "steps")
    if several and not record:
        raise UsageError("nothing was recorded: decode with return_dict_in_generate=True, output_trajectory=True.")
    if several and not -len(record) <= row < len(record):
        raise UsageError(f"there are {len(record)} texts, 0 to {len(record) - 1}: {row} is none of them.")
    rows, record = (len(record), record[row]) if several else (1, record)
    steps = [step for step in record.steps[first : first + forwards] if step.draft]
    text = record.tokens
    begin = min((step.start for step in steps), default=record.prompt_length)
    end = max((step.start + len(step.draft) for step in steps), default=begin + 1)
    axes = axes or pyplot.figure(figsize=(max(4, 0.32 * (end - begin)), max(2, 0.3 * len(steps)))).subplots()
    for line, step in enumerate(steps):
        if step.start > begin:
            axes.add_patch(Rectangle((begin, line), step.start - begin, 1, facecolor=PROMPT, edgecolor="none"))
        for offset, token in enumerate(step.draft):
            position = step.start + offset
            place = position - record.prompt_length
            right = place < len(text) and (place < 0 or text[place] == token)
            color = state_of(offset, right, step)
            axes.add_patch(Rectangle((position, line), 1, 1, facecolor=color, edgecolor="white", linewidth=0.5))
            if tokenizer is not None:
                word = tokenizer.decode([token]).replace("$", r"\$")[:6]
                axes.text(position + 0.5, line + 0.5, word, ha="center", va="center", fontsize=5)
    axes.set(xlim=(begin, end), ylim=(len(steps), 0), xlabel="position", ylabel="forward")
    if rows > 1:
        axes.set_title(f"text {row % rows} of 0 to {rows - 1}", fontsize=9)
    axes.set_xticks([tick for tick in range(begin, end) if (tick - record.prompt_length) % 8 == 0])
    axes.set_xticklabels([str(int(tick) - record.prompt_length) for tick in axes.get_xticks()])
    shown = {
        "there before": PROMPT,
        "right, committed": ACCEPTED,
        "committed from the pool": RECYCLED,
        "right, behind a wrong one": RIGHT,
        "wrong": WRONG,
    }
    handles = [Patch(color=color, label=label) for label, color in shown.items()]
    axes.legend(handles=handles, loc="upper right", fontsize=7, frameon=False)  # drafts never get into that corner
    return axes


def state_of(offset: int, right: bool, step: TrajectoryStep) -> str:
    """The colour of the token at `offset` in the draft of a forward."""
    if offset == 0:
        return PROMPT
    if offset <= len(step.accepted) and right:
        return ACCEPTED
    if offset < len(step.accepted):  # committed, though it was not in the draft; the last one is the model's own
        return RECYCLED
    return RIGHT if right else WRONG


def accepted_tokens(stats: JacobiStats, axes: Axes | None = None) -> Axes:
    """
    How many tokens each forward committed.

    Args:
        stats: `output.jacobi_stats`, or of one row.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(7, 2.5)).subplots()
    axes.bar(range(len(stats.accepted_per_forward)), stats.accepted_per_forward, width=1.0, color=ACCEPTED)
    mean = stats.tokens_per_forward
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=f"{mean:.2f} tokens per forward")
    axes.set(xlabel="forward", ylabel="tokens committed")
    axes.legend(fontsize=8, **ABOVE)
    return axes


def training_curves(
    history: Sequence[Mapping[str, float]], names: Sequence[str] = CURVES, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """
    What was logged over a training.

    Args:
        history: `trainer.state.log_history`, or that of a `trainer_state.json`.
        names: of what is shown, each in axes of its own; those never logged are left out.
        axes: as many axes as there are names; new ones if left out.

    Returns:
        The axes.

    Raises:
        `ValueError`: none of the names was logged.
    """
    shown = [name for name in names if any(name in entry for entry in history)]
    if not shown:
        raise UsageError(f"none of {list(names)} was logged.")
    if axes is None:
        figure = pyplot.figure(figsize=(3.5 * len(shown), 3), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for one, name in zip(axes, shown):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        one.plot(*zip(*points), marker="." if len(points) < 30 else None)
        one.set(xlabel="step", title=name.replace("_", " "))
    return axes


def attention_mask(row: Mapping[str, Sequence[int]], axes: Axes | None = None) -> Axes:
    """
    Which token of a packed row sees which: a line for each token that looks, a column for each it may see.

    Args:
        row: a row that `pack_trajectories` made.
        axes: where to draw; new axes if left out.
    """
    from ..training.mask import RowTensors, visible  # needs more than the rest of this file

    rows = RowTensors.of({name: torch.tensor([list(row[name])]) for name in SHOWN})
    count = len(row["input_ids"])
    places = torch.arange(count)
    seen = visible(rows, torch.zeros(1, dtype=torch.long), places[:, None], places[None, :])
    axes = axes or pyplot.figure(figsize=(5, 5)).subplots()
    axes.imshow(seen, cmap="Blues", vmin=0, vmax=1.5, interpolation="nearest")
    noise = next((place for place, block in enumerate(row["block_ids"]) if block >= 0), count)
    for draw in (axes.axhline, axes.axvline):
        draw(noise - 0.5, color="black", linewidth=0.6)
    axes.set(xlabel="token that is seen", ylabel="token that looks")
    return axes


def knee(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    What a forward takes by how many tokens it scores: flat up to the knee, where more tokens cost next to nothing.

    Args:
        report: what `tune` returned.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(4.5, 3.2)).subplots()
    for rows, seconds in report["costs"]["seconds"].items():
        label = None if rows == "1" else f"batches of {rows}"
        tokens = report["costs"]["tokens"][: len(seconds)]
        (line,) = axes.plot(tokens, [1000 * value for value in seconds], marker="o", label=label)
        axes.axhline(1000 * seconds[0], color=line.get_color(), linestyle="--", linewidth=0.8)
    if len(report["costs"]["seconds"]) > 1:
        axes.legend(fontsize=7, **ABOVE)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a row in a forward", ylabel="milliseconds", ylim=(0, None))
    return axes


def tuned_settings(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    Predicted tokens per second over tokens and positions per forward, a point for each setting, the chosen one marked.

    Args:
        report: what `tune` returned.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(5.5, 4)).subplots()
    costs = report["costs"]
    rows = report["grid"]
    across = [row["positions_per_forward"] for row in rows]
    up = [row["tokens_per_forward"] for row in rows]
    positions = np.linspace(1, 1.05 * max(across), 60)
    yields = np.linspace(1, 1.1 * max(up), 60)
    seconds = np.interp(positions, costs["tokens"], costs["seconds"]["1"]) + costs["overhead"]
    lines = axes.contourf(positions, yields, yields[:, None] / seconds[None, :], levels=12, cmap="Blues")
    axes.figure.colorbar(lines, ax=axes, label="tokens per second, predicted")
    axes.scatter(across, up, color="black", s=12)
    chosen = next(row for row in rows if row["settings"] == report["jacobi"])
    point = (chosen["positions_per_forward"], chosen["tokens_per_forward"])
    label = str(report["jacobi"] or "default") + (", but AR was faster" if report["decoding"] == "ar" else "")
    axes.scatter(*point, color=WRONG, marker="*", s=120, label=label)
    axes.set(xlabel="positions per forward", ylabel="tokens per forward")
    axes.legend(fontsize=7, **ABOVE)
    return axes


def predicted_against_measured(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    Tokens per second of the settings that were checked, as predicted and as measured.

    Args:
        report: what `tune` returned.
        axes: where to draw; new axes if left out.
    """
    axes = axes or pyplot.figure(figsize=(4, 4)).subplots()
    pairs = [
        (row["predicted"], report["checked"][str(row["settings"])]["tokens_per_second"])
        for row in report["grid"]
        if str(row["settings"]) in report["checked"]
    ]
    axes.scatter(*zip(*pairs))
    top = 1.15 * max(max(pair) for pair in pairs)
    axes.plot((0, top), (0, top), color="gray", linewidth=0.8)
    axes.axhline(report["checked"]["AR"]["tokens_per_second"], color="gray", linestyle="--", label="AR")
    axes.set(xlabel="predicted tokens per second", ylabel="measured", xlim=(0, top), ylim=(0, top))
    axes.legend(fontsize=8, **ABOVE)
    return axes
