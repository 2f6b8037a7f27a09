"""
Draws the pictures of these pages.

    python docs/pictures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from packing_example import PACKED  # noqa: E402

from hf_jacobi.evaluation import plots  # noqa: E402


def main() -> None:
    plots.packed_row(PACKED).figure.savefig(HERE / "images" / "packed_row.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
