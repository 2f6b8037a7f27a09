"""
The paper's tables in miniature, from scratch: data, base model, trajectories, Jacobi Forcing, evaluation, tables.

    python -m benchmarks.miniature                      # table 1, the curves
    python -m benchmarks.miniature --ablations          # also tables 2 to 6

Everything is kept in `--folder`, where an interrupted run resumes. The figures go to
`benchmarks/results/miniature.json`, and the tables made from them to `benchmarks/miniature/README.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .forcing import Workplace
from .plots import contour, curves
from .results import Results
from .tables import COMPARED, MAIN_ROWS, by_block_size, comparison, grid, main_table, render


HERE = Path(__file__).parent
TRAINED = ("forcing", "cllm", "draft")
AS_IN_THE_PAPER = "forcing-linear"  # its noise: a row of table 1 that needs a training as long as the others
FIGURES = HERE.parent / "results" / "miniature.json"
START, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/miniature"), help="the folder for everything")
    parser.add_argument(
        "--trained", nargs="+", choices=TRAINED, default=TRAINED, help="the trainings of table 1 (default: all)"
    )
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="also tables 2 to 6, and linear noise in table 1; takes hours",
    )
    parser.add_argument("--figures", type=Path, default=FIGURES, help="where the figures are written")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the training data, for trying out")
    parser.add_argument("--problems", type=int, default=500, help="held-out problems of each task (default: 500)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    results = Results(Workplace(arguments.folder, arguments.fraction), arguments.problems)
    file = arguments.figures
    figures = json.loads(file.read_text()) if file.exists() else {}
    figures["setup"] = results.setup

    def keep(name: str, value: Any) -> None:
        figures[name] = value
        file.write_text(json.dumps(figures, indent=1) + "\n")

    trained = [name for name in TRAINED if name in arguments.trained]
    trained += [AS_IN_THE_PAPER] if arguments.ablations else []
    rows = figures.get("main", {}) | main_table(results, trained)  # keep the figures of other trainings
    keep("main", {title: rows[title] for title, _, _ in MAIN_ROWS if title in rows})
    keep("curves", figures.get("curves", {}) | {name: {"curve": results.curve(name)["curve"]} for name in trained})
    if arguments.ablations:
        keep("grid", grid(results, AS_IN_THE_PAPER))
        for name, recipes in COMPARED.items():
            keep(name, comparison(results, recipes))
        keep("block_sizes", by_block_size(results))
    if file == FIGURES:
        write_page(figures)
    print(render(figures))


def write_page(figures: dict[str, Any]) -> None:
    """Writes the tables into the page and the plots beside it."""
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}{render(figures)}{END}{after}")
    curves(figures, HERE / "curves.png")
    if "grid" in figures:
        contour(figures, HERE / "contour.png")


if __name__ == "__main__":
    main()
