"""`JacobiForcingTrainer`: a `transformers.Trainer` that teaches a model to decode in parallel."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, set_seed

from ..decoding.compat import (
    attention_of,
    forget_preparation,
    leave_loss_as_it_is,
    make_own,
    name_of,
    on_device,
    warn_of_untested_version,
    without_checkpointing,
)
from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError
from ..decoding.mixin import unwrap
from ..hub.card import NOTE, render_card, training_note
from ..trajectories.checks import check_weights
from .adapters import NoisyTokens, add_adapter
from .callbacks import DecodingCallback, SkippingBrokenSteps, prompts_of, texts_of_base
from .checks import (
    RowCheck,
    check_arguments,
    check_best_model,
    check_optimizer,
    check_score,
    check_tokenizer,
    keep_sums_whole,
    refuse_prepared,
    refuse_split_rows,
    refuse_unsharded,
    refuse_unsupported,
    refuse_without_sharding,
)
from .collator import FILL, PLAN, PackedCollator, Plan, Planner
from .config import JacobiForcingConfig
from .figures import Score
from .forward import Head, RouterLoss, check_compilable, compiled_layers, forward_as, run_decoder
from .losses import Targets, Terms, sum_losses
from .mask import FLEX_MULTIPLE, RowTensors, refuse_untrainable, training_mask
from .refresh import Refresh, RefreshedRows, Refreshing, check_refresh
from .text_once import TextOnce, can_split
from .windows import attending_by_windows, can_be_windowed


if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig
    from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback


class JacobiForcingTrainer(Trainer):
    """
    Trains a causal language model on packed trajectories (paper, section 3.2).

    The parameters are those of `transformers.Trainer`, in its order, followed by `peft_config`, `eval_score` and
    `refresh`.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`):
            The model, or its name or folder, from which it is loaded with `args.model_init_kwargs`.
        args ([`JacobiForcingConfig`], *optional*):
            The arguments.
        data_collator (`Callable`, *optional*):
            Makes a batch from packed rows; `PackedCollator` by default.
        train_dataset (`datasets.Dataset`, *optional*):
            The result of [`pack_trajectories`]. Without a name, it can also be the third argument.
        eval_dataset (`datasets.Dataset` or a `dict` of them, *optional*):
            The same, held out.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; loaded from the model's folder by default.
        model_init, compute_loss_func, compute_metrics, preprocess_logits_for_metrics:
            Not supported: anything but `None` is refused.
        callbacks, optimizers, optimizer_cls_and_kwargs:
            As in `transformers.Trainer`.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter with this configuration instead of the whole model.
        eval_score (`Callable`, *optional*):
            Tells whether an answer is correct, from the text of a held-out prompt and that of its completion, both
            without special tokens. Adds `eval_score`, the share of correct answers, and
            `eval_tokens_per_forward_right`, their speed.
        refresh ([`Refresh`], *optional*):
            The prompts from which new trajectories replace the rows every `args.refresh_steps` steps.

    Raises:
        `ValueError`: the data are not packed, or do not fit the model or the tokenizer; or the model or the arguments
            are not supported. The message says what to do.

    Example:

    ```python
    >>> trainer = JacobiForcingTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     args=JacobiForcingConfig(output_dir="out", learning_rate=1e-5),
    ...     train_dataset=packed,
    ... )
    >>> trainer.train()
    ```
    """

    args: JacobiForcingConfig
    model: torch.nn.Module
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the counts of all micro-batches

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str | None = None,
        args: JacobiForcingConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset | None = None,
        eval_dataset: datasets.Dataset | torch.utils.data.Dataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        eval_score: Score | None = None,
        refresh: Refresh | None = None,
    ):
        warn_of_untested_version()
        args = JacobiForcingConfig(output_dir="jacobi-forcing") if args is None else args
        check_arguments(args)
        refuse_unsupported(model, model_init, compute_loss_func, compute_metrics, preprocess_logits_for_metrics)
        check_optimizer(optimizers[0], model, peft_config)
        data_collator, train_dataset = in_order(data_collator, train_dataset)
        model, processing_class = self._load(model, args, processing_class)
        inner = unwrap(model)
        self._examine(inner, args)
        data = by_argument(train_dataset, eval_dataset)
        sizes = [self._check(name, some, args) for name, some in data.items()]
        self.block_size = args.block_size or next(filter(None, sizes), None)
        if processing_class is not None:
            check_tokenizer(processing_class, inner)
        prompts = prompts_of(first_of(eval_dataset), args.eval_prompts)
        check_score(eval_score, prompts, processing_class)
        check_refresh(refresh, args, processing_class, train_dataset)
        if refresh is not None:
            train_dataset = RefreshedRows(train_dataset, args)
            args.train_sampling_strategy = "sequential"  # its rows are in order
        before = None if peft_config is None else texts_of_base(inner, prompts, args)  # an adapter can change them
        model = self._adapted(model, peft_config, args)
        if data_collator is None:
            data_collator = self._collator(inner, args, processing_class, any(map(is_stream, data.values())))
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._seconds = 0.0  # spent in training steps since the last log
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._check_launch()
        self.text_once = self._make_text_once(inner)
        self.planner.text_once = self.text_once is not None
        self._set_decoding(inner)
        self._add_callbacks(prompts, before, eval_score, refresh, train_dataset)

    # Construction

    def _load(self, model: Any, args: JacobiForcingConfig, tokenizer: Any) -> tuple[Any, Any]:
        """The model, loaded if it is given by name, and its tokenizer, if one is found."""
        self.base_name = model if isinstance(model, str) else name_of(unwrap(model))
        if isinstance(model, str):
            model_init_kwargs = args.model_init_kwargs
            assert not isinstance(model_init_kwargs, str)  # `JacobiForcingConfig` reads JSON
            model = load_model(model, model_init_kwargs)
        elif args.model_init_kwargs:
            raise UsageError("`model_init_kwargs` needs a model given by name: drop it, or pass the name.")
        if tokenizer is None and self.base_name:
            tokenizer = find_tokenizer(self.base_name)
        return model, tokenizer

    def _examine(self, model: PreTrainedModel, args: JacobiForcingConfig) -> None:
        """Refuses a model that cannot be trained, and prepares what depends on its architecture."""
        refuse_untrainable(model)
        check_weights(model)
        self.windowed = can_be_windowed(model)
        self.planner = Planner(args.within_block, self.windowed)
        self.head = Head(model)
        self.head.check()
        self.router_loss = RouterLoss(model)
        if args.compile_layers:
            check_compilable(model)
        self._row_check = RowCheck(model, args.block_size)
        self._checked: list[Any] = []

    def _adapted(self, model: Any, peft_config: PeftConfig | None, args: JacobiForcingConfig) -> torch.nn.Module:
        if peft_config is not None:
            set_seed(args.seed)  # for the adapter's first weights: `Trainer` seeds only later
        adapted = add_adapter(model, peft_config, args)
        check_best_model(adapted, args)
        self.noisy_tokens = NoisyTokens(adapted) if args.adapter_scope == "draft" else None
        return adapted

    def _collator(
        self, model: PreTrainedModel, args: JacobiForcingConfig, tokenizer: Any, stream: bool
    ) -> PackedCollator:
        flex = attention_of(model.config.get_text_config(decoder=True)) == "flex_attention"
        return PackedCollator(
            pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
            multiple=FLEX_MULTIPLE if flex else 1,
            as_drafts=args.adapter_scope == "draft",
            check=self._row_check.some if stream else None,
            planner=self.planner,
        )

    def _check_launch(self) -> None:
        """Refuses what only `Trainer` can tell: how processes and devices work together."""
        leave_loss_as_it_is(self)
        refuse_split_rows(self.args, getattr(self.accelerator, "parallelism_config", None))
        refuse_without_sharding(self)
        keep_sums_whole(self)
        if self.args.n_gpu > 1:
            raise UsageError(
                f"{self.args.n_gpu} GPUs are visible to one process: start one process for each with "
                "`accelerate launch`, or restrict it to one with CUDA_VISIBLE_DEVICES."
            )

    def _set_decoding(self, model: PreTrainedModel) -> None:
        """Makes the saved checkpoint decode with Jacobi decoding by default."""
        make_own(model.generation_config)
        vars(model.generation_config).update(decoding="jacobi", jacobi=self.jacobi_config.to_dict())

    def _add_callbacks(
        self,
        prompts: list[list[int]],
        before: list[list[int]] | None,
        score: Score | None,
        refresh: Refresh | None,
        rows: Any,
    ) -> None:
        self.broken_steps = SkippingBrokenSteps(self)
        self.add_callback(self.broken_steps)
        if refresh is not None:
            self.add_callback(Refreshing(self, refresh, rows))
        self.decoding = DecodingCallback(self, prompts, before, score) if prompts else None
        if self.decoding:
            self.add_callback(self.decoding)

    def _check(self, name: str, dataset, args: JacobiForcingConfig) -> int | None:
        """Refuses wrong data, once; returns the length of their longest block."""
        if dataset is None or any(known is dataset for known in self._checked):
            return None
        if name != "train_dataset" and args.world_size > 1 and is_stream(dataset):
            raise UsageError(
                f"`{name}` is a stream, of which {args.world_size} processes would count some rows twice: pass a data "
                "set with a length."
            )
        size = self._row_check.all(name, dataset)
        self._checked.append(dataset)
        return size

    def _make_text_once(self, model: PreTrainedModel) -> TextOnce | None:
        """What runs the text of a draft-only adapter once for all noise, if the model and the settings allow it."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        checkpointing, compiled = bool(self.args.activation_checkpointing), self.args.compile_layers
        others = self.router_loss.weight or sharded
        if not self.noisy_tokens or others or not can_split(model, checkpointing, compiled):
            return None
        text_once = TextOnce(model, self.noisy_tokens, self.windowed, compiled)
        return text_once if text_once.check(model) else None

    @property
    def jacobi_config(self) -> JacobiConfig:
        """How the checkpoint decodes: as the arguments say, or with blocks as long as those of the data."""
        settings = self.args.jacobi_config
        if settings is not None:
            assert not isinstance(settings, str)  # `JacobiForcingConfig` reads JSON
            return JacobiConfig.coerce(settings)
        return JacobiConfig(block_size=self.block_size)

    # The loss

    @property
    def ar_loss_weight(self) -> float:
        """Lambda at this step: `args.ar_loss_weight`, or a value between `args.ar_loss_weight_start` and it."""
        if not self.model.training or not self.state.max_steps:
            return self.args.ar_loss_weight
        return self._ar_loss_weight_at(self.state.global_step)

    def _ar_loss_weight_at(self, step: int) -> float:
        start, end = self.args.ar_loss_weight_start, self.args.ar_loss_weight
        if start is None:
            return end
        done = (step / max(1, self.state.max_steps - 1)) ** 2
        return start ** (1 - done) * end**done

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`, with the token counts of the losses over all micro-batches and processes, `[3]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch if PLAN in batch else {**batch, PLAN: self.planner(batch)} for batch in batches]
        counts = [sum(some) for some in zip([0, 0, 0], *(batch[PLAN].targets.counts for batch in batches))]
        return batches, self.accelerator.reduce(torch.tensor(counts, device=device), "sum")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None) -> Any:
        """
        Consistency loss + lambda times autoregressive loss (paper, section 3.2), each the mean over its tokens; plus
        the router loss of a mixture of experts, if the model's configuration turns it on.

        Args:
            model: the model, wrapped or not.
            inputs: a collated batch; if your own collator made no plan, it is made here.
            return_outputs: whether to return the `Terms`, too.
            num_items_in_batch: `[3]`, the counts to divide by; by default those of this batch.
        """
        plan = inputs[PLAN] if PLAN in inputs else self.planner(inputs)
        targets = plan.targets
        with self.accelerator.autocast():
            terms = self.sum_losses(model, inputs, plan)
        counts = torch.as_tensor(targets.counts if num_items_in_batch is None else num_items_in_batch)
        ar_count, consistency_count, token_count = counts.clamp(min=1)
        loss = terms.consistency / consistency_count + self.ar_loss_weight * terms.ar / ar_count
        if self.router_loss.weight:
            loss = loss + self.router_loss.weight * terms.router / token_count
        self._count("train" if self.model.training else "eval", targets, terms)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, terms) if return_outputs else loss

    def sum_losses(self, model, batch: dict[str, Any], plan: Plan) -> Terms:
        """Runs a batch through the model, and returns the sums of its losses."""
        rows = RowTensors.of(batch)
        dtype = self._dtype()

        def method(inner, input_ids, attention_mask, position_ids, **ignored) -> Terms:
            if self.text_once:
                assert plan.split is not None  # `planner.text_once` is set with `text_once`
                hidden = self.text_once(inner, input_ids, rows, plan.split, dtype)
                return self.head.in_one_call(partial(self._terms_of, plan), hidden)  # type: ignore[no-any-return]
            router = {"output_router_logits": True} if self.router_loss.weight else {}
            outputs = run_decoder(
                inner, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **router
            )
            terms = self.head.in_one_call(partial(self._terms_of, plan), outputs.last_hidden_state)
            if not router:
                return terms
            by_row = not self.model.training
            return terms._replace(router=self.router_loss(outputs.router_logits, plan.targets.present, by_row))

        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids")}
        with ExitStack() as stack:
            stack.enter_context(self._attention())
            if self.text_once:
                stack.enter_context(self.text_once.noisy_tokens.in_two_forwards())
            inputs |= self.noisy_tokens.inputs(rows, plan.noisy_tokens) if self.noisy_tokens else {}
            return forward_as(model, method, attention_mask=self._mask(rows, plan, dtype), **inputs)

    def _dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        device = self.accelerator.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.head.model.dtype

    def _mask(self, rows: RowTensors, plan: Plan, dtype: torch.dtype) -> Any:
        """What the attention of a single forward takes as its mask."""
        if self.text_once:
            return None
        if self.windowed:
            return plan.segments
        return training_mask(rows, self.head.model.config.get_text_config(decoder=True), dtype)

    def _terms_of(self, plan: Plan, head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> Terms:
        clean, noisy, _ = plan.targets.counts
        return sum_losses(
            head,
            hidden,
            plan.targets,
            kind=self.args.consistency_loss,
            temperature=self.args.temperature,
            label_smoothing=self.args.label_smoothing_factor,
            chunk_size=max(1, self.args.loss_chunk_size * clean // max(1, clean, noisy)),
            accept_cut=self.args.accept_cut,
            place_weight=self.args.block_position_weight,
            trained_head=self.head.is_trained,
            text_learns=self.noisy_tokens is None,  # a draft-only adapter does not change the text
        )

    def _attention(self) -> AbstractContextManager:
        whole = self.windowed and not self.text_once
        return attending_by_windows(self.head.model) if whole else nullcontext()

    @contextmanager
    def _one_batch(self):
        """While this is open, the forward's attention and adapter hold for what the backward pass recomputes."""
        with ExitStack() as stack:
            stack.enter_context(self._attention())
            if self.noisy_tokens:
                tokens = self.noisy_tokens
                stack.enter_context(tokens.one_batch())
                stack.enter_context(tokens.in_two_forwards() if self.text_once else tokens.in_one_piece())
            yield

    def train(self, *args, **kwargs):
        """As in `Trainer`; with `compile_layers`, the layers are compiled meanwhile."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                "the model has no trainable weight: load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), or pass a `peft_config`."
            )
        refuse_prepared(self)
        if self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            forget_preparation(self)
        with ExitStack() as stack:
            if self.args.compile_layers:
                stack.enter_context(compiled_layers(self.head.model))
                if self.noisy_tokens:  # the same forwards in all steps, or they would recompile
                    tokens = self.noisy_tokens
                    stack.enter_context(tokens.in_two_forwards() if self.text_once else tokens.in_one_piece())
            return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """As in `Trainer`; the forward's attention and adapter hold for what the backward pass recomputes."""
        start = time.perf_counter()
        with self._one_batch():
            loss = super().training_step(*args, **kwargs)
        self._seconds += time.perf_counter() - start
        return loss

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As in `Trainer`; checks the data first."""
        if isinstance(eval_dataset, str):
            known = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if eval_dataset not in known:
                raise UsageError(f"there is no evaluation set {eval_dataset!r}: the names are {known}.")
        elif not isinstance(eval_dataset, dict):
            self._check("eval_dataset", eval_dataset, self.args)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        """As in `Trainer`, but with all rows: `dataloader_drop_last` applies to training only."""
        with self._all_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        """As in `Trainer`, but with all rows."""
        with self._all_rows():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _all_rows(self):
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop

    def predict(self, test_dataset, *args, **kwargs):
        """As in `Trainer`; checks the data first."""
        if test_dataset is None:
            raise UsageError("`test_dataset` is missing: pass what pack_trajectories returns.")
        self._check("test_dataset", test_dataset, self.args)
        return super().predict(test_dataset, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch, without logits: those of whole rows would fill the memory."""
        inputs = self._each_once(inputs)
        with torch.no_grad(), without_checkpointing(self.head.model), self._one_batch():
            loss: torch.Tensor = self.compute_loss(model, on_device(self, inputs))
        return loss.detach(), None, None

    def _each_once(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        A batch with padding in place of repeated rows, and its plan: accelerate fills the last round of batches with
        rows from the start of the data, so that all processes have equally many.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        rows = len(batch["input_ids"])
        new = min(max(0, state.remainder - self.accelerator.process_index * rows), rows)
        old = torch.arange(rows, device=batch["input_ids"].device) >= new
        filled = {name: batch[name].masked_fill(old[:, None], fill) for name, fill in FILL.items()}
        batch = {name: values for name, values in batch.items() if name != PLAN} | filled
        return {**batch, PLAN: self.planner(batch)}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """As in `Trainer`, with the means of the losses over the whole set, and the figures of decoding prompts."""
        refuse_unsharded(self)
        self._sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        figures = self._means_of(self._take_sums("eval"))
        figures["loss"] = figures["consistency_loss"] + self.args.ar_loss_weight * figures["ar_loss"]
        figures["loss"] += self.router_loss.weight * figures.get("router_loss", 0.0)
        if self.decoding and metric_key_prefix.startswith("eval"):
            figures |= self.decoding.figures()
        named = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # What is logged

    def _count(self, mode: str, targets: Targets, terms: Terms) -> None:
        clean, noisy, tokens = targets.counts
        counted = {
            "consistency": terms.uncut,
            "ar": terms.ar.detach(),
            "right": terms.right.detach(),
            "router": terms.router.detach() if isinstance(terms.router, torch.Tensor) else 0.0,
            "clean": clean,
            "noisy": noisy,
            "tokens": tokens,
        }
        for name, value in counted.items():
            self._sums[mode][name] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in `Trainer`, with the means since the last log of the losses, the share of noisy positions predicted
        correctly and the tokens per second; the number of skipped steps so far; and lambda, if it grows.
        """
        if "loss" in logs:
            seconds, self._seconds = max(self._seconds, 1e-9), 0.0
            sums = self._take_sums("train")
            logs = {**logs, **self._means_of(sums), "tokens_per_second": sums["tokens"] / seconds}
            logs["skipped_steps"] = self.broken_steps.skipped
            if self.args.ar_loss_weight_start is not None:
                logs["ar_loss_weight"] = self._ar_loss_weight_at(self.state.global_step - 1)  # of the step just taken
        super().log(logs, start_time)

    def _take_sums(self, mode: str) -> dict[str, float]:
        """The sums of a mode over all processes; resets them."""
        names = ("consistency", "ar", "right", "router", "noisy", "clean", "tokens")
        local = torch.tensor([float(self._sums[mode][name]) for name in names], device=self.accelerator.device)
        self._sums[mode].clear()
        return dict(zip(names, self.accelerator.reduce(local, "sum").tolist()))

    def _means_of(self, sums: dict[str, float]) -> dict[str, float]:
        router = {"router_loss": sums["router"] / max(1.0, sums["tokens"])} if self.router_loss.weight else {}
        return means_of(sums) | router

    # What is saved

    @property
    def output_folder(self) -> Path:
        assert self.args.output_dir is not None  # `TrainingArguments` sets a default
        return Path(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """Saves the model, its generation config, the tokenizer and a model card."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            folder = self.output_folder if output_dir is None else Path(output_dir)
            # PEFT saves no generation config with an adapter.
            unwrap(self.model).generation_config.save_pretrained(folder)
            self._write_card(folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the model card into `args.output_dir`; `push_to_hub` calls it."""
        if self.is_world_process_zero():
            self._write_card(self.output_folder, kwargs.get("model_name"), kwargs.get("dataset_name"))

    def _write_card(self, folder: Path, model_name: str | None = None, dataset_name: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        adapted = unwrap(self.model) is not self.accelerator.unwrap_model(self.model)
        scope = "draft-only adapter" if self.args.adapter_scope == "draft" else "adapter"
        note = training_note(
            base=self.base_name,
            dataset=dataset_name,
            kind=scope if adapted else "model",
            args=self.args,
            jacobi=self.jacobi_config,
            history=self.state.log_history,
            step=self.state.best_global_step if self.args.load_best_model_at_end else None,
        )
        name = self.hub_model_id or self.args.hub_model_id or model_name or self.output_folder.name
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        card = render_card(name, note)
        (folder / "README.md").write_text(card, encoding="utf-8")


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """Both losses and the share of noisy positions predicted correctly, from the sums of `JacobiForcingTrainer`."""
    return {
        "consistency_loss": sums["consistency"] / max(1.0, sums["noisy"]),
        "ar_loss": sums["ar"] / max(1.0, sums["clean"]),
        "noisy_accuracy": sums["right"] / max(1.0, sums["noisy"]),
    }


def in_order(collator: Any, dataset: Any) -> tuple[Any, Any]:
    """A collator and the training set; the latter was the third parameter before the order was that of `Trainer`."""
    if collator is None or callable(collator):
        return collator, dataset
    if dataset is None and (hasattr(collator, "__getitem__") or hasattr(collator, "__iter__")):
        return None, collator
    raise UsageError(
        f"`data_collator` must be a function of rows, got {type(collator).__name__}: pass data as `train_dataset` and "
        "`eval_dataset`, by name."
    )


def by_argument(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The data sets by the names that messages use."""
    several = eval_dataset if isinstance(eval_dataset, dict) else {}
    held_out = {f"eval_dataset[{name!r}]": dataset for name, dataset in several.items()}
    return {"train_dataset": train_dataset} | (held_out or {"eval_dataset": eval_dataset})


def first_of(eval_dataset: Any) -> Any:
    """The evaluation set, or the first of several."""
    return next(iter(eval_dataset.values()), eval_dataset) if isinstance(eval_dataset, dict) else eval_dataset


def is_stream(dataset: Any) -> bool:
    """Whether a data set has no length."""
    return dataset is not None and not hasattr(dataset, "__len__")


def find_tokenizer(name: str) -> Any:
    """The tokenizer in a model's folder, or `None`: training does not need one."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def load_model(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """
    Loads a model. Unless `init_kwargs` say otherwise, it is in float32, and uses FlexAttention on a GPU if it can.

    Args:
        name: a folder or a Hub id.
        init_kwargs: arguments of `from_pretrained`.
    """
    # float32 whatever the dtype of the checkpoint, as in TRL: half precision would lose small updates.
    settings: dict[str, Any] = {"dtype": "float32"} | (init_kwargs or {})
    if settings.get("attn_implementation") is None and torch.cuda.is_available():
        try:
            return AutoModelForCausalLM.from_pretrained(name, **settings | {"attn_implementation": "flex_attention"})
        except ValueError:  # the model does not support it
            pass
    return AutoModelForCausalLM.from_pretrained(name, **settings)
