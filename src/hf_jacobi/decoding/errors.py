"""Errors that the user can mend, told apart from faults of the program: the commands print them as one sentence."""

from contextlib import contextmanager


class UsageError(ValueError):
    """What was wrong with what the user gave, and what would be right, in one sentence."""


class MissingPackage(UsageError, ImportError):
    """A package is not installed: which one, and how to install it."""


class MissingFile(UsageError, OSError):
    """A file or folder is not there, or cannot be read or written: which one, and what was expected."""


@contextmanager
def of_usage(*kinds: type[Exception]):
    """
    Errors of these kinds, raised inside by another library, are the user's to mend: they go on as `UsageError`.

    For a place where nothing but what the user gave can go wrong: reading their file, checking their arguments.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(str(error) or type(error).__name__) from error
