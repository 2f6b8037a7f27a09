"""Types of command-line options, and the option every command has."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..decoding import JacobiConfig


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
        JacobiConfig.coerce(found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return found


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="what the model computes in (default: as it was saved)",
    )
