"""Solve rates and tokens per forward of a model on problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from hf_jacobi.evaluation.measuring import Method, measure

from .problems import Problem
from .tasks import is_solved


MAX_NEW_TOKENS = 300
BATCH_SIZE = 25


def answer(model, tokenizer, problems: Sequence[Problem], method: Method) -> list[dict]:
    """
    Solves all problems, in batches of similar length.

    Returns:
        For each problem, in order, its `task`, the new `tokens`, the `forwards` its row took, and whether it is
        `solved`.
    """
    order = sorted(range(len(problems)), key=lambda index: len(problems[index].prompt))
    answers: list[dict] = [{} for _ in problems]
    for piece in tqdm(list(_pieces(order)), desc=method.name, leave=False):
        inputs = tokenizer([problems[index].prompt for index in piece], padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        measured = measure(model, inputs, method, MAX_NEW_TOKENS)
        for index, tokens, forwards in zip(piece, measured.tokens, measured.forwards):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            solved = is_solved(problems[index], text)
            answers[index] = {
                "task": problems[index].task,
                "tokens": tokens,
                "forwards": forwards,
                "solved": solved,
            }
    return answers


def _pieces(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


def summary(answers: list[dict], before: list[dict]) -> dict[str, dict]:
    """
    Figures by task and for both.

    Args:
        answers: a model's answers.
        before: the base model's answers to the same problems.
    """
    figures = {}
    for task in (*sorted({row["task"] for row in answers}), "both"):
        pairs = [(row, old) for row, old in zip(answers, before) if task in (row["task"], "both")]
        tokens = sum(len(row["tokens"]) for row, _ in pairs)
        figures[task] = {
            "problems": len(pairs),
            "solve_rate": sum(row["solved"] for row, _ in pairs) / len(pairs),
            "tokens_per_forward": tokens / sum(row["forwards"] for row, _ in pairs),
            "tokens": tokens,
            "identical": sum(row["tokens"] == old["tokens"] for row, old in pairs) / len(pairs),
        }
    return figures
