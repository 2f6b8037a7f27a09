"""Arithmetic in words, solved step by step, like GSM8K in form; scored by the final answer."""

from __future__ import annotations

import random
import re

from .problems import Problem


NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
ITEMS = (
    "apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "plums", "shells",
    "stamps", "stickers", "stones", "tickets", "toys",
)  # fmt: skip
BEGIN = (
    ("{name} has {c} {item}.", "{name} has {c} {item} at first."),
    ("There are {c} {item} in the room of {name}.", "{name} has {c} {item} in the room."),
    ("{name} starts the day with {c} {item}.", "The day of {name} starts with {c} {item}."),
    ("{name} collected {c} {item}.", "The collection of {name} has {c} {item}."),
)
ADD = (
    ("Then {name} buys {b} more {item}.", "Buying {b} more makes it {a} + {b} = {c} {item}."),
    ("{other} gives {name} {b} {item}.", "With the {b} {item} from {other} there are {a} + {b} = {c} {item}."),
    ("On the way home {name} finds {b} {item}.", "{name} finds {b}, which makes {a} + {b} = {c} {item}."),
    ("As a present {name} gets {b} {item}.", "The present adds {b} {item}, so there are {a} + {b} = {c}."),
)
TAKE = (
    (
        "After that {name} gives {b} {item} to {other}.",
        "{other} gets {b} of them, so {a} - {b} = {c} {item} are left.",
    ),
    ("{name} loses {b} of the {item}.", "Without the {b} lost {item} there are {a} - {b} = {c}."),
    ("{b} of the {item} are broken, and {name} throws them away.", "Throwing away {b} leaves {a} - {b} = {c} {item}."),
    ("{name} sells {b} {item} at the market.", "After selling {b} at the market {name} has {a} - {b} = {c} {item}."),
)
MULTIPLY_ADD = (
    (
        "{name} buys {k} bags with {b} {item} in each.",
        "The {k} bags hold {k} * {b} = {m} {item}. Together with them there are {a} + {m} = {c} {item}.",
    ),
    (
        "Each of {k} friends brings {name} {b} {item}.",
        "The {k} friends bring {k} * {b} = {m} {item}. Now {name} has {a} + {m} = {c} {item}.",
    ),
    (
        "For {k} days {name} gets {b} {item} a day.",
        "In {k} days that is {k} * {b} = {m} {item} more. So there are {a} + {m} = {c} {item}.",
    ),
)
MULTIPLY_TAKE = (
    (
        "{name} gives {b} {item} to each of {k} children.",
        "The {k} children get {k} * {b} = {m} {item}. So {a} - {m} = {c} {item} are left.",
    ),
    (
        "Every day for {k} days {name} uses up {b} {item}.",
        "In {k} days {k} * {b} = {m} {item} are used up. That leaves {a} - {m} = {c} {item}.",
    ),
)
TOTAL = (
    ("How many {item} does {name} have now?", "So {name} has {a} {item} now."),
    ("How many {item} are there in the end?", "In the end there are {a} {item}."),
)
TOGETHER = (
    (
        "{other} has {b} {item} more than {name}. How many {item} do they have together?",
        "{other} has {a} + {b} = {m} {item}. Together they have {a} + {m} = {c} {item}.",
    ),
    (
        "{other} has {b} {item}. How many {item} do {name} and {other} have together?",
        "{other} has {b} {item} as well. Together {name} and {other} have {a} + {b} = {c} {item}.",
    ),
)
LARGEST = 400  # of any total
BOXES = (
    (
        "All of them are packed into {k} boxes. How many {item} are in each box?",
        "Each of the {k} boxes holds {a} / {k} = {c} {item}.",
    ),
)
ANSWER = re.compile(r"Answer: (-?\d+)")


def make(draw: random.Random) -> Problem:
    """A problem of two to four events."""
    name, other = draw.sample(NAMES, 2)
    item = draw.choice(ITEMS)
    words = {"name": name, "other": other, "item": item}
    total = draw.randrange(12, 100)
    question, solution = [], []
    key = []

    def say(kind: str, templates, **numbers) -> None:
        index = draw.randrange(len(templates))
        asked, solved = templates[index]
        question.append(asked.format(**words, **numbers))
        solution.append(solved.format(**words, **numbers))
        key.append(f"{kind}{index} {sorted(numbers.items())}")

    say("begin", BEGIN, c=total)
    for _ in range(draw.choice((2, 3, 3, 4))):
        kinds = ["add", "add", "multiply_add"] if total < LARGEST - 110 else []
        kinds += ["take", "take"] if total > 15 else []
        kinds += ["multiply_take"] if total > 40 else []
        kind = draw.choice(kinds)
        k, b = draw.randrange(2, 10), draw.randrange(2, 13)
        if kind == "add":
            b = draw.randrange(3, 80)
            say(kind, ADD, a=total, b=b, c=total + b)
            total += b
        elif kind == "take":
            b = draw.randrange(3, min(total - 4, 90))
            say(kind, TAKE, a=total, b=b, c=total - b)
            total -= b
        elif kind == "multiply_add":
            say(kind, MULTIPLY_ADD, a=total, b=b, k=k, m=k * b, c=total + k * b)
            total += k * b
        else:
            while k * b > total - 3:
                k, b = draw.randrange(2, 10), draw.randrange(2, 13)
            say(kind, MULTIPLY_TAKE, a=total, b=b, k=k, m=k * b, c=total - k * b)
            total -= k * b
    boxes = [k for k in range(2, 10) if total % k == 0 and 2 <= total // k <= 12]
    end = draw.choice(["total", "together"] + ["boxes"] * 2 * bool(boxes))
    if end == "total":
        say(end, TOTAL, a=total)
    elif end == "boxes":
        k = draw.choice(boxes)
        say(end, BOXES, a=total, k=k, c=total // k)
        total //= k
    else:
        b = draw.randrange(3, 60)
        index = draw.randrange(2)
        m, c = (total + b, 2 * total + b) if index == 0 else (0, total + b)
        say(f"{end}{index}-", TOGETHER[index : index + 1], a=total, b=b, m=m, c=c)
        total = c
    prompt = f"Question: {' '.join(question)}\nSolution:\n"
    completion = "\n".join(solution) + f"\nAnswer: {total}"
    return Problem("math", " ".join(key), prompt, completion, str(total))


def is_solved(problem: Problem, text: str) -> bool:
    """Whether the last `Answer:` of a completion is the correct number."""
    found = ANSWER.findall(text)
    return bool(found) and found[-1] == problem.answer
