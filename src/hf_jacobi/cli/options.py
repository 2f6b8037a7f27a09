"""What commands have in common: types of options, options, text that fits the terminal."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

from ..decoding.config import JacobiConfig
from ..decoding.errors import MissingFile, MissingPackage, UsageError
from ..decoding.files import write_whole
from ..evaluation.prompts import CHAT
from .models import encode, refusing_bad_templates


OF_PROMPTS = ("dataset_name", "dataset_split", "prompt_column", "as_chat")
LARGEST = 2**31 - 1  # of what is counted


class Parser(argparse.ArgumentParser):
    """A parser of a command: takes the names of its options with hyphens and with underscores alike."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        known = re.findall(r"--[\w-]+", self.format_usage())
        end = args.index("--") if "--" in args else len(args)
        return super().parse_known_args([*(_as_known(one, known) for one in args[:end]), *args[end:]], namespace)


def _as_known(typed: str, known: list[str]) -> str:
    """An option, or the beginning of one, as the parser spells it."""
    name, equals, value = typed.partition("=")
    stem = name[2:]
    spellings = (name, f"--{stem.replace('_', '-')}", f"--{stem.replace('-', '_')}")
    if not name.startswith("--"):
        return typed
    found = (one for one in spellings if any(option.startswith(one) for option in known))
    return f"{next(found, name)}{equals}{value}"


def wrapped(text: str) -> str:
    """The lines of a text, each with its end, as they fit the terminal; 80 columns where there is none."""
    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    return "".join(f"{fill(line)}\n" for line in text.splitlines())


def positive(text: str) -> int:
    """An integer of at least 1, and no more than torch can count."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be at most {LARGEST}, got {value}")
    return value


def path(text: str) -> Path:
    """A file or a folder; `~` is the user's."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in the home of a user that is not known here") from None


def settings(text: str) -> dict[str, Any]:
    """Settings of `JacobiConfig` as JSON."""
    try:
        found = json.loads(text)
        if found is None:
            raise UsageError('give an object, such as {"block_size": 16}')
        JacobiConfig.coerce(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return found


def named(settings: dict[str, Any]) -> str:
    """Settings of `JacobiConfig` as one writes them."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the default settings"


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="what the model computes in (default: as it was saved)",
    )


def check_places(output: Path | None, picture: Path | None = None, *others: Path | None) -> None:
    """
    Makes the folders of what will be written and tries to write there, before any work is lost.

    Args:
        output, others: files.
        picture: a file for a picture.

    Raises:
        `UsageError`: one cannot be written, two are the same, or a picture would be of a kind that is not known.
        `ImportError`: matplotlib is not installed.
    """
    files = [*filter(None, (output, picture, *others))]
    for file in files:
        check_place(file)
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError(f"{files[0]} is named for two files: one would replace the other.")
    if picture is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise MissingPackage("pictures need matplotlib: pip install 'hf_jacobi[eval]'") from error
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.removeprefix(".").lower() not in known:
        raise UsageError(f"{picture} is no picture that can be drawn: end its name in one of {', '.join(known)}.")


def check_folder(folder: Path) -> None:
    """
    Makes a folder, and tries whether files can be written there.

    Raises:
        `UsageError`: it is a file, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder.")
    check_place(folder / "any")


def check_place(file: Path) -> None:
    """
    Tries whether a file can be written: makes its folder, and a file in it for a moment.

    Raises:
        `UsageError`: it cannot.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder: name a file in it.")
    if _is_stream(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.resolve().parent):
            pass
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        above = next((place for place in file.parents if place.is_file()), None)
        reason = f"{above} is a file" if above else error.strerror or error
        raise MissingFile(f"{file} cannot be written ({reason}): name another place.") from error


def write(file: Path, content: str | bytes) -> None:
    """Writes a file that the user named, whole or not at all; a link is followed, as the user named that."""
    if _is_stream(file):
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.resolve(), content)


def _is_stream(file: Path) -> bool:
    """Whether it is a pipe or a device, or another name of one, such as /dev/stdout."""
    return (file.exists() and not file.is_file()) or str(file).startswith(("/dev/", "/proc/self/fd/"))


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file as `write` does."""
    write(file, json.dumps(content, indent=1, default=str) + "\n")


def write_picture(file: Path, axes) -> None:
    """Writes the picture that some axes are part of, as `write` does; its kind is that of the name."""
    memory = io.BytesIO()
    axes.figure.savefig(memory, format=file.suffix.removeprefix(".").lower(), dpi=120, bbox_inches="tight")
    write(file, memory.getvalue())


def add_prompts(parser: argparse.ArgumentParser, count: int) -> None:
    """Adds the options that `Prompts` reads, for `count` prompts by default."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", help="a JSON, JSONL, Parquet, CSV or text file (default: short questions)")
    source.add_argument("--dataset", help="a data set on the Hub, or a folder")
    parser.add_argument("--dataset-name", help="the configuration of a data set on the Hub")
    parser.add_argument("--dataset-split", help="the split (default: train)")
    parser.add_argument("--prompt-column", help="the column of the prompts (default: the first that looks like one)")
    parser.add_argument("--as-chat", action="store_true", help="take each text for a user's message")
    parser.add_argument("--count", type=positive, help=f"how many prompts (default: {count})")
    parser.set_defaults(default_count=count)


class Prompts:
    """
    The prompts that were asked for, opened when this is made, so that a wrong name is told before a model is loaded.

    Attributes:
        name: what reports call them, without the way to a file.
    """

    def __init__(self, arguments):
        self.arguments = arguments
        source = arguments.dataset if arguments.prompts is None else arguments.prompts
        if source is None:
            unused = [name for name in OF_PROMPTS if getattr(arguments, name) not in (None, False)]
            if unused:
                option = f"--{unused[0].replace('_', '-')}"
                raise UsageError(f"{option} is for prompts of your own: name them with --prompts or --dataset.")
            self.name, self.rows = "short questions", None
            return
        if not source.strip():
            raise UsageError("the name of the prompts is empty: name a file, or leave the option out.")
        from ..trajectories.prompts import open_prompts  # which needs `datasets`

        file = Path(source).expanduser()
        self.name = file.name if file.exists() else source
        self.rows = open_prompts(source, arguments.dataset_split, arguments.dataset_name)

    def encode(self, tokenizer) -> list[list[int]]:
        """The tokens of each prompt; where there are fewer than were asked for, stderr says so."""
        asked = self.arguments.count
        with refusing_bad_templates():  # blank lines are no prompts
            found = list(islice(filter(None, self._ids(tokenizer)), asked or self.arguments.default_count))
        if not found:
            raise UsageError(f"{self.name} holds no prompt: give it some text.")
        if asked and len(found) < asked:
            print(f"{self.name}: there are {len(found)} prompts, not {asked}; all are taken.", file=sys.stderr)
        return found

    def _ids(self, tokenizer):
        if self.rows is None:
            yield from (encode(tokenizer, prompt, "cpu")["input_ids"][0].tolist() for prompt in CHAT)
            return
        from ..trajectories.encoding import BadPrompt
        from ..trajectories.prompts import encode_prompt

        column, as_chat = self.arguments.prompt_column, self.arguments.as_chat
        for number, row in enumerate(self.rows):
            try:
                yield encode_prompt(number, row, column, tokenizer, as_chat).ids
            except BadPrompt as error:
                print(f"{self.name}: left out: {error}", file=sys.stderr)
