"""What decoding some held-out prompts comes to: speed, right answers, text that is kept, text that goes in circles."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decoding.drafting import agreement
from ..decoding.errors import MissingFile, UsageError


GRAM = 4  # tokens
Score = Callable[[Any, str], bool]


def repetition(text: Sequence[int]) -> tuple[int, int]:
    """
    How many of a text's 4-grams stood in it before, and how many there are.

    A loop is drafted with ease and raises the tokens per forward: a share of repeated 4-grams that grows over a
    training says that some of its speed is that.
    """
    grams = [tuple(text[place : place + GRAM]) for place in range(len(text) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


@dataclass
class Tally:
    """Sums over texts, each given to `add`."""

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
        text: Sequence[int],
        forwards: int,
        plain: Sequence[int],
        before: Sequence[int],
        is_right: bool = False,
    ) -> None:
        """
        Counts a prompt.

        Args:
            text: what Jacobi decoding made of it.
            forwards: in how many forwards.
            plain: the model's text one token at a time: in half precision Jacobi decoding settles ties otherwise.
            before: the same by the model as it was before training.
            is_right: what the scoring function says of `text`.
        """
        repeated, grams = repetition(text)
        counted = {
            "texts": 1,
            "tokens": len(text),
            "forwards": forwards,
            "same": agreement(plain, before),
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
        `tokens_per_forward`; `agreement`, the share of tokens that are those of the text before training, up to the
        first that is not; `repetition`, the share of 4-grams that stood in their text before. With a scoring function
        also `score`, the share of right answers, and `tokens_per_forward_right`, of these alone, if there are any.
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
    The function that `module:function` or `file.py:function` names; modules are looked for in the working directory,
    too.

    Raises:
        `ValueError`: there is no such module, file or function.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise UsageError(f"a scoring function is named as module:function or file.py:function, got {name!r}.")
    module = _file(Path(place).expanduser()) if place.endswith(".py") else _module(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"{place} has no function {function!r}: name one that takes a prompt and its completion.")
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise MissingFile(f"there is no file {path} with a scoring function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # nothing but the user's file can fail here
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    return module


def _module(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except Exception as error:  # of the user's module, or that there is none
        raise UsageError(f"the module {name} cannot be imported: {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove("")
