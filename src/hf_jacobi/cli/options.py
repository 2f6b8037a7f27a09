"""Shared parts of the commands: types of options, groups of options, checks of output files, wrapped text."""

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
from ..decoding.errors import MissingFile, UsageError, missing_extra
from ..decoding.files import write_whole
from ..evaluation.prompts import CHAT
from .models import encode, refusing_bad_templates


OF_PROMPTS = ("dataset_name", "dataset_split", "prompt_column", "as_chat")
LARGEST = 2**31 - 1  # the largest count
INTERRUPTED = "\nInterrupted: run the same command again to resume."


class Parser(argparse.ArgumentParser):
    """The parser of a command, which accepts option names with hyphens or underscores."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        known = re.findall(r"--[\w-]+", self.format_usage())
        end = args.index("--") if "--" in args else len(args)
        return super().parse_known_args([*(_as_known(one, known) for one in args[:end]), *args[end:]], namespace)


def _as_known(typed: str, known: list[str]) -> str:
    """An option, or the beginning of one, in the parser's spelling."""
    name, equals, value = typed.partition("=")
    stem = name[2:]
    spellings = (name, f"--{stem.replace('_', '-')}", f"--{stem.replace('-', '_')}")
    if not name.startswith("--"):
        return typed
    found = (one for one in spellings if any(option.startswith(one) for option in known))
    return f"{next(found, name)}{equals}{value}"


def wrapped(text: str) -> str:
    """The lines of a text, wrapped to the width of the terminal (80 columns without one) and ended by newlines."""
    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    return "".join(f"{fill(line)}\n" for line in text.splitlines())


def positive(text: str) -> int:
    """An integer from 1 to `LARGEST`."""
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
    """The path of a file or folder, `~` expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in the home of an unknown user") from None


def settings(text: str) -> dict[str, Any]:
    """`JacobiConfig` settings, parsed from JSON."""
    try:
        found = json.loads(text)
        if found is None:
            raise UsageError('give an object, such as {"block_size": 16}')
        JacobiConfig.coerce(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return found


def named(settings: dict[str, Any]) -> str:
    """`JacobiConfig` settings in one phrase."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the default settings"


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="the data type that the model computes in (default: as saved)",
    )


def check_places(output: Path | None, picture: Path | None = None, *others: Path | None) -> None:
    """
    Creates the folders of output files and tries to write there, so that an error comes before the work.

    Args:
        output, others: output files.
        picture: an output file for a plot.

    Raises:
        `UsageError`: a file cannot be written, two files are the same, or matplotlib does not support the format.
        `ImportError`: a plot is wanted, but matplotlib is not installed.
    """
    files = [*filter(None, (output, picture, *others))]
    for file in files:
        check_place(file)
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError(f"{files[0]} is named for two files: name two different ones.")
    if picture is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise missing_extra("a plot", "matplotlib", "eval") from error
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.removeprefix(".").lower() not in known:
        raise UsageError(f"{picture} does not name a format for plots: end it with one of {', '.join(known)}.")


def check_folder(folder: Path) -> None:
    """
    Creates a folder, and tries to write a file there.

    Raises:
        `UsageError`: that fails, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder.")
    check_place(folder / "any")


def check_place(file: Path) -> None:
    """
    Checks that a file can be written: creates its folder, and a temporary file there.

    Raises:
        `UsageError`: that fails.
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
    """Writes a file that the user named, completely or not at all. If the name is a link, its target is written."""
    if _is_stream(file):
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.resolve(), content)


def _is_stream(file: Path) -> bool:
    """Whether a file is a pipe or a device, or a name of one, such as /dev/stdout."""
    return (file.exists() and not file.is_file()) or str(file).startswith(("/dev/", "/proc/self/fd/"))


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file in the same way as `write`."""
    write(file, json.dumps(content, indent=1, default=str) + "\n")


def write_picture(file: Path, axes) -> None:
    """Writes the figure of some axes in the same way as `write`, in the format of the file's suffix."""
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
    parser.add_argument("--prompt-column", help="the column with the prompts (default: the first with a usual name)")
    parser.add_argument("--as-chat", action="store_true", help="treat each text as a user's message")
    parser.add_argument("--count", type=positive, help=f"the number of prompts (default: {count})")
    parser.set_defaults(default_count=count)


class Prompts:
    """
    The prompts of a command. The constructor opens them, so that a wrong name is reported before a model is loaded.

    Attributes:
        name: their name in reports, without the path of a file.
    """

    def __init__(self, arguments):
        self.arguments = arguments
        source = arguments.dataset if arguments.prompts is None else arguments.prompts
        if source is None:
            unused = [name for name in OF_PROMPTS if getattr(arguments, name) not in (None, False)]
            if unused:
                option = f"--{unused[0].replace('_', '-')}"
                raise UsageError(f"{option} needs your own prompts: name them with --prompts or --dataset.")
            self.name, self.rows = "short questions", None
            return
        if not source.strip():
            raise UsageError("the name of the prompts is empty: name a file, or leave out the option.")
        from ..trajectories.prompts import open_prompts  # needs `datasets`

        file = Path(source).expanduser()
        self.name = file.name if file.exists() else source
        self.rows = open_prompts(source, arguments.dataset_split, arguments.dataset_name)

    def encode(self, tokenizer) -> list[list[int]]:
        """The token ids of each prompt; prints notes to stderr: too few prompts, or text without a chat template."""
        count = self.arguments.count
        with refusing_bad_templates():
            prompts = filter(None, self._ids(tokenizer))  # without blank lines
            found = list(islice(prompts, count or self.arguments.default_count))
        if not found:
            raise UsageError(f"{self.name} holds no prompt: add text to it.")
        if count and len(found) < count:
            print(f"{self.name}: there are {len(found)} prompts, not {count}; all are used.", file=sys.stderr)
        return found

    def _ids(self, tokenizer):
        if self.rows is None:
            yield from (encode(tokenizer, prompt, "cpu")["input_ids"][0].tolist() for prompt in CHAT)
            return
        from ..trajectories.encoding import BadPrompt
        from ..trajectories.prompts import encode_prompt, is_text

        column, as_chat = self.arguments.prompt_column, self.arguments.as_chat
        if tokenizer.chat_template and not as_chat and any(is_text(row, column) for row in islice(self.rows, 1)):
            print(
                f"{self.name}: plain text, without the model's chat template; --as-chat applies it.", file=sys.stderr
            )
        for number, row in enumerate(self.rows):
            try:
                yield encode_prompt(number, row, column, tokenizer, as_chat).ids
            except BadPrompt as error:
                print(f"{self.name}: left out: {error}", file=sys.stderr)
