"""How answers to the tasks of this folder are scored. lm-evaluation-harness loads this file by its path."""

from __future__ import annotations

import re


def programs(responses: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The first block of code of each response, the whole response where there is none."""
    return [[program(text) for text in texts] for texts in responses]


def program(text: str) -> str:
    """The first block of code of a response."""
    found = re.search(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found.group(1) if found else text


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Whether the first program passes the tests. Runs it."""
    from lm_eval.tasks.humaneval.utils import pass_at_k  # loads a metric from the Hub

    return pass_at_k(references=references, predictions=predictions, k=[1])["pass@1"]


def boxed_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the last boxed answer is the right one: as MATH writes it, or as the number that GSM8K ends with."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

    boxed = last_boxed_only_string(results[0])
    answer = None if boxed is None else remove_boxed(boxed).strip()
    expected = doc["answer"].rpartition("####")[2].strip()
    right = answer is not None and (is_equiv(answer, expected) or is_equiv(plain(answer), plain(expected)))
    return {"exact_match": float(right)}


def plain(number: str) -> str:
    """A number without its unit, sign of money and commas."""
    number = re.sub(r"\\text\{.*?\}|[\\$%]", "", number).replace("{,}", "").replace(",", "").strip()
    return re.sub(r"\.0+$", "", number)
