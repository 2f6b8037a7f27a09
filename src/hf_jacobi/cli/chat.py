"""`hf-jacobi chat`: a chat in the browser or the terminal that shows which tokens each forward committed."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
import webbrowser
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..decoding.errors import MissingFile, UsageError
from .demo import SideBySide, is_miniature
from .models import MINIATURE
from .options import positive, wrapped
from .serve import add_address, add_model, load


if TYPE_CHECKING:
    from ..serving.chat import Answer, Conversation
    from .models import Found


PORT = 7860  # the port of Spaces
LENGTH = 512  # maximum tokens of an answer
SHADES = ((16, "bold black on bright_green"), (8, "black on green"), (4, "bold green"), (2, "green"))
TITLES = {"ar": "one token at a time", "jacobi": "Jacobi"}
HELP = (
    "An empty line or Ctrl-D ends the chat, Ctrl-C stops an answer; /1 to /{} ask an example, /clear starts a new "
    "chat. A line that ends in \\ continues on the next line."
)


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Chat with a model in the browser: each forward's tokens in one colour, optionally next to AR"
    parser = commands.add_parser("chat", help=about, description=about)
    add_model(parser)
    add_address(parser, PORT)
    parser.add_argument("--terminal", action="store_true", help="chat in the terminal")
    parser.add_argument("--compare", action="store_true", help="also write each answer one token at a time")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=LENGTH, help=f"maximum tokens per answer (default: {LENGTH})"
    )
    parser.add_argument("--no-browser", action="store_true", help="serve the page without opening a browser")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    return _in_terminal(arguments) if arguments.terminal else _as_page(arguments)


def examples_for(found: Found) -> list[str]:
    """Example prompts: the miniature's own, or prompts that suit any model."""
    if is_miniature(found):
        return json.loads((MINIATURE / "prompts.json").read_text(encoding="utf-8"))
    from ..evaluation.prompts import CHAT

    return CHAT[:4]


def _as_page(arguments) -> int:
    from ..serving.listening import address_of, listen, refuse_missing_packages

    refuse_missing_packages()
    try:
        listening = listen(arguments.host, PORT if arguments.port is None else arguments.port)
    except MissingFile:
        if arguments.port is not None:
            raise
        listening = listen(arguments.host, 0)
    served, found = load(arguments, "jacobi")
    from ..serving.server import about, application, serve

    page = about(
        served,
        examples_for(found),
        is_miniature=is_miniature(found),
        compare=arguments.compare,
        max_new_tokens=arguments.max_new_tokens,
    )
    app, address = application(served, page), address_of(listening)
    print(f"Chat with {served.name} at {address} (Ctrl-C stops the server).", flush=True)
    if not arguments.no_browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    serve(served, app, listening)
    return 0


def _in_terminal(arguments) -> int:
    served, found = load(arguments, "jacobi")
    from ..serving.chat import Conversation

    conversation = Conversation(served, arguments.max_new_tokens)
    examples = examples_for(found)
    print(wrapped(HELP.format(len(examples))), end="")
    for number, example in enumerate(examples, 1):
        print(wrapped(f"/{number}  {example.splitlines()[0]:.70}"), end="")
    while (text := _read()) is not None:
        if text == "/clear":
            conversation.messages.clear()
            continue
        if text.startswith("/"):
            text = _example(text, examples)
            if text is None:
                print(wrapped(HELP.format(len(examples))), end="")
                continue
            print(text.rstrip())
        _exchange(conversation, text, arguments.compare)
    return 0


def _read() -> str | None:
    """A message, continued by a backslash at the end of a line; `None` at the end of the chat."""
    lines: list[str] = []
    sign = "\n> "
    while True:
        try:
            line = input(sign)
        except EOFError:
            return None
        lines.append(line.removesuffix("\\"))
        if lines[-1] == line:
            return "\n".join(lines) or None
        sign = ". "


def _example(typed: str, examples: list[str]) -> str | None:
    number = typed[1:]
    return examples[int(number) - 1] if number.isdecimal() and 0 < int(number) <= len(examples) else None


def _exchange(conversation: Conversation, text: str, compare: bool) -> None:
    """Sends a message and shows its answer; with `compare` also the answer written one token at a time."""
    conversation.ask(text)
    answers: list[Answer] = []
    try:
        with _screen(compare) as show:
            for decoding in ("jacobi", "ar") if compare else ("jacobi",):
                answers.append(conversation.answer(decoding, show(decoding)))
    except UsageError as error:
        print(wrapped(str(error)), end="")
    if not answers:
        conversation.messages.pop()
        return
    conversation.keep(answers[0])
    print(_figures(answers))


def _shade(tokens: int) -> str:
    return next((style for least, style in SHADES if tokens >= least), "")


@contextmanager
def _screen(compare: bool):
    """Gives `show(decoding)`, which returns the function to call with each portion of an answer."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda decoding: _plain(TITLES[decoding] if compare else None)
        print()
        return
    from rich.console import Console
    from rich.text import Text

    if compare:
        with SideBySide() as columns:
            yield lambda decoding: _column(columns(decoding), Text())
    else:
        console = Console(highlight=False)
        yield lambda _: lambda text, tokens: console.print(Text(text, _shade(tokens)), end="", soft_wrap=True)
        print()


def _plain(title: str | None):
    """Prints the text under a title as it grows, for pipes and files."""
    if title:
        print(f"\n--- {title} ---")
    return lambda text, tokens: print(text, end="", flush=True)


def _column(show, text):
    """Shows the text, one of rich, in its column as it grows."""
    start = time.perf_counter()
    counts: list[int] = []

    def portion(more: str, tokens: int) -> None:
        counts.append(tokens)
        text.append(more, _shade(tokens))
        show(text, sum(counts), time.perf_counter() - start)

    return portion


def _figures(answers: list[Answer]) -> str:
    """The figures of an answer in one line, with the speed-up if it was also written one token at a time."""
    first = answers[0]
    line = (
        f"[{first.tokens} tokens in {len(first.forwards)} forwards, {first.tokens_per_forward:.2f} per forward; "
        f"{first.tokens_per_second:.0f} tokens per second"
    )
    if any(answer.stopped for answer in answers):
        line += "; stopped"
    elif len(answers) == 2:
        other = answers[1]
        speedup = first.tokens_per_second / other.tokens_per_second if other.tokens_per_second else 0
        same = "same text" if first.text == other.text else "different text"
        line += f"; one token at a time {other.tokens_per_second:.0f}: speed-up {speedup:.2f}x, {same}"
    return wrapped(f"{line}]").rstrip("\n")
