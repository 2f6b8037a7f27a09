"""Packs trajectories into training rows: clean text first, noisy blocks after."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..decoding.errors import UsageError
from .checks import check_whole
from .noise import NoiseSchedule, converged_prefix, nearest_state, noise_targets
from .shards import ShardFolder, in_shards
from .statistics import packing_statistics


COLUMNS = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "seq_ids", "twin_ids")
PACKED_FEATURES = Features({column: List(Value("int32")) for column in COLUMNS})
TRAJECTORY_COLUMNS = ("prompt_ids", "completion_ids", "block_size", "trajectories")
MOST_TOKENS = 2**31  # what an int32 column holds
BUFFER = 256  # samples that bin packing looks at together


@dataclass
class Half:
    """The clean or the noisy half of a sample, one entry per token; the columns are those of `pack_trajectories`."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    window_start: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    twins: list[int] = field(default_factory=list)  # position of the twin in the clean half, -1 if there is none

    def append(self, token: int, position: int, block: int, start: int, label: int, twin: int) -> None:
        self.input_ids.append(token)
        self.position_ids.append(position)
        self.block_ids.append(block)
        self.window_start.append(start)
        self.labels.append(label)
        self.twins.append(twin)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Sample:
    """One sequence: its clean half, and its noisy half."""

    clean: Half
    noisy: Half

    def __len__(self) -> int:
        return len(self.clean) + len(self.noisy)


def lay_out_sample(prompt: list[int], text: list[int], copies: list[list[list[int]]], window_size: int) -> Sample:
    """
    Lays out one sequence.

    Args:
        prompt: its prompt.
        text: the clean tokens after it.
        copies: for each noisy copy of the text the states of its blocks, one after the other.
        window_size: w, blocks of a window.
    """
    clean, noisy = Half(), Half()
    for position, token in enumerate([*prompt, *text]):
        clean.append(token, position, -1, 0, token if position >= len(prompt) else -100, -1)
    for states in copies:
        start = window_start = len(prompt)
        for index, state in enumerate(states):
            if index % window_size == 0:
                window_start = start
            final = text[start - len(prompt) :][: len(state)]
            right = converged_prefix(state, final)
            for position, token in enumerate(state, start):
                noisy.append(token, position, index, window_start, -100, position if position >= start + right else -1)
            start += len(state)
    return Sample(clean, noisy)


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
    columns = TRAJECTORY_COLUMNS
    what = "trajectories"

    def __post_init__(self):
        check_whole("noisy_copies", self.noisy_copies, 1)
        noise_targets(self.noise_schedule, self.window_size, self.min_noise, self.max_noise, random.Random(self.seed))
        if self.pack_samples and self.max_length is None:
            raise UsageError("`pack_samples=True` fills rows up to `max_length`: pass it too.")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 1)
        levels = 1 if self.noise_schedule == "constant" else self.window_size
        draws = callable(self.noise_schedule) or self.noise_schedule == "random"
        if not draws and self.noisy_copies > levels:
            raise UsageError(
                f"`noisy_copies={self.noisy_copies}` would be alike, as the {self.noise_schedule!r} schedule has "
                f"{levels} levels: pass noise_schedule='random', or at most so many."
            )

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable: a schedule that is a function stands there as a digest of it."""
        schedule = Hasher.hash(self.noise_schedule) if callable(self.noise_schedule) else self.noise_schedule
        described = vars(self) | {"noise_schedule": schedule}
        if self.noisy_copies == 1:  # as folders were described before there were copies
            del described["noisy_copies"]
        return described

    def sample(self, row: dict[str, Any], number: int) -> Sample | None:
        """See `Packing.sample`; the place of a row decides, with the seed, what is drawn."""
        _check_row(row, number)
        prompt = row["prompt_ids"]
        room = None if self.max_length is None else self.max_length - len(prompt)
        blocks = []
        for states in row["trajectories"]:
            if room is not None:
                room -= (1 + self.noisy_copies) * len(states[-1])
                if room < 0:
                    break
            blocks.append(states)
        text = [token for states in blocks for token in states[-1]]
        copies = [_noisy_copy(blocks, number, copy, self) for copy in range(self.noisy_copies)]
        return lay_out_sample(prompt, text, copies, self.window_size) if blocks else None


def _noisy_copy(blocks: list[list[list[int]]], number: int, copy: int, settings: PackSettings) -> list[list[int]]:
    """The state of each block in one copy; each copy is further on in the window's noise levels than the last."""
    size = settings.window_size
    generator = random.Random(f"{settings.seed}/{number}" + (f"/{copy}" if copy else ""))
    chosen = []
    for index, states in enumerate(blocks):
        if index % size == 0:
            targets = noise_targets(settings.noise_schedule, size, settings.min_noise, settings.max_noise, generator)
        place = (index + copy * size // settings.noisy_copies) % size
        chosen.append(states[nearest_state(states, targets[place])])
    return chosen


def _check_row(row: dict[str, Any], number: int) -> None:
    """Raises `ValueError` for a row whose blocks do not make up its text."""
    if not isinstance(row, Mapping):
        raise UsageError(f"trajectory {number} is no row with columns: {row!r:.80}.")
    if missing := [column for column in TRAJECTORY_COLUMNS if row.get(column) is None]:
        raise UsageError(f"trajectory {number} lacks {missing}: rows need {list(TRAJECTORY_COLUMNS)}.")
    check_whole(f"block_size of trajectory {number}", row["block_size"], 1)
    try:
        lengths = [{len(state) for state in states} for states in row["trajectories"]]
    except TypeError:
        raise UsageError(
            f"trajectory {number} has no list of blocks, each a list of states, each a list of tokens."
        ) from None
    if any(len(length) != 1 for length in lengths):
        raise UsageError(f"trajectory {number} has a block of no states, or of states of different lengths.")
    for tokens in (row["prompt_ids"], row["completion_ids"], *row["trajectories"]):
        check_tokens(tokens, f"trajectory {number}")
    sizes = [length.pop() for length in lengths]
    if any(size != row["block_size"] for size in sizes[:-1]) or (sizes and not 0 < sizes[-1] <= row["block_size"]):
        raise UsageError(
            f"trajectory {number} has blocks of {sizes} tokens, but its block_size is {row['block_size']}."
        )
    if [token for states in row["trajectories"] for token in states[-1]] != list(row["completion_ids"]):
        raise UsageError(f"trajectory {number} has other text in completion_ids than its blocks end in.")


def check_tokens(tokens: Sequence, what: str) -> None:
    """Raises `ValueError` for a list of tokens, or of such lists of one length, that holds something else."""
    array = np.asarray(tokens)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= MOST_TOKENS):
        flat = np.asarray(tokens, dtype=object).ravel()
        odd = next((token for token in flat if not isinstance(token, Integral) or not 0 <= token < MOST_TOKENS), None)
        raise UsageError(f"{what} holds {odd!r}, which is no token: they are whole numbers from 0 on.")


def join_samples(samples: list[Sample]) -> dict[str, list[int]]:
    """One row out of some samples: all their clean halves, then all their noisy ones."""
    row: dict[str, list[int]] = {column: [] for column in COLUMNS}
    first_clean: list[int] = []
    for halves in ([sample.clean for sample in samples], [sample.noisy for sample in samples]):
        for number, half in enumerate(halves):
            if len(first_clean) <= number:
                first_clean.append(len(row["input_ids"]))
            for column in ("input_ids", "position_ids", "block_ids", "window_start", "labels"):
                row[column] += getattr(half, column)
            row["seq_ids"] += [number] * len(half)
            row["twin_ids"] += [twin if twin < 0 else first_clean[number] + twin for twin in half.twins]
    return row


def fill_rows(samples: Iterable[Sample], max_length: int) -> Iterator[list[Sample]]:
    """
    Bin packing, first fit by falling length within a buffer of `BUFFER` samples: rows of at most `max_length` tokens.
    """
    for _, buffer in in_shards(samples, BUFFER):
        rows: list[list[Sample]] = []
        for sample in sorted(buffer, key=len, reverse=True):
            for row in rows:
                if sum(map(len, row)) + len(sample) <= max_length:
                    row.append(sample)
                    break
            else:
                rows.append([sample])
        yield from rows


class Packing(Protocol):
    """How rows of some kind become samples; `PackSettings` for trajectories, `NoiseSettings` for plain completions."""

    columns: tuple[str, ...]  # of the rows
    what: str  # they are called in errors
    max_length: int | None
    pack_samples: bool

    def sample(self, row: dict[str, Any], number: int) -> Sample | None:
        """The sample of a row, cut at a block boundary to `max_length`; `None` if not even one block fits."""

    def described(self) -> dict[str, Any]:
        """The settings, JSON-serializable."""


def packed_rows(trajectories: Iterable[dict], settings: Packing, first: int = 0) -> Iterator[dict[str, list[int]]]:
    """The training rows of trajectories or completions whose places count from `first`."""
    laid_out = (settings.sample(row, number) for number, row in enumerate(trajectories, start=first))
    samples = (sample for sample in laid_out if sample is not None)
    groups = fill_rows(samples, settings.max_length) if settings.pack_samples else ([sample] for sample in samples)
    for group in groups:
        yield join_samples(group)


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
    each noisy block is the state of that block's trajectory whose noise level is nearest to the level that the
    schedule aims at for its place in the window. Rows are made and written one after the other, so that the size of
    the data set does not matter to memory.

    Args:
        trajectories: rows with `prompt_ids`, `completion_ids`, `block_size` and `trajectories` (per block a list of
            states, the last of them the fixed point); a `datasets.Dataset` or anything that can be run through again.
        window_size: w, the number of consecutive blocks over which the noise level runs. 1 is CLLM.
        noise_schedule, min_noise, max_noise: see `noise_targets`.
        max_length: tokens a row may have; a longer sample is cut at a block boundary, and left out if not even its
            first block fits.
        pack_samples: put several samples into a row, up to `max_length`.
        noisy_copies: how many noisy versions of the text follow it in a row, each with other noise levels: the
            schedule begins further on in each, and `"random"` draws anew. A draft-only adapter learns from them for
            one forward over the text (`JacobiForcingConfig.adapter_scope`).
        seed: of the `"random"` schedule; each sample draws by itself, so the result does not depend on the others.
        output_dir: where Parquet files are written as they are made; started again, packing goes on where it was
            interrupted. Left out, the rows go to the cache of `datasets`.
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
    """Packs rows as `settings` say; arguments, result and errors as of `pack_trajectories`."""
    check_whole("shard_size", shard_size, 1)
    _check_columns(rows, settings)
    if isinstance(rows, (Dataset, IterableDataset)):
        rows = rows.with_format(None)
    if output_dir is not None:
        packed = _pack_into(output_dir, rows, settings, shard_size, progress)
    else:
        if next(packed_rows(rows, settings), None) is None:
            raise UsageError(_nothing_fits(rows, settings))
        # A fingerprint of its own: by default `datasets` would return what a reader of the same name gave before.
        try:
            packed = Dataset.from_generator(
                lambda: packed_rows(rows, settings), features=PACKED_FEATURES, fingerprint=uuid.uuid4().hex
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
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


def _digest(rows: list[dict[str, Any]], columns: tuple[str, ...] = TRAJECTORY_COLUMNS) -> str:
    known = [[row[column] for column in columns] for row in rows]
    text = json.dumps(known, default=lambda array: array.tolist())  # of numpy, say
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _pack_into(output_dir, trajectories, settings: Packing, shard_size: int, progress: bool) -> Dataset:
    """Writes the shards that are missing in a folder, and returns all of it."""
    digest = partial(_digest, columns=settings.columns)
    files = ShardFolder(output_dir, "packed", PACKED_FEATURES, settings.described() | {"shard_size": shard_size})
    total = len(trajectories) if hasattr(trajectories, "__len__") else None
    shards = 0
    with files.locked(), tqdm(total=total, unit=" samples", desc="packing", disable=not progress) as bar:
        for shard, piece in in_shards(trajectories, shard_size):
            shards += 1
            if not files.is_done(shard, piece, digest):
                rows = list(packed_rows(piece, settings, first=shard * shard_size))
                counts = packing_statistics(rows).counts() | {"trajectories": len(piece)}
                files.write(shard, rows, counts, digest(piece), len(piece))
            bar.update(len(piece))
        files.check_end(shards)
        return files.dataset()
