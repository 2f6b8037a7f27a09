"""The outputs of a call: tokens for a streamer while it decodes; then text, scores, logits and statistics."""

from __future__ import annotations

from typing import Any

import torch

from .batch import Row
from .compat import CACHE
from .stats import JacobiOutput, JacobiStats
from .verify import TokenChooser


class Outputs:
    """
    The outputs of one call.

    Args:
        rows: the rows of the batch.
        generation_config: prepared by `generate`; determines which outputs are returned.
        pad_token: the token that pads rows.
        streamer: receives the committed tokens, in the portions in which AR would put them; `None` for no streamer.
        records: whether every draft is returned.
    """

    def __init__(self, rows: list[Row], generation_config, pad_token: int, streamer=None, records: bool = False):
        self.rows, self.pad_token, self.streamer, self.records = rows, pad_token, streamer, records
        self.as_dict = generation_config.return_dict_in_generate
        self.wants_scores = self.as_dict and generation_config.output_scores
        self.wants_logits = self.as_dict and generation_config.output_logits
        self.streamed = rows[0].length
        self._shown: tuple[torch.Tensor, ...] = ()

    def record(self, live: list[Row], logits: torch.Tensor, nodes: dict[int, int], chooser: TokenChooser) -> None:
        """Keeps scores and logits, if requested, at one node of each row; `nodes` gives it by the row's number."""
        if self.wants_scores or self.wants_logits:
            raw = logits[[row.place for row in live], [nodes[row.number] for row in live]]
            self.keep(live, raw, chooser.scores(raw))

    def keep(self, rows: list[Row], raw: torch.Tensor, scores: torch.Tensor) -> None:
        """Keeps the logits and the processed scores, `[R, V]` each, of the next token of some rows."""
        for row, row_logits, row_scores in zip(rows, raw, scores):
            if not row.finished:
                if self.wants_logits:
                    row.logits.append(row_logits.float().clone())
                if self.wants_scores:
                    row.scores.append(row_scores.clone())

    def scores_so_far(self) -> tuple[torch.Tensor, ...] | None:
        """The `scores` that AR passes to the user's stopping criteria, which judge all rows at once."""
        if not self.wants_scores:
            return None
        self._shown += self._columns([row.scores for row in self.rows], len(self._shown))
        return self._shown

    def _columns(self, rows: list[list[torch.Tensor]], first: int = 0) -> tuple[torch.Tensor, ...]:
        """`[B, V]` for each position from `first` on; zeros where a row had ended."""
        nothing = torch.zeros_like(next(row[0] for row in rows if row))
        length = max(map(len, rows))
        return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(first, length))

    def stream(self) -> None:
        """
        Puts every position that all rows have reached, one `[B]` tensor each, as AR does. If the streamer has a method
        `end_forward`, it is called after the tokens of each forward.
        """
        if self.streamer is None:
            return
        reached = min((row.length for row in self.rows if not row.finished), default=None)
        if reached is None:
            reached = max(row.length for row in self.rows)
        for index in range(self.streamed, reached):
            tokens = [row.tokens[index] if index < row.length else self.pad_token for row in self.rows]
            self.streamer.put(torch.tensor(tokens, device="cpu"))
        self.streamed = reached
        if (end_forward := getattr(self.streamer, "end_forward", None)) is not None:
            end_forward()

    def end_stream(self) -> None:
        """Ends the stream."""
        if self.streamer is not None:
            self.streamer.end()

    @property
    def length(self) -> int:
        """The length of the longest row."""
        return max(row.length for row in self.rows)

    def padded(self) -> list[list[int]]:
        """The tokens of all rows, padded to the same length."""
        return [row.tokens + [self.pad_token] * (self.length - row.length) for row in self.rows]

    def result(self, stats: JacobiStats, cache, device: torch.device):
        """
        What `generate` returns: `[B, L]` token ids, or with `return_dict_in_generate` a `JacobiOutput`.

        Args:
            stats: the counts of the call, to which those of the rows are added.
            cache: the cache to return.
            device: the device of the token ids.
        """
        sequences = torch.tensor(self.padded(), dtype=torch.long, device=device)
        if not self.as_dict:
            return sequences
        stats.per_sequence = [row.stats for row in self.rows]
        stats.recycled_tokens = sum(row.stats.recycled_tokens for row in self.rows)
        stats.blocks_spawned = sum(row.stats.blocks_spawned for row in self.rows)
        fields: dict[str, Any] = {
            "sequences": sequences,
            "scores": self._columns([row.scores for row in self.rows]) if self.wants_scores else None,
            "logits": self._columns([row.logits for row in self.rows]) if self.wants_logits else None,
            CACHE: cache,
        }
        trajectory = [row.trajectory for row in self.rows if row.trajectory] if self.records else None
        return JacobiOutput(**fields, jacobi_stats=stats, trajectory=trajectory)
