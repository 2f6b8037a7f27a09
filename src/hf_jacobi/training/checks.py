"""Refuses, before training begins, data and settings that it cannot use, each with the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ..decoding.errors import UsageError
from ..trajectories.packing import COLUMNS
from .config import JacobiForcingConfig
from .rows import BlockSizes, Flat, block_sizes, find_fault, flat_batches, flat_rows, iter_rows


if TYPE_CHECKING:
    from .trainer import JacobiForcingTrainer


LOOKED_AT = 64  # rows of a stream checked before training; the collator checks the others


class RowCheck:
    """
    Refuses rows that are not packed, or do not fit the model.

    Args:
        model: the causal language model.
        block_size: the expected block size; `None` accepts any.
    """

    def __init__(self, model, block_size: int | None):
        config = model.config.get_text_config(decoder=True)
        self.model = type(model).__name__
        self.vocabulary = config.vocab_size
        self.positions = getattr(config, "max_position_embeddings", None)
        self.block_size = block_size

    def all(self, name: str, dataset) -> int | None:
        """
        Checks all rows of a data set, or the first ones of a stream, which has no length.

        Args:
            name: the name of the argument, for messages.
            dataset: the data.

        Returns:
            the length of the longest block, in tokens.

        Raises:
            `ValueError`: a row is wrong; the message names it.
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
        """Checks the rows of a batch, for a stream."""
        self._check("a batch", 0, flat_rows(rows, "a batch"))

    def _check_kind(self, name: str, head: list[Any]) -> None:
        if not head:
            raise UsageError(f"{name} is empty: collect and pack trajectories first.")
        if not hasattr(head[0], "keys"):
            raise UsageError(f"{name} has no rows with columns: pass what pack_trajectories returns.")
        if "trajectories" in head[0]:
            raise UsageError(f"{name} holds trajectories: pack them with pack_trajectories first.")
        if missing := [column for column in COLUMNS if column not in head[0]]:
            raise UsageError(f"{name} lacks the columns {missing}: pass what pack_trajectories returns.")

    def _check(self, name: str, first: int, rows: Flat) -> None:
        fault = find_fault(rows, self.vocabulary, self.positions)
        if fault is not None:
            raise UsageError(
                f"row {first + fault.row} of {name} {fault.what.replace('the model', self.model)}: it was packed with "
                "another tokenizer, for another model, or changed afterwards; pack the trajectories again."
            )

    def _check_blocks(self, name: str, found: BlockSizes) -> None:
        size = self.block_size
        if size is not None and (found.longest > size or (found.longest < size and found.several)):
            raise UsageError(
                f"{name} has blocks of {found.longest} tokens, but block_size={size}: they must be equal."
            )


def check_tokenizer(tokenizer: Any, model) -> None:
    """Raises `ValueError` for another model's tokenizer: one with more tokens than the model has."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "__len__"):
        raise UsageError(f"`processing_class` must be a tokenizer, got {tokenizer!r:.60}.")
    if len(tokenizer) > vocabulary + 8:  # some models lack a token or two of their tokenizer
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, but {type(model).__name__} has {vocabulary}: pass the "
            "tokenizer of this model."
        )


def check_arguments(args: Any) -> None:
    """Raises `ValueError` for training arguments of another trainer, or that this one does not support."""
    if not isinstance(args, JacobiForcingConfig):
        raise UsageError(f"`args` must be a JacobiForcingConfig, got {type(args).__name__}.")
    refuse_split_rows(args)
    check_precision(args)
    check_shares(args)
    never_dispatch(args)


def refuse_unsupported(
    model: Any,
    model_init: Callable | None,
    compute_loss_func: Callable | None,
    compute_metrics: Callable | None,
    preprocess_logits_for_metrics: Callable | None,
) -> None:
    """Raises `ValueError` for parameters of `transformers.Trainer` that this trainer would ignore."""
    if model is None or model_init is not None:
        raise UsageError(
            "`model_init`, and with it the search for hyperparameters, is not supported: pass `model`, and make a "
            "trainer for each trial."
        )
    if compute_loss_func is not None:
        raise UsageError(
            "`compute_loss_func` is not supported, as the trainer computes the losses of Jacobi Forcing: omit it, and "
            "set `consistency_loss` and `ar_loss_weight` in `args`."
        )
    for name, function in (
        ("compute_metrics", compute_metrics),
        ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
    ):
        if function is not None:
            raise UsageError(f"`{name}` needs the logits of whole rows, which are never computed: omit it.")


def check_optimizer(optimizer: Any, model: Any, peft_config: Any) -> None:
    """Raises `ValueError` for an optimizer that was made before the weights that it should train."""
    if optimizer is not None and (isinstance(model, str) or peft_config is not None):
        raise UsageError(
            "`optimizers` cannot hold the weights of a model given by name or of an adapter from `peft_config`, which "
            "the trainer makes later: pass `optimizer_cls_and_kwargs`, or a model that has its adapter."
        )


def check_precision(args: JacobiForcingConfig) -> None:
    """Raises `ValueError` for float16 on a CPU, which transformers would ignore silently."""
    if args.fp16 and args.device.type == "cpu":
        raise UsageError("`fp16` needs a GPU: on a CPU, set bf16=True or train in float32.")


def check_score(score: Any, prompts: list[list[int]], tokenizer: Any) -> None:
    """Raises `ValueError` for a scoring function that is not callable, or has nothing to score."""
    if score is None:
        return
    if not callable(score):
        raise UsageError(f"`eval_score` must be a function of a prompt and its completion, got {score!r:.60}.")
    if not prompts:
        raise UsageError(
            "`eval_score` needs held-out prompts: pass an `eval_dataset` with prompts, and eval_prompts above 0."
        )
    if tokenizer is None:
        raise UsageError("`eval_score` reads text: pass the tokenizer as `processing_class`.")


def check_shares(args: JacobiForcingConfig) -> None:
    """Raises `ValueError` if processes would get different numbers of batches and wait for each other."""
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise UsageError(
            f"`even_batches=False` gives some of {args.world_size} processes fewer batches, and the others wait: omit "
            "it; an evaluation counts each row once even so."
        )


def never_dispatch(args: JacobiForcingConfig) -> None:
    """
    Makes each process read a stream itself and take its own rows. By accelerate's default, one process would read for
    all and join batches, whose rows differ in length.

    Raises:
        `ValueError`: `dispatch_batches=True`.
    """
    if args.world_size == 1:
        return
    config: Any = args.accelerator_config  # `TrainingArguments` made it an `AcceleratorConfig`
    if getattr(config, "dispatch_batches", None):
        raise UsageError(
            "`dispatch_batches=True` joins the batches of all processes, whose rows differ in length: omit it."
        )
    config.dispatch_batches = False


def check_best_model(model, args: JacobiForcingConfig) -> None:
    """Raises `ValueError` for adapters whose best checkpoint transformers would not find."""
    names = getattr(model, "active_adapters", ["default"]) if hasattr(model, "peft_config") else ["default"]
    if args.load_best_model_at_end and list(names) != ["default"]:
        raise UsageError(
            "`load_best_model_at_end` finds only the checkpoint of an adapter named 'default', but the active ones "
            f"are {list(names)}: omit it, or rename the adapter."
        )


def refuse_split_rows(args: JacobiForcingConfig, config: Any = None) -> None:
    """
    Raises `ValueError` for context and sequence parallelism, which give each process a part of every row and replace
    its mask by a causal one.

    Args:
        args: the training arguments.
        config: accelerate's `ParallelismConfig`, if it exists already.
    """
    sizes: dict[str, int] = {}
    for found in (config, getattr(args, "parallelism_config", None)):
        for name in ("cp_size", "sp_size"):
            size = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
            sizes[name] = max(sizes.get(name, 1), size or 1)
    for name in ("cp_size", "sp_size"):  # `accelerate launch` sets variables
        given = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "")
        sizes[name] = max(sizes[name], int(given) if given.isdigit() else 1)
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None) or {}
    sizes["sequence_parallel_size"] = deepspeed.get("sequence_parallel_size") or 1
    if split := [f"{name}={size}" for name, size in sizes.items() if size != 1]:
        raise UsageError(
            f"context and sequence parallelism ({', '.join(split)}) would put a causal mask in place of the one that "
            "keeps noise out of the text: omit them, and divide the rows among processes instead (DDP, FSDP, "
            "DeepSpeed ZeRO)."
        )


def refuse_without_sharding(trainer: JacobiForcingTrainer) -> None:
    """Raises `ValueError` if accelerate would ignore a request for FSDP, which it supports on GPUs only."""
    requested = trainer.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if requested and trainer.accelerator.num_processes > 1 and not trainer.is_fsdp_enabled:
        raise UsageError(
            f"accelerate does not support FSDP for processes on a {trainer.args.device.type}, and would copy the "
            "whole model to each of them: omit FSDP, or run on GPUs."
        )


def refuse_unsharded(trainer: JacobiForcingTrainer) -> None:
    """Raises `ValueError` for an evaluation before FSDP 2 has sharded the model."""
    if getattr(trainer.accelerator, "is_fsdp2", False) and not isinstance(trainer.model, FSDPModule):
        raise UsageError(
            "FSDP 2 shards a model when its training begins: evaluate after train(), with eval_on_start=True, or "
            "without FSDP."
        )


def refuse_prepared(trainer: JacobiForcingTrainer) -> None:
    """Raises `ValueError` for training with DeepSpeed after an evaluation or a training, which has another engine."""
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        raise UsageError(
            "with DeepSpeed, a trainer trains once, and not after an evaluation: make a new trainer, with "
            "eval_on_start=True to evaluate first."
        )


def keep_sums_whole(trainer: JacobiForcingTrainer) -> None:
    """
    Keeps FSDP 2 from rounding outputs to half precision, as accelerate requests for half-precision weights: a forward
    returns sums over thousands of tokens here.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
