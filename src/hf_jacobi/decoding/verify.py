"""Acceptance: which token the model itself would generate at each position, greedy or sampled."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers.generation import logits_process

from .gumbel import GumbelNoise


# Processors whose scores for a position depend on its logits alone; they are applied to all positions at once.
CONTEXT_FREE = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
)
# Processors that read the text before a position, but neither count calls nor distinguish the rows of the batch.
ROW_WISE = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
)


def _is_one_of(processor, names: tuple[str, ...]) -> bool:
    return type(processor) in [getattr(logits_process, name, None) for name in names]


def _narrowed(processor, row: int):
    """The processor for one row: a repetition penalty stores for each row how much padding it ignores."""
    per_row = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(per_row, torch.Tensor) or per_row.shape[0] == 1:
        return processor
    processor = copy.copy(processor)
    processor.prompt_ignore_length = per_row[row : row + 1]
    return processor


UNDRAWABLE = -1  # replaces a token where scores are not a distribution to draw from


def usable(predictions: list[list[int]]) -> list[list[int]]:
    """Predictions that can be tried: an arbitrary token replaces `UNDRAWABLE`."""
    return [[max(token, 0) for token in tokens] for tokens in predictions]


class AcceptanceRule:
    """Which token is accepted at a position. A new rule is a subclass."""

    is_random = False  # whether `pick` needs `keys`

    def pick(self, scores: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """
        The token of each position, `[B, Q]`.

        Args:
            scores: `[B, Q, V]`; can be overwritten.
            keys: `[2, B, Q, 1]`, for rules that are random.
        """
        raise NotImplementedError

    def keys(self, rows: list[int], positions: np.ndarray) -> np.ndarray:
        """The keys of the noise at positions `[B, Q]` of some rows, `[2, B, Q, 1]` int32; for random rules."""
        raise NotImplementedError


class Greedy(AcceptanceRule):
    """The token with the highest score."""

    def pick(self, scores: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """As `AcceptanceRule.pick`."""
        return scores.max(-1).indices  # equals argmax, in a third of its time in bfloat16 on a CPU


class Gumbel(GumbelNoise, AcceptanceRule):
    """A sample: the token with the highest score after adding the noise of its position."""

    is_random = True

    def pick(self, scores: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """As `AcceptanceRule.pick`; `UNDRAWABLE` where a score is NaN or inf, or all are -inf."""
        assert keys is not None  # `is_random`
        best, tokens = self.add_to(scores, keys).max(-1)
        return torch.where(best.abs() < torch.inf, tokens, UNDRAWABLE)


class TokenChooser:
    """
    Turns logits into tokens as `generate` would: by its processors, then by the rule.

    Args:
        processors: the `LogitsProcessorList` that `generate` prepared.
        rule: how a token is chosen from scores.
    """

    def __init__(self, processors, rule: AcceptanceRule):
        self.processors = processors
        self.rule = rule
        self._of_row: dict[int, object] = {}
        self.context_free = [processor for processor in processors if _is_one_of(processor, CONTEXT_FREE)]

    @property
    def reads_context(self) -> bool:
        """Whether a processor depends on more than the logits, so that tokens must be chosen one by one."""
        return len(self.context_free) < len(self.processors)

    @property
    def is_row_wise(self) -> bool:
        """Whether rows can be served one by one: every processor is known to treat rows independently."""
        return all(_is_one_of(processor, CONTEXT_FREE + ROW_WISE) for processor in self.processors)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores of many positions after the context-free processors: float32, in the shape of `logits`."""
        scores = logits.to(torch.float32, copy=True).flatten(0, -2)  # a copy: noise is added in place
        nothing = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)
        for processor in self.context_free:
            scores = processor(nothing, scores)
        return scores.view(logits.shape)

    def predict(self, logits: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """
        The token at every position, `[B, Q]`; a guess if a processor reads context, since it is not applied here.

        Args:
            logits: `[B, Q, V]`.
            keys: `[2, B, Q, 1]`, the keys of the noise of each position, if the rule is random.
        """
        if not self.context_free and not self.rule.is_random:
            # AR compares in float32, where float64 logits can tie.
            return self.rule.pick(logits.float() if logits.dtype == torch.float64 else logits)
        return self.rule.pick(self._scores_of_guesses(logits), keys)

    def _scores_of_guesses(self, logits: torch.Tensor) -> torch.Tensor:
        """As `scores`; NaN for a position at which a processor raises, since that guess may never be committed."""
        try:
            return self.scores(logits)
        except ValueError:  # some processors check that there is a distribution
            if logits.shape[:-1].numel() == 1:
                return torch.full_like(logits, torch.nan, dtype=torch.float32)
            parts = [self._scores_of_guesses(part) for part in logits.flatten(0, -2).split(1)]
            return torch.cat(parts).view(logits.shape)

    def raise_undrawable(self, logits: torch.Tensor) -> None:
        """Raises the error of AR for logits `[V]` from which nothing can be drawn: a processor's, or torch's."""
        self.scores(logits.unsqueeze(0))
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    def _processors_for(self, rows: list[int]):
        """The processors for some rows of the batch; for a single row, reduced to what they store for that row."""
        if len(rows) != 1:
            return self.processors
        if rows[0] not in self._of_row:
            own = [_narrowed(processor, rows[0]) for processor in self.processors]
            self._of_row[rows[0]] = type(self.processors)(own)
        return self._of_row[rows[0]]

    def choose(self, input_ids: torch.Tensor, logits: torch.Tensor, rows: list[int], positions: list[int]):
        """
        The next token of some rows of equal length, after all processors.

        Args:
            input_ids: `[G, length]`, the text so far, padding included.
            logits: `[G, V]` of the next position.
            rows: the batch index of each of the G rows.
            positions: the position of each row's next token, which is part of the key of its noise.

        Returns:
            tokens (`[G]` list, `UNDRAWABLE` as in `Gumbel.pick`) and processed scores (`[G, V]` float32).
        """
        scores = self._processors_for(rows)(input_ids, logits.to(torch.float32, copy=True))
        if not self.rule.is_random:
            return self.rule.pick(scores).tolist(), scores
        keys = torch.from_numpy(self.rule.keys(rows, np.array(positions)[:, None])).to(scores.device)
        return self.rule.pick(scores.clone()[:, None], keys)[:, 0].tolist(), scores
