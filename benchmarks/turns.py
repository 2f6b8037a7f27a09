"""
Calls of `generate` that take turns, so that all of them meet the machine in the same state.

On a busy machine the time of a forward can change by 40% within seconds, and whole calls timed one after the other
then differ by more than what is to be measured. Here each call has a thread, and one thread runs at a time: after each
forward, the call that has written the fewest tokens goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class Turns:
    """
    Whose turn it is.

    Args:
        names: of the calls.
        clock: gives the time in seconds, in the thread that asks.

    Attributes:
        seconds: how long each call has run.
        tokens: how many tokens each has written.
    """

    def __init__(self, names: list[str], clock: Callable[[], float]):
        self.clock = clock
        self.seconds = dict.fromkeys(names, 0.0)
        self.tokens = dict.fromkeys(names, 0)
        self.running = list(names)
        self.changed = threading.Condition()
        self.turn: str | None = names[0]

    def wait(self, name: str) -> float:
        """Waits for the turn of a call; returns the time at which it begins."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn == name)
        return self.clock()

    def yield_from(self, name: str, began: float, done: bool = False) -> None:
        """Ends the turn of a call, which began at a time; the call with the fewest tokens has the next one."""
        self.seconds[name] += self.clock() - began
        with self.changed:
            if done:
                self.running.remove(name)
            self.turn = min(self.running, key=lambda one: self.tokens[one], default=None)
            self.changed.notify_all()


class _Pause(BaseStreamer):
    """Ends the turn of its call after each forward."""

    def __init__(self, turns: Turns, name: str):
        self.turns, self.name = turns, name
        self.began = turns.wait(name)
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.turns.tokens[self.name] += value.numel()
        self.turns.yield_from(self.name, self.began)
        self.began = self.turns.wait(self.name)

    def end(self) -> None:
        pass


def take_turns(
    ways: Mapping[str, tuple[Any, dict]], arguments: dict, clock: Callable[[], float], threads: int
) -> dict[str, tuple[float, Any]]:
    """
    Runs calls of `generate` in turns.

    Args:
        ways: `(model, arguments)` of each call, by name.
        arguments: further arguments of all calls, for one prompt.
        clock: `time.perf_counter` or `time.thread_time`.
        threads: torch threads of each call.

    Returns:
        `(seconds, output)` of each call.
    """
    turns, outputs, failed = Turns(list(ways), clock), {}, []

    def call(name: str) -> None:
        torch.set_num_threads(threads)  # a setting of the thread
        model, how = ways[name]
        pause = _Pause(turns, name)
        try:
            outputs[name] = model.generate(**arguments, **how, streamer=pause, return_dict_in_generate=True)
        except BaseException as error:
            failed.append(error)
        finally:
            turns.yield_from(name, pause.began, done=True)

    running = [threading.Thread(target=call, args=(name,)) for name in ways]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    return {name: (turns.seconds[name], outputs[name]) for name in ways}
