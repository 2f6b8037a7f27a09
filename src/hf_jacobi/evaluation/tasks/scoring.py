"""Scores answers to the tasks in this folder. lm-evaluation-harness loads this file by its path."""

from __future__ import annotations

import re


def programs(responses: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The prompt, whose imports and helpers a program can need, and after it each response's first block of code."""
    return [[f"{doc['prompt']}\n{program(text)}" for text in texts] for texts, doc in zip(responses, docs)]


def program(text: str) -> str:
    """The first block of code in a response, or the whole response if it has none."""
    found = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found.group(1) if found else text


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Whether the first program passes the tests; runs the program."""
    from lm_eval.tasks.humaneval.utils import pass_at_k  # loads a metric from the Hub

    return pass_at_k(references=references, predictions=predictions, k=[1])["pass@1"]


def boxed_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the last boxed answer is correct: equivalent to MATH's answer, or equal to GSM8K's final number."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    answer = last_boxed(results[0])
    expected = doc["answer"].rpartition("####")[2].strip()
    if answer is None:
        return {"exact_match": 0.0}
    number = plain(expected)
    same_number = re.fullmatch(r"-?\d+(\.\d+)?", number) and plain(answer) == number
    return {"exact_match": float(is_equiv(answer, expected) or bool(same_number))}


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` in a text."""
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    try:
        return remove_boxed(last_boxed_only_string(text)).strip()
    except (AssertionError, TypeError):  # no box, or one in another notation
        return None


def plain(number: str) -> str:
    """A number without its unit, currency sign, thousands separators, and a fraction of zeros."""
    number = re.sub(r"\\text\{.*?\}|[\\$%]", "", number).replace("{,}", ",").strip()
    return re.sub(r"\.0+$", "", re.sub(r"(?<=\d),(?=\d{3})", "", number))
