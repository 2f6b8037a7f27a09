"""Where a server listens, and whether its packages are installed: checked before torch is imported."""

from __future__ import annotations

import importlib.util
import socket

from ..decoding.errors import MissingFile, missing_extra


NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # as in transformers' extra `serving`


def refuse_missing_packages() -> None:
    """Raises `MissingPackage` if a package that the server needs is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise missing_extra("serving", ", ".join(missing), "serve")


def listen(host: str, port: int) -> socket.socket:
    """
    Opens the socket of a server before the model is loaded, so that a port in use is reported at once.

    Args:
        host: a name or an address of this machine.
        port: the port; 0 for any free one.

    Raises:
        `MissingFile`: the port is in use, or this machine does not have the address.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise MissingFile(f"cannot listen on {host}:{port} ({said}): choose another --port or --host.") from error


def address_of(listening: socket.socket) -> str:
    """The address of the server for a browser."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "127.0.0.1": "localhost", "::": "localhost", "::1": "[::1]"}.get(host, host)
    return f"http://{host}:{port}"
