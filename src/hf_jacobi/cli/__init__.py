"""
The command `hf-jacobi`.

The modules of the commands say what can be typed, and import what takes seconds, torch and transformers among it, when
they run.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from contextlib import contextmanager

from .. import __version__
from ..decoding.errors import UsageError
from . import bench, chat, collect, demo, eval, pack, push, recipe, serve, train, tune
from .options import Parser


COMMANDS = (demo, collect, pack, train, recipe, bench, tune, eval, push, serve, chat)
DEBUG = "--debug"
PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def main(argv: list[str] | None = None) -> int:
    """
    Runs `hf-jacobi COMMAND ...`; returns the exit status.

    What the user can mend is said in a sentence, with status 2. Everything else is a fault of the program, and
    is raised.
    """
    _print_any_text()
    arguments, debug = _parse(argv)
    try:
        with _own_warnings_in_a_line():
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is said as Python ends
        return 141  # as the shell calls it when the signal ends a program
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if {"tqdm", "torch"} <= sys.modules.keys():
            from ..decoding.compat import end_progress_bars

            end_progress_bars()
        said = _for_the_user(error)
        if said is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"hf-jacobi {arguments.command}: {said}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, bool]:
    """What was typed, and whether with `--debug`; ends the program where that is nothing that can run."""
    parser = argparse.ArgumentParser(prog="hf-jacobi", description="Decode many tokens per forward.")
    parser.add_argument("--version", action="version", version=f"hf-jacobi {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help() or 2)
    about = "show the traceback of an error, too"
    parser.add_argument(DEBUG, action="store_true", help=about)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        module.add_parser(commands)
    for name, command in commands.choices.items():
        if name != "train":  # which has a parser of its own, and an option of transformers with this name
            command.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help=about)
    arguments, arguments.rest = parser.parse_known_args(argv)
    debug = vars(arguments).pop("debug")
    if arguments.command == "train":
        arguments.rest, asked = _without_debug(arguments.rest)
        return arguments, debug or asked
    if arguments.rest:
        commands.choices.get(arguments.command, parser).error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    return arguments, debug


def _without_debug(rest: list[str]) -> tuple[list[str], bool]:
    """The options of `train` without a `--debug` that has no value; one with a value is transformers' own."""
    ends = [*rest[1:], "--"]
    ours = {place for place, one in enumerate(rest) if one == DEBUG and ends[place].startswith("--")}
    return [one for place, one in enumerate(rest) if place not in ours], bool(ours)


def _print_any_text() -> None:
    """Lets streams escape what their encoding lacks, rather than fail in the middle of a text, or be closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- `None` where the caller closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _own_warnings_in_a_line():
    """Shows warnings of this package without the place in its source, which tells the user nothing."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message, category, filename, *rest, **settings) -> None:
            if filename.startswith(PACKAGE) and category is UserWarning:
                print(f"hf-jacobi: {message}", file=sys.stderr)
            else:
                others(message, category, filename, *rest, **settings)

        warnings.showwarning = show
        yield


def _for_the_user(error: Exception) -> str | None:
    """The sentence for an error that the user can mend; `None` for a fault of the program."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        if isinstance(error.filename, (str, bytes, os.PathLike)):
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        if error.errno in NO_ROOM:
            return str(error.strerror)
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return "a name begins with `~` and a user that is not known here: write the folder out."
    if "huggingface_hub" in sys.modules:
        from ..hub.network import is_of_network, sentence_of

        if is_of_network(error):
            return sentence_of(error)
    return None
