"""New trajectories during a training, written by the model in training after every `refresh_steps` steps."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
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


if TYPE_CHECKING:
    from .config import JacobiForcingConfig
    from .trainer import JacobiForcingTrainer


FOLDER = "refresh"  # in the training's output folder


@dataclass(frozen=True)
class Refresh:
    """
    The source of a training's rows after its first `refresh_steps` steps: trajectories of the model at that point.

    Args:
        prompts: as for [`collect_trajectories`]. Each refresh takes the next prompts, and wraps around at the end.
        count: the number of prompts of each refresh.
        max_new_tokens: the length of the longest completion, in tokens.
        window_size: the window size w, in blocks.
        collect: other arguments of [`collect_trajectories`]; the block size is that of the training rows.
        pack: other arguments of [`pack_trajectories`].

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

    def __post_init__(self) -> None:
        check_whole("refresh.count", self.count, 1)
        for name, ours in (
            ("collect", ("block_size", "max_new_tokens", "output_dir", "completions", "dataset", "progress")),
            ("pack", ("window_size", "output_dir", "progress", "trajectories")),
        ):
            if odd := [one for one in getattr(self, name) if one in ours]:
                raise UsageError(f"refresh.{name} must not hold {odd[0]!r}, which the training sets: drop it.")


def check_refresh(refresh: Refresh | None, args: JacobiForcingConfig, tokenizer: Any, rows: Any) -> None:
    """Raises `ValueError` for a refresh that is impossible, or that a resumed training could not repeat."""
    if (refresh is None) != (args.refresh_steps is None):
        given, missing = ("refresh_steps", "refresh") if refresh is None else ("refresh", "refresh_steps")
        raise UsageError(f"`{given}` needs `{missing}`: pass both, or neither.")
    if refresh is None:
        return
    if not isinstance(refresh, Refresh):
        raise UsageError(f"`refresh` must be a Refresh, got {type(refresh).__name__}.")
    reasons = {
        "max_steps above 0": args.max_steps <= 0,
        "dataloader_num_workers=0, because workers read ahead": args.dataloader_num_workers > 0,
        "ignore_data_skip=False": args.ignore_data_skip,
        "one process": args.world_size > 1,
        "adapter_scope='all', because a draft-only adapter does not change trajectories": args.adapter_scope != "all",
        "the tokenizer as `processing_class`": tokenizer is None,
        "a `train_dataset` with a length": not hasattr(rows, "__len__"),
    }
    if wrong := [reason for reason, is_wrong in reasons.items() if is_wrong]:
        raise UsageError(f"`refresh_steps` needs {wrong[0]}.")


class RefreshedRows(Rows):
    """
    The rows of a training in the order in which it reads them. The number of a row determines its refresh, so that a
    resumed training reads the same rows.

    Args:
        first: the rows before the first refresh; any data set with a length.
        args: the training arguments.
    """

    def __init__(self, first: Any, args: JacobiForcingConfig):
        assert args.refresh_steps is not None  # `check_refresh` requires it
        self.pools: dict[int, Any] = {0: first}
        self.seed = args.seed
        self.batch = args.per_device_train_batch_size
        self.per_step = self.batch * args.gradient_accumulation_steps
        self.period = self.per_step * args.refresh_steps
        self.length = self.per_step * args.max_steps
        self.shuffled: tuple[tuple[int, int] | None, list[int]] = (None, [])  # pool and turn; their order

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict:
        # accelerate reads one batch ahead, so the first batch after a refresh still holds old rows.
        pool, place = divmod(max(0, number - self.batch), self.period)
        rows = self.pools[pool]
        turn, place = divmod(place if pool else number, len(rows))
        if self.shuffled[0] != (pool, turn):
            order = random.Random(f"{self.seed}/{pool}/{turn}").sample(range(len(rows)), len(rows))
            self.shuffled = (pool, turn), order
        return rows[self.shuffled[1][place]]


class Refreshing(TrainerCallback):
    """
    Collects and packs trajectories after every `refresh_steps` steps, before that step's checkpoint is written.

    Args:
        trainer: the trainer.
        refresh: the prompts and the settings.
        rows: the rows of the training, which it replaces.
    """

    def __init__(self, trainer: JacobiForcingTrainer, refresh: Refresh, rows: RefreshedRows):
        self.trainer = trainer
        self.refresh = refresh
        self.rows = rows
        assert trainer.args.refresh_steps is not None  # `check_refresh` requires it
        self.steps = trainer.args.refresh_steps
        self.block_size = trainer.block_size or 0
        if self.block_size < 2:
            raise UsageError(
                "`refresh_steps` needs `block_size`, as no block of `train_dataset` has two tokens to read it from."
            )
        prompts: Any = open_prompts(refresh.prompts)
        if not hasattr(prompts, "__len__") or not len(prompts):
            raise UsageError("`refresh.prompts` must have a length, and at least one prompt.")
        self.prompts = prompts

    @property
    def folder(self) -> Path:
        return self.trainer.output_folder / FOLDER

    def on_train_begin(self, args, state, control, **kwargs):
        """Reads the rows that the resumed step needs, and removes the folders of later refreshes."""
        done = state.global_step // self.steps
        for folder in self.folder.glob("step-*"):
            if int(folder.name[5:]) > done * self.steps:
                shutil.rmtree(folder)
        if done:
            folder = self._of(done)
            if not (folder / "packed").exists():
                raise UsageError(
                    f"{folder}, which this training needs to resume, does not exist: start the training again."
                )
            for number in {done - 1, done} - {0}:
                self.rows.pools[number] = open_prompts(str(self._of(number) / "packed"))

    def on_step_end(self, args, state, control, **kwargs):
        """Makes new rows, if they are due."""
        step = state.global_step
        if step % self.steps or step >= args.max_steps:
            return
        number = step // self.steps
        self.rows.pools[number] = self._make(number)
        for old in [one for one in self.rows.pools if one < number - 1]:
            del self.rows.pools[old]

    def _of(self, number: int) -> Path:
        return self.folder / f"step-{number * self.steps}"

    def _make(self, number: int) -> Dataset:
        refresh, trainer, folder = self.refresh, self.trainer, self._of(number)
        first = (number - 1) * refresh.count
        places = [(first + place) % len(self.prompts) for place in range(min(refresh.count, len(self.prompts)))]
        prompts = self.prompts
        chosen = prompts.select(places) if hasattr(prompts, "select") else [prompts[place] for place in places]
        inner = unwrap(trainer.model)
        with (
            torch.random.fork_rng(),  # the training's random numbers do not depend on it
            outside_training(inner),
            without_router_logits(inner),
            trainer.accelerator.autocast(),
        ):
            trajectories = collect_trajectories(
                trainer.model,
                trainer.processing_class,
                chosen,
                self.block_size,
                refresh.max_new_tokens,
                output_dir=folder / "trajectories",
                progress=False,
                **refresh.collect,
            )
        return pack_trajectories(
            trajectories, refresh.window_size, output_dir=folder / "packed", progress=False, **refresh.pack
        )
