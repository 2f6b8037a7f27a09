"""Where a server listens, and whether it can serve at all: what is told before torch is imported or a model loaded."""

from __future__ import annotations

import importlib.util
import socket

from ..decoding.errors import MissingFile, MissingPackage


NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # as transformers' own extra `serving`


def refuse_missing_packages() -> None:
    """Raises `MissingPackage` where what the server needs is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackage(f"serving needs {', '.join(missing)}: pip install 'hf_jacobi[serve]'")


def listen(host: str, port: int) -> socket.socket:
    """
    A socket that listens, so that a port that is taken is told before a model is loaded.

    Args:
        host: a name or an address of this machine.
        port: 0 for any that is free.

    Raises:
        `MissingFile`: the port is taken, or there is no such address here.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise MissingFile(f"{host}:{port} cannot be listened on ({said}): name another --port or --host.") from error


def address_of(listening: socket.socket) -> str:
    """The address at which a browser finds the server."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "127.0.0.1": "localhost", "::": "localhost", "::1": "[::1]"}.get(host, host)
    return f"http://{host}:{port}"
