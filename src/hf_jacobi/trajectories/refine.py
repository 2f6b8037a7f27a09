"""The trajectories of all blocks of finished sequences: many blocks, of many sequences, refined in one forward."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from ..decoding.drafting import matching_prefix
from ..decoding.step import Step
from ..decoding.verify import usable


@dataclass
class Block:
    """
    A block of a finished sequence and its states so far, from the first guess to the known fixed point.

    Attributes:
        row: the row of the batch.
        start: index in the sequence, padding included, of its first token.
        final: its tokens, the fixed point.
        states: its trajectory so far, the first guess first.
    """

    row: int
    start: int
    final: list[int]
    states: list[list[int]] = field(default_factory=list)
    right: int = 0  # converged tokens of the newest state

    def __post_init__(self):
        self.right = matching_prefix(self.states[-1], self.final)
        self._finish_without_forward()

    @property
    def done(self) -> bool:
        return self.right == len(self.final)

    @property
    def queries(self) -> list[int]:
        """
        The tokens whose predictions the next state needs: from the first wrong one to the second to last.

        Earlier tokens equal the text, so the cache holds their keys and values, and their predictions are the text.
        """
        return self.states[-1][self.right : -1]

    def advance(self, predictions: list[int]) -> None:
        """Appends the next state, given the predictions made at the queries."""
        self.states.append(self.final[: self.right + 1] + predictions)
        self.right = matching_prefix(self.states[-1], self.final)
        self._finish_without_forward()

    def _finish_without_forward(self) -> None:
        if self.right == len(self.final) - 1:
            self.states.append(self.final)
            self.right += 1


def refine_blocks(step: Step, blocks: list[Block], positions_per_forward: int) -> int:
    """
    Runs Jacobi iterations on blocks of sequences that have been decoded, until every one has converged.

    All blocks in flight go through one forward: each sees the text before it, from the cache that decoding left,
    and itself, but no other block.

    Args:
        step: the step of a finished call; its cache, mask and token chooser are used.
        blocks: the blocks, which get their states.
        positions_per_forward: how many tokens a forward may score, beyond one block per row.

    Returns:
        the number of forwards.
    """
    by_row: dict[int, deque[Block]] = {}
    for block in blocks:
        if not block.done:
            by_row.setdefault(block.row, deque()).append(block)
    rows = sorted(by_row, key=lambda row: sum(len(block.final) for block in by_row[row]), reverse=True)
    forwards = 0
    while rows:
        longest = sum(len(block.final) for block in by_row[rows[0]])
        count = max(1, positions_per_forward // longest)
        group, rows = rows[:count], rows[count:]
        forwards += _refine_rows(step, [by_row[row] for row in group], positions_per_forward // len(group))
    return forwards


def _refine_rows(step: Step, waiting: list[deque[Block]], share: int) -> int:
    """Refines the blocks of some rows, at most `share` tokens of each at a time."""
    rows = [blocks[0].row for blocks in waiting]
    length = max(blocks[-1].start + len(blocks[-1].final) for blocks in waiting) - 1
    part = step.of_rows(rows, length)
    flying: list[list[Block]] = [[] for _ in rows]
    forwards = 0
    while True:
        for blocks, queue in zip(flying, waiting):
            while queue and (not blocks or _positions(blocks) + len(queue[0].final) <= share):
                blocks.append(queue.popleft())
        if not any(flying):
            return forwards
        layout = lay_out_blocks(flying, length, step.device)
        end = length + layout.ids.shape[1]
        part.cache.place(torch.arange(length, end, device=step.device).expand(len(rows), -1), length, end)
        offsets = torch.tensor(part.offsets, device=step.device).unsqueeze(1)
        positions = (layout.places + offsets).clamp(min=0)  # padding has no position
        visible = layout.visible(part.key_valid)
        logits = part.run(layout.ids, positions, visible, layout.places, layout.key_places())
        predictions = usable(part.predict(logits, (positions + 1).cpu().numpy()))
        forwards += 1
        for row, blocks in enumerate(flying):
            taken = 0
            for block in blocks:
                count = len(block.queries)
                block.advance(predictions[row][taken : taken + count])
                taken += count
            flying[row] = [block for block in blocks if not block.done]


def _positions(blocks: list[Block]) -> int:
    return sum(len(block.queries) for block in blocks)


@dataclass
class BlockStep:
    """
    One forward over the blocks in flight. B rows, Q queries each (rows with fewer are padded), T slots of text.

    Attributes:
        ids, places: `[B, Q]`, the tokens and their indices in their sequences.
        limits: `[B, Q]`, how many slots of text each may attend to.
        numbers: `[B, Q]`, which block each belongs to, -1 for padding.
        length: T.
    """

    ids: torch.Tensor
    places: torch.Tensor
    limits: torch.Tensor
    numbers: torch.Tensor
    length: int

    def visible(self, key_valid: torch.Tensor | None) -> torch.Tensor:
        """`[B, Q, T + Q]` bool: the text before the block's first wrong token, and the block from there to itself."""
        slots = torch.arange(self.length, device=self.ids.device)
        text = slots < self.limits.unsqueeze(2)
        if key_valid is not None:
            text[:, :, : key_valid.shape[1]] &= key_valid.unsqueeze(1)
        width = self.ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.ids.device).tril()
        own = (self.numbers.unsqueeze(2) == self.numbers.unsqueeze(1)) & causal
        return torch.cat([text, own], dim=2)

    def key_places(self) -> torch.Tensor:
        """`[B, T + Q]`, the index in its sequence of the token in each slot."""
        slots = torch.arange(self.length, device=self.ids.device).expand(self.ids.shape[0], -1)
        return torch.cat([slots, self.places], dim=1)


def lay_out_blocks(flying: list[list[Block]], length: int, device: torch.device) -> BlockStep:
    """Lays the queries of the blocks in flight of each row side by side."""
    columns: list[list[list[int]]] = [[], [], [], []]
    for blocks in flying:
        ids: list[int] = []
        places: list[int] = []
        limits: list[int] = []
        numbers: list[int] = []
        for number, block in enumerate(blocks):
            queries = block.queries
            first = block.start + block.right
            ids += queries
            places += range(first, first + len(queries))
            limits += [first] * len(queries)
            numbers += [number] * len(queries)
        for column, of_row in zip(columns, (ids, places, limits, numbers)):
            column.append(of_row)
    width = max(map(len, columns[0]))
    tensors = []
    for column, filler in zip(columns, (0, 0, 0, -1)):
        padded = [values + [filler] * (width - len(values)) for values in column]
        tensors.append(torch.tensor(padded, device=device))
    token_ids, token_places, token_limits, block_numbers = tensors
    return BlockStep(token_ids, token_places, token_limits, block_numbers, length)
