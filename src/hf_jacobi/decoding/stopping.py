"""Applies stopping criteria token by token, so that text never runs past the token at which they stop it."""

from __future__ import annotations

import time

import torch
from transformers.generation import stopping_criteria as criteria_module


class StopCheck:
    """
    The stopping criteria of a call.

    The limits of transformers' own criteria for length, end-of-sequence tokens and time are checked on the host; any
    other criterion is called as `generate` calls it.

    Args:
        criteria: the `StoppingCriteriaList` that `generate` prepared.
    """

    def __init__(self, criteria):
        self.max_length: int | None = None
        self.eos: set[int] = set()
        self.deadline: float | None = None
        self.others = criteria_module.StoppingCriteriaList()
        for criterion in criteria:
            kind = type(criterion)
            if kind is criteria_module.MaxLengthCriteria:
                self.max_length = min(self.max_length or criterion.max_length, criterion.max_length)
            elif kind is criteria_module.EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.flatten().tolist())
            elif kind is criteria_module.MaxTimeCriteria:
                limit = criterion.initial_timestamp + criterion.max_time
                self.deadline = min(self.deadline or limit, limit)
            else:
                self.others.append(criterion)

    @property
    def has_eos(self) -> bool:
        """Whether a criterion has end-of-sequence tokens, after which `generate` pads."""
        return bool(self.eos) or any(hasattr(criterion, "eos_token_id") for criterion in self.others)

    @property
    def is_row_wise(self) -> bool:
        """Whether rows can be judged one by one: time ends all rows at once, and a user's criterion may read all."""
        kinds = {type(criterion) for criterion in self.others}
        return self.deadline is None and kinds <= {criteria_module.StopStringCriteria}

    def __call__(self, texts: list[list[int]], device: torch.device, scores: tuple | None) -> list[bool]:
        """
        Whether each text ends with its newest token.

        Args:
            texts: all tokens of each row, padding included, of equal length.
            device: the device on which criteria expect tensors.
            scores: what `generate` would pass as `scores`.
        """
        length = len(texts[0])
        late = self.deadline is not None and time.time() > self.deadline
        full = late or (self.max_length is not None and length >= self.max_length)
        done = [full or text[-1] in self.eos for text in texts]
        if self.others:
            stop = self.others(torch.tensor(texts, device=device), scores)
            done = [ended or stopped for ended, stopped in zip(done, stop.tolist())]
        return done
