"""
Measures on one GPU what a CPU cannot show, within the given number of minutes.

    python -m benchmarks.gpu --minutes 8 --output DIR
    python -m benchmarks.gpu --minutes 8 --output DIR --stages decoding smollm2 --bundle BUNDLE
    python -m benchmarks.gpu --dry-run --output DIR           # every stage on a CPU, at toy size

benchmarks/gpu/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .report import report
from .runner import STAGES, Plan, run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for everything (default: 8)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--bundle", nargs="+", type=Path, default=[], help="folders that benchmarks.gpu.bundle made")
    parser.add_argument("--dry-run", action="store_true", help="every stage at toy size, on a CPU")
    parser.add_argument(
        "--fault",
        nargs="+",
        default=[],
        metavar="STAGE=KIND",
        help="plant an exception, a hang or a lack of memory",
    )
    arguments = parser.parse_args()
    missing = [str(folder) for folder in arguments.bundle if not folder.is_dir()]
    if missing:
        parser.error(f"there is no folder {missing[0]}: name one that benchmarks.gpu.bundle made")
    plan = Plan(
        arguments.stages,
        arguments.minutes,
        arguments.output,
        arguments.bundle,
        arguments.dry_run,
        arguments.fault,
    )
    print(report(run(plan)))


if __name__ == "__main__":
    main()
