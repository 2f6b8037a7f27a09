"""`hf-jacobi serve`: a model behind an OpenAI-compatible address."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..decoding.errors import UsageError
from .demo import is_miniature
from .models import MINIATURE, find
from .options import add_dtype


if TYPE_CHECKING:
    from ..serving.server import Served
    from .models import Found


PORT = 8000  # as `transformers serve` and `transformers chat` have it
ABOUT_MODEL = "a local folder or a Hub id, of a model or an adapter (default: the miniature that comes along)"
TITLES = {"ar": "one token at a time", "jacobi": "Jacobi decoding"}
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
REFUSED = {
    "continuous_batching": (
        "--continuous-batching goes around `generate`, and so around Jacobi decoding: drop it, or serve many requests "
        "at once with `transformers serve`, or with vLLM."
    ),
    "compile": (
        "--compile asks for a static cache of another length in every request, for each of which the model would be "
        "compiled: drop it, and put cache_implementation='static' and max_cache_len into the checkpoint's generation "
        "config."
    ),
}


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Serve a model as `transformers serve` does (OpenAI-compatible), with Jacobi decoding"
    parser = commands.add_parser("serve", help=about, description=about)
    add_model(parser)
    parser.add_argument(
        "--decoding",
        choices=("ar", "jacobi"),
        help="for requests that do not say (default: as the checkpoint's generation config has it, else ar)",
    )
    add_address(parser, PORT)
    parser.add_argument("--enable-cors", action="store_true", help="let pages of any origin call it")
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="warning", help="of the server's log (default: warning)"
    )
    for name in REFUSED:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help="refused: it says why")
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and how it is loaded."""
    parser.add_argument("model", nargs="?", help=ABOUT_MODEL)
    parser.add_argument("--adapter", help="an adapter for it, a folder or a Hub id")
    add_dtype(parser)
    parser.add_argument("--attention", help="attention implementation, such as sdpa or eager")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Adds `--host` and `--port`."""
    parser.add_argument(
        "--host", default="localhost", help="where to listen (default: localhost; 0.0.0.0: everywhere)"
    )
    parser.add_argument("--port", type=_port, help=f"where to listen (default: {port}; 0: any that is free)")


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def run(arguments) -> int:
    """Runs the command."""
    for name, reason in REFUSED.items():
        if getattr(arguments, name):
            raise UsageError(reason)
    from ..serving.listening import address_of, listen, refuse_missing_packages

    refuse_missing_packages()
    listening = listen(arguments.host, PORT if arguments.port is None else arguments.port)
    served, _ = load(arguments, arguments.decoding)
    from ..serving.server import application, serve

    app = application(served, cors=arguments.enable_cors)
    print(
        f"Serving {served.name} at {address_of(listening)}/v1 ({TITLES[served.decoding]} unless a request says "
        "otherwise; Ctrl-C ends it).",
        flush=True,
    )
    serve(served, app, listening, arguments.log_level)
    return 0


def load(arguments, decoding: str | None = None) -> tuple[Served, Found]:
    """
    The model that was asked for, ready to be served, and where it was found.

    Args:
        arguments: those of `add_model`.
        decoding: how it decodes; left out, as the checkpoint has it, else one token at a time.

    Raises:
        `UsageError`: there is no such model, or it cannot decode so.
    """
    name = MINIATURE.name if arguments.model is None else arguments.model
    own = arguments.model is None or (name == MINIATURE.name and not os.path.isdir(name))
    found = find(MINIATURE if own else arguments.model, arguments.adapter)
    print(f"Loading {name} ...", flush=True)

    import torch
    from transformers.utils import logging

    from ..serving.server import Served

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if is_miniature(found):
        torch.set_num_threads(1)  # more gain a model so small little, and wait for each other on a busy machine
    tokenizer = found.tokenizer()
    loaded = found.load(arguments.dtype, attention=arguments.attention)
    if found.adapter is not None:
        decoding = decoding or loaded.decoding  # which stands beside the adapter
    served = Served(name, loaded.model, loaded.writer, tokenizer, decoding, loaded.config)
    served.warm_up()
    return served, found
