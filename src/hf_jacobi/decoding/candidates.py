"""Lays the draft and the recycled candidates of every sequence into one row: ids, positions, slots, visibility."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class TokenTree:
    """
    The tokens one forward scores for one sequence: the draft as a chain, candidates as branches off it.

    Node 0 is the newest committed token. Nodes 0 to `draft_length` - 1 are the draft; a branch shares the nodes of the
    draft that it begins with. `parents[i] < i`; `depths[i]` is the distance from node 0.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: list[dict[int, int]] = field(default_factory=list)
    draft_length: int = 0

    def __post_init__(self):
        draft, self.tokens = self.tokens, []
        for index, token in enumerate(draft):
            self._append(token, index - 1)
        self.draft_length = len(draft)

    def _append(self, token: int, parent: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        self.children.append({})
        if parent >= 0:
            self.children[parent][token] = node
        return node

    def add_branch(self, tokens: list[int]) -> None:
        """Adds a candidate continuation of node 0, sharing the nodes already there."""
        node = 0
        for token in tokens:
            child = self.children[node].get(token)
            node = self._append(token, node) if child is None else child

    def path(self, node: int) -> list[int]:
        """The nodes from node 0 to `node`, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class StepInputs:
    """
    One forward over the trees of all sequences. B sequences, Q tokens each (shorter trees are padded), S slots.

    Attributes:
        input_ids: `[B, Q]`.
        position_ids: `[B, Q]`, counted as the model does, without the left padding.
        slots: `[B, Q]`, the cache slot of each token.
        places: `[B, Q]`, the index in its sequence of each token.
        visible: `[B, Q, S]` bool, which slots each token may attend to; `None` when each sees all there are (one token
            a row, no padding, rows of equal length).
        key_places: `[B, S]`, the index of the token in each slot; `None` with `visible`.
        uniform: whether all sequences write the same slots.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    visible: torch.Tensor | None
    key_places: torch.Tensor | None
    uniform: bool


def lay_out(
    trees: list[TokenTree],
    starts: list[int],
    offsets: list[int],
    key_valid: torch.Tensor | None,
    device: torch.device,
    copies: int = 0,
) -> StepInputs:
    """
    Lays one tree per sequence into the rows of a batch.

    Args:
        trees: one per sequence.
        starts: the slot of each tree's node 0, which is also its index in the sequence.
        offsets: position minus slot, per sequence (minus the left padding).
        key_valid: `[B, P]` bool, false for the padding of the prompt; `None` when there is none.
        device: where the tensors go.
        copies: how many columns the drafts have that stand a second time at the end of each row; a copy sees the
            committed text and itself, never the tree. 0 for none.
    """
    tree_width = max(len(tree) for tree in trees)
    ids = [tree.tokens + [0] * (tree_width - len(tree)) for tree in trees]
    depths = [tree.depths + [0] * (tree_width - len(tree)) for tree in trees]
    if copies:
        ids = [row + _fitted(tree.tokens[: tree.draft_length], copies) for row, tree in zip(ids, trees)]
        depths = [
            row + [min(depth, tree.draft_length - 1) for depth in range(copies)] for row, tree in zip(depths, trees)
        ]
    width = tree_width + copies
    uniform = len(set(starts)) == 1
    start = torch.tensor(starts, device=device).unsqueeze(1)
    slots = start + torch.arange(width, device=device)
    places = start + torch.tensor(depths, device=device)
    positions = places + torch.tensor(offsets, device=device).unsqueeze(1)
    visible = key_places = None
    if width > 1 or key_valid is not None or not uniform:
        total = max(starts) + width
        within = torch.arange(total, device=device) - start  # [B, S], slot relative to node 0
        ancestors = torch.from_numpy(np.stack([_ancestors(tree, tree_width, copies) for tree in trees])).to(device)
        in_tree = (within >= 0) & (within < width)
        index = within.clamp(0, width - 1)
        tree_part = ancestors.gather(2, index.unsqueeze(1).expand(-1, width, -1)) & in_tree.unsqueeze(1)
        committed = within < 0
        if key_valid is not None:
            committed[:, : key_valid.shape[1]] &= key_valid
        visible = tree_part | committed.unsqueeze(1)
        key_places = torch.where(in_tree, places.gather(1, index), within + start)
    return StepInputs(torch.tensor(ids, device=device), positions, slots, places, visible, key_places, uniform)


def _fitted(tokens: list[int], length: int) -> list[int]:
    return tokens + [0] * (length - len(tokens))


def _ancestors(tree: TokenTree, width: int, copies: int = 0) -> np.ndarray:
    """`[Q, Q]` bool, Q = width + copies: row i marks node i and its ancestors; a padding node marks itself."""
    rows = np.eye(width + copies, dtype=bool)
    rows[width:, width:] = np.tri(copies, dtype=bool)
    length = tree.draft_length
    rows[:length, :length] = np.tri(length, dtype=bool)
    for node in range(length, len(tree)):
        rows[node] |= rows[tree.parents[node]]
    return rows
