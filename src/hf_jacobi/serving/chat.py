"""A conversation with a model in the same process, for `hf-jacobi chat --terminal`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable

    from .server import Served


class Stopped(Exception):
    """Raised by `show` to stop an answer."""


@dataclass
class Answer:
    """
    An answer, complete or stopped early.

    Attributes:
        decoding: `"ar"` or `"jacobi"`.
        text: the text so far.
        forwards: the number of tokens of each forward.
        seconds: the time it took, including the prompt.
        stopped: whether it was stopped early.
    """

    decoding: str
    text: str = ""
    forwards: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.forwards)

    @property
    def tokens_per_forward(self) -> float:
        """TPF."""
        return self.tokens / len(self.forwards) if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Portions:
    """
    A streamer that calls `show(text, tokens)` once per forward, with its text and its number of tokens. An incomplete
    character is shown with a later forward.
    """

    def __init__(self, tokenizer, answer: Answer, show: Callable[[str, int], None]):
        self.tokenizer, self.answer, self.show = tokenizer, answer, show
        self.tokens: list[int] = []
        self.prompt_seen = False
        self.shown = 0
        self.start = time.perf_counter()

    def put(self, value) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        if self.answer.decoding == "ar":
            self.end_forward()

    def end_forward(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self._show(text.rstrip("\ufffd"))

    def end(self) -> None:
        if len(self.tokens) > self.shown:
            self._show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        count, self.shown = len(self.tokens) - self.shown, len(self.tokens)
        more = text[len(self.answer.text) :]
        self.answer.forwards.append(count)
        self.answer.text += more
        self.answer.seconds = time.perf_counter() - self.start
        self.show(more, count)


class Conversation:
    """
    A conversation: messages of the user and answers of the model.

    Args:
        served: the model.
        length: the maximum number of tokens of an answer.
    """

    def __init__(self, served: Served, length: int):
        self.served, self.length = served, length
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> None:
        """Adds a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def keep(self, answer: Answer) -> None:
        """Adds an answer to the conversation; if it is empty, removes the message that it answers."""
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
        else:
            self.messages.pop()

    def answer(self, decoding: str, show: Callable[[str, int], None]) -> Answer:
        """
        Generates an answer.

        Args:
            decoding: `"ar"` or `"jacobi"`.
            show: called with each piece of text and its number of tokens. Ctrl-C, or `Stopped` raised by `show`, stops
                the answer.
        """
        answer = Answer(decoding)
        body = {"generation_config": {"decoding": decoding, "max_new_tokens": self.length, "do_sample": False}}
        _, config = self.served.prepared(body)
        config, inputs = self.served.settled(body, config), self.served.encode(self.messages)
        self.served.fit(inputs, config)
        try:
            self.served.generate(inputs, config, Portions(self.served.tokenizer, answer, show))
        except (KeyboardInterrupt, Stopped):
            answer.stopped = True
        return answer
