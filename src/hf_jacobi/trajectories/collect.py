"""`collect_trajectories`: from prompts to a data set of trajectories, shard by shard."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from .collector import SAMPLING, TOKENS, Collector, CollectSettings
from .prompts import digest_of, encode_prompt, only_prompts, open_prompts
from .report import CollectReport
from .shards import ShardFolder, counts_in, in_shards, read_note


TRAJECTORY_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "block_size": Value("int32"),
        "trajectories": List(List(List(Value("int32")))),
        "ended": Value("bool"),
    }
)
NAME = "trajectories"
WAIT = timedelta(days=2)  # for each other: a shard can take long, and torch gives up after minutes


def collect_trajectories(
    model,
    tokenizer,
    dataset,
    block_size: int = 32,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    output_dir: str | Path | None = None,
    *,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prompt_column: str | None = None,
    as_chat: bool = False,
    max_prompt_length: int | None = None,
    repetition: str = "cut",
    overlong: str = "keep",
    empty: str = "drop",
    shard_size: int = 128,
    positions_per_forward: int = 2048,
    progress: bool = True,
) -> Dataset:
    """
    Has a model complete prompts, and records how each block of its text comes about by Jacobi iterations.

    A block's trajectory begins with a first guess drawn from the prompt; each further state holds the model's own
    prediction for every position, given the text before the block and the state before it; the last state is the
    text (paper, section 3.1). Started again with the same arguments, it goes on where it was interrupted. Started by
    `accelerate launch` in several processes, each takes its share of the shards, and all return the whole.

    > Parameters that control what is collected

    Args:
        model: a causal language model that `generate(decoding="jacobi")` can serve. It need not be enabled.
        tokenizer: its tokenizer.
        dataset: prompts: a `datasets` data set, a list of texts or rows, or the path of a JSON, JSONL, Parquet, CSV or
            text file. Messages go through the chat template; an answer at their end is left out.
        block_size: n, the length of a block; the last block of a completion may be shorter.
        max_new_tokens: the longest completion.
        prompt_column: the column of the prompts. Left out, the first of `messages`, `conversations`, `prompt`,
            `question`, `instruction` and `text` that there is.
        as_chat: take a text for a user's message, rather than for the beginning of a text.
        max_prompt_length: prompts of more tokens are dropped. Never more than the model's positions leave room for.

    > Parameters that control how text is chosen

    Args:
        do_sample: sample instead of taking the likeliest token. The noise of a token depends on `seed`, on the place
            of its prompt in the data set and on its position, so states are sampled like the text.
        temperature, top_k, top_p: of the samples; left out, as in the model's generation config.
        seed: of the samples and of the first guesses.

    > Parameters that control cleaning

    Args:
        repetition: a completion that ends in a loop (a piece four or more times in a row, 32 tokens at least) is
            `"cut"` after the loop's first round, `"drop"`ped or `"keep"`pt.
        overlong: `"keep"` or `"drop"` a completion that reached `max_new_tokens` without an end.
        empty: `"drop"` or `"keep"` a completion that consists of an end alone.

    > Parameters that control the run

    Args:
        batch_size: sequences decoded together.
        output_dir: where Parquet files are written as they are made. Left out, the result is kept in memory.
        shard_size: prompts per file. What an interruption loses is at most one file's work of each process.
        positions_per_forward: tokens that one forward over blocks of several sequences scores, about. More is faster
            until the device is busy; the logits take this times the vocabulary.
        progress: whether to show a progress bar.

    Returns:
        A `datasets.Dataset`, one row per completion: `prompt_id` (the row's own id, else its place), `prompt_ids`,
        `completion_ids` (the end-of-sequence token included), `block_size`, `trajectories` (per block a list of
        states, each a list of tokens as long as the block) and `ended` (whether the text has an end).
        `read_report(output_dir)` gives the counts.

    Raises:
        `ValueError`: an argument is out of range, a prompt cannot be read, `output_dir` holds other work, or Jacobi
            decoding cannot serve the model.
    """
    given = locals()
    settings = CollectSettings(**{field.name: given[field.name] for field in dataclasses.fields(CollectSettings)})
    for name, value in (("batch_size", batch_size), ("positions_per_forward", positions_per_forward)):
        if value < 1:
            raise UsageError(f"`{name}` must be at least 1, got {value}.")
    collector = Collector(model, tokenizer, settings, batch_size, positions_per_forward)
    rows = only_prompts(open_prompts(dataset), prompt_column)
    processes = process_state()
    if output_dir is None:
        if processes.num_processes > 1:
            raise UsageError("several processes write into one folder: pass `output_dir`.")
        with tempfile.TemporaryDirectory() as folder:
            files = ShardFolder(folder, NAME, TRAJECTORY_FEATURES, {})
            _fill(files, collector, rows, progress)
            return files.dataset(in_memory=True)
    described = {"model": describe(model), "tokenizer": describe_tokenizer(tokenizer), **vars(settings)}
    described["generation_config"] = {
        name: getattr(collector.generation_config, name) for name in (*TOKENS, *SAMPLING)
    }
    files = ShardFolder(output_dir, NAME, TRAJECTORY_FEATURES, described)
    with files.locked() if processes.is_main_process else nullcontext():
        processes.wait_for_everyone()
        _fill(files, collector, rows, progress)
        with processes.main_process_first():
            return files.dataset()


def _fill(files: ShardFolder, collector: Collector, rows, progress: bool) -> None:
    """Writes the shards that are missing, of those that fall to this process."""
    processes, settings = process_state(), collector.settings
    total = len(rows) if hasattr(rows, "__len__") else None
    digest = functools.partial(digest_of, column=settings.prompt_column)
    seen: list[tuple[int, str]] = []
    with Progress(total, progress and processes.is_main_process) as bar:
        for shard, piece in in_shards(rows, settings.shard_size):
            mine = shard % processes.num_processes == processes.process_index
            if not mine:
                seen.append((len(piece), digest(piece)))
                bar.skip(len(piece))
                continue
            seen.append((len(piece), ""))
            if files.is_done(shard, piece, digest):
                bar.skip(len(piece))
                continue
            first = shard * settings.shard_size
            prompts = [
                encode_prompt(first + index, row, settings.prompt_column, collector.tokenizer, settings.as_chat)
                for index, row in enumerate(piece)
            ]
            rows_of_shard, counts = collector.collect(prompts, bar.advance)
            files.write(shard, rows_of_shard, counts, digest(piece), len(piece))
    processes.wait_for_everyone()
    files.check_end(len(seen))
    for shard, (count, expected) in enumerate(seen):
        note = read_note(files.path(shard))
        if expected and (note["made_from"], note["digest"]) != (count, expected):
            raise UsageError(
                f"the processes were given different data (shard {shard}): shuffle with a seed, the same for all."
            )


def process_state() -> PartialState:
    """The processes that were launched together, as `accelerate` sees them; on a CPU it has to be told to look."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=WAIT)


class Progress:
    """A bar of prompts, with blocks per second; `total` is `None` where nobody knows."""

    def __init__(self, total: int | None, show: bool):
        self.bar = tqdm(total=total, unit=" prompts", disable=not show, desc="trajectories")
        self.blocks = 0
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def skip(self, prompts: int) -> None:
        """Passes over prompts that are done already, or that another process does."""
        if not self.bar.disable:
            self.bar.initial += prompts  # not part of the rate that the time left is estimated by
            self.bar.update(prompts)

    def advance(self, prompts: int, blocks: int) -> None:
        """Counts prompts that were completed just now."""
        self.blocks += blocks
        rate = self.blocks / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:.1f} blocks/s", refresh=False)
        self.bar.update(prompts)


def describe(model) -> dict[str, Any]:
    """What tells one model from another: its class, dtype, a digest of some of its weights, the adapters in use."""
    inner = unwrap(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in inner.named_parameters():
        step = max(1, weight.numel() // 16)
        digest.update(name.encode())
        if weight.device.type != "meta":  # offloaded
            digest.update(weight.detach().flatten()[::step][:16].float().cpu().numpy().tobytes())
    layers = [module for module in inner.modules() if hasattr(module, "disable_adapters")]
    adapters = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    return {
        "class": type(inner).__name__,
        "dtype": str(inner.dtype),
        "weights": digest.hexdigest(),
        "adapters": sorted(adapters),
    }


def describe_tokenizer(tokenizer) -> str:
    """A digest of a tokenizer's vocabulary and chat template."""
    known = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.blake2b(json.dumps(known, default=str).encode(), digest_size=16).hexdigest()


def read_report(folder: str | Path) -> CollectReport:
    """
    The counts of a folder that `collect_trajectories` wrote, finished or not.

    Raises:
        `OSError`: there are no trajectories in it.
    """
    return CollectReport.from_counts(counts_in(folder, NAME))
