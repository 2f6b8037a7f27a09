"""`hf-jacobi serve` serves a model through an OpenAI-compatible API."""

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


PORT = 8000  # the port of `transformers serve` and `transformers chat`
ABOUT_MODEL = "a local folder or a Hub id, of a model or an adapter (default: the miniature of this package)"
TITLES = {"ar": "one token at a time", "jacobi": "Jacobi decoding"}
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
REFUSED = {
    "continuous_batching": (
        "--continuous-batching goes around `generate`, and with it around Jacobi decoding: drop it, or serve many "
        "requests at once with `transformers serve` or with vLLM."
    ),
    "compile": (
        "--compile uses a static cache of another length for every request, so the model would be compiled again for "
        "each: drop it, and set cache_implementation='static' and max_cache_len in the checkpoint's generation config."
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
        help="the default for requests (default: the setting in the checkpoint's generation config, else ar)",
    )
    add_address(parser, PORT)
    parser.add_argument("--enable-cors", action="store_true", help="allow requests from pages of any origin")
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="warning", help="the level of the server's log (default: warning)"
    )
    for name in REFUSED:
        parser.add_argument(
            f"--{name.replace('_', '-')}", action="store_true", help="not supported; the error says why"
        )
    parser.set_defaults(run=run)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the options for loading it."""
    parser.add_argument("model", nargs="?", help=ABOUT_MODEL)
    parser.add_argument("--adapter", help="an adapter for MODEL, a folder or a Hub id")
    add_dtype(parser)
    parser.add_argument("--attention", help="attention implementation, such as sdpa or eager")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Adds `--host` and `--port`."""
    parser.add_argument(
        "--host", default="localhost", help="the address to listen on (default: localhost; 0.0.0.0: all addresses)"
    )
    parser.add_argument("--port", type=_port, help=f"the port to listen on (default: {port}; 0: any free port)")


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
        "otherwise; Ctrl-C stops the server).",
        flush=True,
    )
    serve(served, app, listening, arguments.log_level)
    return 0


def load(arguments, decoding: str | None = None) -> tuple[Served, Found]:
    """
    Loads the model of a command and prepares it for serving.

    Args:
        arguments: the arguments that `add_model` defines.
        decoding: the default decoding method; `None` for the checkpoint's, else AR.

    Returns:
        The served model, and the names that it was found by.

    Raises:
        `UsageError`: there is no such model, or it does not support this decoding method.
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
        torch.set_num_threads(1)  # so small a model gains little from more, and loses on a busy machine
    tokenizer = found.tokenizer()
    loaded = found.load(arguments.dtype, attention=arguments.attention)
    if found.adapter is not None:
        decoding = decoding or loaded.decoding  # from the adapter's generation config
    served = Served(name, loaded.model, loaded.writer, tokenizer, decoding, loaded.config)
    served.warm_up()
    return served, found
