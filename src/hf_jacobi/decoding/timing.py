"""What a forward costs: measured once for each way of running a model, in a few forwards of the first call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

from .batch import Row
from .compat import attention_of
from .costs import CostCurve, default_curve
from .drafting import Draft
from .step import Step


WIDTHS = (1, 2, 4, 16)
BUDGET = 10  # the time that a measurement takes, about, in forwards over one position
SHORTEST = 32  # the smallest number of new tokens for which a call measures
COLD = 2.0  # a first forward that takes this many times as long as the next has compiled or loaded something
ATTEMPTS = 3  # measurements while positions seem more expensive than by default

# model -> way of running it -> its curves
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[tuple, list[CostCurve]]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def curve_of(step: Step, rows: list[Row], may_measure: bool = True, adapter: bool = False) -> CostCurve:
    """
    The cost of the forwards of a call, as measured for its model, device, dtype, attention, threads and batch size,
    which is rounded up to a power of two.

    Short calls, and calls during another measurement, use what is known, else a table of defaults.

    Args:
        step: the step, after the prefill.
        rows: the rows of the batch.
        may_measure: whether forwards can be run for a measurement.
        adapter: whether half of the positions are a draft-only adapter's.
    """
    model = step.model
    rounded = 1 << max(0, len(rows) - 1).bit_length()
    attention = attention_of(model.config.get_text_config(decoder=True))
    way = (step.device, model.dtype, attention, rounded, torch.get_num_threads(), adapter, step.runner.name)
    known, default = _KNOWN.setdefault(model, {}), default_curve(step.device.type, len(rows))
    plain = curve_of(step, rows, may_measure) if adapter else default
    curves = known.setdefault(way, [])
    if _is_wanting(curves, default) and may_measure and _is_long(rows) and _LOCK.acquire(blocking=False):
        texts, room = [row.tokens for row in rows], min(row.room for row in rows)
        try:
            curves.append(measure_adapter(step, texts, plain) if adapter else measure(step, texts, room))
        finally:
            _LOCK.release()
    return min(curves, key=_dearness, default=plain)


def _dearness(curve: CostCurve) -> float:
    return curve.cost(WIDTHS[-1])


def _is_wanting(curves: list[CostCurve], default: CostCurve) -> bool:
    """
    Whether to measure: there was no measurement yet, or other work on the machine may have made positions look
    expensive, which would keep this model from drafting for good.
    """
    return not curves or (len(curves) < ATTEMPTS and min(map(_dearness, curves)) > _dearness(default))


def _is_long(rows: list[Row]) -> bool:
    live = [row for row in rows if not row.finished]
    is_long = any(row.max_length is None or row.max_length - row.prompt_length >= SHORTEST for row in live)
    return is_long and min(row.room for row in rows) >= WIDTHS[-1]


def measure(step: Step, texts: list[list[int]], room: int) -> CostCurve:
    """
    Times forwards over 1, 2, 4, ... positions, written to the slots that the next forward overwrites.

    Args:
        step: its cache holds all tokens of the rows except the newest.
        texts: the tokens of each row, the last of which are scored, so that experts are chosen as for real text.
        room: the number of positions from the newest token on.
    """
    widths = sorted({step.shapes.width(width) for width in WIDTHS if width <= room})
    with _timer(step, texts, adapter=False) as clocked:
        first, one = clocked(1), clocked(1)
        if first > COLD * one or step.device.type != "cpu":
            for width in widths * step.cold_runs:
                clocked(width)
            first = one = clocked(1)
        seconds, spent = {1: min(first, one)}, first + one
        for width in (*widths[1:], *widths):
            likely = CostCurve(tuple(sorted(seconds.items()))).cost(width) if len(seconds) > 1 else seconds[1]
            if spent + likely > BUDGET * seconds[1] and len(seconds) > 1:
                break
            took = clocked(width)
            spent += took
            seconds[width] = min(took, seconds.get(width, took))
    return CostCurve.of(sorted(seconds.items()))


def measure_adapter(step: Step, texts: list[list[int]], plain: CostCurve) -> CostCurve:
    """
    Times forwards in which a draft-only adapter takes part, at one width, since what it adds hardly depends on that.

    Args:
        step, texts: as for `measure`.
        plain: the cost of forwards without it.
    """
    chain = step.shapes.width(WIDTHS[-1] // 2)
    with _timer(step, texts, adapter=True) as clocked:
        for _ in range(step.cold_runs):
            clocked(chain)
        one, both = clocked(1), min(clocked(chain), clocked(chain))
    added = max(0.0, both / one - plain.cost(2 * chain))
    widths = sorted({2, 2 * chain, *(width for width, _ in plain.points if width > 1)})
    return CostCurve(((1, 1.0), *((width, plain.cost(width) + added) for width in widths)))


@contextmanager
def _timer(step: Step, texts: list[list[int]], adapter: bool) -> Iterator[Callable[[int], float]]:
    """Gives a function that runs a forward over a number of nodes and returns its seconds; then restores `step`."""
    starts, clock = [len(text) - 1 for text in texts], _clock(step.device)

    def clocked(nodes: int) -> float:
        begin = clock()
        step([Draft((nodes * text[-nodes:])[-nodes:]) for text in texts], starts)  # this waits for the device
        return max(clock() - begin, 1e-9)

    logits, step.adapter_drafts = step.logits, adapter
    yield clocked
    step.logits, step.copies = logits, 0


def _clock(device: torch.device) -> Callable[[], float]:
    """For one thread of a CPU the clock of that thread, which stops while other programs run, if it is precise."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    fine = time.get_clock_info("thread_time").resolution < 1e-5
    return time.thread_time if alone and fine else time.perf_counter
