"""Draws the pictures of these pages, from the root of the repository: `python -m docs.pictures`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from packing_example import PACKED  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import hf_jacobi  # noqa: E402
from benchmarks.miniature.tasks import held_out_problems  # noqa: E402
from hf_jacobi.cli.models import MINIATURE  # noqa: E402
from hf_jacobi.evaluation import plots  # noqa: E402


def packed_row(file: Path) -> None:
    """The row that training_data.md works by hand."""
    plots.packed_row(PACKED).figure.savefig(file, dpi=130, bbox_inches="tight")


def trajectory(file: Path) -> None:
    """A held-out problem, solved by the miniature that comes with the package."""
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE)
    problem = next(problem for problem in held_out_problems(20) if problem.task == "sql")
    output = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(MINIATURE)).generate(
        **tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=120,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    axes = plots.trajectory(output.trajectory[0], tokenizer, forwards=9)
    axes.figure.savefig(file, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    packed_row(HERE / "images" / "packed_row.png")
    trajectory(HERE / "images" / "trajectory.png")
