"""Plots of the library's results with matplotlib. Each function draws into axes and returns them."""

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
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "frameon": False}  # covers no data
CURVES = ("consistency_loss", "ar_loss", "noisy_accuracy", "eval_tokens_per_forward", "eval_agreement")
SHOWN = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "seq_ids", "twin_ids")


def noise_levels(statistics: PackingStatistics, axes: Axes | None = None) -> Axes:
    """
    A histogram of the noise levels of the blocks in packed rows.

    Args:
        statistics: the result of `packing_statistics`.
        axes: the axes to draw into; new ones by default.
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
    A packed row, token by token: the value in each column, and by colour whether a token is prompt, completion,
    converged noise or other noise.

    Args:
        row: a row that `pack_trajectories` made.
        axes: the axes to draw into; new ones by default.
        first: the index of the first token to draw.
        tokens: the number of tokens to draw; the title of a longer row says which part is shown.

    Raises:
        `ValueError`: the row has no such token.
    """
    length = len(row["input_ids"])
    if not 0 <= first < length or tokens < 1:
        raise UsageError(f"the row has tokens 0 to {length - 1}, not {tokens} from {first} on: choose some of these.")
    shown = range(first, min(first + tokens, length))
    axes = axes or pyplot.figure(figsize=(1.2 + 0.48 * len(shown), 0.42 * (len(SHOWN) + 2))).subplots()
    for index in shown:
        for line, column in enumerate(SHOWN):
            color = _kind(row, index) if line == 0 else "white"
            axes.add_patch(Rectangle((index, -line), 1, 1, facecolor=color, edgecolor="#888888", linewidth=0.5))
            value = row[column][index]
            shown_value = "·" if value == -100 else str(value)
            axes.text(index + 0.5, 0.5 - line, shown_value, ha="center", va="center", fontsize=8)
    for line, column in enumerate(SHOWN):
        axes.text(first - 0.2, 0.5 - line, column, ha="right", va="center", fontsize=8, family="monospace")
    kinds = {
        "prompt": PROMPT,
        "completion": COMPLETION,
        "noisy, without an error": RIGHT,
        "noisy, from an error on": WRONG,
    }
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
    The speed-up over the first decoding method by batch size, with the range over batches.

    Args:
        report: the report of `bench`.
        axes: the axes to draw into; new ones by default.
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
    axes.set_xlabel(f"speed-up over {names[0]}")
    if len(sizes) > 1:  # beside the axes, so that it covers no bar
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
    The drafts of one text: a line for each forward, a column for each index in the sequence.

    Grey tokens were committed before. Of the draft, green tokens were correct and committed, blue ones were replaced
    by committed tokens from the pool, pale green ones were correct but follow a wrong token, orange ones were wrong.

    Args:
        record: `output.trajectory`, or one of its records.
        tokenizer: decodes the tokens, which are then written into the cells.
        first: the first forward to show; 0 is the prefill, which drafts nothing.
        forwards: the number of forwards to show.
        axes: the axes to draw into; new ones by default.
        row: the row of `output.trajectory` to draw; the title names it if there are several.

    Raises:
        `ValueError`: nothing was recorded, or there is no such row.
    """
    one, title = _row_of(record, row)
    steps = [step for step in one.steps[first : first + forwards] if step.draft]
    begin = min((step.start for step in steps), default=one.prompt_length)
    end = max((step.start + len(step.draft) for step in steps), default=begin + 1)
    axes = axes or pyplot.figure(figsize=(max(4, 0.32 * (end - begin)), max(2, 0.3 * len(steps)))).subplots()
    for line, step in enumerate(steps):
        if step.start > begin:
            axes.add_patch(Rectangle((begin, line), step.start - begin, 1, facecolor=PROMPT, edgecolor="none"))
        _draw_draft(axes, line, step, one, tokenizer)
    axes.set(xlim=(begin, end), ylim=(len(steps), 0), xlabel="index after the prompt", ylabel="forward")
    if title:
        axes.set_title(title, fontsize=9)
    axes.set_xticks([tick for tick in range(begin, end) if (tick - one.prompt_length) % 8 == 0])
    axes.set_xticklabels([str(int(tick) - one.prompt_length) for tick in axes.get_xticks()])
    shown = {
        "committed before": PROMPT,
        "correct, committed": ACCEPTED,
        "committed from the pool": RECYCLED,
        "correct, after a wrong one": RIGHT,
        "wrong": WRONG,
    }
    handles = [Patch(color=color, label=label) for label, color in shown.items()]
    axes.legend(handles=handles, loc="upper right", fontsize=7, frameon=False)  # drafts never reach that corner
    return axes


def _row_of(record: Trajectory | Sequence[Trajectory] | None, row: int) -> tuple[Trajectory, str]:
    """The record of a row, and its title, which is empty if there is only one."""
    if not record:
        raise UsageError("nothing was recorded: decode with return_dict_in_generate=True, output_trajectory=True.")
    if not isinstance(record, Sequence):
        return record, ""
    count = len(record)
    if not -count <= row < count:
        raise UsageError(f"there are {count} texts, 0 to {count - 1}, and no text {row}: choose one of these.")
    return record[row], f"text {row % count} of 0 to {count - 1}" if count > 1 else ""


def _draw_draft(axes: Axes, line: int, step: TrajectoryStep, record: Trajectory, tokenizer) -> None:
    text = record.tokens
    for offset, token in enumerate(step.draft):
        index = step.start + offset
        place = index - record.prompt_length
        is_correct = place < len(text) and (place < 0 or text[place] == token)
        color = state_of(offset, is_correct, step)
        axes.add_patch(Rectangle((index, line), 1, 1, facecolor=color, edgecolor="white", linewidth=0.5))
        if tokenizer is not None:
            word = tokenizer.decode([token]).replace("$", r"\$")[:6]
            axes.text(index + 0.5, line + 0.5, word, ha="center", va="center", fontsize=5)


def state_of(offset: int, is_correct: bool, step: TrajectoryStep) -> str:
    """The colour of the token at `offset` in the draft of a forward."""
    if offset == 0:
        return PROMPT
    if offset <= len(step.accepted) and is_correct:
        return ACCEPTED
    if offset < len(step.accepted):  # committed, but not in the draft; the last committed token is the model's own
        return RECYCLED
    return RIGHT if is_correct else WRONG


def accepted_tokens(stats: JacobiStats, axes: Axes | None = None) -> Axes:
    """
    The number of tokens that each forward committed.

    Args:
        stats: `output.jacobi_stats`, or the statistics of one row.
        axes: the axes to draw into; new ones by default.
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
    The logged values of a training by step.

    Args:
        history: `trainer.state.log_history`, or `log_history` in a `trainer_state.json`.
        names: the values to show, each in its own axes; values that were never logged are left out.
        axes: one for each name; new ones by default.

    Returns:
        The axes.

    Raises:
        `ValueError`: none of the names was logged.
    """
    shown = [name for name in names if any(name in entry for entry in history)]
    if not shown:
        raise UsageError(f"none of {list(names)} was logged: name values that were.")
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
    The noise-aware mask of a packed row: a line for each query token, a column for each key token.

    Args:
        row: a row that `pack_trajectories` made.
        axes: the axes to draw into; new ones by default.
    """
    from ..training.mask import RowTensors, visible  # needs packages that the rest of this file does not

    rows = RowTensors.of({name: torch.tensor([list(row[name])]) for name in SHOWN})
    count = len(row["input_ids"])
    places = torch.arange(count)
    seen = visible(rows, torch.zeros(1, dtype=torch.long), places[:, None], places[None, :])
    axes = axes or pyplot.figure(figsize=(5, 5)).subplots()
    axes.imshow(seen, cmap="Blues", vmin=0, vmax=1.5, interpolation="nearest")
    noise = next((place for place, block in enumerate(row["block_ids"]) if block >= 0), count)
    for draw in (axes.axhline, axes.axvline):
        draw(noise - 0.5, color="black", linewidth=0.6)
    axes.set(xlabel="key token", ylabel="query token")
    return axes


def knee(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    The time of a forward by the number of tokens that it scores: nearly flat up to the knee.

    Args:
        report: the report of `tune`.
        axes: the axes to draw into; new ones by default.
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
    axes.set(xlabel="tokens per row in a forward", ylabel="milliseconds", ylim=(0, None))
    return axes


def tuned_settings(report: Mapping[str, Any], axes: Axes | None = None) -> Axes:
    """
    The predicted tokens per second by tokens and positions per forward, with a point for each setting. A star marks
    the chosen one.

    Args:
        report: the report of `tune`.
        axes: the axes to draw into; new ones by default.
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
    Predicted and measured tokens per second of the best few settings.

    Args:
        report: the report of `tune`.
        axes: the axes to draw into; new ones by default.
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
