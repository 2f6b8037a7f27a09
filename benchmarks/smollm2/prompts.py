"""
Prompts for SmolLM2: short tasks in Python, arithmetic in words, instructions; with a fixed split.

    python -m benchmarks.smollm2.prompts FOLDER

writes `train.jsonl` and `held_out.jsonl`. Subjects are held out, not wordings: a Python task, a topic or the
numbers of an arithmetic problem that occur there occur nowhere in the training prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path


TRAIN, HELD_OUT = 640, 60  # prompts of each kind

CODE = (
    "Write a Python function that {task}.",
    "Write a Python function that {task}, with a short docstring.",
    "Can you show me Python code that {task}?",
    "I need a small Python program that {task}. Explain it briefly.",
)
ACTIONS = (
    "returns the sum of",
    "returns the product of",
    "finds the largest of",
    "finds the smallest of",
    "counts",
    "returns the average of",
    "prints",
    "removes",
    "sorts",
    "doubles",
    "returns a list of",
)
THINGS = (
    "the even numbers in {}",
    "the odd numbers in {}",
    "the positive numbers in {}",
    "the negative numbers in {}",
    "the prime numbers in {}",
    "the squares of the numbers in {}",
    "the numbers greater than ten in {}",
    "the unique values in {}",
    "the first ten elements of {}",
    "the numbers divisible by three in {}",
)
CONTAINERS = ("a list", "a tuple", "a dictionary's values", "a text file", "a matrix", "a comma-separated string")

NAMES = ("Mia", "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack")
ITEMS = ("apples", "books", "pencils", "marbles", "stickers", "cookies", "coins", "cards", "shells", "flowers")
ARITHMETIC = (
    "{name} has {a} {item}. {name} buys {b} more {item} and gives {c} to a friend. How many {item} are left?",
    "A box holds {a} {item}. How many {item} are there in {b} boxes? Show your steps.",
    "{name} reads {a} pages a day for {b} days. How many pages is that in total?",
    "A shop sells {item} for {a} dollars each. {name} buys {b} of them and pays with {c} dollars. How much is left?",
    "{name} and {other} share {a} {item} equally with {b} friends. How many {item} does each of them get?",
    "What is {a} plus {b} times {c}? Explain step by step.",
    "{name} had {a} {item} and lost {b} of them. Then {other} gave {name} {c} more. How many does {name} have now?",
    "A train travels {a} miles an hour for {b} hours. How far does it travel?",
)

TOPIC_LIST = """
photosynthesis; gravity; inflation; democracy; the water cycle; volcanoes; electricity; magnets; the solar system;
evolution; vaccines; the internet; climate change; recycling; rainbows; black holes; the human heart; sleep;
earthquakes; tides; the moon; insurance; taxes; the stock market; solar panels; electric cars; bicycles; airplanes;
bridges; concrete; glass; paper; bread; cheese; coffee; tea; chocolate; honey; salt; sugar; bees; whales; penguins;
elephants; spiders; ants; trees; mushrooms; coral reefs; deserts; rain forests; rivers; glaciers; clouds; lightning;
snow; wind; computers; keyboards; databases; encryption; passwords; search engines; social media; robots; artificial
intelligence; machine learning; programming; operating systems; networks; libraries; museums; schools; hospitals;
newspapers; photography; painting; music; dancing; theater; poetry; novels; chess; football; swimming; running;
yoga; meditation; cooking; gardening; fishing; camping; hiking; traveling; learning a language; public speaking;
time management; saving money; studying for an exam; writing an essay; job interviews; teamwork; leadership;
negotiation; friendship; kindness; patience; curiosity; history; geography; mathematics; physics; chemistry;
biology; economics; philosophy; psychology; law; medicine; architecture; farming; fashion; birds; cats; dogs;
horses; vegetables; fruit; rice; soup
"""
TOPICS = [topic.strip() for topic in TOPIC_LIST.replace("\n", " ").split(";")]
INSTRUCTIONS = (
    "Explain {topic} in simple terms.",
    "What are three interesting facts about {topic}?",
    "Give me five tips about {topic}.",
    "What are the advantages and disadvantages of {topic}?",
    "Write a short paragraph about {topic}.",
    "Why is {topic} important?",
)


def is_held_out(subject: str) -> bool:
    """Whether prompts about this subject are kept from training: one in nine, by a hash that never changes."""
    return zlib.crc32(subject.encode()) % 9 == 0


def code(draw: random.Random) -> Iterator[tuple[str, str]]:
    """`(subject, prompt)` without end: tasks in Python."""
    subjects = [
        f"{action} {thing.format(container)}"
        for action, thing, container in itertools.product(ACTIONS, THINGS, CONTAINERS)
    ]
    while True:
        task = draw.choice(subjects)
        yield task, draw.choice(CODE).format(task=task)


def arithmetic(draw: random.Random) -> Iterator[tuple[str, str]]:
    """`(subject, prompt)` without end: problems in words; the subject is the form with its numbers."""
    while True:
        form = draw.randrange(len(ARITHMETIC))
        name, other = draw.sample(NAMES, 2)
        numbers = {"a": draw.randrange(20, 100), "b": draw.randrange(2, 20), "c": draw.randrange(2, 20)}
        if form == 3:  # pays with enough
            numbers = {"a": draw.randrange(2, 9), "b": draw.randrange(2, 9), "c": 100}
        subject = f"{form} {sorted(numbers.items())}"
        yield subject, ARITHMETIC[form].format(name=name, other=other, item=draw.choice(ITEMS), **numbers)


def instructions(draw: random.Random) -> Iterator[tuple[str, str]]:
    """`(subject, prompt)` without end: a topic, to be explained or advised on."""
    while True:
        topic = draw.choice(TOPICS)
        yield topic, draw.choice(INSTRUCTIONS).format(topic=topic)


KINDS = {"code": code, "arithmetic": arithmetic, "instructions": instructions}


def prompts(held_out: bool) -> list[dict]:
    """Rows of `id`, `kind` and `messages`, the kinds in turn; no prompt occurs twice."""
    wanted = HELD_OUT if held_out else TRAIN
    rows = []
    for kind, source in KINDS.items():
        found: dict[str, None] = {}
        for subject, prompt in source(random.Random(f"{kind} {held_out}")):
            if is_held_out(subject) == held_out:
                found.setdefault(prompt)
            if len(found) == wanted:
                break
        rows.append([(kind, prompt) for prompt in found])
    return [
        {"id": f"{kind}-{number}", "kind": kind, "messages": [{"role": "user", "content": prompt}]}
        for number, kinds in enumerate(zip(*rows))
        for kind, prompt in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("held_out", True)):
        rows = prompts(held_out)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    main()
