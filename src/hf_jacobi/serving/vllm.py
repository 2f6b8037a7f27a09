"""
Jacobi decoding in vLLM: `JacobiProposer`, which drafts, and `JacobiWorker`, which reports statistics.

    LLM(model, speculative_config={"method": "custom_class", "model": "hf_jacobi.serving.vllm.JacobiProposer",
                                   "num_speculative_tokens": 15})

vLLM verifies every draft itself, so drafts never change its text. A `decoding.drafting.DraftRule` for each request
chooses the drafts. This file supplies what the rule needs: the model's predictions, read where vLLM passes its logits
to the rejection sampler, and the request that each row of a batch belongs to.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..decoding.adaptive import Economy
from ..decoding.config import JacobiConfig
from ..decoding.costs import CostCurve, default_curve
from ..decoding.drafting import DraftRule, choose
from ..decoding.errors import UsageError
from ..decoding.ngram_table import load_table
from .step_times import StepTimes


logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's logger, for its format and level

# A draft, and the model's predictions for each of its tokens and for the token after it.
Scored = tuple[list[int], list[int]]

# From this number of running requests on -> the most tokens to draft for each (`benchmarks.vllm lengths`).
DRAFT_LENGTHS = {1: 31, 5: 15, 33: 7, 129: 3}
SAMPLER_TAKES = ["self", "metadata", "draft_probs", "logits", "sampling_metadata"]
CAPTURES = "captures_for_jacobi"  # marks the wrapped sampler
PROMPT_KEPT = 4096  # last tokens of a prompt to search for n-grams; indexing one takes 3 us
COMPARED = 256  # last tokens by which a request is recognized
STEPS_KEPT = 64  # steps for which a request that left the batch is remembered: it can be waiting
LOG_EVERY = 10.0  # seconds


@dataclass
class DraftStats:
    """
    Statistics of a proposer's drafts.

    Attributes:
        requests: requests whose prompt was processed.
        drafts: forwards after the prompts, counted once for each request in them, with or without a draft.
        drafted: draft tokens that were verified.
        tokens: generated tokens, including those after the end of a text: its last draft can be longer than the text.
    """

    requests: int = 0
    drafts: int = 0
    drafted: int = 0
    tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """TPF; the prompt counts as one forward."""
        return self.tokens / max(1, self.requests + self.drafts)


class Capture:
    """
    The model's predictions in the current step, for each thread.

    `RejectionSampler.forward` is wrapped for the whole process, because a worker creates its sampler after its
    proposer, which has no access to it.
    """

    _step = threading.local()

    @classmethod
    def install(cls) -> bool:
        """Starts capturing; returns false if the sampler of this vLLM has other arguments, which are not supported."""
        from vllm.v1.sample.rejection_sampler import RejectionSampler

        forward = RejectionSampler.forward
        if getattr(forward, CAPTURES, False):
            return True
        if list(inspect.signature(forward).parameters) != SAMPLER_TAKES:
            return False

        @functools.wraps(forward)
        def capturing(self, metadata, draft_probs, logits, sampling_metadata):
            if not any(metadata.num_draft_tokens):  # with these, vLLM 0.32 fails if a request has a `top_k`
                return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
            cls._step.seen = metadata, logits.argmax(-1)  # before the sampler, which can change the logits in place
            return forward(self, metadata, draft_probs, logits, sampling_metadata)

        setattr(capturing, CAPTURES, True)
        RejectionSampler.forward = capturing
        return True

    @classmethod
    def take(cls, requests: int) -> list[Scored] | None:
        """The draft and the predictions of each request in the step; `None` if they are of another step or absent."""
        seen, cls._step.seen = getattr(cls._step, "seen", None), None
        if seen is None or len(seen[0].num_draft_tokens) != requests:
            return None
        drafts, predictions = iter(seen[0].draft_token_ids.tolist()), iter(seen[1].tolist())
        counts = seen[0].num_draft_tokens
        return [(list(islice(drafts, count)), list(islice(predictions, count + 1))) for count in counts]


def fix_sampling() -> None:
    """
    Fixes sampling with drafts, of any method, on a CPU without Triton: vLLM 0.32 does not expand the temperatures to
    the tokens of the drafts there, so that what it samples is noise.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        return
    import torch

    ends, values = torch.tensor([1, 3]), torch.tensor([0.5, 2.0])
    if rejection_sampler.expand_batch_to_tokens(values, ends, 3).tolist() == [0.5, 2.0, 2.0]:
        return

    def expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


@dataclass
class Request:
    """
    One request: its draft rule, and what identifies it in later steps.

    Attributes:
        rule: its draft rule.
        length: the number of tokens of its prompt and text.
        seen: the last step in which it was in the batch.
        economy: the cost and gain of its drafts, if their length adapts.
        text: the number of tokens of its text.
    """

    rule: DraftRule
    length: int
    seen: int
    economy: Economy | None = None
    text: int = 1

    def is_in(self, tokens, length: int) -> bool:
        """Whether the first `length` tokens of a row are those of this request."""
        if self.length != length:
            return False
        last = self.rule.text[-COMPARED:]
        return tokens[length - len(last) : length].tolist() == last

    def advance(self, new: list[int], row: Scored | None, shared: int = 1) -> int:
        """
        Records the tokens of a step; returns the number of guesses that it verified.

        Args:
            new: the new tokens.
            row: the draft that was scored, which can be a prefix of the proposed one, and the predictions.
            shared: the positions of the step per request. All requests wait for a step, so each is charged for the
                drafts of all.
        """
        guesses = self.rule.draft.chain[1:]
        tried, predictions = row or ([], new)
        as_proposed = tried == guesses[: len(tried)] and (tried or not guesses)
        if as_proposed and len(new) <= len(tried) + 1 and new[:-1] == tried[: len(new) - 1]:
            # A chain is accepted as a prefix, so the predictions after that are the next draft.
            self.rule.observe(new, predictions, list(range(len(new))), drafted=predictions, by_adapter=False)
        else:
            self.rule.follow(new)
        self.length += len(new)
        self.text += len(new)
        if self.economy:
            self.economy.took(shared - 1, self.text)
        return len(tried)

    def assumed(self, new: list[int]) -> Scored:
        """What is known of a step without captured predictions: the proposed draft and the new tokens."""
        return self.rule.draft.chain[1:], new

    def propose(self, room: int, curve: CostCurve) -> list[int]:
        """
        The draft for the next step.

        Args:
            room: the maximum number of tokens.
            curve: the current cost of the positions of a forward.
        """
        if room < 1:
            return []
        if self.economy is None:
            return self.rule.propose(room + 1).chain[1:]
        self.economy.follow(curve)
        choice = choose(self.economy, [(self.rule, room + 1)])
        return self.rule.propose(room + 1, choice.guesses, choice.probes).chain[1:]


class JacobiProposer:
    """
    Drafts of Jacobi decoding for vLLM's `speculative_config={"method": "custom_class", ...}`.

    The next draft of a request is what the model predicted after the newly accepted tokens, preceded by an n-gram of
    the text where those have been more accurate, and filled up according to `JacobiConfig.draft_init`. The settings
    are those of `JacobiConfig`, from `additional_config["jacobi"]` or else from the checkpoint's generation config;
    `pool_size` has no effect, because vLLM's drafts are chains. An additional setting, `draft_lengths`, maps a number
    of running requests to the most tokens to draft for each from that number on: `{"1": 15, "17": 7}`.

    Args:
        vllm_config: the configuration of the engine.

    Raises:
        `UsageError`: a setting is unknown or out of range, or the engine's configuration is not supported.
    """

    def __init__(self, vllm_config: Any) -> None:
        refuse_unsupported(vllm_config)
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.max_model_len = vllm_config.model_config.max_model_len
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.config, self.draft_lengths = settings_of(vllm_config)
        self.captures = Capture.install()
        if self.captures:
            fix_sampling()
        else:
            self.config = dataclasses.replace(self.config, draft_init="ngram")
            logger.warning(
                "The RejectionSampler of this vLLM has arguments that hf_jacobi was not tested with, so drafts are "
                "n-grams of the text, without the model's predictions: install vLLM 0.32 for both."
            )
        self.table = load_table(self.config.ngram_table, vllm_config.model_config.model, self.vocabulary)
        self.device = getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu")
        self._curves: dict[int, CostCurve] = {}
        self.times = StepTimes()
        self._ended: float | None = None  # the end of the last step
        self.stats = DraftStats()
        self.step = 0
        self.rows: list[Request | None] = []  # the requests of the last step
        self.away: list[Request] = []  # not in the last step, but possibly in a later one
        self._logged = time.monotonic(), DraftStats()

    def load_model(self, *_) -> None:
        """Called by vLLM; does nothing, because there is no draft model."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None) -> list[list[int]]:
        """
        The drafts for the next step; vLLM calls this after each step.

        Args:
            sampled_token_ids: the new tokens of each request; none while its prompt is being processed.
            num_tokens_no_spec: `[requests]`, the number of tokens that each now has.
            token_ids_cpu: `[requests, max_model_len]`, these tokens.
        """
        count = len(sampled_token_ids)
        captured: Sequence[Scored | None] = Capture.take(count) or [None] * count
        self.step += 1
        lengths = [int(length) for length in num_tokens_no_spec[:count]]
        self._find(sampled_token_ids, lengths, token_ids_cpu)
        if not self.captures:  # assume that the whole draft was scored; no predictions after the text are known
            rows = zip(self.rows, sampled_token_ids)
            captured = [None if request is None else request.assumed(list(new)) for request, new in rows]
        positions = len(self.rows) + sum(len(row[0]) for row in captured if row)
        self._time(positions)
        shared = -(-positions // max(1, count))
        running = sum(map(bool, sampled_token_ids))
        most, curve = self._draft_length(running), self._curve(running)
        drafts: list[list[int]] = []
        for row, new in enumerate(sampled_token_ids):
            if not new:
                drafts.append([])
                continue
            request = self._advance(row, list(new), captured[row], token_ids_cpu[row, : lengths[row]], shared)
            drafts.append(request.propose(min(most, self.max_model_len - lengths[row] - 1), curve))
        self._log()
        return drafts

    def _time(self, positions: int) -> None:
        """Records how long the step took, if all its requests were also in the step before."""
        before, self._ended = self._ended, time.perf_counter()
        went_on = all(request is not None and request.seen == self.step - 1 for request in self.rows)
        if before is not None and went_on and self.rows and self.captures:
            self.times.saw(len(self.rows), positions, self._ended - before)

    def _find(self, sampled: list[list[int]], lengths: list[int], texts) -> None:
        """
        Finds the request of each row, and puts them into `rows`.

        vLLM moves requests between rows and does not name them here, so each is recognized by its text. Confusing two
        of the same length with the same last tokens costs accepted drafts, and nothing else.
        """
        before = [length - len(new) for length, new in zip(lengths, sampled)]
        known: list[Request | None] = [*self.rows, *self.away]
        rows: list[Request | None] = [None] * len(sampled)
        for row, new in enumerate(sampled):
            if new and row < len(self.rows) and (request := known[row]) and request.is_in(texts[row], before[row]):
                rows[row], known[row] = request, None
        for row, new in enumerate(sampled):
            if not new or rows[row]:
                continue
            for index, request in enumerate(known):
                if request and request.is_in(texts[row], before[row]):
                    rows[row], known[index] = request, None
                    break
        self.rows = rows
        self.away = [request for request in known if request and self.step - request.seen <= STEPS_KEPT]

    def _advance(self, row: int, new: list[int], captured: Scored | None, text, shared: int) -> Request:
        """Records the new tokens of the request in a row, which it adds if it is new."""
        request = self.rows[row]
        if request:
            self.stats.drafts += 1
            self.stats.drafted += request.advance(new, captured, shared)
            request.seen = self.step
        else:
            prompt = text[-1 - PROMPT_KEPT : -1].tolist()
            rule = DraftRule(self.config, prompt, f"{self.config.seed or 0}/0", self.vocabulary, self.table)
            rule.begin(new[-1])
            economy = Economy(self._curve(1)) if self.config.adapts else None
            request = self.rows[row] = Request(rule, len(text), self.step, economy)
            self.stats.requests += 1
        self.stats.tokens += len(new)
        return request

    def _curve(self, requests: int) -> CostCurve:
        """The cost of the positions of a forward while this number of requests is running."""
        if requests not in self._curves:
            self._curves[requests] = curve_of(self.config.position_cost, self.device, max(1, requests))
        given = self._curves[requests]
        return given if self.config.position_cost is not None else self.times.curve(max(1, requests), given)

    def _draft_length(self, requests: int) -> int:
        """The most tokens to draft for each request while this number of them is running."""
        length = next((length for least, length in self.draft_lengths if requests >= least), self.most)
        return min(length, self.most)

    def _log(self) -> None:
        """Logs the statistics since the last time, every `LOG_EVERY` seconds."""
        then, before = self._logged
        now = time.monotonic()
        if now - then < LOG_EVERY:
            return
        lately = DraftStats(*(new - old for new, old in zip(vars(self.stats).values(), vars(before).values())))
        self._logged = now, dataclasses.replace(self.stats)
        if lately.tokens:
            logger.info(
                "Jacobi drafts: %.2f tokens per forward (%d tokens, %d drafts, %d requests)",
                *(lately.tokens_per_forward, lately.tokens, lately.drafts, lately.requests),
            )


class JacobiWorker:
    """
    Adds statistics to a worker, with `worker_extension_cls="hf_jacobi.serving.vllm.JacobiWorker"`:

    ```python
    >>> llm.collective_rpc("jacobi_stats")[0]
    {'requests': 4, 'drafts': 112, 'drafted': 1680, 'tokens': 748, 'tokens_per_forward': 6.45}
    ```
    """

    model_runner: Any  # of the worker that vLLM mixes this class into

    def jacobi_stats(self) -> dict[str, float]:
        """The `DraftStats` of the worker's proposer, and TPF."""
        stats = self.model_runner.drafter.stats
        return vars(stats) | {"tokens_per_forward": stats.tokens_per_forward}


def tokens_per_forward(tokens: int, stats: dict[str, float]) -> float:
    """
    TPF of finished texts: their tokens divided by drafts and requests.

    vLLM's own acceptance counters, and `DraftStats.tokens`, also count tokens of the last draft after the end of a
    text.

    Args:
        tokens: the number of tokens of the texts, including end-of-sequence tokens.
        stats: what `jacobi_stats` returned after the texts, minus what it returned before.
    """
    return tokens / max(1, stats["requests"] + stats["drafts"])


def refuse_unsupported(vllm_config) -> None:
    """Raises `UsageError` for an engine in which drafts would change the text, or could not be made."""
    method = getattr(vllm_config.speculative_config, "rejection_sample_method", "standard")
    if method != "standard":
        raise UsageError(
            f"JacobiProposer: rejection_sample_method={method!r} does not preserve the text of the model: remove it "
            "from the speculative config, or set 'standard'."
        )
    stages = getattr(vllm_config.parallel_config, "pipeline_parallel_size", 1)
    if stages > 1:
        raise UsageError(
            f"JacobiProposer does not support pipeline_parallel_size={stages}: use tensor parallelism instead."
        )


def settings_of(vllm_config) -> tuple[JacobiConfig, list[tuple[int, int]]]:
    """
    The settings of an engine: those of the draft rule, and (requests, draft length), most requests first.

    Raises:
        `UsageError`: a setting is unknown or out of range.
    """
    speculative = vllm_config.speculative_config
    given = (vllm_config.additional_config or {}).get("jacobi") or {}
    if not isinstance(given, dict):
        raise UsageError(f'additional_config["jacobi"] must be a dict of JacobiConfig settings, got {given!r}.')
    given = dict(given)
    of_vllm = getattr(speculative, "num_speculative_tokens_per_batch_size", None)
    table = given.pop("draft_lengths", None) or {start: count for start, _, count in of_vllm or ()} or DRAFT_LENGTHS
    kept = vllm_config.model_config.try_get_generation_config().get("jacobi") or {}
    config = JacobiConfig.from_dict(kept | given)
    most = speculative.num_speculative_tokens
    if config.block_size is not None and config.block_size != most + 1:
        logger.warning(
            "Jacobi drafts have at most %d tokens: num_speculative_tokens is %d, and JacobiConfig.block_size is %d, "
            "which includes the newest token.",
            *(min(most, config.block_size - 1), most, config.block_size),
        )
    size = most + 1 if config.block_size is None else min(most + 1, config.block_size)
    # A config without a block size adapts its window, and must continue to do so with one.
    config = dataclasses.replace(config, block_size=size, adaptive=config.adapts, pool_size=0)
    return config, checked_lengths(table)


def curve_of(cost, device: str, requests: int) -> CostCurve:
    """
    The cost of a forward by the positions of each request.

    Args:
        cost: `JacobiConfig.position_cost`. Unless it depends on the batch size, it applies to all positions together.
        device: the device, for the default cost.
        requests: the number of running requests.
    """
    if isinstance(cost, Mapping):
        return CostCurve.of(cost, requests)
    alone = default_curve(device) if cost is None else CostCurve.of(cost)
    sizes = sorted({1, *(max(2, -(-positions // requests)) for positions, _ in alone.points), 64})
    return CostCurve.of([[size, alone.cost(requests * size)] for size in sizes])


def checked_lengths(table) -> list[tuple[int, int]]:
    """`draft_lengths` as (requests, draft length), most requests first; raises `UsageError` if it is invalid."""
    try:
        lengths = {int(requests): int(length) for requests, length in table.items()}
    except (AttributeError, TypeError, ValueError):
        lengths = {}
    if not lengths or min(lengths) < 1 or min(lengths.values()) < 0:
        raise UsageError(
            "`draft_lengths` must map numbers of requests, at least 1, to draft lengths, at least 0, such as "
            f'{{"1": 15, "17": 7}}, got {table!r}.'
        )
    return sorted(lengths.items(), reverse=True)
