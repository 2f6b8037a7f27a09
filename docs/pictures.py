"""
Draws the pictures of these pages, from the root of the repository:

    python -m docs.pictures                         # the packed row
    python -m docs.pictures --miniature FOLDER      # and how a text comes about, by what benchmarks.miniature trained
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from packing_example import PACKED  # noqa: E402

from hf_jacobi.evaluation import plots  # noqa: E402


def packed_row(file: Path) -> None:
    """The row that training_data.md works by hand."""
    plots.packed_row(PACKED).figure.savefig(file, dpi=130, bbox_inches="tight")


def trajectory(folder: Path, file: Path) -> None:
    """A held-out problem of the miniature, solved by the model with the draft-only adapter."""
    from benchmarks.miniature.forcing import load, load_tokenizer
    from benchmarks.miniature.recipes import sliding
    from benchmarks.miniature.tasks import held_out_problems

    tokenizer = load_tokenizer(folder / "base")
    problem = next(problem for problem in held_out_problems(20) if problem.task == "sql")
    output = load(folder / "models" / "draft", folder / "base").generate(
        **tokenizer(problem.prompt, return_tensors="pt"),
        **sliding(16).arguments(),
        max_new_tokens=120,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    axes = plots.trajectory(output.trajectory[0], tokenizer, forwards=16)
    axes.figure.savefig(file, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--miniature", type=Path, help="the folder of a run of benchmarks.miniature")
    arguments = parser.parse_args()
    packed_row(HERE / "images" / "packed_row.png")
    if arguments.miniature:
        trajectory(arguments.miniature, HERE / "images" / "trajectory.png")
