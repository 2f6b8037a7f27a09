"""
What a forward costs: measured for each way of running a model, in a few forwards of the first call, and corrected by
what the forwards of later calls take.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from weakref import WeakKeyDictionary

import torch

from .batch import Row
from .compat import attention_of
from .costs import CostCurve, default_curve
from .drafting import Draft
from .step import Step


WIDTHS = (1, 2, 3, 4, 8, 16)
BUDGET = 18  # the time that a measurement takes, about, in forwards over one position
TURNS = 2  # of forwards with a draft-only adapter and without
CHAIN = 2  # nodes of the forwards that show what a draft-only adapter adds
SHORTEST = 32  # the smallest number of new tokens for which a call measures
COLD = 2.0  # a first forward that takes this many times as long as the next has compiled or loaded something
ATTEMPTS = 3  # measurements while positions seem more expensive than by default
# Later forwards are compared with the last ONES forwards over one position among the last RECENT ones, as the speed of
# a machine changes. FEWEST of them, over the same number of positions, count more than the measurement; MOST are kept.
ONES, RECENT = 3, 8
FEWEST, MOST = 4, 16


@dataclass
class Known:
    """
    What is known of the costs of one way of running a model, in forwards over one position.

    Attributes:
        curves: those measured.
        added: what a draft-only adapter adds to forwards over as many positions, as measured.
        seen: by the number of positions, what other forwards cost.
        seen_with_adapter: the same of forwards in which half of the positions were a draft-only adapter's.
    """

    curves: list[CostCurve] = field(default_factory=list)
    added: float | None = None
    seen: dict[int, list[float]] = field(default_factory=dict)
    seen_with_adapter: dict[int, list[float]] = field(default_factory=dict)

    def curve(self, default: CostCurve) -> CostCurve:
        """The cheapest of the curves measured, or `default`, corrected by what other forwards cost."""
        if not self.curves:
            return default
        curve = min(self.curves, key=_dearness)
        seen = list(self.seen.items())  # calls of other threads can add to it
        settled = {positions: median(costs) for positions, costs in seen if len(costs) >= FEWEST}
        if not settled:
            return curve
        return CostCurve.of(sorted((dict(curve.points) | settled).items()))

    def with_adapter(self, plain: CostCurve) -> CostCurve:
        """`plain`, and what the adapter adds, which hardly depends on the number of positions."""
        seen = list(self.seen_with_adapter.items())  # as above
        added = [cost - plain.cost(positions) for positions, costs in seen for cost in costs]
        more = max(0.0, median(added) if len(added) >= FEWEST else self.added or 0.0)
        widths = [width for width, _ in plain.points if width > 1] or [2]
        return CostCurve(((1, 1.0), *((width, plain.cost(width) + more) for width in widths)))


# model -> way of running it -> what is known
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[tuple, Known]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def known_of(step: Step, rows: list[Row]) -> Known:
    """What is known for a model, device, dtype, attention, threads and batch size, rounded up to a power of two."""
    model, rounded = step.model, 1 << max(0, len(rows) - 1).bit_length()
    attention = attention_of(model.config.get_text_config(decoder=True))
    way = (step.device, model.dtype, attention, rounded, torch.get_num_threads(), step.runner.name)
    return _KNOWN.setdefault(model, {}).setdefault(way, Known())


def curves_of(step: Step, rows: list[Row], may_measure: bool = True) -> tuple[CostCurve, CostCurve | None]:
    """
    The costs of the forwards of a call: without a draft-only adapter, and with it where there is one.

    Short calls, and calls during another measurement, use what is known, else a table of defaults.

    Args:
        step: the step, after the prefill.
        rows: the rows of the batch.
        may_measure: whether forwards can be run for a measurement.
    """
    known, default = known_of(step, rows), default_curve(step.device.type, len(rows))
    texts, room = [row.tokens for row in rows], min(row.room for row in rows)
    if may_measure and _is_long(rows):
        if _is_wanting(known.curves, default):
            with _alone() as alone:
                if alone:
                    known.curves.append(measure(step, texts, room))
        if step.draft_adapter and known.added is None:
            with _alone() as alone:
                if alone:
                    known.added = measure_adapter(step, texts)
    plain = known.curve(default)
    return plain, known.with_adapter(plain) if step.draft_adapter else None


@contextmanager
def _alone() -> Iterator[bool]:
    """Whether no other thread measures now, nor does so while this is open."""
    alone = _LOCK.acquire(blocking=False)
    try:
        yield alone
    finally:
        if alone:
            _LOCK.release()


class Watch:
    """
    Times the forwards of a call, for the curves of later ones.

    Args:
        step, rows: as for `curves_of`.
    """

    def __init__(self, step: Step, rows: list[Row]):
        self.known = known_of(step, rows)
        self.clock = _clock(step.device)
        self.ones: deque[float | None] = deque(maxlen=RECENT)  # seconds of forwards over one position, else None

    @contextmanager
    def forward(self, step: Step, nodes: int) -> Iterator[None]:
        """Times a forward of `step` over drafts of at most `nodes` nodes."""
        begin = self.clock()
        yield
        seconds = max(self.clock() - begin, 1e-9)
        ones = [one for one in self.ones if one is not None][-ONES:]
        self.ones.append(seconds if nodes == 1 else None)
        if nodes == 1 or len(ones) < ONES:
            return
        seen = self.known.seen_with_adapter if step.copies else self.known.seen
        costs = seen.setdefault(step.shapes.width(nodes) + step.copies, [])
        if len(costs) < MOST:
            costs.append(seconds / median(ones))


def _dearness(curve: CostCurve) -> float:
    return curve.cost(WIDTHS[-1])


def _is_wanting(curves: list[CostCurve], default: CostCurve) -> bool:
    """
    Whether to measure a curve: there was no measurement yet, or other work on the machine may have made positions look
    expensive, which would keep this model from drafting for good.
    """
    return not curves or (len(curves) < ATTEMPTS and min(map(_dearness, curves)) > _dearness(default))


def _is_long(rows: list[Row]) -> bool:
    live = [row for row in rows if not row.finished]
    is_long = any(row.max_length is None or row.max_length - row.prompt_length >= SHORTEST for row in live)
    return is_long and min(row.room for row in rows) >= WIDTHS[-1]


def measure(step: Step, texts: list[list[int]], room: int) -> CostCurve:
    """
    Times forwards over 2, 3, 4, ... positions, each between two over one position, as the speed of a machine changes.

    They write to the slots that the next forward overwrites.

    Args:
        step: its cache holds all tokens of the rows except the newest.
        texts: the tokens of each row, the last of which are scored, so that experts are chosen as for real text.
        room: the number of positions from the newest token on.
    """
    widths = sorted({step.shapes.width(width) for width in WIDTHS if width <= room})
    points = [(1, 1.0)]
    with _timer(step, texts, adapter=False) as clocked:
        first, one = clocked(1), clocked(1)
        if first > COLD * one or step.device.type != "cpu":
            for width in widths * step.cold_runs:
                clocked(width)
            one = clocked(1)
        spent = 2.0
        for width in widths[1:]:
            if spent + CostCurve(tuple(points)).cost(width) > BUDGET:
                break
            before, took, one = one, clocked(width), clocked(1)
            points.append((width, took / fmean((before, one))))
            spent += points[-1][1] + 1
    return CostCurve.of(points).levelled()


def measure_adapter(step: Step, texts: list[list[int]]) -> float:
    """
    What a draft-only adapter adds to a forward, in forwards over one position.

    Args:
        step, texts: as for `measure`.
    """
    chain = step.shapes.width(CHAIN)
    with _timer(step, texts, adapter=True) as clocked:
        for _ in range(step.cold_runs):
            clocked(chain)
        added = []
        for _ in range(TURNS):
            step.adapter_drafts = True
            both = clocked(chain)
            step.adapter_drafts = False
            added.append((both - clocked(2 * chain)) / clocked(1))
    return max(0.0, fmean(added))


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
