"""
One stage of the kit, in a separate process: each figure is written as soon as it is measured.

`benchmarks.gpu.runner` starts it as `python -m benchmarks.gpu.stage NAME ...` and stops it when its time is up.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


FAULTS = ("exception", "hang", "memory")


class Stage:
    """
    A running stage: its time limit, its device, and its measurements so far.

    Args:
        name: its name.
        file: the JSON file of its figures; rewritten after each of them.
        seconds: its time limit.
        dry: whether everything has toy size.
        bundle: the folder of a bundle that the runner unpacked; can be empty.
        output: the folder for files to copy back.
        fault: the fault to plant after the first figure, one of `FAULTS`, for the tests.
    """

    def __init__(
        self, name: str, file: Path, seconds: float, dry: bool, bundle: Path, output: Path, fault: str | None = None
    ):
        self.name, self.file, self.dry, self.bundle, self.output, self.fault = name, file, dry, bundle, output, fault
        self.deadline = time.monotonic() + seconds
        self.content: dict[str, Any] = {"figures": {}, "errors": {}, "skipped": {}}

    @property
    def left(self) -> float:
        """Seconds until the stage is stopped."""
        return self.deadline - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        """Whether the stage runs on a GPU."""
        import torch

        return torch.cuda.is_available()

    @property
    def device(self):
        """The device on which everything is measured."""
        import torch

        return torch.device("cuda" if self.on_gpu else "cpu")

    def measure(self, name: str, function: Callable[..., Any], *arguments, needs: float = 0.0, **keywords) -> Any:
        """
        Calls a function and keeps its result as a figure. An exception is kept, too, and the stage continues.

        Args:
            name: the name of the figure.
            function: returns a value that JSON can hold.
            needs: approximate seconds it takes; with less time left it is skipped, in favor of later figures.

        Returns:
            the figure, or `None`.
        """
        if self.left < needs and not self.dry:
            self.content["skipped"][name] = f"needs about {needs:.0f} s, {self.left:.0f} s were left"
            self.write()
            return None
        start = time.monotonic()
        try:
            figure = function(*arguments, **keywords)
        except Exception as error:
            self.content["errors"][name] = f"{type(error).__name__}: {error}"[:2000]
            traceback.print_exc()
            figure = None
        else:
            self.content["figures"][name] = figure
        print(f"[{self.name}] {name}: {time.monotonic() - start:.1f} s: {figure}", flush=True)
        self.write()
        _release_memory()
        if self.fault:
            plant(self.fault)
        return figure

    def write(self) -> None:
        """Writes all figures atomically, so that stopping the stage never leaves a partial file."""
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(self.content))
        os.replace(scratch, self.file)


def _release_memory() -> None:
    """Frees the memory that a failed figure still holds, for the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plant(fault: str) -> None:
    """Fails on purpose, in one of the ways that stages fail."""
    if fault == "exception":
        raise RuntimeError("planted")
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    import torch

    if torch.cuda.is_available():
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")  # more than any card has
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when a machine runs out of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--fault", choices=FAULTS)
    arguments = parser.parse_args()
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel kills this process, not the runner
    except OSError:
        pass
    stage = Stage(
        arguments.name,
        arguments.file,
        arguments.seconds,
        arguments.dry_run,
        arguments.bundle,
        arguments.output,
        arguments.fault,
    )
    stage.write()
    module = importlib.import_module(f"benchmarks.gpu.{arguments.name}")
    module.run(stage)


if __name__ == "__main__":
    main()
