"""Shows the progress of a recipe in one line: phase, stage, and the share of the stage that is done."""

from __future__ import annotations

from contextlib import contextmanager

from datasets import disable_progress_bars, enable_progress_bars
from datasets.utils import are_progress_bars_disabled
from tqdm.auto import tqdm
from transformers.utils import logging


class Display:
    """
    A progress bar that restarts with each stage.

    Args:
        show: whether to show the bar.
    """

    def __init__(self, show: bool):
        self.bar = tqdm(disable=not show, dynamic_ncols=True)

    def begin(self, title: str) -> None:
        """Starts a stage."""
        self.bar.reset()
        self.bar.set_description_str(title)

    def tell(self, done: int, total: int | None) -> None:
        """Updates how much of the stage is done."""
        if self.bar.disable:
            return
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()


@contextmanager
def showing(show: bool):
    """Gives a `Display` and hides the progress bars of other libraries."""
    theirs, ours = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    display = Display(show)
    try:
        yield display
    finally:
        display.bar.close()
        if theirs:
            logging.enable_progress_bar()
        if ours:
            enable_progress_bars()
