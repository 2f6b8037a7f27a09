"""
Writes the problems of `benchmarks/miniature` as prompts, and checks answers to them.

    python examples/recipes/miniature_problems.py prompts.jsonl 12300
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `benchmarks`

from benchmarks.miniature.problems import Problem
from benchmarks.miniature.tasks import is_solved, training_problems


def is_right(row: dict, completion: str) -> bool:
    """Whether a completion solves the problem in a row of prompts; checked by executing it."""
    return is_solved(Problem(**{name: row[name] for name in Problem.__dataclass_fields__}), completion)


if __name__ == "__main__":
    problems = training_problems(int(sys.argv[2]), "forcing")
    lines = (json.dumps({"id": str(number), **asdict(problem)}) for number, problem in enumerate(problems))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
