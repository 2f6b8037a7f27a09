"""Fresh trajectories within a training: every so many steps the model that is being trained writes new ones."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset as Rows
from transformers import TrainerCallback

from ..decoding.compat import without_router_logits
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from ..trajectories.checks import check_whole
from ..trajectories.collect import collect_trajectories
from ..trajectories.packing import pack_trajectories
from ..trajectories.prompts import open_prompts
from .forward import outside_training


FOLDER = "refresh"  # of the training's own folder


@dataclass(frozen=True)
class Refresh:
    """
    Where the rows of a training come from after its first `refresh_steps`: trajectories of the model as it is then.

    Args:
        prompts: as for [`collect_trajectories`]; each refresh takes the next ones, and begins anew at their end.
        count: prompts of each refresh.
        max_new_tokens: the longest completion.
        window_size: w.
        collect: further arguments of [`collect_trajectories`]; the block size is that of the rows trained on.
        pack: further arguments of [`pack_trajectories`].

    Example:

    ```python
    >>> trainer = JacobiForcingTrainer(
    ...     model, JacobiForcingConfig("out", max_steps=1000, refresh_steps=200), train_dataset=packed,
    ...     processing_class=tokenizer, refresh=Refresh(prompts, count=256, max_new_tokens=256),
    ... )
    ```
    """

    prompts: Any
    count: int = 256
    max_new_tokens: int = 512
    window_size: int = 16
    collect: dict[str, Any] = field(default_factory=dict)
    pack: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_whole("refresh.count", self.count, 1)
        for name, ours in (
            ("collect", ("block_size", "max_new_tokens", "output_dir", "completions", "dataset", "progress")),
            ("pack", ("window_size", "output_dir", "progress", "trajectories")),
        ):
            if odd := [one for one in getattr(self, name) if one in ours]:
                raise UsageError(f"refresh.{name} must not hold {odd[0]!r}, which is decided elsewhere.")


def check_refresh(refresh: Refresh | None, args, tokenizer, rows) -> None:
    """Raises `ValueError` for a refresh that cannot be had, or would not be the same after an interruption."""
    if (refresh is None) != (args.refresh_steps is None):
        there, missing = ("refresh_steps", "refresh") if refresh is None else ("refresh", "refresh_steps")
        raise UsageError(f"`{there}` needs `{missing}` beside it: how often, and from which prompts.")
    if refresh is None:
        return
    if not isinstance(refresh, Refresh):
        raise UsageError(f"`refresh` must be a Refresh, got {type(refresh).__name__}.")
    reasons = {
        "max_steps above 0, so that it is known when": args.max_steps <= 0,
        "dataloader_num_workers=0, as others would read ahead": args.dataloader_num_workers > 0,
        "ignore_data_skip=False": args.ignore_data_skip,
        "one process": args.world_size > 1,
        "adapter_scope='all': a draft-only adapter leaves the trajectories as they are": args.adapter_scope != "all",
        "the tokenizer as `processing_class`": tokenizer is None,
        "a `train_dataset` with a length to begin with": not hasattr(rows, "__len__"),
    }
    if asked := [reason for reason, is_wrong in reasons.items() if is_wrong]:
        raise UsageError(f"`refresh_steps` needs {asked[0]}.")


class RefreshedRows(Rows):
    """
    The rows of a training in the order in which it takes them: which refresh one belongs to follows from its number,
    so that a training that is resumed reads the same.

    Args:
        first: the rows before the first refresh.
        args: the training's arguments.
    """

    def __init__(self, first: Sequence[dict], args):
        self.pools: dict[int, Sequence[dict]] = {0: first}
        self.seed = args.seed
        self.batch = args.per_device_train_batch_size
        self.per_step = self.batch * args.gradient_accumulation_steps
        self.period = self.per_step * args.refresh_steps
        self.length = self.per_step * args.max_steps
        self.shuffled: tuple[Any, list[int]] = (None, [])  # the newest order of some rows, and of which

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict:
        # accelerate reads a batch ahead, so that the first one after a refresh is still of the rows before.
        pool, place = divmod(max(0, number - self.batch), self.period)
        rows = self.pools[pool]
        turn, place = divmod(place if pool else number, len(rows))
        if self.shuffled[0] != (pool, turn):
            order = random.Random(f"{self.seed}/{pool}/{turn}").sample(range(len(rows)), len(rows))
            self.shuffled = (pool, turn), order
        return rows[self.shuffled[1][place]]


class Refreshing(TrainerCallback):
    """
    Collects and packs after every `refresh_steps` steps, before the checkpoint of that step is written.

    Args:
        trainer: the trainer.
        refresh: from which prompts, and how.
        rows: what it trains on.
    """

    def __init__(self, trainer, refresh: Refresh, rows: RefreshedRows):
        self.trainer = trainer
        self.refresh = refresh
        self.rows = rows
        self.prompts = open_prompts(refresh.prompts)
        if not hasattr(self.prompts, "__len__") or not len(self.prompts):
            raise UsageError("`refresh.prompts` must have a length, and at least one prompt.")

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir) / FOLDER

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes up the rows of the refreshes before the step that is resumed, and removes those of others after it."""
        done = state.global_step // args.refresh_steps
        for folder in self.folder.glob("step-*"):
            if int(folder.name[5:]) > done * args.refresh_steps:
                shutil.rmtree(folder)
        if done:
            folder = self._of(done)
            if not (folder / "packed").exists():
                raise UsageError(f"{folder}, from which this training would go on, is not there: begin it anew.")
            for number in {done - 1, done} - {0}:
                self.rows.pools[number] = open_prompts(str(self._of(number) / "packed"))

    def on_step_end(self, args, state, control, **kwargs):
        """Makes new rows, if it is time."""
        step = state.global_step
        if step % args.refresh_steps or step >= args.max_steps:
            return
        number = step // args.refresh_steps
        self.rows.pools[number] = self._make(number)
        for old in [one for one in self.rows.pools if one < number - 1]:
            del self.rows.pools[old]

    def _of(self, number: int) -> Path:
        return self.folder / f"step-{number * self.trainer.args.refresh_steps}"

    def _make(self, number: int):
        refresh, trainer, folder = self.refresh, self.trainer, self._of(number)
        first = (number - 1) * refresh.count
        places = [(first + place) % len(self.prompts) for place in range(min(refresh.count, len(self.prompts)))]
        prompts = self.prompts
        chosen = prompts.select(places) if hasattr(prompts, "select") else [prompts[place] for place in places]
        inner = unwrap(trainer.model)
        with (
            torch.random.fork_rng(),  # what the training draws does not depend on it
            outside_training(inner),
            without_router_logits(inner),
            trainer.accelerator.autocast(),
        ):
            trajectories = collect_trajectories(
                trainer.model,
                trainer.processing_class,
                chosen,
                trainer.block_size,
                refresh.max_new_tokens,
                output_dir=folder / "trajectories",
                progress=False,
                **refresh.collect,
            )
        return pack_trajectories(
            trajectories, refresh.window_size, output_dir=folder / "packed", progress=False, **refresh.pack
        )
