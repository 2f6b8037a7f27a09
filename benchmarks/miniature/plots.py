"""The miniature's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot


def curves(figures: dict[str, Any], file: Path) -> None:
    """Tokens per forward against training tokens, and against the solve rate, for each training with checkpoints."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, curve in figures["curves"].items():
        points = curve["curve"]
        label = {
            "forcing": "Jacobi Forcing, random noise",
            "forcing-linear": "Jacobi Forcing, linear noise",
            "cllm": "CLLM, window 1",
            "draft": "draft-only adapter",
        }.get(name, name)
        speed = [point["tokens_per_forward"] for point in points[1:]]
        left.plot([point["training_tokens"] / 1e6 for point in points[1:]], speed, marker="o", label=label)
        right.plot([100 * point["solve_rate"] for point in points[1:]], speed, marker="o", label=label)
    base = max((curve["curve"][0] for curve in figures["curves"].values()), key=lambda point: point["problems"])
    right.axvline(100 * base["solve_rate"], color="gray", linestyle="--", label="base model")
    left.set(xlabel="training tokens (millions)", ylabel="tokens per forward")
    right.set(xlabel="solved (%)", ylabel="tokens per forward")
    right.legend()
    figure.suptitle("Validation problems, sliding window of 16")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def contour(figures: dict[str, Any], file: Path) -> None:
    """Table 4: tokens per forward by block size and pool."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, (kind, title) in zip(panels, (("pools", "in blocks"), ("sliding", "sliding window"))):
        values = figures["grid"][kind]
        sizes, pools = list(values), list(next(iter(values.values())))
        heights = [[values[size][pool] for size in sizes] for pool in pools]
        filled = axes.contourf(range(len(sizes)), range(len(pools)), heights, levels=12)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_yticks(range(len(pools)), pools)
        axes.set(xlabel="block size", title=title)
        figure.colorbar(filled, ax=axes, label="tokens per forward")
    panels[0].set_ylabel("pool size")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
