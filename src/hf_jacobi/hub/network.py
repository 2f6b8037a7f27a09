"""Errors of the network and of the Hub, told apart from faults of the program."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ..decoding.errors import UsageError


HTTP = {"httpx", "httpx2", "requests", "urllib3"}  # which of them huggingface_hub calls differs between its versions
WAYS_OUT = {
    401: "log in with `hf auth login`, or pass a token that is still valid",
    403: "use a token that may do this",
    404: "check the name, and whether your token may see it",
    429: "these were too many requests, so wait a few minutes",
}


def is_of_network(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, came from the network or from the Hub's answers."""
    return any(
        _classes(one, HTTP) & {"HTTPError", "InvalidURL"}
        or (isinstance(one, OSError) and _classes(one, HTTP | {"huggingface_hub"}))
        or isinstance(one, (ConnectionError, TimeoutError, socket.gaierror))
        for one in _causes(error)
    )


def sentence_of(error: BaseException) -> str:
    """What went wrong on the way to the Hub, and the way out, in one sentence."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    causes = list(_causes(error))
    answers = (getattr(getattr(one, "response", None), "status_code", None) for one in causes)
    if (status := next(filter(None, answers), None)) is not None:
        way_out = WAYS_OUT.get(status, "try again later" if status >= 500 else "see what it said")
        return f"the Hub answered {status}: {way_out} ({said})."
    if any("OfflineModeIsEnabled" in _classes(one, {"huggingface_hub"}) for one in causes):
        return f"{said}: unset HF_HUB_OFFLINE to ask the Hub."
    if _classes(error, {"huggingface_hub"}):
        return f"{said}."  # nobody is logged in, for instance: it says so
    return f"there is no way to the Hub ({said}): check the network, and HF_ENDPOINT if it is set."


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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _classes(error: BaseException, packages: set[str]) -> set[str]:
    """The names of those classes of an error that come from the packages."""
    return {cls.__name__ for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in packages}
