"""What commands have in common: types of options, options, text that fits the terminal."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

from ..decoding.errors import MissingPackage, UsageError
from ..evaluation.prompts import CHAT
from .models import encode


def wrapped(text: str) -> str:
    """The lines of a text, each with its end, as they fit the terminal; 80 columns where there is none."""
    width = shutil.get_terminal_size().columns
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False).fill
    return "".join(f"{fill(line)}\n" for line in text.splitlines())


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def settings(text: str) -> dict[str, Any]:
    """Settings of `JacobiConfig` as JSON."""
    try:
        found = json.loads(text)
        from ..decoding.config import JacobiConfig  # which takes seconds

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


def check_places(output: Path | None, picture: Path | None = None) -> None:
    """
    Makes the folders of what will be written, before any work is lost.

    Raises:
        `OSError`: one cannot be made.
        `ValueError`: a picture would be of a kind that is not known.
        `ImportError`: matplotlib is not installed.
    """
    for file in filter(None, (output, picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if picture is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise MissingPackage("pictures need matplotlib: pip install 'hf_jacobi[eval]'") from error
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix.removeprefix(".") not in known:
        raise UsageError(f"{picture} is no picture that can be drawn: end its name in one of {', '.join(known)}.")


def add_prompts(parser: argparse.ArgumentParser, count: int) -> None:
    """Adds the options that `prompts_of` reads, for `count` prompts by default."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", help="a JSON, JSONL, Parquet, CSV or text file (default: short questions)")
    source.add_argument("--dataset", help="a data set on the Hub, or a folder")
    parser.add_argument("--dataset-name", help="the configuration of a data set on the Hub")
    parser.add_argument("--dataset-split", help="the split (default: train)")
    parser.add_argument("--as-chat", action="store_true", help="take each text for a user's message")
    parser.add_argument("--count", type=positive, default=count, help=f"how many prompts (default: {count})")


def prompts_of(arguments, tokenizer) -> list[list[int]]:
    """The tokens of the prompts that were asked for."""
    if not (arguments.prompts or arguments.dataset):
        return [encode(tokenizer, prompt, "cpu")["input_ids"][0].tolist() for prompt in CHAT[: arguments.count]]
    from ..trajectories.prompts import encode_prompt, open_prompts  # these need `datasets`

    rows = open_prompts(arguments.prompts or arguments.dataset, arguments.dataset_split, arguments.dataset_name)
    found = (encode_prompt(number, row, None, tokenizer, arguments.as_chat).ids for number, row in enumerate(rows))
    prompts = list(islice(filter(None, found), arguments.count))  # lines may be blank
    if not prompts:
        raise UsageError(f"{arguments.prompts or arguments.dataset} holds no prompt: give it some text.")
    return prompts
