"""Clocks and memory, the same for every way of decoding and training, with and without a GPU."""

from __future__ import annotations

import time
from contextlib import contextmanager
from statistics import median

import torch
from transformers.generation.streamers import BaseStreamer


def synchronize() -> None:
    """Waits until the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock(BaseStreamer):
    """
    Notes when tokens arrive. A streamer gets them on the host, so no further wait is needed, and compiled and captured
    decoding is timed like any other.

    Attributes:
        times: when the first new token and each later one arrived; tokens of one forward arrive together.
    """

    def __init__(self, at_first_token=None):
        self.times: list[float] = []
        self.at_first_token = at_first_token
        self._prompt_seen = False

    def put(self, value) -> None:
        """Receives what `generate` puts: the prompt, then `[B]` tokens per position."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1 and self.at_first_token:
            self.at_first_token()

    def end(self) -> None:
        """Does nothing at the end."""

    @property
    def seconds_per_token(self) -> float:
        """Seconds for the tokens after the first, which the prefill yields."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


class ForwardClock:
    """
    While it is open, times each forward of a model, from its first to its last operation on the device.

    The first forward, the prefill, is left out. If the host is slower than the GPU, the time includes the gaps.
    """

    def __init__(self, model):
        self.model = model
        self._marks: list = []

    def __enter__(self) -> ForwardClock:
        self._handles = [
            self.model.register_forward_pre_hook(lambda *_: self._mark()),
            self.model.register_forward_hook(lambda *_: self._mark()),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    @property
    def count(self) -> int:
        """The number of forwards after the prefill."""
        return len(self._marks) // 2 - 1

    def milliseconds(self) -> float:
        """The median."""
        synchronize()
        pairs = list(zip(self._marks[2::2], self._marks[3::2]))
        if torch.cuda.is_available():
            return median(start.elapsed_time(end) for start, end in pairs)
        return median(1000 * (end - start) for start, end in pairs)


@contextmanager
def peak_memory(figure: dict):
    """Writes the peak GPU memory inside the block to `figure["peak_gib"]`; nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    if torch.cuda.is_available():
        figure["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def median_seconds(function, rounds: int) -> float:
    """The median time of a call, after one warm-up call."""
    function()
    synchronize()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
