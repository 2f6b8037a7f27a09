"""Measures `generate` calls: one call with one decoding method, and several methods against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from ..decoding.compat import compile_here
from ..decoding.mixin import unwrap
from .pairs import fastest_pair


LOOKUP_TOKENS = 10  # the value in transformers' documentation of prompt lookup
# Overrides what a generation config can request that would change the decoding method or the number of texts.
ALONE = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "cache_implementation": None,
    "max_cache_len": None,
}


@dataclass(frozen=True)
class Method:
    """
    A decoding method.

    Args:
        name: its name in reports.
        decoding: `"ar"`, `"jacobi"`, or `"prompt_lookup"`: transformers' own n-gram drafts, which support one row.
        settings: `JacobiConfig` settings for `"jacobi"`; by default those in the model's generation config.
        compiled: for `"prompt_lookup"`: compile its forwards and use a static cache, which needs transformers 5.24.
            Compilation happens while the first prompt is decoded.
    """

    name: str
    decoding: Literal["ar", "jacobi", "prompt_lookup"]
    settings: Mapping[str, Any] | None = field(default=None, hash=False)
    compiled: bool = False

    def arguments(self, room: int) -> dict[str, Any]:
        """The arguments for `generate`, for sequences of at most `room` tokens."""
        if self.decoding == "prompt_lookup":
            lookup: dict[str, Any] = {"decoding": "ar", "prompt_lookup_num_tokens": LOOKUP_TOKENS}
            if self.compiled:  # the last draft can extend past the text, and the cache must hold it
                length = room + LOOKUP_TOKENS + 1
                lookup |= {
                    "cache_implementation": "static",
                    "max_cache_len": length,
                    "compile_config": compile_here(),
                }
            return ALONE | lookup
        config = {} if self.settings is None else {"jacobi_config": dict(self.settings)}
        return ALONE | {"decoding": self.decoding, **config}


AR = Method("AR", "ar")
PROMPT_LOOKUP = Method("prompt lookup", "prompt_lookup")
COMPILED_LOOKUP = Method("prompt lookup, compiled", "prompt_lookup", compiled=True)


@dataclass
class Measured:
    """
    The result of one call.

    Attributes:
        tokens: the new tokens of each row, up to and including the end token.
        forwards: forwards that each row took part in, the prefill counted as one.
        positions: positions scored in total, the prefill counted as one per row.
        seconds: wall-clock time of the call.
        first_seconds: wall-clock time to the end of the first forward, which yields the first token.
        peak_bytes: peak memory of the GPU, or of the process on a CPU; `None` where the system does not report it.
    """

    tokens: list[list[int]]
    forwards: list[int]
    positions: int
    seconds: float
    first_seconds: float
    peak_bytes: int | None

    @property
    def count(self) -> int:
        """The number of new tokens in all rows."""
        return sum(map(len, self.tokens))


@contextmanager
def watching_forwards(model, note: Callable[[dict[str, Any]], None]):
    """
    Calls `note` with the keyword arguments of each forward that `generate` runs inside the context.

    A compiled forward keeps the hooks from the time of its compilation, so the function that `generate` compiles is
    wrapped instead.
    """
    compiling = False

    def hook(module, arguments, keywords, output) -> None:
        if not torch.compiler.is_compiling() and not compiling:
            note(keywords)

    def get_compiled_call(compile_config):
        call = type(model).get_compiled_call(model, compile_config)

        def noted(*arguments, **keywords):
            nonlocal compiling
            compiling = True  # a forward that falls back to eager code still runs the hook
            try:
                output = call(*arguments, **keywords)
            finally:
                compiling = False
            note(keywords)
            return output

        return noted

    handle = model.register_forward_hook(hook, with_kwargs=True)
    model.get_compiled_call = get_compiled_call
    try:
        yield
    finally:
        handle.remove()
        del model.get_compiled_call


def measure(
    model, inputs: Mapping[str, torch.Tensor], method: Method, max_new_tokens: int, room: int | None = None
) -> Measured:
    """
    Decodes one batch greedily and measures it.

    Args:
        model: an enabled model.
        inputs: `input_ids` and `attention_mask`, `[batch, length]`, padded on the left.
        method: the decoding method.
        max_new_tokens: the maximum number of new tokens per row.
        room: the length, in tokens, that the cache of a compiled method must hold; pass the longest length of a series
            to compile once. By default the length of this batch.
    """
    length = inputs["input_ids"].shape[1]
    ends: list[float] = []
    scored: list[int] = []

    def note(keywords: dict[str, Any]) -> None:
        ends.append(now(model) if not ends else 0.0)
        ids = keywords.get("input_ids")
        scored.append(ids.shape[1] if len(ends) > 1 and ids is not None else 1)

    memory = PeakMemory(model.device)
    with watching_forwards(unwrap(model), note):
        start = now(model)
        output = model.generate(
            **inputs,
            **method.arguments(length + max_new_tokens if room is None else room),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        seconds = now(model) - start
    if method.decoding == "jacobi":
        rows = output.jacobi_stats.per_sequence
        counts = [row.new_tokens for row in rows]
        forwards = [row.forwards for row in rows]
        positions = output.jacobi_stats.positions
    else:
        counts = [
            up_to_end(row, model.generation_config.eos_token_id) for row in output.sequences[:, length:].tolist()
        ]
        forwards = counts if method.decoding == "ar" else [len(ends)]
        positions = sum(counts) if method.decoding == "ar" else sum(scored)
    tokens = [row[:count] for row, count in zip(output.sequences[:, length:].tolist(), counts)]
    return Measured(tokens, forwards, positions, seconds, ends[0] - start, memory.peak())


class PeakMemory:
    """
    The peak memory since this object was created: of a GPU, or of this process on Linux.

    Read from /proc, because psutil cannot reset the peak of a process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        except OSError:
            self.known = False

    def peak(self) -> int | None:
        """The peak in bytes; `None` where the system does not report it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.known:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def race(
    contestants: Mapping[str, tuple[Any, Method]],
    prompts: Sequence[Mapping[str, torch.Tensor]],
    max_new_tokens: int,
    warm_up: int = 1,
) -> Iterator[dict[str, Measured]]:
    """
    Decodes each prompt with every contestant in turn, so that a change of the machine's speed affects all of them.

    Args:
        contestants: maps names to `(model, method)`. A model with an adapter runs AR and prompt lookup in its fastest
            form (`fastest_pair`).
        prompts: `input_ids` and `attention_mask` of each batch, `[batch, length]`.
        max_new_tokens: the maximum number of new tokens per row.
        warm_up: the number of prompts that are decoded first without being measured.

    Yields:
        For each prompt, the measurement of each contestant.
    """
    contestants = {
        name: (model if method.decoding == "jacobi" else fastest_pair(model)[1], method)
        for name, (model, method) in contestants.items()
    }
    room = max_new_tokens + max(prompt["input_ids"].shape[1] for prompt in prompts)
    for number, prompt in enumerate([*prompts[:warm_up], *prompts]):
        runs = {
            name: measure(model, prompt, method, max_new_tokens, room) for name, (model, method) in contestants.items()
        }
        if number >= warm_up:
            yield runs


def compare(runs: Sequence[Mapping[str, Measured]]) -> dict[str, dict[str, Any]]:
    """
    The figures of a race, relative to the first contestant.

    Args:
        runs: the measurements that `race` yielded.

    Returns:
        For each name `tokens_per_second`; `tokens_per_forward` (per row); `positions_per_token`; `speedup` (tokens per
        second over those of the first contestant, on all prompts; above 1 is faster); `slowest`, `median_speedup` and
        `fastest` (the lowest, median and highest speed-up on single prompts); `identical` (the share of rows with the
        first contestant's text); `first_token_seconds` (median); and `peak_bytes` (maximum; `None` where the system
        does not report it).
    """
    figures = {}
    first = [next(iter(run.values())) for run in runs]
    rows = sum(len(run.tokens) for run in first)
    for name in runs[0]:
        mine = [run[name] for run in runs]
        ratios = [_pace([one]) / _pace([other]) for one, other in zip(mine, first)]
        tokens = sum(run.count for run in mine)
        same = sum(
            one == other for run, of_first in zip(mine, first) for one, other in zip(run.tokens, of_first.tokens)
        )
        peaks = [run.peak_bytes for run in mine if run.peak_bytes is not None]
        figures[name] = {
            "tokens_per_second": _pace(mine),
            "tokens_per_forward": tokens / sum(sum(run.forwards) for run in mine),
            "positions_per_token": sum(run.positions for run in mine) / tokens,
            "speedup": _pace(mine) / _pace(first),
            "slowest": min(ratios),
            "median_speedup": median(ratios),
            "fastest": max(ratios),
            "identical": same / rows,
            "first_token_seconds": median(run.first_seconds for run in mine),
            "peak_bytes": max(peaks) if len(peaks) == len(mine) else None,
        }
    return figures


def _pace(runs: Sequence[Measured]) -> float:
    return sum(run.count for run in runs) / sum(run.seconds for run in runs)


def now(model) -> float:
    """The time in seconds, read after the model's device has finished all its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def up_to_end(row: list[int], ends: int | list[int] | None) -> int:
    """The number of tokens in a row up to and including its end token."""
    known = {ends} if isinstance(ends, int) else set(ends or ())
    return next((index + 1 for index, token in enumerate(row) if token in known), len(row))
