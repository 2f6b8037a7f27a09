"""Appends accepted tokens one position at a time, so that processors and stopping criteria see the text as in AR."""

from __future__ import annotations

import torch

from .batch import Row
from .drafting import Draft
from .outputs import Outputs
from .stopping import StopCheck
from .verify import UNDRAWABLE, TokenChooser


class Walk:
    """
    Commits to each row the longest path of its draft that the model would have generated, plus one token.

    Processors and stopping criteria see every position once, in order, with the text before it. Rows are served one by
    one, and each accepts as many tokens as it can. Where a processor, a stopping criterion or the lack of an
    end-of-sequence token makes rows depend on each other, all rows form one group that moves in step.

    Args:
        rows: the rows of the batch.
        chooser: turns logits into tokens.
        stop: the stopping criteria.
        outputs: keeps scores and logits.
        pad_token: the token that `generate` appends to rows that have ended.

    Attributes:
        by_row: whether rows do not depend on each other.
    """

    def __init__(self, rows: list[Row], chooser: TokenChooser, stop: StopCheck, outputs: Outputs, pad_token: int):
        self.chooser, self.stop, self.outputs, self.pad_token = chooser, stop, outputs, pad_token
        self.pads_ended_rows = stop.has_eos or len(rows) == 1
        self.by_row = chooser.is_row_wise and stop.is_row_wise and self.pads_ended_rows
        self.groups = [[row] for row in rows] if self.by_row else [rows]

    def __call__(
        self, drafts: list[Draft], logits: torch.Tensor, predictions: list[list[int]]
    ) -> dict[int, list[int]]:
        """
        Args:
            drafts: one per row of the forward.
            logits: `[B, Q, V]` of the forward.
            predictions: `[B][Q]`, the token predicted at each node; only a guess if processors read the text.

        Returns:
            the accepted nodes of each unfinished row, by its number; one token was appended for each node.
        """
        paths: dict[int, list[int]] = {}
        for group in self.groups:
            self._advance(group, drafts, logits, predictions, paths)
        return paths

    def _advance(self, group: list[Row], drafts, logits, predictions, paths) -> None:
        """Moves a group on until the next token of one of its rows is not in that row's draft."""
        live = [row for row in group if not row.finished]
        nodes = {row.number: 0 for row in live}
        while live:
            if self.chooser.reads_context:
                tokens = self._choose(group, logits, nodes)
            else:
                tokens = {row.number: predictions[row.place][nodes[row.number]] for row in live}
                self.outputs.record(live, logits, nodes, self.chooser)
            self._append(group, live, tokens, logits, nodes)
            for row in live:
                paths.setdefault(row.number, []).append(nodes[row.number])
            self._stop(group, live, logits.device)
            live = [row for row in live if not row.finished]
            for row in live:
                child = drafts[row.place].children[nodes[row.number]].get(tokens[row.number])
                if child is None:
                    return
                nodes[row.number] = child

    def _append(self, group: list[Row], live: list[Row], tokens: dict[int, int], logits, nodes) -> None:
        """Appends the next token of each live row, and padding to the other rows of its group."""
        for row in live:
            if tokens[row.number] == UNDRAWABLE:
                self.chooser.raise_undrawable(logits[row.place, nodes[row.number]])
        for row in group:
            if row.finished and len(group) > 1:
                row.tokens.append(self.pad_token)
        for row in live:
            row.tokens.append(tokens[row.number])

    def _stop(self, group: list[Row], live: list[Row], device: torch.device) -> None:
        """Finishes the live rows that a stopping criterion ends with their newest token."""
        rows = group if len(group) > 1 else live
        scores = None if self.stop.is_row_wise else self.outputs.scores_so_far()
        for row, stop in zip(rows, self.stop([row.tokens for row in rows], device, scores)):
            row.stopped = row.stopped or stop
        over = all(row.stopped for row in group)
        for row in live:
            row.finished = over or (row.stopped and self.pads_ended_rows)

    def _choose(self, group: list[Row], logits: torch.Tensor, nodes: dict[int, int]) -> dict[int, int]:
        """Applies every processor to the text so far, and chooses the next token of each row of a group."""
        numbers = [row.number for row in group]
        input_ids = torch.tensor([row.tokens for row in group], dtype=torch.long, device=logits.device)
        raw = logits[[row.place for row in group], [nodes.get(number, 0) for number in numbers]]
        tokens, scores = self.chooser.choose(input_ids, raw, numbers, [row.position for row in group])
        self.outputs.keep(group, raw, scores)
        return dict(zip(numbers, tokens))
