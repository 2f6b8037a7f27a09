"""
The part of vLLM that a proposer sees: the rejection sampler that it wraps, and a runner that calls both.

The runner imitates vLLM 0.32, `GPUModelRunner.sample_tokens` and `Scheduler`: rows that move when a
request ends, prompts read in pieces, requests left out of a step or put off, drafts cut short or replaced by
placeholders. `test_vllm.py` uses the real one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import torch


VOCABULARY = 64
PLACEHOLDER = -1


def install(monkeypatch, sampler=None, expand_batch_to_tokens=None) -> type:
    """Makes `import vllm` find these fakes; returns the sampler class."""

    class RejectionSampler:
        def forward(self, metadata, draft_probs, logits, sampling_metadata):
            """The tokens of each request: the drafts that match the model's predictions, then one prediction."""
            best, drafts = logits.argmax(-1).tolist(), metadata.draft_token_ids.tolist()
            logits.fill_(0.0)  # so can the real one
            sampled = []
            for count in metadata.num_draft_tokens:
                tried, said = drafts[:count], best[: count + 1]
                del drafts[:count], best[: count + 1]
                right = next((i for i, (a, b) in enumerate(zip(tried, said)) if a != b), count)
                sampled.append(said[: right + 1])
            return sampled

    sampler = sampler or RejectionSampler
    names = ["vllm", "vllm.platforms", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.rejection_sampler"]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    file = modules["vllm.v1.sample"].rejection_sampler = modules[names[-1]]
    file.RejectionSampler = sampler
    file.expand_batch_to_tokens = expand_batch_to_tokens or spread
    return sampler


def spread(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    """What vLLM's function of that name should do."""
    values = [replace_to if value == replace_from else value for value in x.tolist()]
    ends = [0, *cu_num_tokens.tolist()]
    spread = [value for value, start, end in zip(values, ends, ends[1:]) for _ in range(start, end)]
    assert len(spread) == num_tokens
    return torch.tensor(spread, dtype=x.dtype)


def config_of(length=15, jacobi=None, kept=None, max_model_len=512, stages=1, **speculative) -> SimpleNamespace:
    """
    A `VllmConfig`.

    Args:
        length: `num_speculative_tokens`.
        jacobi: `additional_config["jacobi"]`.
        kept: the generation config of the checkpoint.
    """
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=length, **speculative),
        model_config=SimpleNamespace(
            model="someone/model",
            max_model_len=max_model_len,
            try_get_generation_config=lambda: kept or {},
            get_vocab_size=lambda: VOCABULARY,
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        additional_config={} if jacobi is None else {"jacobi": jacobi},
    )


@dataclass
class Served:
    """A request: its prompt, and the text so far; `read` tokens of both have been scored."""

    prompt: list[int]
    new_tokens: int
    text: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    read: int = 0
    steps: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.text

    @property
    def finished(self) -> bool:
        return len(self.text) >= self.new_tokens


class FakeRunner:
    """
    Serves requests in steps.

    Args:
        proposer: proposes the drafts.
        sampler: the class that `install` returned.
        predict: the model: the token after a text.
        max_model_len: of the model.
        chunk: how many tokens of a prompt are read in a step.
        scored: how many tokens of a draft are scored at most.
    """

    def __init__(self, proposer, sampler, predict, max_model_len=512, chunk=10**6, scored=10**6):
        self.proposer, self.sampler, self.predict = proposer, sampler(), predict
        self.max_model_len, self.chunk, self.scored = max_model_len, chunk, scored
        self.rows: list[Served] = []
        self.most_drafted = 0

    def add(self, prompt: list[int], new_tokens: int) -> Served:
        self.rows.append(Served(list(prompt), new_tokens))
        return self.rows[-1]

    def remove(self, request: Served) -> None:
        """Cancels, ends or pauses a request; the last row takes its place, as in vLLM."""
        row = next(row for row, other in enumerate(self.rows) if other is request)
        last = self.rows.pop()
        if last is not request:
            self.rows[row] = last

    def preempt(self, request: Served) -> None:
        """Discards the computed state of a request; its prompt and text are then processed again."""
        self.remove(request)
        request.read, request.draft = 0, []

    def run(self) -> None:
        """Runs until all requests are finished."""
        while self.rows:
            self.step()

    def step(self) -> None:
        """Runs one forward and proposes the drafts for the next."""
        rows = list(self.rows)
        logits, counts, tried, whole = [], [], [], []
        for request in rows:
            left = len(request.tokens) - request.read
            request.read += min(left, self.chunk)
            whole.append(left <= self.chunk)
            draft = request.draft[: self.scored] if whole[-1] else []
            counts.append(len(draft))
            tried += draft
            logits += [self._logits(request.tokens + draft[:count]) for count in range(len(draft) + 1)]
        sampled = self._sample(counts, tried, torch.stack(logits))
        sampled = [new if read else [] for new, read in zip(sampled, whole)]
        for request, new in zip(rows, sampled):
            request.text += new
            request.steps += bool(new)
        lengths = np.array([len(request.tokens) for request in rows], dtype=np.int32)
        texts = np.zeros((len(rows), self.max_model_len + 64), dtype=np.int32)
        for row, request in zip(texts, rows):
            row[: len(request.tokens)] = request.tokens
        drafts = self.proposer.propose(sampled, lengths, texts, slot_mappings=None)
        assert len(drafts) == len(rows)
        for request, new, draft in zip(rows, sampled, drafts):
            assert new or not draft
            assert len(request.tokens) + len(draft) < self.max_model_len or not draft
            assert all(type(token) is int and 0 <= token < VOCABULARY for token in draft)
            request.draft = draft
            request.read = len(request.tokens) - 1 if new else request.read
            self.most_drafted = max(self.most_drafted, len(draft))
        for request in rows:
            if request.finished:
                del request.text[request.new_tokens :]
                self.remove(request)

    def _sample(self, counts, tried, logits):
        if not any(counts):  # vLLM does not call the rejection sampler then
            return [[token] for token in logits.argmax(-1).tolist()]
        metadata = SimpleNamespace(num_draft_tokens=counts, draft_token_ids=torch.tensor(tried))
        return self.sampler.forward(metadata, None, logits, None)

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.predict(tokens)), VOCABULARY).float()
