"""
Jacobi decoding in vLLM: `JacobiProposer`, the drafts, and `JacobiWorker`, which tells what they brought.

    LLM(model, speculative_config={"method": "custom_class", "model": "hf_jacobi.serving.vllm.JacobiProposer",
                                   "num_speculative_tokens": 15})

vLLM verifies every draft itself, so its text stays its own. What is drafted is up to `decoding.drafting.DraftRule`,
one for each request; here is what it takes to feed it: the model's predictions, read where vLLM hands its logits to
the rejection sampler, and which row of a batch is which request.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from ..decoding.adaptive import Economy
from ..decoding.config import JacobiConfig
from ..decoding.costs import CostCurve, default_curve
from ..decoding.drafting import DraftRule, choose
from ..decoding.errors import UsageError
from .step_times import StepTimes


logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, for its format and level

# Requests in flight, from so many on -> how many tokens are drafted for each, at most (`benchmarks.vllm lengths`).
DRAFT_LENGTHS = {1: 31, 5: 15, 33: 7, 129: 3}
SAMPLER_TAKES = ["self", "metadata", "draft_probs", "logits", "sampling_metadata"]
PROMPT_KEPT = 4096  # tokens of a prompt, the last ones, that n-grams are looked for in: to index one takes 3 us
COMPARED = 256  # tokens, the last ones, by which a request is known again
STEPS_KEPT = 64  # steps for which a request that is not in the batch is remembered: it may be waiting
LOG_EVERY = 10.0  # seconds


@dataclass
class DraftStats:
    """
    What the drafts of a proposer brought.

    Attributes:
        requests: requests whose prompt was read.
        drafts: forwards after that, counted once for each request they served, with a draft or without.
        drafted: tokens that were tried.
        tokens: tokens that came out, those beyond the end of a text among them: the last draft of a text may go on.
    """

    requests: int = 0
    drafts: int = 0
    drafted: int = 0
    tokens: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """TPF, a prompt's forward counted as one."""
        return self.tokens / max(1, self.requests + self.drafts)


class Capture:
    """
    The model's predictions of the step that is being made, in the thread that makes it.

    `RejectionSampler.forward` is wrapped for the whole process: the sampler of a worker is made after its proposer,
    and out of reach.
    """

    _step = threading.local()

    @classmethod
    def install(cls) -> bool:
        """Begins to capture; false where this vLLM hands its sampler something else, so that nothing is captured."""
        from vllm.v1.sample.rejection_sampler import RejectionSampler

        forward = RejectionSampler.forward
        if getattr(forward, "captures_for_jacobi", False):
            return True
        if list(inspect.signature(forward).parameters) != SAMPLER_TAKES:
            return False

        @functools.wraps(forward)
        def capturing(self, metadata, draft_probs, logits, sampling_metadata):
            if not any(metadata.num_draft_tokens):  # vLLM 0.32 fails over these where a request has a `top_k`
                return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
            cls._step.seen = metadata, logits.argmax(-1)  # before the sampler, which may change the logits in place
            return forward(self, metadata, draft_probs, logits, sampling_metadata)

        capturing.captures_for_jacobi = True
        RejectionSampler.forward = capturing
        return True

    @classmethod
    def take(cls, requests: int) -> list[tuple[list[int], list[int]]] | None:
        """
        For each request of the step its draft and the model's prediction before each token of it and after the last.

        None where nothing was drafted in the step, or what was captured is another's.
        """
        seen, cls._step.seen = getattr(cls._step, "seen", None), None
        if seen is None or len(seen[0].num_draft_tokens) != requests:
            return None
        drafts, predictions = iter(seen[0].draft_token_ids.tolist()), iter(seen[1].tolist())
        counts = seen[0].num_draft_tokens
        return [(list(islice(drafts, count)), list(islice(predictions, count + 1))) for count in counts]


def mend_sampling() -> None:
    """
    Spreads temperatures over the tokens of drafts where vLLM fails to: on a CPU without Triton, 0.32 leaves them
    unset, so that what is sampled with drafts, of any method, is noise.
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
    One request: its draft rule, and what it is known by again.

    Attributes:
        length: tokens of its prompt and text.
        seen: the step in which it was in the batch last.
        economy: what its drafts cost and have brought, where they adapt.
    """

    rule: DraftRule
    length: int
    seen: int
    economy: Economy | None = None
    text: int = 1

    def is_in(self, tokens, length: int) -> bool:
        """Whether the first `length` tokens of a text are those of this request."""
        if self.length != length:
            return False
        last = self.rule.text[-COMPARED:]
        return tokens[length - len(last) : length].tolist() == last

    def advance(self, new: list[int], row: tuple[list[int], list[int]] | None, shared: int = 1) -> int:
        """
        Takes in the tokens that a step brought; returns how many guesses it tried.

        Args:
            new: the tokens.
            row: the draft that was scored, which may be the beginning of what was proposed, and the predictions.
            shared: positions of the step by request. All wait for it, so that each accounts for the drafts of all.
        """
        guesses = self.rule.draft.chain[1:]
        tried, predictions = row or ([], new)
        as_proposed = tried == guesses[: len(tried)] and (tried or not guesses)
        if as_proposed and len(new) <= len(tried) + 1 and new[:-1] == tried[: len(new) - 1]:
            # All of a chain is on the path, so what is predicted beyond it is read off there.
            self.rule.observe(new, predictions, list(range(len(new))), drafted=predictions, by_adapter=False)
        else:
            self.rule.follow(new)
        self.length += len(new)
        self.text += len(new)
        if self.economy:
            self.economy.took(shared - 1, self.text)
        return len(tried)

    def propose(self, room: int, curve: CostCurve | None) -> list[int]:
        """
        The draft for the next step.

        Args:
            room: how many tokens it may have at most.
            curve: what the positions of a forward cost now.
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

    A request's next draft is what the model predicted itself beyond the tokens just accepted, led by an n-gram of the
    text where that has been right further, and filled up as `JacobiConfig.draft_init` says. Settings are those of
    `JacobiConfig`, in `additional_config["jacobi"]` or else in the checkpoint's generation config; `pool_size` does
    not count, as vLLM's drafts are chains. One setting more, `draft_lengths`, maps a number of requests to how many
    tokens are drafted for each from that many on, at most: `{"1": 15, "17": 7}`.

    Args:
        vllm_config: of the engine.

    Raises:
        `UsageError`: a setting is unknown or out of range, or the engine is set up for what is not supported.
    """

    def __init__(self, vllm_config):
        refuse_unsupported(vllm_config)
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.max_model_len = vllm_config.model_config.max_model_len
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.config, self.draft_lengths = settings_of(vllm_config)
        self.captures = Capture.install()
        if self.captures:
            mend_sampling()
        else:
            self.config = dataclasses.replace(self.config, draft_init="ngram")
            logger.warning(
                "This version of vLLM calls its RejectionSampler in a way that hf_jacobi was not tested with: drafts "
                "are n-grams of the text alone, without the model's own predictions. vLLM 0.32 gives both."
            )
        self.device = getattr(getattr(vllm_config, "device_config", None), "device_type", "cpu")
        self._curves: dict[int, CostCurve] = {}
        self.times = StepTimes()
        self._ended: float | None = None  # when the last step did
        self.stats = DraftStats()
        self.step = 0
        self.rows: list[Request | None] = []  # of the last step
        self.away: list[Request] = []  # not in the last step, but perhaps in a later one
        self._logged = time.monotonic(), DraftStats()

    def load_model(self, *_) -> None:
        """vLLM calls this; there is nothing to load."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings=None) -> list[list[int]]:
        """
        The drafts for the next step, as vLLM asks for them after each.

        Args:
            sampled_token_ids: for each request of the step the tokens it brought; none while a prompt is being read.
            num_tokens_no_spec: `[requests]`, how many tokens each has now.
            token_ids_cpu: `[requests, max_model_len]`, these tokens.
        """
        count = len(sampled_token_ids)
        captured = Capture.take(count) or [None] * count
        self.step += 1
        lengths = [int(length) for length in num_tokens_no_spec[:count]]
        self._find(sampled_token_ids, lengths, token_ids_cpu)
        if not self.captures:  # all of a draft was tried, as far as can be told, and nothing is known beyond the text
            rows = zip(self.rows, sampled_token_ids)
            captured = [request and (request.rule.draft.chain[1:], list(new)) for request, new in rows]
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
            self._advance(row, list(new), captured[row], token_ids_cpu[row, : lengths[row]], shared)
            drafts.append(self.rows[row].propose(min(most, self.max_model_len - lengths[row] - 1), curve))
        self._log()
        return drafts

    def _time(self, positions: int) -> None:
        """Takes in how long the step took, if it did nothing but go on with the requests of the step before."""
        before, self._ended = self._ended, time.perf_counter()
        went_on = all(request is not None and request.seen == self.step - 1 for request in self.rows)
        if before is not None and went_on and self.rows and self.captures:
            self.times.saw(len(self.rows), positions, self._ended - before)

    def _find(self, sampled: list[list[int]], lengths: list[int], texts) -> None:
        """
        Puts the requests of the step into `rows`.

        vLLM moves requests between rows and names none here, so each is known by its text. Mistaking one for another
        of the same length and the same last tokens would cost accepted drafts, and nothing else.
        """
        before = [length - len(new) for length, new in zip(lengths, sampled)]
        known, rows = [*self.rows, *self.away], [None] * len(sampled)
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

    def _advance(self, row: int, new: list[int], captured, text, shared: int) -> None:
        """Takes in what a step brought for one request, which may be new."""
        request = self.rows[row]
        if request:
            self.stats.drafts += 1
            self.stats.drafted += request.advance(new, captured, shared)
            request.seen = self.step
        else:
            prompt = text[-1 - PROMPT_KEPT : -1].tolist()
            rule = DraftRule(self.config, prompt, f"{self.config.seed or 0}/0", self.vocabulary)
            rule.begin(new[-1])
            economy = Economy(self._curve(1)) if self.config.adapts else None
            self.rows[row] = Request(rule, len(text), self.step, economy)
            self.stats.requests += 1
        self.stats.tokens += len(new)

    def _curve(self, requests: int) -> CostCurve | None:
        """What the positions of a forward cost while so many requests run."""
        if requests not in self._curves:
            self._curves[requests] = curve_of(self.config.position_cost, self.device, max(1, requests))
        given = self._curves[requests]
        return given if self.config.position_cost is not None else self.times.curve(max(1, requests), given)

    def _draft_length(self, requests: int) -> int:
        """How many tokens may be drafted for each of so many requests."""
        length = next((length for least, length in self.draft_lengths if requests >= least), self.most)
        return min(length, self.most)

    def _log(self) -> None:
        """Now and then, what the drafts have brought since the last time."""
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
    What a worker can be asked in addition, with `worker_extension_cls="hf_jacobi.serving.vllm.JacobiWorker"`:

    ```python
    >>> llm.collective_rpc("jacobi_stats")[0]
    {'requests': 4, 'drafts': 112, 'drafted': 1680, 'tokens': 748, 'tokens_per_forward': 6.45}
    ```
    """

    def jacobi_stats(self) -> dict[str, float]:
        """The `DraftStats` of the worker's proposer, and TPF."""
        stats = self.model_runner.drafter.stats
        return vars(stats) | {"tokens_per_forward": stats.tokens_per_forward}


def tokens_per_forward(tokens: int, stats: dict[str, float]) -> float:
    """
    TPF of finished texts: their tokens over drafts and requests.

    vLLM's own acceptance counters, and `DraftStats.tokens`, also count what the last draft of a text had beyond its
    end.

    Args:
        tokens: how many tokens the texts have, the end-of-sequence token included.
        stats: what `jacobi_stats` returned, less what it returned before the texts.
    """
    return tokens / max(1, stats["requests"] + stats["drafts"])


def refuse_unsupported(vllm_config) -> None:
    """Raises `UsageError` for an engine whose text would not be its own, or in which nothing could be drafted."""
    method = getattr(vllm_config.speculative_config, "rejection_sample_method", "standard")
    if method != "standard":
        raise UsageError(
            f"JacobiProposer: rejection_sample_method={method!r} does not keep to the text that the model would write "
            "without drafts: leave it out of the speculative config, or set 'standard'."
        )
    stages = getattr(vllm_config.parallel_config, "pipeline_parallel_size", 1)
    if stages > 1:
        raise UsageError(
            f"JacobiProposer does not support pipeline_parallel_size={stages}: use tensor parallelism instead."
        )


def settings_of(vllm_config) -> tuple[JacobiConfig, list[tuple[int, int]]]:
    """
    The settings of an engine: for the draft rule, and (requests, draft length), the most requests first.

    Raises:
        `UsageError`: a setting is unknown or out of range.
    """
    speculative = vllm_config.speculative_config
    given = (vllm_config.additional_config or {}).get("jacobi") or {}
    if not isinstance(given, dict):
        raise UsageError(f'additional_config["jacobi"] must be a dict of settings of JacobiConfig, got {given!r}.')
    given = dict(given)
    of_vllm = getattr(speculative, "num_speculative_tokens_per_batch_size", None)
    table = given.pop("draft_lengths", None) or {start: count for start, _, count in of_vllm or ()} or DRAFT_LENGTHS
    kept = vllm_config.model_config.try_get_generation_config().get("jacobi") or {}
    config = JacobiConfig.from_dict(kept | given)
    most = speculative.num_speculative_tokens
    if config.block_size is not None and config.block_size != most + 1:
        logger.warning(
            "Jacobi drafts have %d tokens at most: num_speculative_tokens is %d, and JacobiConfig.block_size %d, the "
            "newest token included.",
            *(min(most, config.block_size - 1), most, config.block_size),
        )
    size = most + 1 if config.block_size is None else min(most + 1, config.block_size)
    # A config that leaves the block size out adapts its window, and goes on to.
    config = dataclasses.replace(config, block_size=size, adaptive=config.adapts, pool_size=0)
    return config, checked_lengths(table)


def curve_of(cost, device: str, requests: int) -> CostCurve:
    """
    What a forward costs by the positions of each request, while so many run.

    Args:
        cost: `JacobiConfig.position_cost`. Unless it is given by batch size, that of all positions together counts.
        device: what it runs on, where no cost is given.
    """
    if isinstance(cost, Mapping):
        return CostCurve.of(cost, requests)
    alone = default_curve(device) if cost is None else CostCurve.of(cost)
    sizes = sorted({1, *(max(2, -(-positions // requests)) for positions, _ in alone.points), 64})
    return CostCurve.of([[size, alone.cost(requests * size)] for size in sizes])


def checked_lengths(table) -> list[tuple[int, int]]:
    """(requests, draft length), the most requests first; raises `UsageError` where it is something else."""
    try:
        lengths = {int(requests): int(length) for requests, length in table.items()}
    except (AttributeError, TypeError, ValueError):
        lengths = {}
    if not lengths or min(lengths) < 1 or min(lengths.values()) < 0:
        raise UsageError(
            "`draft_lengths` must map numbers of requests, from 1 on, to draft lengths, from 0 on, for instance "
            f'{{"1": 15, "17": 7}}, got {table!r}.'
        )
    return sorted(lengths.items(), reverse=True)
