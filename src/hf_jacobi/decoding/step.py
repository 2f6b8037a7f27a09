"""One forward over the drafts of a batch: from the prefill's cache, by layout and mask, to the logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from transformers import Cache, DynamicCache, StaticCache

from .attention import CHAIN_ATTENTION, AttentionMask, ChainMask, groups_to_fold
from .compat import CACHE, attention_of, cache_argument, cache_of, can_compile, prefill, renamed_cache
from .draft_adapter import DraftAdapter
from .drafting import Draft
from .errors import UsageError
from .layout import Layout
from .running import (
    WARM_UPS,
    Compiled,
    Eager,
    Graphs,
    Resident,
    Result,
    leave_resident,
    recorder_of,
    state_of,
    take_resident,
    weights_of,
)
from .shapes import FixedShapes, GrowingShapes
from .slot_cache import SlotCache, capacity_of, rows_of
from .verify import UNDRAWABLE, TokenChooser


MOVES = 64  # accepted tokens that one step can move into place; multiplied by four as often as needed


class Step:
    """
    Runs the model over the drafts of B rows, and predicts the token after each node.

    Args:
        model: the model.
        input_ids: `[B, P]`, left-padded.
        generation_config, model_kwargs: what `generate` prepared.
        chooser: turns logits into tokens.

    Attributes:
        cache: the keys and values of all tokens except each row's newest.
        offsets: position minus slot, per row.
        key_valid: `[B, P]` bool, false for the padding of the prompt; `None` without padding.
        adapter_drafts: whether a draft-only adapter takes part in forwards over more than one node.
        copies: the number of columns at the end of the newest forward that the draft-only adapter served; 0 without
            one.
        repairs_drafts: whether a forward that a draft has spoilt is repeated; false if processes share each forward.
        is_static: whether forwards have fixed shapes, over a static cache.
        shapes: the shapes that a forward can have.
        runner: how a forward is run.
        graphs: the graphs recorded of steps like this one, if the device can replay them.
    """

    cache: SlotCache
    home: Cache  # the cache that `generate` prepared, to which `export` returns the text
    mask: AttentionMask | ChainMask
    offsets: list[int]
    slot_shift: int
    logits: torch.Tensor

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
        self.adapter_drafts = True
        self.copies = 0
        self.key_valid: torch.Tensor | None = None
        self.repairs_drafts = True
        self.is_static = isinstance(model_kwargs.get(CACHE), StaticCache)
        self.shapes: GrowingShapes | FixedShapes = GrowingShapes()
        self.runner: Eager | Compiled = Eager()
        self.graphs: Graphs | None = None
        self.resident: Resident | None = None
        self._token_of_nan: int | None = None
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._slots = torch.arange(0, device=self.device)

    @property
    def cold_runs(self) -> int:
        """The number of runs of a shape that can take longer than later ones."""
        return 1 if self.graphs is None else WARM_UPS + 1

    @property
    def prompt_ends(self) -> list[int]:
        """The position of each row's last prompt token."""
        return self.model_kwargs["position_ids"][:, -1].expand(len(self.numbers)).tolist()

    def prefill(self, keeps_home: bool, most_tokens: int, most_nodes: int) -> list[list[int]]:
        """
        Runs the prompt through transformers' own prefill, and copies its cache.

        An empty static cache is filled only at the end, and only if the caller wants it.

        Args:
            keeps_home: whether the caller wants its cache filled (`export`).
            most_tokens: the largest length of the text.
            most_nodes: the largest number of nodes of a draft.

        Returns:
            `[B][1]`, the first token of each row; its logits are in `logits`.
        """
        config = self.model.config.get_text_config(decoder=True)
        static: StaticCache | None = self.model_kwargs[CACHE] if self.is_static else None
        empty = None if static is None or int(static.get_seq_length()) else static
        if empty is not None:
            dynamic = DynamicCache(config=config)
            self.model_kwargs = self.model_kwargs | {CACHE: dynamic}
            _refuse_misfit(empty, len(self.numbers), len(dynamic.layers))
        with self.draft_adapter.on(0) if self.draft_adapter else nullcontext():
            outputs = prefill(self.model, self.input_ids, self.generation_config, self.model_kwargs)
        filled = cache_of(outputs)
        if not isinstance(filled, Cache):
            raise UsageError(
                f"Jacobi decoding verifies drafts against the KV cache, but {type(self.model).__name__} returned a "
                f"{type(filled).__name__} in place of a transformers.Cache: use decoding='ar'."
            )
        self.home = filled if empty is None else empty
        length = int(filled.get_seq_length())
        self.slot_shift = length - self.input_ids.shape[1]
        ends = self.prompt_ends
        self.offsets = [position - (length - 1) for position in ends]
        self.mask = self._mask_of_step(config)
        keep = keeps_home and filled is self.home
        if static is None:
            self.cache = SlotCache.from_prefill(filled, length, keep)
        else:
            longest = max(most_tokens + self.slot_shift, capacity_of(static) or 0)
            self._fix(filled, length, keep, FixedShapes(longest, most_nodes))
        self.logits = outputs.logits[:, -1:].to(self.device)
        return self.predict(self.logits, np.array(ends)[:, None] + 1)

    def _mask_of_step(self, config) -> AttentionMask | ChainMask:
        """The mask for the attention of the model; sets `key_valid`."""
        mask = self.model_kwargs.get("attention_mask")
        left_padding = torch.zeros(len(self.numbers), dtype=torch.long, device=self.device)
        if mask is not None and not bool(mask.all()):
            self.key_valid = mask.bool().to(self.device)
            left_padding = (self.key_valid.cumsum(1) == 0).sum(1)
        if attention_of(config) == CHAIN_ATTENTION:
            return self._chain_mask(config, left_padding)
        return AttentionMask(config, self.model.dtype, left_padding, groups_to_fold(self.model))

    def _chain_mask(self, config, left_padding: torch.Tensor) -> ChainMask:
        if self.key_valid is not None and bool(((~self.key_valid).sum(1) != left_padding).any()):
            raise UsageError(
                "flash attention sees all tokens after the padding of a row, but this batch has padding between its "
                "tokens: load the model with attn_implementation='sdpa', or use decoding='ar'."
            )
        self.key_valid = None  # the mask contains the padding
        return ChainMask(config, left_padding)

    def _fix(self, filled: Cache, length: int, keep: bool, shapes: FixedShapes) -> None:
        """Copies a cache into static slots, and compiles or records the step over them where possible."""
        self.shapes = shapes
        plain = self.draft_adapter is None or self.draft_adapter.is_plain
        if plain and can_compile(self.model, self.generation_config):
            purpose = (shapes.total, *state_of(self.model))
            self.runner = Compiled(self.generation_config.compile_config, purpose)
        record = recorder_of(self.device)
        if type(self.runner) is Eager or record is None or self._has_other_tensors():
            self.cache = SlotCache.from_prefill(filled, length, keep, shapes.total)
            return
        rows, total = len(self.numbers), shapes.total
        self._purpose = (rows, total, self.runner.name, self.draft_adapter is not None, weights_of(self.model))
        resident = take_resident(self.model, self._purpose)
        if resident is None:
            cache = SlotCache.from_prefill(filled, length, keep, total)
            valid = torch.ones(rows, total, dtype=torch.bool, device=self.device)
            resident = Resident(cache, self.mask, valid, Graphs(self.device, record))
        else:
            resident.cache.take_over(filled, length, keep)
            resident.mask.left_padding.copy_(self.mask.left_padding)
        resident.key_valid.fill_(True)
        if self.key_valid is not None:
            resident.key_valid[:, : self.key_valid.shape[1]] = self.key_valid
        self.cache, self.mask, self.key_valid = resident.cache, resident.mask, resident.key_valid
        self._layouts, self._slots = resident.layouts, resident.slots
        self.resident, self.graphs = resident, resident.graphs

    def release(self) -> None:
        """Leaves the recorded graphs to the next call. The step must not run after this."""
        if self.resident is not None:
            leave_resident(self.model, self._purpose, self.resident)
            self.resident = None

    def __call__(self, drafts: list[Draft], starts: list[int]) -> list[list[int]]:
        """
        Scores all drafts in one forward, which leaves their keys and values in the cache and their logits in `logits`.

        Args:
            drafts: one per row.
            starts: index in its sequence of each draft's node 0.

        Returns:
            `[B][Q]`, the token predicted at each node (`verify.UNDRAWABLE` for none); the last `copies` are those of
            the draft-only adapter at the chain.
        """
        longest = max(draft.chain_length for draft in drafts)
        drafts_more = self.draft_adapter and self.adapter_drafts and longest > 1
        self.copies = self.shapes.width(longest) if drafts_more else 0
        predictions = self._predictions(drafts, starts)
        if self.repairs_drafts and self._are_spoilt(predictions):
            self.cache.plan.repairs_drafts = True
            with self.as_written():
                predictions = self._predictions(drafts, starts)
            self.cache.plan.repairs_drafts = False
        return predictions

    def _predictions(self, drafts: list[Draft], starts: list[int]) -> list[list[int]]:
        with self.draft_adapter.on(self.copies) if self.draft_adapter else nullcontext():
            layout = self.score(drafts, starts)
        return self.chooser.predict(self.logits, layout.keys).tolist()  # the only wait for the device

    def _are_spoilt(self, predictions: list[list[int]]) -> bool:
        """
        Whether a draft at which the model overflows has spoilt the prediction at a node 0, whose logits are then NaN.
        The logits are read only if the predicted token is the one that NaN gives, or if NaN can give any token.
        """
        if len(predictions[0]) == 1:
            return False
        if self._token_of_nan is None:
            nan = torch.full_like(self.logits[:1, :1], torch.nan)
            keys = torch.zeros(2, 1, 1, 1, dtype=torch.int32, device=self.device)
            self._token_of_nan = int(self.chooser.predict(nan, keys).item())
        is_known = not self.chooser.rule.is_random or self._token_of_nan == UNDRAWABLE
        if is_known and all(tokens[0] != self._token_of_nan for tokens in predictions):
            return False
        return bool(self.logits[:, 0].isnan().any())

    def score(self, drafts: list[Draft], starts: list[int]) -> Layout:
        """Lays out, uploads and runs a forward over the drafts, which leaves its logits in `logits`."""
        layout = self._layout(self.shapes.padded(self.shapes.width(max(map(len, drafts))) + self.copies))
        layout.fill(drafts, [start + self.slot_shift for start in starts], self.offsets, self.copies)
        layout.fill_moves(self.cache.moves)
        if self.chooser.rule.is_random:
            layout.host["keys"][:] = self.chooser.rule.keys(self.numbers, layout.host["positions"] + 1)
        if self.shapes.total is not None:
            layout.fix(self.shapes.total)
        layout.upload()
        end = self.shapes.slots(layout.end)
        if self.cache.moves:
            self._run(("move", *layout.moves.shape, layout.width), lambda: self.cache.move(layout.moves))
            self.cache.moves.clear()
        self.logits = self._run((layout.width, self.copies, end), lambda: self.forward(layout, end))
        return layout

    def _run(self, shape: tuple, function: Callable[[], Result]) -> Result:
        return function() if self.graphs is None else self.graphs.run(shape, function)

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """While this is open, nothing is compiled, recorded or replayed."""
        before, self.runner, self.graphs = (self.runner, self.graphs), Eager(), None
        try:
            yield
        finally:
            self.runner, self.graphs = before

    def forward(self, layout: Layout, end: int) -> torch.Tensor:
        """Logits `[B, Q, V]` of an uploaded layout, over `end` slots, without waiting for the device."""
        self.cache.place(layout.slots, layout.first, end)
        slots = self._numbers_of_slots(end)
        visible = None if type(self.mask) is ChainMask else layout.visible(slots, self.key_valid)
        key_places = layout.key_places(slots) if visible is not None and self.mask.reads_places else None
        return self.run(layout.ids, layout.positions, visible, layout.places, key_places)

    def run(self, ids, positions, visible, places, key_places) -> torch.Tensor:
        """
        One forward over tokens whose slots `cache` knows (`SlotCache.place`).

        Args:
            ids, positions, places: `[B, Q]`, the tokens, their positions, and their indices in their sequences.
            visible: `[B, Q, S]` bool, or `None` if every token sees all slots.
            key_places: `[B, S]`, the index of the token in each slot; can be `None` as for `AttentionMask`.

        Returns:
            logits `[B, Q, V]`.
        """
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            attention_mask=self._mask(visible, places, key_places),
            position_ids=positions,
            **{CACHE: self.cache},
            **self._other_kwargs(ids.shape[1]),
        )
        shape = (*ids.shape, self.copies, self.cache.plan.end if self.is_static else 0)
        return self.runner(self.model, renamed_cache(inputs, self.cache_name), shape).to(self.device)

    def _mask(self, visible, places, key_places):
        if type(self.mask) is not ChainMask:
            return None if visible is None else self.mask(visible, places, key_places)
        return self.mask(None, places, None)

    def predict(self, logits: torch.Tensor, positions: np.ndarray) -> list[list[int]]:
        """`[B][Q]`, the tokens predicted by logits `[B, Q, V]` at `positions` `[B, Q]`."""
        keys = None
        if self.chooser.rule.is_random:
            keys = torch.from_numpy(self.chooser.rule.keys(self.numbers, positions)).to(self.device)
        return self.chooser.predict(logits, keys).tolist()

    def keep_path(self, row: int, start: int, path: list[int]) -> None:
        """Keeps the accepted nodes of a row; `start` is the index in its sequence of node 0."""
        self.cache.keep_path(row, start + self.slot_shift, path)

    def of_rows(self, rows: list[int], length: int) -> Step:
        """A step over some of the rows, with a separate cache that holds their first `length` slots."""
        part = copy.copy(self)
        part.numbers = [self.numbers[row] for row in rows]
        part.cache = self.cache.of_rows(rows, length)
        part.mask = self.mask.of_rows(rows)
        part.key_valid = None if self.key_valid is None else self.key_valid[rows]
        part.offsets = [self.offsets[row] for row in rows]
        part._layouts = {}
        part.is_static, part.shapes, part.runner = False, GrowingShapes(), Eager()
        part.graphs = part.resident = None
        part.model_kwargs = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (len(self.numbers),) else value
            for name, value in self.model_kwargs.items()
        }
        return part

    def export(self, length: int) -> None:
        """Returns the first `length` tokens of every row to the cache that `generate` prepared (`home`)."""
        self.cache.export(self.home, length + self.slot_shift)

    def idle(self) -> None:
        """A forward whose result is unused, for the other processes of a sharded model that are still decoding."""
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

    def _has_other_tensors(self) -> bool:
        """Whether each forward gets new tensors as arguments, so that it cannot be recorded."""
        return any(isinstance(value, torch.Tensor) for value in self._other_kwargs(1).values())

    def _other_kwargs(self, width: int) -> dict:
        """The caller's other arguments for the model; new tokens get the token types that AR would give them."""
        ours = (CACHE, "position_ids", "attention_mask", "inputs_embeds", "logits_to_keep")
        others = {name: value for name, value in self.model_kwargs.items() if name not in ours}
        for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            if others.get(name) is not None:
                newest = others[name][:, -1:].expand(-1, width)
                others[name] = newest if name == "token_type_ids" else torch.zeros_like(newest)
        return others


def _refuse_misfit(static: StaticCache, rows: int, layers: int) -> None:
    """Raises for a cache that could not be filled at the end; AR would fail at its first token."""
    if (rows_of(static) or rows) != rows:
        raise UsageError(
            f"the StaticCache of this call has memory for batches of {rows_of(static)}, but this batch has {rows} "
            "rows: pass a new cache."
        )
    if len(static.layers) < layers:
        raise UsageError(
            f"the StaticCache of this call has {len(static.layers)} layers, but the model has {layers}: make it with "
            "the config of this model."
        )
