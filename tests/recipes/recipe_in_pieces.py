"""
Runs a recipe twice: without interruption, and killed repeatedly, each time a little later. This is not a test:
`test_killed.py` runs it. It forks before anything is computed, so that slow imports happen once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 -- imported once, before the forks
from transformers import Trainer

from hf_jacobi.recipes import run_recipe
from hf_jacobi.recipes.display import Display


EVENTS = (  # after which a run can be killed: files that are moved into place, steps, halves of checkpoints
    (os, "replace"),
    (os, "rename"),
    (Path, "touch"),
    (Trainer, "training_step"),
    (Trainer, "_save_optimizer_and_scheduler"),
    (Trainer, "_save_rng_state"),
    (shutil, "copytree"),
    (shutil, "rmtree"),
)


def killed_after(events: int, log: Path) -> None:
    """Lets this process be killed after a number of events, and logs where that was."""
    seen, stage = [], ["start"]
    begin = Display.begin

    def noted(self, title: str) -> None:
        stage[0] = title
        begin(self, title)

    Display.begin = noted
    for owner, name in EVENTS:
        original = getattr(owner, name)

        def counted(*arguments, original=original, name=name, **keywords):
            result = original(*arguments, **keywords)
            seen.append(name)
            if len(seen) == events:
                with open(log, "a") as file:
                    file.write(f"{stage[0]}: {name}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)


def run_in_a_fork(recipe: dict, folder: Path, events: int | None, log: Path) -> bool:
    """Whether the run was completed."""
    child = os.fork()
    if not child:
        try:
            if events is not None:
                killed_after(events, log)
            run_recipe(recipe, folder, progress=False)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a run failed")
    return os.WIFEXITED(status)


if __name__ == "__main__":
    recipe, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    assert run_in_a_fork(recipe, out / "whole", None, out / "kills.txt")
    events = 4
    while not run_in_a_fork(recipe, out / "pieces", events, out / "kills.txt"):
        events += 1
