"""Errors that the user can fix, as opposed to faults of the program: the commands print them as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any


class UsageError(ValueError):
    """The user's input is wrong: one sentence that says what was wrong and what would be correct."""


class MissingPackage(UsageError, ImportError):
    """A package is not installed: which one, and how to install it."""


class MissingFile(UsageError, OSError):
    """A file or folder does not exist, or cannot be read or written: which one, and what was expected."""


def missing_extra(what: str, package: str | None, extra: str) -> MissingPackage:
    """
    The error for a package that an extra of this project installs.

    Args:
        what: what needs it.
        package: the missing one.
        extra: the name of the extra.
    """
    return MissingPackage(
        f"{what} needs {package}, from the extra {extra!r}: pip install '.[{extra}]' in a clone of hf_jacobi"
    )


@contextmanager
def of_usage(*kinds: type[Exception]) -> Iterator[None]:
    """
    Turns errors of these kinds, which another library raises inside, into `UsageError`.

    For places where only the user's input can be at fault: reading their file, checking their arguments.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(str(error) or type(error).__name__) from error


def check_range(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """
    Raises `UsageError` for a setting that is not a number of its range. NaN is in no range.

    Args:
        name: how the message names the setting, for instance "`temperature`".
        value: the setting.
        least, most: the smallest and the largest value allowed.
        above: a bound that the value must exceed; use it instead of `least`.
        whole: whether the value must be a whole number.
        optional: whether it can also be `None`.

    Example:

    ```python
    >>> check_range("`temperature`", -1.0, above=0)
    UsageError: `temperature` must be above 0, got -1.0.
    >>> check_range("`block_size`", "many", 1, whole=True)
    UsageError: `block_size` must be a whole number of at least 1, got 'many'.
    ```
    """
    if optional and value is None:
        return
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if is_number and _is_within(value, least, most, above):
        return
    wanted = _range_in_words(least, most, above)
    if not is_number:
        kind = "a whole number" if whole else "a number"
        wanted = f"{kind} {'of ' if wanted.startswith('at') else ''}{wanted}".rstrip()
    raise UsageError(f"{name} must be {wanted}{', or None' if optional else ''}, got {value!r}.")


def _is_within(value: float, least: float | None, most: float | None, above: float | None) -> bool:
    return (
        value == value  # not NaN
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )


def _range_in_words(least: float | None, most: float | None, above: float | None) -> str:
    if least is not None and most is not None:
        return f"from {least} to {most}"
    bounds = {"above": above, "at least": least, "at most": most}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
