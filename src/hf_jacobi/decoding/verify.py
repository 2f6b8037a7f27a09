"""Acceptance: which token the model itself would have put at each position, greedy or sampled."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers.generation import logits_process

from .gumbel import GumbelNoise


# Processors whose scores for a position depend on that position's logits alone: applied to all positions at once.
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
# Processors that read the text before a position, but neither count calls nor know which row of the batch they serve.
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
    """The processor for one row: the length of the padding that a repetition penalty ignores is known per row."""
    per_row = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(per_row, torch.Tensor) or per_row.shape[0] == 1:
        return processor
    processor = copy.copy(processor)
    processor.prompt_ignore_length = per_row[row : row + 1]
    return processor


UNDRAWABLE = -1  # in place of a token where scores are no distribution to draw from


def usable(predictions: list[list[int]]) -> list[list[int]]:
    """Predictions that can be tried: any token in place of `UNDRAWABLE`."""
    return [[max(token, 0) for token in tokens] for tokens in predictions]


class Greedy:
    """The token of the highest score. Any acceptance rule is a class with these members."""

    is_random = False  # whether `pick` needs `keys`

    def pick(self, scores: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, Q]`, the token of each position of scores `[B, Q, V]`, which may be overwritten."""
        return scores.max(-1).indices  # what argmax gives, at a third of its time in bfloat16 on a CPU


class Gumbel(GumbelNoise):
    """A sample: the token of the highest score with the noise of its position added."""

    is_random = True

    def pick(self, scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """
        As `Greedy.pick`; `keys` `[2, B, Q, 1]` are those of the positions (`GumbelNoise.keys`). `UNDRAWABLE` where a
        score is NaN or inf, or all are -inf.
        """
        best, tokens = self.add_to(scores, keys).max(-1)
        return torch.where(best.abs() < torch.inf, tokens, UNDRAWABLE)


class TokenChooser:
    """
    Turns logits into tokens, as `generate` would: processors, then the rule.

    Args:
        processors: the `LogitsProcessorList` that `generate` prepared.
        rule: `Greedy` or `Gumbel`.
    """

    def __init__(self, processors, rule: Greedy | Gumbel):
        self.processors = processors
        self.rule = rule
        self._of_row: dict[int, object] = {}
        self.context_free = [processor for processor in processors if _is_one_of(processor, CONTEXT_FREE)]

    @property
    def reads_context(self) -> bool:
        """Whether a processor depends on more than the logits, so that tokens must be chosen one after the other."""
        return len(self.context_free) < len(self.processors)

    @property
    def is_row_wise(self) -> bool:
        """Whether rows can be served one by one: every processor is known to treat each row by itself."""
        return all(_is_one_of(processor, CONTEXT_FREE + ROW_WISE) for processor in self.processors)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of many positions at once, by the context-free processors: float32, of the shape of `logits`."""
        scores = logits.to(torch.float32, copy=True).flatten(0, -2)  # a copy: noise is added in place
        nothing = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)
        for processor in self.context_free:
            scores = processor(nothing, scores)
        return scores.view(logits.shape)

    def predict(self, logits: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """
        The token at every position, `[B, Q]`; when a processor reads context, a guess that leaves such processors out.

        Args:
            logits: `[B, Q, V]`.
            keys: `[2, B, Q, 1]`, of the noise of each position (`GumbelNoise.keys`), for sampled text.
        """
        if not self.context_free and not self.rule.is_random:
            # AR compares in float32, where float64 logits may tie.
            return self.rule.pick(logits.float() if logits.dtype == torch.float64 else logits)
        return self.rule.pick(self._scores_of_guesses(logits), keys)

    def _scores_of_guesses(self, logits: torch.Tensor) -> torch.Tensor:
        """As `scores`; NaN for a position at which a processor raises, which may never be written."""
        try:
            return self.scores(logits)
        except ValueError:  # some look at the distribution, and want one
            if logits.shape[:-1].numel() == 1:
                return torch.full_like(logits, torch.nan, dtype=torch.float32)
            parts = [self._scores_of_guesses(part) for part in logits.flatten(0, -2).split(1)]
            return torch.cat(parts).view(logits.shape)

    def raise_undrawable(self, logits: torch.Tensor) -> None:
        """Raises for logits `[V]` that nothing can be drawn from what AR raises: a processor's error, or torch's."""
        self.scores(logits.unsqueeze(0))
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    def _processors_for(self, rows: list[int]):
        """The processors for some rows of the batch; one row by itself has its own share of what they know per row."""
        if len(rows) != 1:
            return self.processors
        if rows[0] not in self._of_row:
            own = [_narrowed(processor, rows[0]) for processor in self.processors]
            self._of_row[rows[0]] = type(self.processors)(own)
        return self._of_row[rows[0]]

    def choose(self, input_ids: torch.Tensor, logits: torch.Tensor, rows: list[int], positions: list[int]):
        """
        The next token of some rows of equal length, every processor having seen their text.

        Args:
            input_ids: `[G, length]`, the text so far, padding included.
            logits: `[G, V]` of the next position.
            rows: the batch index of each of the G rows.
            positions: the position of each row's next token, the key of its noise.

        Returns:
            tokens (`[G]` list, `UNDRAWABLE` as in `Gumbel.pick`) and processed scores (`[G, V]` float32).
        """
        scores = self._processors_for(rows)(input_ids, logits.to(torch.float32, copy=True))
        if not self.rule.is_random:
            return self.rule.pick(scores).tolist(), scores
        keys = torch.from_numpy(self.rule.keys(rows, np.array(positions)[:, None])).to(scores.device)
        return self.rule.pick(scores.clone()[:, None], keys)[:, 0].tolist(), scores
