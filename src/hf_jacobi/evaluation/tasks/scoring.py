"""How answers to the tasks of this folder are scored. lm-evaluation-harness loads this file by its path."""

from __future__ import annotations

import re


def programs(responses: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The first block of code of each response after the prompt, whose imports and helpers it may need."""
    return [[f"{doc['prompt']}\n{program(text)}" for text in texts] for texts, doc in zip(responses, docs)]


def program(text: str) -> str:
    """The first block of code of a response, the whole response where there is none."""
    found = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found.group(1) if found else text


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Whether the first program passes the tests. Runs it."""
    from lm_eval.tasks.humaneval.utils import pass_at_k  # loads a metric from the Hub

    return pass_at_k(references=references, predictions=predictions, k=[1])["pass@1"]


def boxed_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the last boxed answer is the right one: as MATH writes it, or as the number that GSM8K ends with."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    answer = last_boxed(results[0])
    expected = doc["answer"].rpartition("####")[2].strip()
    if answer is None:
        return {"exact_match": 0.0}
    number = plain(expected)
    same_number = re.fullmatch(r"-?\d+(\.\d+)?", number) and plain(answer) == number
    return {"exact_match": float(is_equiv(answer, expected) or bool(same_number))}


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of a text."""
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    try:
        return remove_boxed(last_boxed_only_string(text)).strip()
    except (AssertionError, TypeError):  # written in another way, or not at all
        return None


def plain(number: str) -> str:
    """A number without its unit, its sign of money, the commas between its digits and zeros after the point."""
    number = re.sub(r"\\text\{.*?\}|[\\$%]", "", number).replace("{,}", ",").strip()
    return re.sub(r"\.0+$", "", re.sub(r"(?<=\d),(?=\d{3})", "", number))
