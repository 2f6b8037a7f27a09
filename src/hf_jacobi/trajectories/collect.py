"""`collect_trajectories`: from prompts to a data set of trajectories, shard by shard."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
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
from .checks import check_whole
from .collector import SAMPLING, TOKENS, Collector, CollectSettings
from .completions import COMPLETION_COLUMNS, END_COLUMNS, check_completions
from .encoding import BadPrompt, refuse_unknown_settings
from .prompts import Prompt, check_columns, digest_of, is_text, only_prompts, open_prompts
from .report import CollectReport
from .shards import ShardFolder, in_shards, notes_in, read_note


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
NAMED = 10  # a warning names at most this many prompts
WAIT = timedelta(days=2)  # for other processes: a shard can take long, and by default torch gives up after minutes


def collect_trajectories(
    model,
    tokenizer,
    dataset=None,
    block_size: int = 32,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    output_dir: str | Path | None = None,
    *,
    completions=None,
    check: bool = False,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    prompt_column: str | None = None,
    as_chat: bool = False,
    max_prompt_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    draft_init: str = "prompt",
    strict: bool = False,
    repetition: str = "cut",
    overlong: str = "keep",
    empty: str = "drop",
    shard_size: int = 128,
    positions_per_forward: int = 2048,
    progress: bool | Callable[[int, int | None], None] = True,
) -> Dataset:
    """
    Completes prompts with a model and records the Jacobi trajectory of each block of the text.

    A block's trajectory begins with a first guess (`draft_init`); each further state holds the model's own prediction
    for every position, given the text before the block and the state before it; the last state is the text (paper,
    section 3.1). An interrupted run continues when it is started again with the same arguments. With several processes
    of `accelerate launch`, each takes its share of the shards, and all return the whole data set.

    > Parameters that control what is collected

    Args:
        model: a causal language model that `generate(decoding="jacobi")` can serve. It need not be enabled.
        tokenizer: its tokenizer.
        dataset: prompts: a `datasets` data set, a list of texts, rows or token ids, or the path of a JSON, JSONL,
            Parquet, CSV or text file. Messages go through the chat template, with the row's `tools` and
            `chat_template_kwargs` if it has such columns; a final answer is left out.
        completions: instead of `dataset`, prompts with their completions, such as the output of a serving engine:
            rows, or a file of them, with a prompt as in `dataset` and either `completion` (text or tokens) or
            `completion_ids`. Only the states are computed, in a fraction of the time. A state holds the tokens given
            so far, including the next one, and the model's own predictions from there on. The last state is therefore
            the completion, whoever wrote it; if the model wrote it greedily, the trajectory is the one that it would
            get here. Text gets the end-of-sequence token that engines leave out, unless the row's `finish_reason` is
            `"length"` or `"max_tokens"`, or its `ended` is false. Tokens of an engine are exact; text is tokenized
            again, which can split words differently.
        check: leave out those `completions` that are not the model's greedy text. They are counted and named like
            prompts that cannot be used, and are an error with `strict`. In half precision a model can break ties
            differently from the engine.
        block_size: n, the length of a block; the last block of a completion may be shorter.
        max_new_tokens: the longest completion.
        draft_init: `"prompt"` or `"vocabulary"`: where the first guess of a block is drawn from, with `seed`.
        prompt_column: the column of the prompts; by default the first existing one of `messages`, `conversations`,
            `prompt`, `question`, `instruction`, `text`, `prompt_ids` and `input_ids`.
        as_chat: treat a text as a user's message instead of a text to continue.
        max_prompt_length: prompts with more tokens are left out. The model's positions can lower this limit.
        chat_template_kwargs: settings of the chat template, such as `{"enable_thinking": False}`; a row's own settings
            take precedence.
        strict: whether a prompt that cannot be used (empty, too long, refused by the chat template, ...) is an error.
            Otherwise it is left out, counted and named in a warning and in `read_report(output_dir).skipped`.

    > Parameters that control how text is chosen

    Args:
        do_sample: sample instead of taking the likeliest token. The noise of a token depends on `seed`, on the place
            of its prompt in the data set and on its position, so states are sampled like the text.
        temperature, top_k, top_p: for sampling; by default those of the model's generation config.
        seed: of the samples and of the first guesses.

    > Parameters that control cleaning

    Args:
        repetition: a completion that ends in a loop (a piece four or more times in a row, 32 tokens at least) is
            `"cut"` after the loop's first round, `"drop"`ped or `"keep"`pt.
        overlong: `"keep"` or `"drop"` a completion that reached `max_new_tokens` without an end.
        empty: `"drop"` or `"keep"` a completion that holds only an end token.

    > Parameters that control the run

    Args:
        batch_size: sequences decoded together.
        output_dir: the folder in which Parquet files are written. Without it, the result is kept in memory.
        shard_size: prompts per file. An interruption costs each process at most one file's work.
        positions_per_forward: approximate number of tokens scored by one forward over blocks of several sequences.
            Larger is faster until the device is saturated; the logits have this many rows of vocabulary size.
        progress: whether to show a progress bar; or a function called with the number of finished prompts and
            the total (`None` if unknown).

    Returns:
        A `datasets.Dataset`, one row per completion: `prompt_id` (the row's own id, else its place), `prompt_ids`,
        `completion_ids` (the end-of-sequence token included), `block_size`, `trajectories` (per block a list of
        states, each a list of tokens as long as the block) and `ended` (whether the text has an end).
        `read_report(output_dir)` gives the counts.

    Raises:
        `ValueError`: an argument is out of range, no completion was kept (`output_dir` is then empty again), a prompt
            cannot be used (with `strict`), `output_dir` holds other work or a damaged file, or Jacobi decoding does
            not support the model.
    """
    given = locals()
    settings = CollectSettings(**{field.name: given[field.name] for field in dataclasses.fields(CollectSettings)})
    for name, value in (("batch_size", batch_size), ("positions_per_forward", positions_per_forward)):
        check_whole(name, value, 1)
    if not callable(tokenizer):
        raise UsageError(f"`tokenizer` must be a tokenizer of transformers, got {tokenizer!r:.60}.")
    refuse_unknown_settings(tokenizer, chat_template_kwargs)
    given_too = completions is not None
    if given_too == (dataset is not None):
        raise UsageError("pass either `dataset`, prompts to complete, or `completions`, prompts with their texts.")
    if check and not given_too:
        raise UsageError("`check` is for `completions`: without them, all text is the model's own.")
    collector = Collector(model, tokenizer, settings, batch_size, positions_per_forward, given_too, check)
    others = (*COMPLETION_COLUMNS, *END_COLUMNS) if given_too else ()
    rows = only_prompts(open_prompts(completions if given_too else dataset), prompt_column, *others)
    check_columns(rows, prompt_column)
    if given_too:
        check_completions(next(iter(rows)))
    if len(tokenizer) > collector.vocabulary:  # find tokens without an embedding before any work is done
        for number, row in enumerate(rows):
            with suppress(BadPrompt):
                collector.encode(number, row)
    processes = process_state()
    if output_dir is None:
        if processes.num_processes > 1:
            raise UsageError("several processes write into one folder: pass `output_dir`.")
        with tempfile.TemporaryDirectory() as folder:
            files = ShardFolder(folder, NAME, TRAJECTORY_FEATURES, {})
            _fill(files, collector, rows, strict, progress)
            return files.dataset(in_memory=True)
    described = {"model": describe(model), "tokenizer": describe_tokenizer(tokenizer), **vars(settings)}
    if settings.draft_init == "prompt":  # earlier folders do not name it
        del described["draft_init"]
    described["generation_config"] = {
        name: getattr(collector.generation_config, name) for name in (*TOKENS, *SAMPLING)
    }
    if given_too:
        described |= {"completions": True, "check": check}
    files = ShardFolder(output_dir, NAME, TRAJECTORY_FEATURES, described)
    with files.locked() if processes.is_main_process else nullcontext():
        processes.wait_for_everyone()
        _fill(files, collector, rows, strict, progress)
        with processes.main_process_first():
            return files.dataset()


def _fill(files: ShardFolder, collector: Collector, rows, strict: bool, progress) -> None:
    """Writes the missing shards of this process."""
    processes, settings = process_state(), collector.settings
    total = len(rows) if hasattr(rows, "__len__") else None
    others = (*COMPLETION_COLUMNS, *END_COLUMNS) if collector.given else ()
    digest = functools.partial(digest_of, column=settings.prompt_column, others=others)
    seen: list[tuple[int, str]] = []
    with Progress(total, processes.is_main_process and progress) as bar:
        for shard, piece in in_shards(rows, settings.shard_size):
            mine = shard % processes.num_processes == processes.process_index
            if not mine:
                seen.append((len(piece), digest(piece)))
                bar.skip(len(piece))
                continue
            seen.append((len(piece), ""))
            if files.is_done(shard, piece, digest):
                if strict and (skipped := read_note(files.path(shard))["skipped"]):
                    raise UsageError(skipped[0])
                bar.skip(len(piece))
                continue
            prompts, skipped, left_out = _encode(collector, shard * settings.shard_size, piece, strict)
            bar.skip(len(skipped))
            rows_of_shard, refused, counts = collector.collect(prompts, bar.advance)
            if strict and refused:
                raise BadPrompt(refused[0])
            skipped += refused
            counts.update(left_out)
            files.write(shard, rows_of_shard, dict(counts), digest(piece), len(piece), skipped)
    processes.wait_for_everyone()
    files.check_end(len(seen))
    for shard, (count, expected) in enumerate(seen):
        note = read_note(files.path(shard))
        if expected and (note["made_from"], note["digest"]) != (count, expected):
            raise UsageError(
                f"the processes were given different data (shard {shard}): shuffle with the same seed in all of them."
            )
    processes.wait_for_everyone()  # until all have read the notes of files that can be removed below
    if processes.is_main_process:
        report = read_report(files.folder)
        if not report.sequences:  # without files, the folder can be used with other settings
            files.clear()
        _judge(report, collector, next(iter(rows)))


def _encode(collector: Collector, first: int, rows: list, strict: bool) -> tuple[list[Prompt], list[str], Counter]:
    """The prompts of some rows, numbered from `first`; why others were left out, one sentence each; the counts."""
    prompts, skipped, counts = [], [], Counter(prompts=len(rows))
    for number, row in enumerate(rows, start=first):
        try:
            prompts.append(collector.encode(number, row))
        except BadPrompt as error:
            if strict:
                raise
            skipped.append(str(error))
            counts[error.count] += 1
    return prompts, skipped, counts


def _judge(report: CollectReport, collector: Collector, row: dict[str, Any]) -> None:
    """
    Warns about prompts that were left out, and if most completions are empty; raises `UsageError` if none was kept.

    Args:
        report: the counts.
        collector: what made them.
        row: one of the prompts.
    """
    if report.bad_prompts and report.bad_prompts == report.prompts:
        raise UsageError(f"none of the {report.prompts} prompts can be used: {report.skipped[0]}.")
    if report.other_text and report.other_text + report.bad_prompts == report.prompts:
        raise UsageError(
            f"none of the {report.prompts} completions is the model's greedy text: {report.skipped[0]}; drop `check` "
            "to take them as they are."
        )
    if report.skipped:
        shown = "; ".join(report.skipped[:NAMED])
        more = len(report.skipped) - NAMED
        shown += f"; and {more} more, in read_report(output_dir).skipped" if more > 0 else ""
        warnings.warn(f"{len(report.skipped)} of {report.prompts} prompts were left out: {shown}.", stacklevel=4)
    if shortfall := report.shortfall():
        sentence = shortfall + _advice(report, collector, row)
        if not report.sequences:
            raise UsageError(sentence)
        warnings.warn(sentence, stacklevel=4)


def _advice(report: CollectReport, collector: Collector, row: dict[str, Any]) -> str:
    """The end of a sentence: what is likely to help against empty completions."""
    settings, template = collector.settings, getattr(collector.tokenizer, "chat_template", None)
    mostly_empty = 2 * report.empty > report.completions and not collector.given
    if mostly_empty and template and not settings.as_chat and is_text(row, settings.prompt_column):
        return "; the prompts are plain text, but the model has a chat template: as_chat=True (--as-chat) applies it."
    return "."


def process_state() -> PartialState:
    """The processes that `accelerate` launched together; on a CPU it finds them only if `cpu` is set."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=WAIT)


class Progress:
    """
    A progress bar of prompts, with blocks per second; `total` is `None` if unknown. If `show` is a function, it is
    called with both counts instead.
    """

    def __init__(self, total: int | None, show: bool | Callable[[int, int | None], None]):
        self.tell = show if callable(show) else None
        self.done, self.total = 0, total
        self.bar = tqdm(total=total, unit=" prompts", disable=self.tell is not None or not show, desc="trajectories")
        self.blocks = 0
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def skip(self, prompts: int) -> None:
        """Skips prompts that are already done, or that another process handles."""
        self._count(prompts)
        if not self.bar.disable:
            self.bar.initial += prompts  # so that they do not count in the rate and the time left
            self.bar.update(prompts)

    def advance(self, prompts: int, blocks: int) -> None:
        """Counts prompts that have just been completed."""
        self._count(prompts)
        self.blocks += blocks
        rate = self.blocks / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:.1f} blocks/s", refresh=False)
        self.bar.update(prompts)

    def _count(self, prompts: int) -> None:
        self.done += prompts
        if self.tell is not None:
            self.tell(self.done, self.total)


def describe(model) -> dict[str, Any]:
    """Identifies a model by its class, its dtype, a digest of some of its weights, and its active adapters."""
    inner = unwrap(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in inner.named_parameters():
        step = max(1, weight.numel() // 16)
        digest.update(name.encode())
        if weight.device.type != "meta":  # offloaded
            digest.update(weight.detach().flatten()[::step][:16].float().cpu().numpy().tobytes())
    layers: list[Any] = [module for module in inner.modules() if hasattr(module, "disable_adapters")]
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
    Reads the counts of a folder that `collect_trajectories` wrote, finished or not, and the prompts left out.

    Raises:
        `OSError`: the folder holds no trajectories.
        `ValueError`: one of its files is damaged; the message names it.
    """
    notes = notes_in(folder, NAME)
    counts: Counter = Counter()
    for note in notes:
        counts.update(note["counts"])
    return CollectReport.from_counts(counts, [reason for note in notes for reason in note["skipped"]])
