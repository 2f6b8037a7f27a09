"""
The command `hf-jacobi`.

The modules of the commands say what can be typed, and import what takes seconds, torch and transformers among it, when
they run.
"""

from __future__ import annotations

import argparse
import os
import sys

from .. import __version__
from ..decoding.errors import UsageError
from . import bench, collect, demo, eval, pack, push, train, tune
from .options import Parser


COMMANDS = (demo, collect, pack, train, bench, tune, eval, push)


def main(argv: list[str] | None = None) -> int:
    """Runs `hf-jacobi COMMAND ...`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hf-jacobi", description="Decode many tokens per forward.")
    parser.add_argument("--version", action="version", version=f"hf-jacobi {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        module.add_parser(commands)
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.command != "train":  # which has a parser of its own for them
        typed = commands.choices.get(arguments.command, parser)
        typed.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is said as Python ends
        return 141  # as the shell calls it when the signal ends a program
    except (UsageError, OSError) as error:
        print(f"hf-jacobi {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
