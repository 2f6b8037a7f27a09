"""Reports the result of a recipe: a table, and a plot of speed and quality over the steps of each phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..decoding.files import write_whole
from .choosing import quality


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    measure = "correct answers" if report["scored"] else "agreement"
    lines = [
        f"# {report['model']}, trained in {len(report['phases'])} phase{'s'[: len(report['phases']) > 1]}",
        "",
        f"{report['held_out']} held-out prompts. Before all training: {_speed(report['before'])}, "
        f"{measure} {quality(report['before']):.3f}, repetition {report['before']['repetition']:.3f}.",
    ]
    for phase in report["phases"]:
        text, rows = phase["trajectories"], phase["packed"]
        lines += [
            "",
            f"## {phase['name']}",
            "",
            f"Blocks of {phase['block_size']}; {text['sequences']} completions, {text['tokens']} tokens, "
            f"{text['tokens_per_iteration']:.2f} tokens per Jacobi iteration; {rows['rows']} rows to train on.",
            "",
            f"| step | tokens per forward | of correct answers | {measure} | repetition |",
            "| --- | --- | --- | --- | --- |",
        ]
        for point in phase["curve"]:
            mark = " (chosen)" if point["step"] == phase["chosen"] else ""
            right = point.get("tokens_per_forward_right")
            lines.append(
                f"| {point['step']}{mark} | {point['tokens_per_forward']:.2f} | "
                f"{'' if right is None else f'{right:.2f}'} | {quality(point):.3f} | {point['repetition']:.3f} |"
            )
        if not phase["kept"]:
            lines += ["", "No checkpoint kept the required quality. The one with the highest quality was chosen."]
    return "\n".join(lines) + "\n"


def _speed(point: dict[str, Any]) -> str:
    return f"{point['tokens_per_forward']:.2f} tokens per forward"


def draw(report: dict[str, Any], file: Path) -> bool:
    """Draws the curve of each phase into a PNG file; false without matplotlib."""
    try:
        from ..evaluation.plots import training_curves
    except ModuleNotFoundError:
        return False
    import io

    from matplotlib import pyplot

    names = ("tokens_per_forward", "score" if report["scored"] else "agreement", "repetition")
    phases = report["phases"]
    figure = pyplot.figure(figsize=(3.5 * len(names), 3 * len(phases)), layout="constrained")
    grid = figure.subplots(len(phases), len(names), squeeze=False)
    for axes, phase in zip(grid, phases):
        training_curves(phase["curve"], names, axes)
        for one in axes:
            one.axvline(phase["chosen"], color="gray", linestyle="--", linewidth=0.8)
            one.set_ylabel(phase["name"])
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    write_whole(file, memory.getvalue())
    return True
