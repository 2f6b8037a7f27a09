"""One forward over the drafts of a batch: the prefill's cache taken over, the layout, the mask, the logits."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import torch
from transformers import Cache

from .attention import AttentionMask
from .compat import CACHE, cache_argument, cache_of, prefill, renamed_cache
from .draft_adapter import DraftAdapter
from .drafting import Draft
from .errors import UsageError
from .layout import Layout
from .slot_cache import SlotCache
from .verify import UNDRAWABLE, TokenChooser


MOVES = 64  # room for accepted tokens to be moved into place in one step; as often four times that as it takes


class Step:
    """
    Runs the model over the drafts of B rows, and predicts the token after each node.

    Args:
        model: the model.
        input_ids: `[B, P]`, left-padded.
        generation_config, model_kwargs: what `generate` prepared.
        chooser: how logits become tokens.

    Attributes:
        cache: the keys and values of all tokens but each row's newest.
        offsets: position minus slot, per row.
        key_valid: `[B, P]` bool, false for the padding of the prompt; `None` when there is none.
        copies: how many columns at the end of the newest forward the draft-only adapter served; 0 without one.
        mends_drafts: whether a forward that a draft spoilt is run again; not where processes share each forward.
    """

    def __init__(self, model, input_ids: torch.Tensor, generation_config, model_kwargs: dict, chooser: TokenChooser):
        self.model = model
        self.input_ids = input_ids
        self.device = input_ids.device
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.chooser = chooser
        self.cache_name = cache_argument(model)
        self.numbers = list(range(input_ids.shape[0]))
        self.draft_adapter: DraftAdapter | None = None
        self.copies = 0
        self.key_valid: torch.Tensor | None = None
        self.mends_drafts = True
        self._token_of_nan: int | None = None
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._slots = torch.arange(0, device=self.device)

    @property
    def prompt_ends(self) -> list[int]:
        """The position of each row's last prompt token."""
        return self.model_kwargs["position_ids"][:, -1].expand(len(self.numbers)).tolist()

    def prefill(self, keeps_home: bool) -> list[list[int]]:
        """
        Runs the prompt through transformers' own prefill, and takes its cache over.

        Args:
            keeps_home: whether the caller wants that cache back (`export`).

        Returns:
            `[B][1]`, the first token of each row; its logits are in `logits`.
        """
        outputs = prefill(self.model, self.input_ids, self.generation_config, self.model_kwargs)
        self.home = cache_of(outputs)
        if not isinstance(self.home, Cache):
            raise UsageError(
                f"Jacobi decoding verifies drafts against the KV cache, but {type(self.model).__name__} gave back "
                f"{type(self.home).__name__} in place of a transformers.Cache: use decoding='ar'."
            )
        length = self.home.get_seq_length()
        self.cache = SlotCache.from_prefill(self.home, length, keeps_home)
        self.slot_shift = length - self.input_ids.shape[1]
        ends = self.prompt_ends
        self.offsets = [position - (length - 1) for position in ends]
        mask = self.model_kwargs.get("attention_mask")
        left_padding = torch.zeros(len(self.numbers), dtype=torch.long, device=self.device)
        if mask is not None and not bool(mask.all()):
            self.key_valid = mask.bool().to(self.device)
            left_padding = (self.key_valid.cumsum(1) == 0).sum(1)
        self.mask = AttentionMask(self.model.config.get_text_config(decoder=True), self.model.dtype, left_padding)
        self.logits = outputs.logits[:, -1:].to(self.device)
        return self.predict(self.logits, np.array(ends)[:, None] + 1)

    def __call__(self, drafts: list[Draft], starts: list[int]) -> list[list[int]]:
        """
        Scores all drafts in one forward. Their keys and values lie in the cache after it, their logits in `logits`.

        Args:
            drafts: one per row.
            starts: index in its sequence of each draft's node 0.

        Returns:
            `[B][Q]`, the token predicted at each node (`verify.UNDRAWABLE` for none); those of the draft-only adapter
            at the chain (`copies`) last.
        """
        longest = max(draft.chain_length for draft in drafts)
        self.copies = longest if self.draft_adapter and longest > 1 else 0
        predictions = self._predictions(drafts, starts)
        if self.mends_drafts and self._are_spoilt(predictions):
            self.cache.plan.mends_drafts = True
            predictions = self._predictions(drafts, starts)
            self.cache.plan.mends_drafts = False
        return predictions

    def _predictions(self, drafts: list[Draft], starts: list[int]) -> list[list[int]]:
        with self.draft_adapter.on(self.copies) if self.draft_adapter else nullcontext():
            layout = self.score(drafts, starts)
        return self.chooser.predict(self.logits, layout.keys).tolist()  # the one wait for the device

    def _are_spoilt(self, predictions: list[list[int]]) -> bool:
        """
        Whether a draft at which the model overflows may have spoilt what is predicted at a node 0: its logits are NaN
        then. They are looked at where the token is the one that such logits give, or where that is any.
        """
        if len(predictions[0]) == 1:
            return False
        if self._token_of_nan is None:
            nan = torch.full_like(self.logits[:1, :1], torch.nan)
            keys = torch.zeros(2, 1, 1, 1, dtype=torch.int32, device=self.device)
            self._token_of_nan = self.chooser.predict(nan, keys).item()
        is_known = not self.chooser.rule.is_random or self._token_of_nan == UNDRAWABLE
        if is_known and all(tokens[0] != self._token_of_nan for tokens in predictions):
            return False
        return bool(self.logits[:, 0].isnan().any())

    def score(self, drafts: list[Draft], starts: list[int]) -> Layout:
        """Lays out, uploads and runs a forward, which leaves `logits`."""
        layout = self._layout(max(map(len, drafts)) + self.copies)
        layout.fill(drafts, [start + self.slot_shift for start in starts], self.offsets, self.copies)
        layout.fill_moves(self.cache.moves)
        if self.chooser.rule.is_random:
            layout.host["keys"][:] = self.chooser.rule.keys(self.numbers, layout.host["positions"] + 1)
        layout.upload()
        self.cache.move(layout.moves)
        self.cache.place(layout.slots, layout.first, layout.end)
        slots = self._numbers_of_slots(layout.end)
        visible = layout.visible(slots, self.key_valid)
        key_places = layout.key_places(slots) if visible is not None and self.mask.reads_places else None
        self.logits = self.run(layout.ids, layout.positions, visible, layout.places, key_places)
        return layout

    def run(self, ids, positions, visible, places, key_places) -> torch.Tensor:
        """
        One forward over tokens that `cache` knows the slots of.

        Args:
            ids, positions, places: `[B, Q]`, the tokens, their positions, and their indices in their sequences.
            visible: `[B, Q, S]` bool, or `None` where each sees all there is.
            key_places: `[B, S]`, the index of the token in each slot; may be `None` as for `AttentionMask`.

        Returns:
            logits `[B, Q, V]`.
        """
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            attention_mask=None if visible is None else self.mask(visible, places, key_places),
            position_ids=positions,
            **{CACHE: self.cache},
            **self._other_kwargs(ids.shape[1]),
        )
        return self.model(**renamed_cache(inputs, self.cache_name), return_dict=True).logits.to(self.device)

    def predict(self, logits: torch.Tensor, positions: np.ndarray) -> list[list[int]]:
        """`[B][Q]`, the tokens at `positions` `[B, Q]` that logits `[B, Q, V]` give."""
        keys = None
        if self.chooser.rule.is_random:
            keys = torch.from_numpy(self.chooser.rule.keys(self.numbers, positions)).to(self.device)
        return self.chooser.predict(logits, keys).tolist()

    def keep_path(self, row: int, start: int, path: list[int]) -> None:
        """Keeps the accepted nodes of a row; `start` is the index in its sequence of node 0."""
        self.cache.keep_path(row, start + self.slot_shift, path)

    def of_rows(self, rows: list[int], length: int) -> Step:
        """A step over some of the rows, with a cache of its own that holds their first `length` slots."""
        part = copy.copy(self)
        part.numbers = [self.numbers[row] for row in rows]
        part.cache = self.cache.of_rows(rows, length)
        part.mask = self.mask.of_rows(rows)
        part.key_valid = None if self.key_valid is None else self.key_valid[rows]
        part.offsets = [self.offsets[row] for row in rows]
        part._layouts = {}
        return part

    def export(self, length: int) -> None:
        """Hands the first `length` tokens of every row back to the cache that the prefill filled (`home`)."""
        self.cache.export(self.home, length + self.slot_shift)

    def idle(self) -> None:
        """A forward without use, for the other processes of a sharded model that are not done yet."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def _layout(self, width: int) -> Layout:
        moves = MOVES
        while moves < len(self.cache.moves):
            moves *= 4
        shape = (width, moves)
        if shape not in self._layouts:
            self._layouts[shape] = Layout(len(self.numbers), *shape, self.device)
        return self._layouts[shape]

    def _numbers_of_slots(self, count: int) -> torch.Tensor:
        """`[count]`: 0, 1, 2, ..."""
        if count > len(self._slots):
            self._slots = torch.arange(2 * count, device=self.device)
        return self._slots[:count]

    def _other_kwargs(self, width: int) -> dict:
        """What else the caller gave the model; token types of new tokens are those that AR would give them."""
        ours = (CACHE, "position_ids", "attention_mask", "inputs_embeds", "logits_to_keep")
        others = {name: value for name, value in self.model_kwargs.items() if name not in ours}
        for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            if others.get(name) is not None:
                newest = others[name][:, -1:].expand(-1, width)
                others[name] = newest if name == "token_type_ids" else torch.zeros_like(newest)
        return others
