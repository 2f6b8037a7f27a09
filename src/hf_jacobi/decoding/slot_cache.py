"""The KV cache with one write position per row: rolling back changes a number, and nothing is concatenated."""

from __future__ import annotations

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


GROWTH = 64  # slots are added in multiples of this number, so that the cache is not copied for every token


class SlotLayer(CacheLayerMixin):
    """
    The keys and values of one layer, `[batch, heads, slots, head size]`.

    Args:
        plan: where the next forward writes, shared by all layers of a cache.
    """

    is_sliding = False  # the mask applies the window of a sliding layer: every slot is kept
    is_croppable = True

    keys: torch.Tensor  # None until `lazy_initialization`
    values: torch.Tensor
    device: torch.device
    dtype: torch.dtype

    def __init__(self, plan: SlotPlan):
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` slots; new ones are zero, since a NaN spreads even from a masked slot."""
        have = self.keys.shape[2]
        if slots > have:
            more = -(-(slots - have) // GROWTH) * GROWTH
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self.plan
        if plan.repairs_drafts:
            key_states, value_states = _with_finite_drafts(key_states), _with_finite_drafts(value_states)
        self._write(plan, key_states, value_states)
        return self.keys[:, :, : plan.end], self.values[:, :, : plan.end]

    def _write(self, plan: SlotPlan, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.reserve(plan.end)
        if plan.first is not None:
            self.keys[:, :, plan.first : plan.end] = key_states
            self.values[:, :, plan.first : plan.end] = value_states
        else:
            slots = plan.slots.to(self.device)
            rows = torch.arange(slots.shape[0], device=self.device).unsqueeze(1)
            # Under autocast, as training leaves a model, dtypes differ from one forward to the next.
            self.keys[rows, :, slots] = key_states.transpose(1, 2).to(self.keys.dtype)
            self.values[rows, :, slots] = value_states.transpose(1, 2).to(self.values.dtype)

    def move(self, rows: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies `[N]` slots to others, all at once."""
        self.keys[rows, :, targets] = self.keys[rows, :, sources]
        self.values[rows, :, targets] = self.values[rows, :, sources]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.end, 0

    def get_seq_length(self) -> int:
        return (self.plan.first or 0) if self.is_initialized else 0  # layers for images stay empty without an image

    def get_max_length(self) -> int:
        return -1


def _with_finite_drafts(states: torch.Tensor) -> torch.Tensor:
    """Keys or values `[batch, heads, query, head size]`, with zeros for NaN and infinity except at node 0."""
    return torch.cat([states[:, :, :1], states[:, :, 1:].nan_to_num(0.0, 0.0, 0.0)], dim=2)


class StaticSlotLayer(SlotLayer):
    """
    A layer that allocates all slots at once, as `[batch, slots, heads, head size]`, so that a token is contiguous.
    Attention gets `[batch, heads, slots, head size]` as usual, up to the end of the plan.

    It is not `is_compileable` in transformers' sense, since models would then build the masks of a forward themselves.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(states.shape[0], self.plan.total, states.shape[1], states.shape[3]).transpose(1, 2)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def reserve(self, slots: int) -> None:
        """Does nothing: all slots exist."""

    def _write(self, plan: SlotPlan, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        assert plan.rows is not None  # set by `SlotCache.place`
        place = plan.rows.to(self.device), plan.slots.to(self.device)
        self.keys.transpose(1, 2).index_put_(place, key_states.transpose(1, 2).to(self.keys.dtype))
        self.values.transpose(1, 2).index_put_(place, value_states.transpose(1, 2).to(self.values.dtype))


class SlotPlan:
    """
    Where the next forward writes.

    Attributes:
        repairs_drafts: whether it replaces NaN and infinity in drafts, since a NaN spreads even from a masked slot.
        rows, slots: `[batch, 1]` and `[batch, query]`, the rows and the slots to write.
        first, end: the same slots for all rows instead; `first` is `None` if rows write different slots.
        total: the number of slots of static layers.
    """

    slots: torch.Tensor  # set by `SlotCache.place`, as `rows` is for static layers

    def __init__(self, total: int = 0):
        self.repairs_drafts = False
        self.rows: torch.Tensor | None = None
        self.first: int | None = 0
        self.end = 0
        self.total = total


class SlotCache(Cache):
    """
    A `transformers.Cache` that writes to explicit slots.

    `from_prefill` fills it from the cache of the prefill, `place` sets where the tokens of the next forward go, and
    `export` returns its content to a cache of transformers.

    Args:
        layers: the number of layers.
        total: the number of slots, if it is fixed; by default the cache grows.
    """

    def __init__(self, layers: int, total: int | None = None):
        self.plan = SlotPlan(total or 0)
        self.moves: list[tuple[int, int, int]] = []
        kind = SlotLayer if total is None else StaticSlotLayer
        self.slot_layers = [kind(self.plan) for _ in range(layers)]
        super().__init__(layers=[*self.slot_layers])

    @classmethod
    def from_prefill(cls, cache: Cache, length: int, keep: bool, total: int | None = None) -> SlotCache:
        """
        Copies the `length` tokens that a prefill left in `cache`.

        A sliding layer holds only the last of them; the slots before them stay zero, outside of its window.

        Args:
            cache: a `DynamicCache` or `StaticCache`.
            length: the number of tokens it has seen.
            keep: whether the caller still uses `cache`; if not, each of its layers is freed once it is copied.
            total: as above.
        """
        slots = cls(len(cache.layers), total)
        slots.take_over(cache, length, keep)
        return slots

    def take_over(self, cache: Cache, length: int, keep: bool) -> None:
        """As `from_prefill`, for slots that may have held another text."""
        self.moves.clear()
        for source, target in zip(cache.layers, self.slot_layers):
            if not isinstance(source, CacheLayerMixin) or not source.is_initialized:
                continue
            if source.keys is None or source.values is None:
                continue
            if target.is_initialized:
                target.keys.zero_()
                target.values.zero_()
            else:
                target.lazy_initialization(source.keys, source.values)
            target.reserve(length)
            held = min(length, source.keys.shape[2])  # a static layer has free slots beyond them
            target.keys[:, :, length - held : length] = source.keys[:, :, :held]
            target.values[:, :, length - held : length] = source.values[:, :, :held]
            if not keep:
                source.reset()
                source.keys = source.values = None  # `reset` of older transformers only zeroes them
                source.is_initialized = False

    def of_rows(self, rows: list[int], length: int) -> SlotCache:
        """A separate cache that holds the first `length` slots of some rows."""
        self.move()
        part = SlotCache(len(self.slot_layers))
        for source, target in zip(self.slot_layers, part.slot_layers):
            if source.is_initialized:
                target.lazy_initialization(source.keys, source.values)
                target.keys = source.keys[rows, :, :length]
                target.values = source.values[rows, :, :length]
        return part

    def place(self, slots: torch.Tensor, first: int | None, end: int) -> None:
        """
        Sets where the next forward writes its tokens.

        Args:
            slots: `[batch, query]`.
            first: the first slot, if all rows write the same consecutive slots, else `None`.
            end: one past the last slot that any row writes.
        """
        plan = self.plan
        plan.slots, plan.first, plan.end = slots, first, end
        if plan.total and plan.rows is None:
            plan.rows = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)

    def keep_path(self, row: int, start: int, path: list[int]) -> None:
        """
        Keeps the accepted nodes of a row: node i was written to slot `start + i`, and the j-th node of `path` belongs
        in slot `start + j`. Nothing moves if the chain itself was accepted.

        The moves are collected in `moves`; `move` performs them with the next step.
        """
        self.moves += [(row, start + node, start + index) for index, node in enumerate(path) if node != index]

    def move(self, moves: torch.Tensor | None = None) -> None:
        """
        Performs the collected moves.

        Args:
            moves: `[3, N]`, rows, slots before and slots after, if they have been uploaded already.
        """
        if self.moves:
            moves = torch.tensor(self.moves, device="cpu").T if moves is None else moves
            on_device: dict[torch.device, torch.Tensor] = {}
            for layer in self.slot_layers:
                if layer.is_initialized:
                    if layer.device not in on_device:
                        on_device[layer.device] = moves.to(layer.device)
                    layer.move(*on_device[layer.device].unbind())
        self.moves.clear()

    def export(self, cache: Cache, length: int) -> Cache:
        """Writes the first `length` slots back into `cache`, a `DynamicCache` or `StaticCache`."""
        self.move()
        for source, target in zip(self.slot_layers, cache.layers):
            if not source.is_initialized or not isinstance(target, CacheLayerMixin):
                continue
            if isinstance(target, StaticLayer):
                _fill_static(target, source, length)
                continue
            held = length
            if isinstance(target, DynamicSlidingWindowLayer):
                held = min(length, target.sliding_window - 1)
            if not target.is_initialized:
                target.lazy_initialization(source.keys, source.values)
            target.keys = source.keys[:, :, length - held : length].clone()
            target.values = source.values[:, :, length - held : length].clone()
            if isinstance(target, DynamicSlidingWindowLayer):
                target.cumulative_length = length
        return cache


def _fill_static(target: StaticLayer, source: SlotLayer, length: int) -> None:
    """Fills a layer of a `StaticCache` with the first `length` slots of ours (with the last of them, if it slides)."""
    if not target.is_initialized:
        target.lazy_initialization(source.keys, source.values)
    assert target.keys is not None and target.values is not None  # made by `lazy_initialization`
    held = min(length, target.max_cache_len)
    target.keys[:, :, :held] = source.keys[:, :, length - held : length]
    target.values[:, :, :held] = source.values[:, :, length - held : length]
    target.cumulative_length.fill_(held)  # its own `update` also stops counting when the window is full
    if isinstance(target, StaticSlidingWindowLayer):
        target.cumulative_length_int = length


def capacity_of(cache: Cache) -> int | None:
    """The number of tokens that a `StaticCache` can hold; `None` for other caches, or if every layer slides."""
    full = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    return min(full, default=None)


def rows_of(cache: Cache) -> int | None:
    """The number of rows for which a `StaticCache` has allocated memory; `None` before that."""
    layers = (layer for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized)
    return next((layer.keys.shape[0] for layer in layers if layer.keys is not None), None)


def can_roll_back(cache: Cache) -> bool:
    """Whether `SlotCache` can hold and return the tokens of every layer of `cache`."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
    return all(type(layer) in kinds or type(layer).__name__ == "DummyLayer" for layer in cache.layers)


def holds_more_than_text(cache: Cache) -> bool:
    """Whether a layer of `cache` that keeps all tokens holds a different number of them, as cross-attention does."""
    full = [layer.keys for layer in cache.layers if type(layer) is DynamicLayer and layer.keys is not None]
    return any(keys.shape[-2] != cache.get_seq_length() for keys in full)
