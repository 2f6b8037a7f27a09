"""What cannot be trained on, refused before the training begins, with what to do about it."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ..decoding.errors import UsageError
from ..trajectories.packing import COLUMNS
from .rows import BlockSizes, Flat, block_sizes, find_fault, flat_batches, flat_rows, iter_rows


LOOKED_AT = 64  # rows of a stream before the training; the others are looked at as they come


class RowCheck:
    """
    Refuses rows that are not packed, or do not fit the model.

    Args:
        model: the causal language model.
        block_size: what the blocks are expected to have, if anything.
    """

    def __init__(self, model, block_size: int | None):
        config = model.config.get_text_config(decoder=True)
        self.model = type(model).__name__
        self.vocabulary = config.vocab_size
        self.positions = getattr(config, "max_position_embeddings", None)
        self.block_size = block_size

    def all(self, name: str, dataset) -> int | None:
        """
        Looks at all rows of a data set; of a stream, which has no length, at the first ones.

        Args:
            name: of the argument, for the message.
            dataset: the data.

        Returns:
            the length of their blocks, that of the longest.

        Raises:
            `ValueError`: names the row that is wrong.
        """
        name = f"`{name}`"
        if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
            raise UsageError(f"{name} must be what pack_trajectories returns, got {type(dataset).__name__}.")
        is_stream = not hasattr(dataset, "__len__")
        head = list(islice(iter_rows(dataset), LOOKED_AT if is_stream else 1))
        self._check_kind(name, head)
        longest, several = 0, False
        for first, rows in flat_batches(head if is_stream else dataset, name):
            self._check(name, first, rows)
            sizes = block_sizes(rows)
            longest, several = max(longest, sizes.longest), several or sizes.several
        self._check_blocks(name, BlockSizes(longest, several))
        return longest or None

    def some(self, rows: list[dict[str, Any]]) -> None:
        """Looks at rows of a stream as they come."""
        self._check("a batch", 0, flat_rows(rows, "a batch"))

    def _check_kind(self, name: str, head: list) -> None:
        if not head:
            raise UsageError(f"{name} is empty: collect trajectories and pack them first.")
        if not hasattr(head[0], "keys"):
            raise UsageError(f"{name} has no rows with columns: pass what pack_trajectories returns.")
        if "trajectories" in head[0]:
            raise UsageError(f"{name} holds trajectories: pass what pack_trajectories makes of them.")
        if missing := [column for column in COLUMNS if column not in head[0]]:
            raise UsageError(f"{name} lacks the columns {missing}: pass what pack_trajectories returns.")

    def _check(self, name: str, first: int, rows: Flat) -> None:
        fault = find_fault(rows, self.vocabulary, self.positions)
        if fault is not None:
            raise UsageError(
                f"row {first + fault.row} of {name} {fault.what.replace('the model', self.model)}: it was packed "
                "with another tokenizer or for another model, or changed since; pack the trajectories again."
            )

    def _check_blocks(self, name: str, found: BlockSizes) -> None:
        asked = self.block_size
        if asked is not None and (found.longest > asked or (found.longest < asked and found.several)):
            raise UsageError(f"{name} has blocks of {found.longest} tokens, but block_size={asked}: make them agree.")


def check_tokenizer(tokenizer: Any, model) -> None:
    """Raises `ValueError` for a tokenizer of another model: one with many tokens that the model does not have."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "__len__"):
        raise UsageError(f"`processing_class` must be a tokenizer, got {tokenizer!r:.60}.")
    if len(tokenizer) > vocabulary + 8:  # some models leave out a token or two that their tokenizer has
        raise UsageError(
            f"the tokenizer makes {len(tokenizer)} tokens, but {type(model).__name__} knows {vocabulary}: pass the "
            "tokenizer of this model."
        )


def check_precision(args) -> None:
    """Raises `ValueError` for float16 on a CPU, which transformers would leave out without a word."""
    if args.fp16 and args.device.type == "cpu":
        raise UsageError("`fp16` needs a GPU: pass bf16=True, or train in float32, on a CPU.")


def check_score(score, prompts: list[list[int]], tokenizer) -> None:
    """Raises `ValueError` for a scoring function that cannot be called, or has nothing to score."""
    if score is None:
        return
    if not callable(score):
        raise UsageError(f"`eval_score` must be a function of a prompt and its completion, got {score!r:.60}.")
    if not prompts:
        raise UsageError("`eval_score` is for held-out prompts: pass an `eval_dataset`, and eval_prompts above 0.")
    if tokenizer is None:
        raise UsageError("`eval_score` reads text: pass the tokenizer as `processing_class`.")


def check_shares(args) -> None:
    """Raises `ValueError` where processes would get different numbers of batches, and wait for each other."""
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise UsageError(
            f"`even_batches=False` gives some of {args.world_size} processes fewer batches, for which others wait: "
            "leave it out; each row of an evaluation counts once all the same."
        )


def never_dispatch(args) -> None:
    """
    Has each process read a stream by itself and take its rows, where one process would by accelerate's default join
    batches of different lengths for the others.

    Raises:
        `ValueError`: that is asked for.
    """
    if args.world_size == 1:
        return
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise UsageError(
            "`dispatch_batches=True` joins the batches of all processes, whose rows differ in length: leave it out."
        )
    args.accelerator_config.dispatch_batches = False


def check_best_model(model, args) -> None:
    """Raises `ValueError` for adapters whose best checkpoint transformers would not find again."""
    names = getattr(model, "active_adapters", ["default"]) if hasattr(model, "peft_config") else ["default"]
    if args.load_best_model_at_end and list(names) != ["default"]:
        raise UsageError(
            f"`load_best_model_at_end` finds the checkpoint of one adapter named 'default' alone, but {list(names)} "
            "are active: leave it out, or rename the adapter."
        )


def refuse_split_rows(args, config=None) -> None:
    """
    Raises `ValueError` for context and sequence parallelism, which give each process a part of every row and a causal
    mask for it, whatever mask there was.

    Args:
        args: the training arguments.
        config: accelerate's `ParallelismConfig`, if there is one already.
    """
    sizes = {}
    for found in (config, getattr(args, "parallelism_config", None)):
        for name in ("cp_size", "sp_size"):
            size = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
            sizes[name] = max(sizes.get(name, 1), size or 1)
    for name in ("cp_size", "sp_size"):  # of `accelerate launch`
        given = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "")
        sizes[name] = max(sizes[name], int(given) if given.isdigit() else 1)
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    sizes["sequence_parallel_size"] = deepspeed.get("sequence_parallel_size") or 1
    if asked := [f"{name}={size}" for name, size in sizes.items() if size != 1]:
        raise UsageError(
            f"context and sequence parallelism ({', '.join(asked)}) would put a causal mask in the place of the one "
            "that keeps noise out of the text: leave them out, and share the rows among processes instead (DDP, FSDP, "
            "DeepSpeed ZeRO)."
        )


def refuse_without_sharding(trainer) -> None:
    """Raises `ValueError` where FSDP was asked for, and accelerate, which has it for GPUs alone, would do without."""
    asked = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and trainer.accelerator.num_processes > 1 and not trainer.is_fsdp_enabled:
        raise UsageError(
            f"FSDP was asked for, but accelerate has none for processes on a {trainer.args.device.type}, and would "
            "copy the whole model to each of them: leave FSDP out, or run on GPUs."
        )


def refuse_unsharded(trainer) -> None:
    """Raises `ValueError` for an evaluation before FSDP 2 has sharded the model."""
    if getattr(trainer.accelerator, "is_fsdp2", False) and not isinstance(trainer.model, FSDPModule):
        raise UsageError(
            "FSDP 2 shards a model when its training begins: evaluate after train(), with eval_on_start=True, or "
            "without FSDP."
        )


def refuse_prepared(trainer) -> None:
    """Raises `ValueError` for a training with DeepSpeed after an evaluation or another training, of another engine."""
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        raise UsageError(
            "with DeepSpeed a trainer trains once, and not after an evaluation: make a trainer anew, and pass "
            "eval_on_start=True to evaluate first."
        )


def keep_sums_whole(trainer) -> None:
    """
    Has FSDP 2 leave outputs in their precision. What a forward returns here are sums over thousands of tokens, which
    accelerate asks for in half precision where the weights are.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
