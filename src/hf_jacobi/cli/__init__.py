"""
The command `hf-jacobi`.

The modules of the commands define the options. They import torch, transformers and other slow packages only when they
run.
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
from ..decoding.errors import UsageError, missing_extra
from . import bench, chat, collect, demo, eval, ngrams, pack, push, recipe, serve, train, tune
from .options import Parser


COMMANDS = (demo, collect, ngrams, pack, train, recipe, bench, tune, eval, push, serve, chat)
DEBUG = "--debug"
PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What the extras in setup.py install, by the names that are imported.
EXTRAS = {
    "train": ("datasets", "pyarrow", "filelock", "accelerate", "peft", "trl"),
    "eval": ("evaluate", "matplotlib", "datasets", "accelerate", "peft"),
    "harness": ("lm_eval", "accelerate", "peft"),
    "demo": ("gguf", "rich", "accelerate", "peft"),
    "serve": ("fastapi", "starlette", "uvicorn", "openai", "pydantic", "rich", "peft"),
    "vllm": ("vllm",),
    "flash": ("flash_attn",),
}
# The extra of each command, "train" for the others.
EXTRA_OF = {"demo": "demo", "bench": "eval", "tune": "eval", "eval": "harness", "serve": "serve", "chat": "serve"}


def main(argv: list[str] | None = None) -> int:
    """
    Runs `hf-jacobi COMMAND ...`; returns the exit status.

    An error that the user can fix is printed as one sentence, with status 2. All other errors are bugs and are raised.
    """
    _print_any_text()
    arguments, debug = _parse(argv)
    try:
        with _own_warnings_in_a_line():
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps Python from printing an error at exit
        return 141  # the shell's status for a program that SIGPIPE ended
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if {"tqdm", "torch"} <= sys.modules.keys():
            from ..decoding.compat import end_progress_bars

            end_progress_bars()
        sentence = _for_the_user(error, arguments.command)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"hf-jacobi {arguments.command}: {sentence}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, bool]:
    """The parsed arguments, and whether `--debug` was given; exits if the arguments are invalid."""
    parser = argparse.ArgumentParser(prog="hf-jacobi", description="Decode many tokens per forward.")

    def print_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser.add_argument("--version", action="version", version=f"hf-jacobi {__version__}")
    parser.set_defaults(run=print_help)
    about = "also show the traceback of an error"
    parser.add_argument(DEBUG, action="store_true", help=about)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for module in COMMANDS:
        module.add_parser(commands)
    for name, command in commands.choices.items():
        if name != "train":  # it has its own parser, in which transformers defines an option of this name
            command.add_argument(DEBUG, action="store_true", default=argparse.SUPPRESS, help=about)
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    debug = vars(arguments).pop("debug")
    if arguments.command == "train":
        arguments.rest, found = _without_debug(rest)
        return arguments, debug or found
    if rest:
        commands.choices.get(arguments.command, parser).error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments, debug


def _without_debug(rest: list[str]) -> tuple[list[str], bool]:
    """The options of `train` without our `--debug`, which has no value; a `--debug` with a value is transformers'."""
    ends = [*rest[1:], "--"]
    ours = {place for place, one in enumerate(rest) if one == DEBUG and ends[place].startswith("--")}
    return [one for place, one in enumerate(rest) if place not in ours], bool(ours)


def _print_any_text() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, and opens them if they are closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- `None` if the caller closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _own_warnings_in_a_line():
    """
    Shows warnings of this package in one line, without the source line that raised them. Warnings among other packages
    of what they are going to remove are left out: no user of a command can heed them.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", FutureWarning)
        others = warnings.showwarning

        def show(message, category, filename, *rest, **settings) -> None:
            if filename.startswith(PACKAGE) and category is UserWarning:
                print(f"hf-jacobi: {message}", file=sys.stderr)
            else:
                others(message, category, filename, *rest, **settings)

        warnings.showwarning = show
        yield


def _for_the_user(error: Exception, command: str) -> str | None:
    """The sentence for an error that the user can fix; `None` for a bug."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_with(error.name, command)):
        return str(missing_extra("this", error.name, extra))
    if isinstance(error, OSError) and error.errno is not None:
        if isinstance(error.filename, (str, bytes, os.PathLike)):
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        if error.errno in NO_ROOM:
            return str(error.strerror)
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return "a name begins with `~` and an unknown user: write the full path of the folder."
    if "huggingface_hub" in sys.modules:
        from ..hub.network import is_of_network, sentence_of

        if is_of_network(error):
            return sentence_of(error)
    return None


def _extra_with(package: str | None, command: str) -> str | None:
    """The extra that installs a package, preferably that of the command; `None` for other packages."""
    order = (EXTRA_OF.get(command, "train"), *EXTRAS)
    return next((extra for extra in order if package in EXTRAS[extra]), None)
