"""`JacobiForcingTrainer`: a `transformers.Trainer` that teaches a model to decode in parallel."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

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
    check_best_model,
    check_precision,
    check_score,
    check_shares,
    check_tokenizer,
    keep_sums_whole,
    never_dispatch,
    refuse_prepared,
    refuse_split_rows,
    refuse_unsharded,
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


class JacobiForcingTrainer(Trainer):
    """
    Trains a causal language model on packed trajectories (paper, section 3.2).

    Args:
        model (`PreTrainedModel`, `PeftModel` or `str`):
            The model, or the name or folder of one, which is loaded with `args.model_init_kwargs`.
        args ([`JacobiForcingConfig`], *optional*):
            The arguments.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*):
            What [`pack_trajectories`] returns.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer; loaded beside the model when left out.
        peft_config (`PeftConfig`, *optional*):
            Trains an adapter of this kind instead of the whole model.
        eval_score (`Callable`, *optional*):
            Says of the text of a held-out prompt and that of its completion, both without special tokens, whether the
            answer is right: `eval_score` is then the share of right ones, `eval_tokens_per_forward_right` their speed.
        refresh ([`Refresh`], *optional*):
            Prompts from which fresh trajectories are collected every `args.refresh_steps` steps, in place of the rows.
        data_collator, callbacks, optimizers, others:
            As in `transformers.Trainer`.

    Raises:
        `ValueError`: the data are not packed, do not fit the model or the tokenizer, or the model cannot be trained
            so; with what to do about it.

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

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the counts of all micro-batches

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str,
        args: JacobiForcingConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        data_collator=None,
        eval_score: Score | None = None,
        refresh: Refresh | None = None,
        **others,
    ):
        if args is None:
            args = JacobiForcingConfig(output_dir="jacobi-forcing")
        warn_of_untested_version()
        if not isinstance(args, JacobiForcingConfig):
            raise UsageError(f"`args` must be a JacobiForcingConfig, got {type(args).__name__}.")
        if model is None or others.get("model_init") is not None:
            raise UsageError(
                "`model_init`, and with it the search for hyperparameters, is not supported: pass `model`, and make a "
                "trainer for each trial."
            )
        refuse_split_rows(args)
        check_precision(args)
        check_shares(args)
        never_dispatch(args)
        self.base_name = model if isinstance(model, str) else name_of(unwrap(model))
        if isinstance(model, str):
            model = load_model(model, args.model_init_kwargs)
        elif args.model_init_kwargs:
            raise UsageError("`model_init_kwargs` is for a model that is given by name: drop it, or pass the name.")
        if processing_class is None and self.base_name:
            processing_class = find_tokenizer(self.base_name)
        inner = unwrap(model)
        refuse_untrainable(inner)
        check_weights(inner)
        self.windowed = can_be_windowed(inner)
        self.planner = Planner(args.within_block, self.windowed)
        self.head = Head(inner)
        self.head.check()
        self.router_loss = RouterLoss(inner)
        if args.compile_layers:
            check_compilable(inner)
        if others.get("compute_metrics") is not None:
            raise UsageError(
                "`compute_metrics` would need the logits of whole rows, which are never made: leave it out."
            )
        several = eval_dataset if isinstance(eval_dataset, dict) else {}
        datasets = {"train_dataset": train_dataset}
        datasets |= {f"eval_dataset[{name!r}]": data for name, data in several.items()} or {
            "eval_dataset": eval_dataset
        }
        self._row_check, self._checked = RowCheck(inner, args.block_size), []
        sizes = [self._check(name, dataset, args) for name, dataset in datasets.items()]
        self.block_size = next(filter(None, sizes), None)
        if processing_class is not None:
            check_tokenizer(processing_class, inner)
        prompts = prompts_of(next(iter(several.values()), eval_dataset), args.eval_prompts)
        check_score(eval_score, prompts, processing_class)
        check_refresh(refresh, args, processing_class, train_dataset)
        if refresh is not None:
            train_dataset = RefreshedRows(train_dataset, args)
            args.train_sampling_strategy = "sequential"  # its rows are in order already
        before = None if peft_config is None else texts_of_base(inner, prompts, args)  # adapters need not begin as it
        if peft_config is not None:
            set_seed(args.seed)  # of the adapter's first weights; `Trainer` seeds when they are there
        model = add_adapter(model, peft_config, args)
        check_best_model(model, args)
        self.noisy_tokens = NoisyTokens(model) if args.adapter_scope == "draft" else None
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None) or 0
            flex = attention_of(inner.config.get_text_config(decoder=True)) == "flex_attention"
            stream = any(data is not None and not hasattr(data, "__len__") for data in datasets.values())
            data_collator = PackedCollator(
                pad,
                FLEX_MULTIPLE if flex else 1,
                args.adapter_scope == "draft",
                self._row_check.some if stream else None,
                self.planner,
            )
        self._sums = {"train": Counter(), "eval": Counter()}
        self._seconds = 0.0  # spent in training steps since the last log
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            **others,
        )
        leave_loss_as_it_is(self)
        refuse_split_rows(self.args, getattr(self.accelerator, "parallelism_config", None))
        refuse_without_sharding(self)
        keep_sums_whole(self)
        if self.args.n_gpu > 1:
            raise UsageError(
                f"{self.args.n_gpu} GPUs are visible to one process: start one process for each with "
                "`accelerate launch`, or show it one with CUDA_VISIBLE_DEVICES."
            )
        self.text_once = self._make_text_once(inner)
        self.planner.text_once = self.text_once is not None
        make_own(inner.generation_config)
        inner.generation_config.decoding = "jacobi"
        inner.generation_config.jacobi = self.jacobi_config.to_dict()
        self.broken_steps = SkippingBrokenSteps(self)
        self.add_callback(self.broken_steps)
        if refresh is not None:
            self.add_callback(Refreshing(self, refresh, train_dataset))
        self.decoding = DecodingCallback(self, prompts, before, eval_score) if prompts else None
        if self.decoding:
            self.add_callback(self.decoding)

    def _check(self, name: str, dataset, args: JacobiForcingConfig) -> int | None:
        """Refuses data that are wrong, once; the length of their blocks."""
        if dataset is None or any(known is dataset for known in self._checked):
            return None
        if name != "train_dataset" and args.world_size > 1 and not hasattr(dataset, "__len__"):
            raise UsageError(
                f"`{name}` is a stream, of which {args.world_size} processes would count some rows twice: pass a data "
                "set with a length."
            )
        size = self._row_check.all(name, dataset)
        self._checked.append(dataset)
        return size

    def _make_text_once(self, model: PreTrainedModel) -> TextOnce | None:
        """What runs the text of a draft-only adapter once, where that can be."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        others = self.args.compile_layers or self.router_loss.weight or sharded
        if not self.noisy_tokens or others or not can_split(model, bool(self.args.activation_checkpointing)):
            return None
        text_once = TextOnce(model, self.noisy_tokens, self.windowed)
        return text_once if text_once.check(model) else None

    @property
    def jacobi_config(self) -> JacobiConfig:
        """What the checkpoint decodes with: the settings of the arguments, else blocks like those of the data."""
        if self.args.jacobi_config is not None:
            return JacobiConfig.coerce(self.args.jacobi_config)
        return JacobiConfig(block_size=self.args.block_size or self.block_size)

    # The loss

    @property
    def ar_loss_weight(self) -> float:
        """Lambda at this step: that of the arguments, or on the way to it from `ar_loss_weight_start`."""
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
        """Also counts the tokens of the losses over all micro-batches of a step and all processes, `[3]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [batch if PLAN in batch else {**batch, PLAN: self.planner(batch)} for batch in batches]
        counts = [sum(some) for some in zip([0, 0, 0], *(batch[PLAN].targets.counts for batch in batches))]
        return batches, self.accelerator.reduce(torch.tensor(counts, device=device), "sum")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """
        Consistency loss + lambda times autoregressive loss (paper, section 3.2), each the mean over its tokens; and
        the router loss of a mixture of experts, where the model's configuration asks for it.

        Args:
            model: the model, wrapped or not.
            inputs: a collated batch; what it lacks of a plan, as with a collator of your own, is found here.
            return_outputs: whether to return the `Terms` too.
            num_items_in_batch: `[3]`, the counts to divide by; of this batch alone if left out.
        """
        plan = inputs[PLAN] if PLAN in inputs else self.planner(inputs)
        targets = plan.targets
        with self.accelerator.autocast():
            terms = self.sum_losses(model, inputs, plan)
        counts = torch.tensor(targets.counts) if num_items_in_batch is None else num_items_in_batch
        ar_count, consistency_count, token_count = counts.clamp(min=1)
        loss = terms.consistency / consistency_count + self.ar_loss_weight * terms.ar / ar_count
        if self.router_loss.weight:
            loss = loss + self.router_loss.weight * terms.router / token_count
        self._count("train" if self.model.training else "eval", targets, terms)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, terms) if return_outputs else loss

    def sum_losses(self, model, batch: dict[str, torch.Tensor], plan: Plan) -> Terms:
        """Runs a batch through the model: the sums of its losses."""
        rows = RowTensors.of(batch)
        enabled = torch.is_autocast_enabled(self.accelerator.device.type)
        dtype = torch.get_autocast_dtype(self.accelerator.device.type) if enabled else self.head.model.dtype
        if self.text_once:
            mask = None
        elif self.windowed:
            mask = plan.segments
        else:
            mask = training_mask(rows, self.head.model.config.get_text_config(decoder=True), dtype)

        clean, noisy, _ = plan.targets.counts

        def losses(head, hidden) -> Terms:
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
            )

        def method(inner, input_ids, attention_mask, position_ids, **ignored) -> Terms:
            asked = {"output_router_logits": True} if self.router_loss.weight else {}
            if self.text_once:
                hidden = self.text_once(inner, input_ids, rows, plan.split, dtype)
            else:
                outputs = run_decoder(
                    inner, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **asked
                )
                hidden = outputs.last_hidden_state
            terms = self.head.in_one_call(losses, hidden)
            if self.text_once:  # of the text, which no draft-only adapter changes
                terms = Terms(terms.consistency, terms.ar.detach(), terms.right, uncut=terms.uncut)
            if not asked:
                return terms
            router = self.router_loss(outputs.router_logits, plan.targets.present, by_row=not self.model.training)
            return Terms(terms.consistency, terms.ar, terms.right, router, terms.uncut)

        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with ExitStack() as stack:
            stack.enter_context(self._attention())
            if self.text_once:
                stack.enter_context(self.noisy_tokens.in_two_forwards())
            inputs |= self.noisy_tokens.inputs(rows, plan.noisy_tokens) if self.noisy_tokens else {}
            return forward_as(model, method, attention_mask=mask, **inputs)

    def _attention(self):
        whole = self.windowed and not self.text_once
        return attending_by_windows(self.head.model) if whole else nullcontext()

    @contextmanager
    def _one_batch(self):
        """While this is open, what the forward pass was told of a batch holds for what is computed from it later."""
        with ExitStack() as stack:
            stack.enter_context(self._attention())
            if self.noisy_tokens:
                stack.enter_context(self.noisy_tokens.one_batch())
            if self.text_once:
                stack.enter_context(self.noisy_tokens.in_two_forwards())
            yield

    def train(self, *args, **kwargs):
        """As in `Trainer`; with `compile_layers`, the layers are compiled while it lasts."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                "no weight of the model may be trained: load an adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True), or pass a `peft_config`."
            )
        refuse_prepared(self)
        if self.accelerator.num_processes > 1 and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            forget_preparation(self)
        with ExitStack() as stack:
            if self.args.compile_layers:
                stack.enter_context(compiled_layers(self.head.model))
                if self.noisy_tokens:
                    stack.enter_context(self.noisy_tokens.in_one_piece())
            return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """As in `Trainer`, with the attention of the forward pass kept for what the backward pass computes again."""
        start = time.perf_counter()
        with self._one_batch():
            loss = super().training_step(*args, **kwargs)
        self._seconds += time.perf_counter() - start
        return loss

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """As in `Trainer`; other data than the constructor's are looked at first."""
        if isinstance(eval_dataset, str):
            known = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if eval_dataset not in known:
                raise UsageError(f"there is no evaluation set {eval_dataset!r}: the names are {known}.")
        elif not isinstance(eval_dataset, dict):
            self._check("eval_dataset", eval_dataset, self.args)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        """As in `Trainer`, but of all rows, whatever `dataloader_drop_last` says of the training."""
        with self._all_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        """As in `Trainer`, but of all rows."""
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
        """As in `Trainer`; the data are looked at first."""
        if test_dataset is None:
            raise UsageError("`test_dataset` is missing: pass what pack_trajectories returns.")
        self._check("test_dataset", test_dataset, self.args)
        return super().predict(test_dataset, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch of the evaluation set, and nothing else: logits of whole rows would fill the memory."""
        inputs = self._each_once(inputs)
        with torch.no_grad(), without_checkpointing(self.head.model), self._one_batch():
            loss = self.compute_loss(model, on_device(self, inputs))
        return loss.detach(), None, None

    def _each_once(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        A batch whose rows are padding where they repeat others, and its plan: accelerate fills the last round of
        batches with rows from the beginning of the data, so that all processes have as many.
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

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Adds both losses, summed over the whole set, and what decoding some of its prompts comes to."""
        refuse_unsharded(self)
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self._means_of(self._take_sums("eval"))
        figures["loss"] = figures["consistency_loss"] + self.args.ar_loss_weight * figures["ar_loss"]
        figures["loss"] += self.router_loss.weight * figures.get("router_loss", 0.0)
        if self.decoding and metric_key_prefix.startswith("eval"):
            figures |= self.decoding.figures()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    # What is logged

    def _count(self, mode: str, targets: Targets, terms: Terms) -> None:
        self._sums[mode].update(
            consistency=terms.uncut,
            ar=terms.ar.detach(),
            right=terms.right.detach(),
            router=terms.router.detach() if self.router_loss.weight else 0.0,
            **dict(zip(("clean", "noisy", "tokens"), targets.counts)),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Adds the means since the last log: both losses, the share of noisy positions predicted right, tokens/s; how
        many steps were skipped so far; and lambda, if it grows.
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
        """Everything counted in a mode over all processes; counting starts over."""
        names = ("consistency", "ar", "right", "router", "noisy", "clean", "tokens")
        local = torch.tensor([float(self._sums[mode][name]) for name in names], device=self.accelerator.device)
        self._sums[mode].clear()
        return dict(zip(names, self.accelerator.reduce(local, "sum").tolist()))

    def _means_of(self, sums: dict[str, float]) -> dict[str, float]:
        router = {"router_loss": sums["router"] / max(1.0, sums["tokens"])} if self.router_loss.weight else {}
        return means_of(sums) | router

    # What is saved

    def save_model(self, output_dir: str | None = None, *args, **kwargs) -> None:
        """Saves the model, how it decodes, the tokenizer, and a model card."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            # An adapter has no generation config of its own: how it decodes is written beside it.
            unwrap(self.model).generation_config.save_pretrained(folder)
            self._write_card(folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes the model card into `args.output_dir`; `push_to_hub` calls it."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), kwargs.get("model_name"), kwargs.get("dataset_name"))

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
        name = self.hub_model_id or self.args.hub_model_id or model_name or Path(self.args.output_dir).name
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        card = render_card(name, note)
        (folder / "README.md").write_text(card, encoding="utf-8")


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """Both losses and the share of noisy positions predicted right, out of what `JacobiForcingTrainer` counts."""
    return {
        "consistency_loss": sums["consistency"] / max(1.0, sums["noisy"]),
        "ar_loss": sums["ar"] / max(1.0, sums["clean"]),
        "noisy_accuracy": sums["right"] / max(1.0, sums["noisy"]),
    }


def find_tokenizer(name: str):
    """The tokenizer beside a model, or `None`: training does not need one."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def load_model(name: str, init_kwargs: dict[str, Any] | None) -> PreTrainedModel:
    """
    The model of a name or folder, in float32, and with FlexAttention where that can train (a GPU), unless
    `init_kwargs` ask for something else.

    Args:
        name: a folder or a Hub id.
        init_kwargs: arguments of `from_pretrained`.
    """
    # float32 whatever the checkpoint was saved in, as in TRL: small updates would be lost in half precision.
    settings = {"dtype": "float32"} | (init_kwargs or {})
    if settings.get("attn_implementation") is None and torch.cuda.is_available():
        try:
            return AutoModelForCausalLM.from_pretrained(name, **settings | {"attn_implementation": "flex_attention"})
        except ValueError:  # a model that does not support it
            pass
    return AutoModelForCausalLM.from_pretrained(name, **settings)
