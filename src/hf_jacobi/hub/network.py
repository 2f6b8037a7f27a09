"""Errors of the network and of the Hub, told apart from faults of the program."""

from __future__ import annotations

import socket
from contextlib import contextmanager

from ..decoding.errors import UsageError


HTTP = {"httpx", "httpx2", "requests", "urllib3"}  # which of them huggingface_hub calls differs between its versions
WAYS_OUT = {
    401: "log in with `hf auth login`, or pass a token that is still valid",
    403: "use a token that may write there",
    404: "check the name, and whether your token may see it",
    429: "these were too many requests, so wait a few minutes",
}


def is_of_network(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, came from the network or from the Hub's answers."""
    while error is not None:
        packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__ if cls.__name__ != "Exception"}
        named = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in HTTP}
        if named & {"HTTPError", "InvalidURL"}:
            return True
        if isinstance(error, OSError) and packages & (HTTP | {"huggingface_hub"}):
            return True
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        error = error.__cause__
    return False


def sentence_of(error: BaseException) -> str:
    """What went wrong on the way to the Hub, and the way out, in one sentence."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        if isinstance(error, OSError) and "huggingface_hub" in {
            cls.__module__.split(".")[0] for cls in type(error).__mro__
        }:
            return f"{said}."  # offline, or nobody is logged in: it says so
        return f"there is no way to the Hub ({said}): check the network, and HF_ENDPOINT if it is set."
    way_out = WAYS_OUT.get(status, "try again later" if status >= 500 else "see what it said")
    return f"the Hub answered {status}: {way_out} ({said})."


@contextmanager
def talking_to_the_hub():
    """Errors of the network and of the Hub go on as `UsageError`; others are left as they are."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not is_of_network(error):
            raise
        raise UsageError(sentence_of(error)) from error
