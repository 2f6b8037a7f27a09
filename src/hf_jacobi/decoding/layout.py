"""Lays the drafts of all rows side by side: one buffer of integers on the host, copied to the device in one go."""

from __future__ import annotations

import numpy as np
import torch

from .drafting import Draft


NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}


class Layout:
    """
    The integers of one step over B rows with Q nodes each (shorter drafts are padded) and S slots of the cache.

    The fields lie in one buffer, which `fill` writes on the host and `upload` copies to the device. A layout is reused
    for every step of its shape.

    Args:
        rows: B.
        width: Q.
        moves: M, the largest number of accepted tokens of the previous step to move into place.
        device: where the step runs.

    Attributes:
        ids: `[B, Q]`, the token of each node.
        positions: `[B, Q]`, as the model counts them, without the left padding.
        slots: `[B, Q]`, the slot of the cache that each node is written to.
        places: `[B, Q]`, the index of each node in the sequence: the slot it would have if its path were the only one.
        starts: `[B, 1]`, the slot of node 0.
        moves: `[3, M]`: rows, slots before, slots after.
        keys: `[2, B, Q, 1]` int32, of the noise of the token that each node predicts (`GumbelNoise.keys`).
        ancestors: `[B, Q, Q]` bool, whether a node (second axis) sees another (third): its ancestors and itself.
        first: the slot at which all rows begin, `None` if they begin at different ones.
        end: S, one past the last slot written.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    moves: torch.Tensor
    keys: torch.Tensor
    ancestors: torch.Tensor

    def __init__(self, rows: int, width: int, moves: int, device: torch.device):
        nodes = (rows, width)
        shapes = {
            "ids": (torch.int64, nodes),
            "positions": (torch.int64, nodes),
            "slots": (torch.int64, nodes),
            "places": (torch.int64, nodes),
            "starts": (torch.int64, (rows, 1)),
            "moves": (torch.int64, (3, moves)),
            "keys": (torch.int32, (2, *nodes, 1)),
            "ancestors": (torch.bool, (*nodes, width)),  # last, as its size need not be a multiple of 8
        }
        sizes = {name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in shapes.items()}
        total = sum(sizes.values())
        self._host: torch.Tensor | None = None  # on a CPU the step reads the buffer itself
        self._device: torch.Tensor | None = None
        buffer = np.zeros(total, dtype=np.uint8)
        if device.type != "cpu":
            self._host = torch.zeros(total, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
            self._device = torch.zeros_like(self._host, device=device)
            buffer = self._host.numpy()
        self.host: dict[str, np.ndarray] = {}
        first = 0
        for name, (dtype, shape) in shapes.items():
            part = slice(first, first := first + sizes[name])
            self.host[name] = buffer[part].view(NUMPY[dtype]).reshape(shape)
            if self._device is None:
                setattr(self, name, torch.from_numpy(self.host[name]))
            else:
                setattr(self, name, self._device[part].view(dtype).view(shape))
        self.width = width
        self.first: int | None = 0
        self.end = 0

    def fill(self, drafts: list[Draft], starts: list[int], offsets: list[int], copies: int = 0) -> None:
        """
        Writes one draft per row, on the host.

        Args:
            drafts: one per row.
            starts: the slot of each draft's node 0.
            offsets: position minus slot, per row (minus the left padding).
            copies: the number of columns at the end of each row that repeat its chain; a copy sees the committed text
                and itself, never the draft. 0 for none.
        """
        host, width = self.host, self.width - copies
        host["ids"][:] = 0
        host["places"][:] = 0
        host["ancestors"][:] = np.eye(self.width, dtype=bool)
        for row, draft in enumerate(drafts):
            count, length = len(draft), draft.chain_length
            host["ids"][row, :count] = draft.tokens
            host["places"][row, :count] = draft.depths
            sees = host["ancestors"][row]
            sees[:length, :length] = np.tri(length, dtype=bool)
            for node in range(length, count):
                sees[node] |= sees[draft.parents[node]]
            if copies:
                host["ids"][row, width : width + length] = draft.chain
                host["places"][row, width:] = np.minimum(np.arange(copies), length - 1)
                sees[width:, width:] = np.tri(copies, dtype=bool)
        start = host["starts"]
        start[:, 0] = starts
        host["places"] += start
        host["slots"][:] = start + np.arange(self.width)
        host["positions"][:] = host["places"] + np.array(offsets)[:, None]
        self.first = starts[0] if len(set(starts)) == 1 else None
        self.end = max(starts) + self.width

    def fix(self, total: int) -> None:
        """For fixed shapes: keeps the padding of rows within the `total` slots, and makes all rows use a mask."""
        np.minimum(self.host["slots"], total - 1, out=self.host["slots"])
        self.first = None
        self.end = min(self.end, total)

    def fill_moves(self, moves: list[tuple[int, int, int]]) -> None:
        """Writes the moves (row, slot before, slot after), on the host; unused entries move a slot onto itself."""
        self.host["moves"][:] = 0
        if moves:
            self.host["moves"][:, : len(moves)] = np.array(moves).T

    def upload(self) -> None:
        """Copies everything to the device. The host has read the previous step, so its buffer is free again."""
        if self._device is not None and self._host is not None:
            self._device.copy_(self._host, non_blocking=True)

    def visible(self, index: torch.Tensor, key_valid: torch.Tensor | None) -> torch.Tensor | None:
        """
        `[B, Q, S]` bool, which slots each node can attend to; `None` if each sees all slots (one node per row, no
        padding, rows of equal length).

        Args:
            index: `[S]`, the numbers of the slots.
            key_valid: `[B, P]` bool, false for the padding of the prompt; `None` without padding.
        """
        if self.width == 1 and key_valid is None and self.first is not None:
            return None
        committed = index < self.starts
        if key_valid is not None:
            committed[:, : key_valid.shape[1]] &= key_valid
        visible = committed.unsqueeze(1).repeat(1, self.width, 1)
        return visible.scatter_(2, self.slots.unsqueeze(1).expand_as(self.ancestors), self.ancestors)

    def key_places(self, index: torch.Tensor) -> torch.Tensor:
        """`[B, S]`, the index in its sequence of the token in each of the slots `index` `[S]`."""
        return index.repeat(self.slots.shape[0], 1).scatter_(1, self.slots, self.places)
