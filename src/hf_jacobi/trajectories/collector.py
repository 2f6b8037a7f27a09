"""Completes prompts with a model and records every state of every block of its text."""

from __future__ import annotations

import functools
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from ..decoding.call import DecodeCall
from ..decoding.compat import without_router_logits
from ..decoding.config import JacobiConfig
from ..decoding.drafting import Draft
from ..decoding.errors import UsageError
from ..decoding.loop import run_to_end
from ..decoding.mixin import unwrap
from ..decoding.step import Step
from ..decoding.support import refuse_unsupported
from ..decoding.verify import Greedy, TokenChooser
from .checks import check_real, check_weights, check_whole, vocabulary_of
from .cleaning import clean
from .completions import encode_completion
from .encoding import BadPrompt, check_settings
from .prompts import Prompt, encode_prompt
from .refine import Block, refine_blocks


SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
IGNORED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "stop_strings",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
)


@dataclass(frozen=True)
class CollectSettings:
    """The settings that, with model and prompts, determine a trajectory data set; see `collect_trajectories`."""

    block_size: int
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int
    prompt_column: str | None
    as_chat: bool
    max_prompt_length: int | None
    repetition: str
    overlong: str
    empty: str
    shard_size: int
    chat_template_kwargs: dict[str, Any] | None
    draft_init: str = "prompt"

    def __post_init__(self):
        check_settings(self.chat_template_kwargs)
        if self.seed is not None and (not isinstance(self.seed, Integral) or isinstance(self.seed, bool)):
            raise UsageError(f"`seed` must be a whole number or None, got {self.seed!r}.")
        for name, least in (("block_size", 2), ("max_new_tokens", 1), ("shard_size", 1), ("max_prompt_length", 1)):
            if getattr(self, name) is not None or name != "max_prompt_length":
                check_whole(name, getattr(self, name), least)
        for name, choices in (
            ("repetition", ("cut", "drop", "keep")),
            ("overlong", ("keep", "drop")),
            ("empty", ("drop", "keep")),
            ("draft_init", ("prompt", "vocabulary")),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        if not self.do_sample and any(value is not None for value in (self.temperature, self.top_k, self.top_p)):
            raise UsageError("`temperature`, `top_k` and `top_p` are for sampled text: pass do_sample=True with them.")
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name))
        if self.temperature is not None and self.temperature <= 0:
            raise UsageError(f"`temperature` must be positive, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"`top_p` must be above 0 and at most 1, got {self.top_p}.")
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 0)


class Collector:
    """
    Completes prompts with one model and refines their blocks; the arguments are those of `collect_trajectories`.

    Args:
        given: whether the rows also give completions.
        check: whether to leave out completions that are not the model's greedy text.
    """

    def __init__(
        self,
        model,
        tokenizer,
        settings: CollectSettings,
        batch_size: int,
        positions_per_forward: int,
        given: bool = False,
        check: bool = False,
    ):
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and getattr(adapter, "is_prompt_learning", False):
            raise UsageError(
                "trajectories do not support virtual tokens, but the model carries a "
                f"{adapter.peft_type.value} adapter: use an adapter of another kind, such as LoRA."
            )
        self.model = unwrap(model)
        check_weights(self.model)
        self.vocabulary = vocabulary_of(self.model)
        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_size = batch_size
        self.positions_per_forward = positions_per_forward
        self.given, self.check = given, check
        if given and settings.do_sample:
            raise UsageError("`completions` are already written: drop `do_sample`.")
        self.generation_config = generation_config_for(self.model, tokenizer, settings)
        if (
            not 0 <= self.generation_config.pad_token_id < self.vocabulary
        ):  # padding is masked: any valid token will do
            self.generation_config.pad_token_id = 0
        eos = self.generation_config.eos_token_id
        self.eos_tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
        table = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = None if table is None else table - settings.max_new_tokens
        if room is not None and room < 1:
            raise UsageError(
                f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the {table} positions of "
                f"{type(self.model).__name__}: lower it."
            )
        limits = [limit for limit in (settings.max_prompt_length, room) if limit is not None]
        self.longest_prompt = min(limits, default=None)

    def encode(self, number: int, row: dict[str, Any]) -> Prompt:
        """
        Encodes the prompt of a row.

        Raises:
            `BadPrompt`: the row has no prompt that the model can complete.
            `ValueError`: no row can be used with these settings.
        """
        settings = self.settings
        prompt = encode_prompt(
            number, row, settings.prompt_column, self.tokenizer, settings.as_chat, settings.chat_template_kwargs
        )
        if not prompt.ids:
            raise BadPrompt(f"prompt {prompt.name} is empty", "empty_prompts")
        if self.longest_prompt is not None and len(prompt.ids) > self.longest_prompt:
            raise BadPrompt(
                f"prompt {prompt.name} has {len(prompt.ids)} tokens, more than {self.longest_prompt}", "long_prompts"
            )
        if odd := [token for token in prompt.ids if not 0 <= token < self.vocabulary]:
            name = type(self.model).__name__
            if 0 <= odd[0] < len(self.tokenizer):
                raise UsageError(
                    f"prompt {prompt.name} holds token {odd[0]} of the tokenizer, but {name} has embeddings for "
                    f"{self.vocabulary}: pass the tokenizer of this model, or call model.resize_token_embeddings."
                )
            raise BadPrompt(f"prompt {prompt.name} holds token {odd[0]}, but {name} has only {self.vocabulary}")
        if self.given:
            prompt.completion = encode_completion(
                prompt.name, row, self.tokenizer, self.eos_tokens, settings.max_new_tokens
            )
            if odd := [token for token in prompt.completion if not 0 <= token < self.vocabulary]:
                raise BadPrompt(
                    f"the completion of prompt {prompt.name} holds token {odd[0]}, but {type(self.model).__name__} "
                    f"has only {self.vocabulary}"
                )
        return prompt

    def collect(self, prompts: list[Prompt], advance) -> tuple[list[dict], list[str], Counter]:
        """
        The trajectories of some prompts, in order; why completions were left out, one sentence each; the counts.

        Args:
            prompts: the prompts.
            advance: called with the numbers of prompts and blocks that have just been finished.
        """
        start = time.perf_counter()
        counts: Counter = Counter()
        prompts = sorted(prompts, key=lambda prompt: len(prompt.ids) + len(prompt.completion))
        rows: dict[int, dict] = {}
        for index in range(0, len(prompts), self.batch_size):
            batch = prompts[index : index + self.batch_size]
            blocks = counts["blocks"]
            rows |= self._complete(batch, counts)
            advance(len(batch), counts["blocks"] - blocks)
        counts["seconds"] = time.perf_counter() - start  # type: ignore[assignment]  # a Counter also adds floats
        refused = sorted((prompt for prompt in prompts if prompt.refused), key=lambda prompt: prompt.number)
        return [rows[number] for number in sorted(rows)], [prompt.refused for prompt in refused], counts

    def _complete(self, batch: list[Prompt], counts: Counter) -> dict[int, dict]:
        """Completes a batch of prompts; returns the rows by prompt number."""
        width = max(len(prompt.ids) for prompt in batch)
        pad = self.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt.ids)) + prompt.ids for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
        with _evaluating(self.model, self.generation_config), _refusing_nan(self.model):
            return self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                custom_generate=functools.partial(self._decode, batch=batch, counts=counts),
            )

    def _decode(
        self,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        *,
        batch,
        counts,
        **model_kwargs,
    ) -> dict[int, dict]:
        """Replaces the decoding of `generate`: decodes the batch, then refines all of its blocks."""
        refuse_unsupported(model, generation_config, input_ids.shape[1], model_kwargs)
        if self.given:
            chooser = TokenChooser(logits_processor, Greedy())
            step = Step(model, input_ids, generation_config, model_kwargs, chooser)
            texts = self._read(step, batch, counts)
        else:
            # Token by token: at these batch sizes a forward keeps the device busy without drafts.
            config = JacobiConfig(block_size=1, pool_size=0, seed=self.settings.seed)
            call = DecodeCall(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                config,
                model_kwargs,
                drafts=False,
                row_names=[str(prompt.number) for prompt in batch],
                leaves=False,  # the cache of all rows is needed to refine their blocks
            )
            run_to_end(call)
            step = call.step
            texts = [row.tokens[row.prompt_length :][: row.stats.new_tokens] for row in call.rows]
        return self._refine(step, batch, texts, counts)

    def _read(self, step: Step, batch: list[Prompt], counts: Counter) -> list[list[int] | None]:
        """
        Runs given completions through the model, a piece of all rows at a time, so that the cache holds them.

        Returns:
            the completions, with `None` for each one refused.
        """
        texts = [prompt.completion for prompt in batch]
        longest = max(map(len, texts))
        width = step.input_ids.shape[1]
        predicted = step.prefill(False, width + longest, 1)
        piece = max(1, self.positions_per_forward // len(batch))
        for done in range(0, longest - 1, piece):
            starts = [width + min(done, max(0, len(text) - 1)) for text in texts]
            layout = step.score([Draft(text[:-1][done : done + piece] or [0]) for text in texts], starts)
            found = step.chooser.predict(step.logits, layout.keys).tolist()
            predicted = [before + row for before, row in zip(predicted, found)]
        kept = []
        for prompt, text, own in zip(batch, texts, predicted):
            counts["given_tokens"] += len(text)
            counts["own_tokens"] += sum(one == other for one, other in zip(text, own))
            place = next((place for place, pair in enumerate(zip(text, own)) if pair[0] != pair[1]), None)
            if place is not None and self.check:
                given, mine = (self.tokenizer.decode([token]) for token in (text[place], own[place]))
                counts["other_text"] += 1
                prompt.refused = (
                    f"the completion of prompt {prompt.name} is not the model's greedy text: its token {place} is "
                    f"{given!r}, but the model's is {mine!r}"
                )
            kept.append(None if prompt.refused else text)
        return kept

    def _refine(
        self, step: Step, batch: list[Prompt], texts: list[list[int] | None], counts: Counter
    ) -> dict[int, dict]:
        """The output rows for texts in the cache of a step, with the states of their blocks."""
        rows = {}
        blocks: list[Block] = []
        for number, (prompt, text) in enumerate(zip(batch, texts)):
            kept = text
            if text is not None:
                kept = clean(
                    text,
                    self.eos_tokens,
                    repetition=self.settings.repetition,
                    overlong=self.settings.overlong,
                    empty=self.settings.empty,
                    counts=counts,
                )
            if kept is None:
                continue
            own = first_guesses(kept, number, step.input_ids.shape[1], prompt, self.settings, self.vocabulary)
            blocks += own
            rows[prompt.number] = {
                "prompt_id": prompt.name,
                "prompt_ids": prompt.ids,
                "completion_ids": kept,
                "block_size": self.settings.block_size,
                "trajectories": [block.states for block in own],
                "ended": kept[-1] in self.eos_tokens,
            }
        refine_blocks(step, blocks, self.positions_per_forward)
        counts.update(
            sequences=len(rows),
            tokens=sum(len(block.final) for block in blocks),
            blocks=len(blocks),
            states=sum(len(block.states) for block in blocks),
        )
        return rows


def first_guesses(
    text: list[int], row: int, start: int, prompt: Prompt, settings: CollectSettings, vocabulary: int
) -> list[Block]:
    """
    The blocks of a completion, each with its first guess: tokens drawn from the prompt, or from the vocabulary.

    Args:
        text: the completion.
        row: its row in the batch.
        start: the index of its first token in that row.
        prompt: the prompt; its number and the seed decide what is drawn.
        settings: the settings.
        vocabulary: how many tokens the model has.
    """
    size = settings.block_size
    source = prompt.ids if settings.draft_init == "prompt" else range(vocabulary)
    blocks = []
    for offset in range(0, len(text), size):
        final = text[offset : offset + size]
        drawn = random.Random(f"{settings.seed}/{prompt.number}/{offset // size}").choices(source, k=len(final))
        blocks.append(Block(row, start + offset, final, [drawn]))
    return blocks


def generation_config_for(model, tokenizer, settings: CollectSettings) -> GenerationConfig:
    """
    The generation config of the settings, with the model's special tokens and, for sampling, its defaults.

    Everything else in the model's generation config, such as a repetition penalty, is left out, with a warning
    if it would change the text: a trajectory holds the model's own predictions.
    """
    own = model.generation_config
    values = {name: getattr(own, name, None) for name in TOKENS}
    if isinstance(values["pad_token_id"], int) and values["pad_token_id"] < 0:
        values["pad_token_id"] = None
    if values["eos_token_id"] is None:
        values["eos_token_id"] = tokenizer.eos_token_id
    if values["pad_token_id"] is None:
        eos = values["eos_token_id"]
        first_eos = eos[0] if isinstance(eos, list) else eos
        values["pad_token_id"] = next((token for token in (tokenizer.pad_token_id, first_eos) if token is not None), 0)
    if settings.do_sample:
        values |= {name: getattr(own, name, None) for name in SAMPLING}
        given = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        values |= {name: value for name, value in given.items() if value is not None}
    asked = own.to_diff_dict() if own is not None else {}
    ignored = [f"{name}={asked[name]!r}" for name in IGNORED if asked.get(name) is not None]
    if ignored:
        warnings.warn(f"trajectories are the model's own predictions, without {', '.join(ignored)}.", stacklevel=2)
    return GenerationConfig(do_sample=settings.do_sample, max_new_tokens=settings.max_new_tokens, **values)


@contextmanager
def _refusing_nan(model) -> Iterator[None]:
    """
    Raises `UsageError` on exit if a score of a row's newest token was NaN or infinite: the likeliest token would then
    always be 0, or the first of these. Until then the result stays on the device.
    """
    found: list[torch.Tensor] = []

    def look(module, inputs, scores) -> None:
        nan = (~(scores[..., -1, :] < float("inf"))).any()
        found[:] = [found[0] | nan] if found else [nan]

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(look) if head is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    if found and bool(found[0]):
        raise UsageError(
            f"the scores of {type(model).__name__} in {model.dtype} are NaN or infinite, so there is no likeliest "
            "token: load it in bfloat16 or float32."
        )


@contextmanager
def _evaluating(model, generation_config: GenerationConfig) -> Iterator[None]:
    """Sets evaluation mode and another generation config: `generate` fills gaps from the model's own."""
    before, training = model.generation_config, [module for module in model.modules() if module.training]
    model.generation_config = generation_config
    model.eval()
    try:
        with without_router_logits(model):
            yield
    finally:
        model.generation_config = before
        for module in training:
            module.training = True
