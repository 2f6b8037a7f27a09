"""The figures of decoding held-out prompts: speed, correct answers, agreement with the text before, repetition."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decoding.drafting import matching_prefix
from ..decoding.errors import MissingFile, UsageError


GRAM = 4  # tokens
Score = Callable[[Any, str], bool]


def repetition(text: Sequence[int]) -> tuple[int, int]:
    """
    How many of a text's 4-grams occur earlier in it, and how many 4-grams it has.

    Loops are easy to draft and raise the tokens per forward: if the share of repeated 4-grams grows during training,
    some of the speed comes from loops.
    """
    grams = [tuple(text[place : place + GRAM]) for place in range(len(text) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


@dataclass
class Tally:
    """Sums over the texts passed to `add`; `scored` says whether a scoring function judges them."""

    scored: bool = False
    texts: int = 0
    tokens: int = 0
    forwards: int = 0
    same: int = 0
    before: int = 0
    repeated: int = 0
    grams: int = 0
    right: int = 0
    right_tokens: int = 0
    right_forwards: int = 0

    def add(
        self,
        text: list[int],
        forwards: int,
        plain: list[int],
        before: list[int],
        is_right: bool = False,
    ) -> None:
        """
        Adds the text of a prompt.

        Args:
            text: the text that Jacobi decoding generated.
            forwards: the number of its forwards.
            plain: the model's text one token at a time; Jacobi decoding breaks ties differently in half precision.
            before: the same, by the model before training.
            is_right: whether the scoring function accepts `text`.
        """
        repeated, grams = repetition(text)
        counted = {
            "texts": 1,
            "tokens": len(text),
            "forwards": forwards,
            "same": matching_prefix(plain, before),
            "before": len(before),
            "repeated": repeated,
            "grams": grams,
            "right": int(is_right),
            "right_tokens": len(text) if is_right else 0,
            "right_forwards": forwards if is_right else 0,
        }
        for name, count in counted.items():
            setattr(self, name, getattr(self, name) + count)

    def figures(self) -> dict[str, float]:
        """
        `tokens_per_forward`; `agreement`, the share of the text before training that the text repeats, up to the first
        difference; `repetition`, the share of 4-grams that occur earlier in their text. With a scoring function also
        `score`, the share of correct answers, and `tokens_per_forward_right`, their speed, if any is correct.
        """
        found = {
            "tokens_per_forward": self.tokens / max(1, self.forwards),
            "agreement": self.same / max(1, self.before),
            "repetition": self.repeated / max(1, self.grams),
        }
        if self.scored:
            found["score"] = self.right / max(1, self.texts)
        if self.right:
            found["tokens_per_forward_right"] = self.right_tokens / self.right_forwards
        return found


def score_function(name: str) -> Score:
    """
    The function that `module:function` or `file.py:function` names. Modules are searched for in the working directory
    first.

    Raises:
        `ValueError`: the module, file or function does not exist, or cannot be imported.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise UsageError(f"a scoring function must be module:function or file.py:function, got {name!r}.")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"{place} has no function {function!r}: name one that takes a prompt and its completion.")
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise MissingFile(f"there is no file {path}: a scoring function must be module:function or file.py:function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # only the user's file can fail here
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's module fails, or does not exist
        raise UsageError(f"the module {name} cannot be imported: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove("")
