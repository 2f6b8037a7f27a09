"""Separates errors of the network and the Hub from bugs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..decoding.errors import UsageError


HTTP = {"httpx", "httpx2", "requests", "urllib3"}  # huggingface_hub uses one of them, depending on its version
WAYS_OUT = {
    401: "log in with `hf auth login`, or pass a token that is still valid",
    403: "use a token with the permission for this",
    404: "check the name, and that your token has access to it",
    429: "too many requests, so wait a few minutes",
}


def is_of_network(error: BaseException) -> bool:
    """Whether an error, or one of its causes, came from the network or is a response of the Hub."""
    return any(
        _classes(one, HTTP) & {"HTTPError", "InvalidURL"}
        or (isinstance(one, OSError) and _classes(one, HTTP | {"huggingface_hub"}))
        or isinstance(one, (ConnectionError, TimeoutError, socket.gaierror))
        for one in _causes(error)
    )


def sentence_of(error: BaseException) -> str:
    """What went wrong in talking to the Hub and how to fix it, in one sentence."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    causes = list(_causes(error))
    answers = (getattr(getattr(one, "response", None), "status_code", None) for one in causes)
    if (status := next(filter(None, answers), None)) is not None:
        way_out = WAYS_OUT.get(status, "try again later" if status >= 500 else "see its message")
        return f"the Hub answered {status}: {way_out} ({said})."
    if any("OfflineModeIsEnabled" in _classes(one, {"huggingface_hub"}) for one in causes):
        return f"{said}: unset HF_HUB_OFFLINE to connect to the Hub."
    if _classes(error, {"huggingface_hub"}):
        return f"{said}."  # already a sentence for the user, for instance that nobody is logged in
    return f"cannot reach the Hub ({said}): check the network, and HF_ENDPOINT if it is set."


@contextmanager
def talking_to_the_hub():
    """Converts errors of the network and the Hub to `UsageError`; lets all others pass."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not is_of_network(error):
            raise
        raise UsageError(sentence_of(error)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _classes(error: BaseException, packages: set[str]) -> set[str]:
    """The names of the classes of an error that are defined in the packages."""
    return {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in packages}
