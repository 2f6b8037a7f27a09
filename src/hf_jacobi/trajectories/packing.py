"""Packs trajectories into training rows: clean text first, noisy blocks after."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, DatasetInfo, IterableDataset, Split
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..decoding.errors import UsageError
from .checks import check_whole
from .noise import NoiseSchedule, nearest_states, noise_targets
from .pieces import TRAJECTORY_COLUMNS, digest_of_piece, pieces_of, read_trajectory, rows_in
from .samples import COLUMNS, PACKED_FEATURES, Sample, fill_rows, lay_out_arrays, table_of
from .shards import ShardFolder, in_shards
from .statistics import PackingStatistics


BATCH = 256  # rows that are put together at once


@dataclass(frozen=True)
class PackSettings:
    """How trajectories are packed; see `pack_trajectories`."""

    window_size: int
    noise_schedule: NoiseSchedule
    min_noise: float
    max_noise: float
    max_length: int | None
    pack_samples: bool
    seed: int
    noisy_copies: int = 1
    columns: ClassVar[tuple[str, ...]] = TRAJECTORY_COLUMNS
    what: ClassVar[str] = "trajectories"

    def __post_init__(self):
        check_whole("noisy_copies", self.noisy_copies, 1)
        noise_targets(self.noise_schedule, self.window_size, self.min_noise, self.max_noise, random.Random(self.seed))
        if self.pack_samples and self.max_length is None:
            raise UsageError("`pack_samples=True` fills rows up to `max_length`: pass it too.")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)
        levels = 1 if self.noise_schedule == "constant" else self.window_size
        if not self._draws and self.noisy_copies > levels:
            raise UsageError(
                f"`noisy_copies={self.noisy_copies}` would not differ, as the {self.noise_schedule!r} schedule has "
                f"{levels} levels: pass noise_schedule='random', or noisy_copies={levels} at most."
            )

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable: a callable schedule is replaced by its digest."""
        schedule = Hasher.hash(self.noise_schedule) if callable(self.noise_schedule) else self.noise_schedule
        described = {field.name: getattr(self, field.name) for field in fields(self)} | {"noise_schedule": schedule}
        if self.noisy_copies == 1:  # as folders were described before there were copies
            del described["noisy_copies"]
        return described

    def sample(self, row: Any, number: int) -> Sample | None:
        """See `Packing.sample`; the place of a row and the seed decide what is drawn."""
        read = read_trajectory(row, number)
        prompt, states = read.prompt, read.states
        if self.max_length is not None:
            ends = np.cumsum((1 + self.noisy_copies) * states.lengths[states.finals])
            states = states.first_blocks(int(np.searchsorted(ends, self.max_length - len(prompt), side="right")))
        if not len(states.counts):
            return None
        chosen = nearest_states(
            states.noise_levels(), self._targets(len(states.counts), number), states.counts
        ).ravel()
        return lay_out_arrays(
            prompt, states.joined(states.finals), states.joined(chosen), states.lengths[chosen], self.window_size
        )

    def _targets(self, blocks: int, number: int) -> np.ndarray:
        """
        The noise level aimed at for each block in each copy, `[copies, blocks]`. Each copy is further on in the
        window's noise levels than the last.
        """
        size, windows = self.window_size, -(-blocks // self.window_size)
        targets = []
        for copy in range(self.noisy_copies):
            if self._draws:
                generator = random.Random(f"{self.seed}/{number}" + (f"/{copy}" if copy else ""))
                levels = np.array([self._levels(generator) for _ in range(windows)])
            else:
                levels = np.tile(self._fixed_levels, (windows, 1))
            targets.append(np.roll(levels, -(copy * size // self.noisy_copies), axis=1).ravel()[:blocks])
        return np.stack(targets)

    @property
    def _draws(self) -> bool:
        return callable(self.noise_schedule) or self.noise_schedule == "random"

    def _levels(self, generator: random.Random | None = None) -> list[float]:
        return noise_targets(self.noise_schedule, self.window_size, self.min_noise, self.max_noise, generator)

    @cached_property
    def _fixed_levels(self) -> list[float]:
        return self._levels()


class Packing(Protocol):
    """Turns rows of one kind into samples; `PackSettings` for trajectories, `NoiseSettings` for plain completions."""

    columns: ClassVar[tuple[str, ...]]  # of the rows
    what: ClassVar[str]  # the name of the rows in errors

    @property
    def max_length(self) -> int | None: ...

    @property
    def pack_samples(self) -> bool: ...

    def sample(self, row: dict[str, Any], number: int) -> Sample | None:
        """The sample of a row, cut at a block boundary to `max_length`; `None` if not even one block fits."""

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable."""


def packed_tables(rows: Iterable[Any], settings: Packing, first: int = 0) -> Iterator[pyarrow.Table]:
    """The training rows of trajectories or completions whose places count from `first`, some at a time."""
    laid_out = (settings.sample(row, number) for number, row in enumerate(rows, start=first))
    samples = (sample for sample in laid_out if sample is not None)
    full = settings.max_length if settings.pack_samples else None
    groups = ([sample] for sample in samples) if full is None else fill_rows(samples, full)
    for _, batch in in_shards(groups, BATCH):
        yield table_of(batch)


def packed_rows(rows: Iterable[Any], settings: Packing, first: int = 0) -> Iterator[dict[str, list[int]]]:
    """The rows of `packed_tables`, one by one."""
    for table in packed_tables(rows, settings, first):
        yield from table.to_pylist()


def pack_trajectories(
    trajectories: Iterable[dict],
    window_size: int = 16,
    noise_schedule: NoiseSchedule = "linear",
    *,
    min_noise: float = 0.0,
    max_noise: float = 1.0,
    max_length: int | None = None,
    pack_samples: bool = False,
    noisy_copies: int = 1,
    seed: int = 0,
    output_dir: str | Path | None = None,
    shard_size: int = 256,
    progress: bool = False,
) -> Dataset:
    """
    Turns trajectories into training rows for Jacobi Forcing (paper, section 3.2).

    A row is `[prompt | completion | noisy block 0 | noisy block 1 | ...]`. The first half is ordinary causal text;
    each noisy block is the trajectory state whose noise level is nearest to the level that the schedule aims at for
    the block's place in the window. Rows are written as they are made, so memory does not grow with the data set.

    Args:
        trajectories: rows with `prompt_ids`, `completion_ids`, `block_size` and `trajectories` (per block a list of
            states, the last of them the fixed point); a `datasets.Dataset` (fastest) or any iterable that can be
            iterated more than once.
        window_size: w, the number of consecutive blocks over which the noise level runs. 1 is CLLM.
        noise_schedule, min_noise, max_noise: see `noise_targets`.
        max_length: maximum tokens of a row; a longer sample is cut at a block boundary, and left out if not even its
            first block fits.
        pack_samples: put several samples into a row, up to `max_length`.
        noisy_copies: how many noisy versions of the text follow it in a row, each with other noise levels: the
            schedule begins further on in each, and `"random"` draws anew. A draft-only adapter learns from them for
            one forward over the text (`JacobiForcingConfig.adapter_scope`).
        seed: seed of the `"random"` schedule; each sample draws independently of the others.
        output_dir: folder of the Parquet files; called again, packing resumes where it was interrupted. If omitted,
            the rows go to the cache of `datasets`.
        shard_size: trajectories per file of `output_dir`.
        progress: whether to show a progress bar, for `output_dir`.

    Returns:
        A `datasets.Dataset` with one entry per token in each column:
        `input_ids`; `position_ids` (a noisy token has that of the clean token it stands for); `block_ids` (-1 for
        clean tokens, else the block's number); `window_start` (for a noisy token the position of its window's first
        token, 0 for clean ones); `labels` (the completion's tokens on clean positions, -100 elsewhere); `seq_ids`
        (which sample of the row); `twin_ids` (for a noisy token from its block's first wrong token on, the index in
        the row of the clean token at the same position, else -1).

    Raises:
        `ValueError`: a column is missing, an argument is out of range, no sample fits, or `output_dir` holds other
            work.
    """
    settings = PackSettings(
        window_size, noise_schedule, min_noise, max_noise, max_length, pack_samples, seed, noisy_copies
    )
    return pack_rows(trajectories, settings, output_dir, shard_size, progress)


def pack_rows(
    rows: Iterable[dict], settings: Packing, output_dir: str | Path | None, shard_size: int, progress: bool
) -> Dataset:
    """Packs rows with these `settings`; arguments, result and errors as in `pack_trajectories`."""
    check_whole("shard_size", shard_size, 1)
    _check_columns(rows, settings)
    if isinstance(rows, (Dataset, IterableDataset)):
        rows = rows.with_format(None)
    if output_dir is not None:
        packed = _pack_into(output_dir, rows, settings, shard_size, progress)
    else:
        packed = _pack_into_cache(rows, settings)
    if not len(packed):
        raise UsageError(_nothing_fits(rows, settings))
    return packed


def _check_columns(rows: Any, settings: Packing) -> None:
    """Raises `ValueError` for what is no data set of rows of the kind."""
    what = settings.what
    if isinstance(rows, Mapping):
        found = f"splits: pass one of them, as in {what}['train']" if rows else "nothing"
        raise UsageError(f"`{what}` must be rows, got a dictionary of {list(rows)}, {found}.")
    if isinstance(rows, (str, Path)):
        raise UsageError(
            f"`{what}` must be rows, got the path {str(rows)!r}: open it with "
            "datasets.load_dataset(path, split='train') first."
        )
    if not hasattr(rows, "__iter__") and not hasattr(rows, "__getitem__"):
        raise UsageError(f"`{what}` must be rows, got {type(rows).__name__}.")
    if iter(rows) is rows:
        raise UsageError(f"`{what}` can be run through only once: pass a list or a data set, not an iterator.")
    first = next(iter(rows), None)
    if first is None:
        raise UsageError(f"there are no {what}.")
    if not isinstance(first, Mapping):
        raise UsageError(f"`{what}` must be rows with columns, the first one is {first!r:.80}.")
    if set(COLUMNS) <= first.keys():
        raise UsageError(f"`{what}` are packed already: train on them, or pass what they were packed from.")
    if missing := [column for column in settings.columns if column not in first]:
        raise UsageError(f"{what} need the columns {missing} too: those found are {sorted(first)}.")


def _nothing_fits(rows: Iterable[dict], settings: Packing) -> str:
    if not any(row[settings.columns[-1]] for row in rows):
        return "there is nothing to pack: every completion is empty."
    return f"there is no sample that fits into max_length={settings.max_length} with even one block."


def _pack_into_cache(rows: Iterable[Any], settings: Packing) -> Dataset:
    """Writes one file in the cache of `datasets`: `Dataset.from_generator` would take the rows one by one."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_jacobi" / f"packed-{uuid.uuid4().hex}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    source = (row for _, piece in pieces_of(rows, BATCH, settings.columns) for row in rows_in(piece))
    try:
        with pyarrow.ipc.new_stream(path, PACKED_FEATURES.arrow_schema) as writer:
            for table in packed_tables(source, settings):
                writer.write_table(table)
        if not writer.stats.num_record_batches:
            raise UsageError(_nothing_fits(rows, settings))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Dataset.from_file(str(path), info=DatasetInfo(features=PACKED_FEATURES), split=Split.TRAIN)


def _pack_into(
    output_dir: str | Path, rows: Iterable[Any], settings: Packing, shard_size: int, progress: bool
) -> Dataset:
    """Writes the shards that are missing in a folder, and returns all of them."""
    digest = partial(digest_of_piece, columns=settings.columns)
    files = ShardFolder(output_dir, "packed", PACKED_FEATURES, settings.described() | {"shard_size": shard_size})
    total = len(rows) if isinstance(rows, Sized) else None
    shards = 0
    with files.locked(), tqdm(total=total, unit=" samples", desc="packing", disable=not progress) as bar:
        for shard, piece in pieces_of(rows, shard_size, settings.columns):
            shards += 1
            if not files.is_done(shard, piece, digest):
                tables = list(packed_tables(rows_in(piece), settings, first=shard * shard_size))
                table = pyarrow.concat_tables(tables) if tables else PACKED_FEATURES.arrow_schema.empty_table()
                statistics = PackingStatistics()
                statistics.add_table(table)
                counts = statistics.counts() | {"trajectories": len(piece)}
                files.write(shard, table, counts, digest(piece), len(piece))
            bar.update(len(piece))
        files.check_end(shards)
        return files.dataset()
