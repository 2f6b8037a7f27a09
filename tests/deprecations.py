"""
Finds our own use of what other packages have deprecated.

A filter by module misses some: Python names the caller's module only if the warning code counted the frames up to it
(those of `torch.nn.Module` lie between a forward and its caller), and transformers logs some deprecations.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from torch.jit._builtins import _register_builtin

import hf_jacobi


OURS = f"{Path(hf_jacobi.__file__).parent}/"
TESTS = f"{Path(__file__).parent}/"
DOOR = ("generate", "_generate_of_process", "decode_by", "__post_init__")  # they pass on their caller's arguments


class OwnUseOfDeprecated(AssertionError):
    """What `hf_jacobi` calls is deprecated."""


def package_of(file: str) -> str:
    """The package that a file belongs to: the folder in site-packages, else the first folder below the library's."""
    _, found, rest = file.partition("site-packages/")
    if found:
        return rest.partition("/")[0]
    return next((part for part in ("transformers", "peft", "accelerate", "trl") if f"/{part}/" in file), file)


def find_own_use(depth: int = 2) -> str | None:
    """
    Where `hf_jacobi` called the code that now warns, or `None` if another package did.

    Between the two lie frames of the package that warns, and of torch, which calls a module's forward. Any other
    package in between is the one that must change.
    """
    frame = sys._getframe(depth)
    warns = package_of(frame.f_code.co_filename)
    while frame is not None:
        file = frame.f_code.co_filename
        handed_on = file.startswith(OURS) and frame.f_code.co_name in DOOR
        if file.startswith(OURS) and not handed_on:
            return f"{file}:{frame.f_lineno}"
        if file.startswith(TESTS) or not (handed_on or package_of(file) in (warns, "torch")):
            return None
        frame = frame.f_back
    return None


_warn, _warning_once = warnings.warn, logging.Logger.warning_once


def watched_warn(message, category=None, stacklevel=1, source=None, **others):
    """`warnings.warn` that raises an error for our own use of what is deprecated."""
    kind = type(message) if isinstance(message, Warning) else category
    if kind is not None and issubclass(kind, (DeprecationWarning, FutureWarning)) and (place := find_own_use()):
        raise OwnUseOfDeprecated(f"{place}: {message}")
    return _warn(message, category, stacklevel + 1, source, **others)  # `skip_file_prefixes`, from Python 3.12


def watched_warning_once(self, message, *args, **kwargs):
    """`warning_once` of transformers' loggers, likewise."""
    if "deprecated" in str(message) and (place := find_own_use()):
        raise OwnUseOfDeprecated(f"{place}: {message}")
    return _warning_once(self, message, *args, **kwargs)


_register_builtin(watched_warn, "aten::warn")  # what TorchScript takes `warnings.warn` for


def watch(monkeypatch) -> None:
    """While `monkeypatch` lasts, raises `OwnUseOfDeprecated` if we use what is deprecated."""
    monkeypatch.setattr(warnings, "warn", watched_warn)
    monkeypatch.setattr(logging.Logger, "warning_once", watched_warning_once)
