"""Both tasks together: problems to train on, held-out problems, and whether an answer is correct."""

from __future__ import annotations

from itertools import islice

from . import math_task, sql_task
from .problems import Problem, problems


TASKS = {"math": math_task, "sql": sql_task}


def training_problems(count: int, seed: str) -> list[Problem]:
    """`count` problems, the tasks in turn; each seed gives different ones."""
    sources = [problems(task.make, f"{name} {seed}", held_out=False) for name, task in TASKS.items()]
    return [problem for pair in islice(zip(*sources), count // len(TASKS)) for problem in pair]


def held_out_problems(count: int) -> list[Problem]:
    """The first `count` held-out problems of each task, the same for everyone."""
    sources = [problems(task.make, name, held_out=True) for name, task in TASKS.items()]
    return [problem for pair in islice(zip(*sources), count) for problem in pair]


def is_solved(problem: Problem, text: str) -> bool:
    """Whether a completion solves its problem, by execution."""
    return TASKS[problem.task].is_solved(problem, text)
