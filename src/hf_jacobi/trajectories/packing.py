"""Packs trajectories into training rows: clean text first, noisy blocks after."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from datasets import Dataset, Features, List, Value

from .noise import NoiseSchedule, converged_prefix, nearest_state, noise_targets


COLUMNS = ("input_ids", "position_ids", "block_ids", "window_start", "labels", "seq_ids", "twin_ids")
PACKED_FEATURES = Features({column: List(Value("int32")) for column in COLUMNS})
TRAJECTORY_COLUMNS = ("prompt_ids", "completion_ids", "block_size", "trajectories")
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


def make_sample(
    row: dict,
    window_size: int,
    schedule: NoiseSchedule,
    min_noise: float,
    max_noise: float,
    max_length: int | None,
    generator: random.Random,
) -> Sample | None:
    """
    Lays out one trajectory row, cut at a block boundary to `max_length` tokens; `None` if not even one block fits.

    Args: as `pack_trajectories`; `row` is a row of a trajectory data set.
    """
    prompt, completion, size = row["prompt_ids"], row["completion_ids"], row["block_size"]
    blocks = row["trajectories"]
    if max_length is not None:
        length = len(prompt)
        fitting = 0
        for states in blocks:
            length += 2 * len(states[-1])
            if length > max_length:
                break
            fitting += 1
        blocks = blocks[:fitting]
    if not blocks:
        return None
    clean, noisy = Half(), Half()
    completion = completion[: sum(len(states[-1]) for states in blocks)]
    for position, token in enumerate([*prompt, *completion]):
        clean.append(token, position, -1, 0, token if position >= len(prompt) else -100, -1)
    for index, states in enumerate(blocks):
        if index % window_size == 0:
            targets = noise_targets(schedule, window_size, min_noise, max_noise, generator)
            start = len(prompt) + index * size
        state, final = states[nearest_state(states, targets[index % window_size])], states[-1]
        right = converged_prefix(state, final)
        for offset, token in enumerate(state):
            position = len(prompt) + index * size + offset
            noisy.append(token, position, index, start, -100, position if offset >= right else -1)
    return Sample(clean, noisy)


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
    buffer: list[Sample] = []

    def flush() -> Iterator[list[Sample]]:
        rows: list[list[Sample]] = []
        for sample in sorted(buffer, key=len, reverse=True):
            for row in rows:
                if sum(map(len, row)) + len(sample) <= max_length:
                    row.append(sample)
                    break
            else:
                rows.append([sample])
        buffer.clear()
        yield from rows

    for sample in samples:
        buffer.append(sample)
        if len(buffer) == BUFFER:
            yield from flush()
    yield from flush()


def pack_trajectories(
    trajectories: Iterable[dict],
    window_size: int = 16,
    noise_schedule: NoiseSchedule = "linear",
    *,
    min_noise: float = 0.0,
    max_noise: float = 1.0,
    max_length: int | None = None,
    pack_samples: bool = False,
    seed: int = 0,
) -> Dataset:
    """
    Turns trajectories into training rows for Jacobi Forcing (paper, section 3.2).

    A row is `[prompt | completion | noisy block 0 | noisy block 1 | ...]`. The first half is ordinary causal text;
    each noisy block is the state of that block's trajectory whose noise level is nearest to the level that the
    schedule aims at for its place in the window.

    Args:
        trajectories: rows with `prompt_ids`, `completion_ids`, `block_size` and `trajectories` (per block a list of
            states, the last of them the fixed point); a `datasets.Dataset` or any iterable that can be run again.
        window_size: w, the number of consecutive blocks over which the noise level runs. 1 is CLLM.
        noise_schedule, min_noise, max_noise: see `noise_targets`.
        max_length: tokens a row may have; a longer sample is cut at a block boundary, and left out if not even its
            first block fits.
        pack_samples: put several samples into a row, up to `max_length`.
        seed: of the `"random"` schedule; each sample draws by itself, so the result does not depend on the others.

    Returns:
        A `datasets.Dataset` with one entry per token in each column:
        `input_ids`; `position_ids` (a noisy token has that of the clean token it stands for); `block_ids` (-1 for
        clean tokens, else the block's number); `window_start` (for a noisy token the position of its window's first
        token, 0 for clean ones); `labels` (the completion's tokens on clean positions, -100 elsewhere); `seq_ids`
        (which sample of the row); `twin_ids` (for a noisy token from its block's first wrong token on, the index in
        the row of the clean token at the same position, else -1).

    Raises:
        `ValueError`: a column is missing, an argument is out of range, or no sample fits.
    """
    noise_targets(noise_schedule, window_size, min_noise, max_noise, random.Random(seed))
    if pack_samples and max_length is None:
        raise ValueError("`pack_samples=True` fills rows up to `max_length`: pass it too.")

    columns = next(iter(trajectories), {})
    if missing := [column for column in TRAJECTORY_COLUMNS if column not in columns]:
        raise ValueError(f"trajectories lack {missing}: their columns are {list(TRAJECTORY_COLUMNS)}.")

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(trajectories):
            generator = random.Random(f"{seed}/{number}")
            sample = make_sample(row, window_size, noise_schedule, min_noise, max_noise, max_length, generator)
            if sample is not None:
                yield sample

    def rows() -> Iterator[dict[str, list[int]]]:
        groups = fill_rows(samples(), max_length) if pack_samples else ([sample] for sample in samples())
        for group in groups:
            yield join_samples(group)

    if next(rows(), None) is None:
        raise ValueError(f"no sample fits into max_length={max_length}, not even with one block: raise it.")
    return Dataset.from_generator(rows, features=PACKED_FEATURES)
