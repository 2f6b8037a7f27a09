"""The slot cache copies a prefill, writes to the given slots, and returns everything."""

from __future__ import annotations

import weakref

import pytest
import torch
from models import padded_prompts, tiny_model
from transformers import DynamicCache

from hf_jacobi.decoding.compat import CACHE, cache_of
from hf_jacobi.decoding.slot_cache import GROWTH, SlotCache


def prefilled(name: str, length: int = 12):
    model = tiny_model(name)
    inputs = padded_prompts(2, length)
    with torch.no_grad():
        cache = cache_of(model(**inputs, **{CACHE: DynamicCache(config=model.config)}, use_cache=True))
    return model, cache


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "deepseek_v3"])
def test_round_trip(name):
    model, cache = prefilled(name)
    slots = SlotCache.from_prefill(cache, 12, keep=True)
    back = slots.export(DynamicCache(config=model.config), 12)
    assert back.get_seq_length() == 12
    for original, returned in zip(cache.layers, back.layers):
        assert torch.equal(original.keys, returned.keys) and torch.equal(original.values, returned.values)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_prefill_nobody_needs_any_more_is_freed(name, keep):
    _, cache = prefilled(name)
    tensors = [weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.values)]
    taken = SlotCache.from_prefill(cache, 12, keep=keep)
    assert [tensor() is not None for tensor in tensors] == [keep] * 4, "zeroed memory is still allocated"
    assert all(layer.keys.any() and layer.values.any() for layer in taken.layers)


@pytest.mark.parametrize("slots", [[[12, 13], [12, 13]], [[12, 13], [70, 71]]])
def test_tokens_are_written_to_their_slots(slots):
    _, cache = prefilled("llama")
    taken = SlotCache.from_prefill(cache, 12, keep=True)
    slots = torch.tensor(slots)
    uniform = bool((slots[0] == slots[1]).all())
    end = int(slots.max()) + 1
    taken.place(slots, 12 if uniform else None, end)
    states = torch.randn(2, 2, 2, 8)
    keys, values = taken.update(states, states + 1, 0)
    assert keys.shape == (2, 2, end, 8)
    for row in range(2):
        assert torch.equal(keys[row][:, slots[row]], states[row])
        assert torch.equal(values[row][:, slots[row]], states[row] + 1)
        assert torch.equal(keys[row, :, :12], cache.layers[0].keys[row])


def test_an_accepted_branch_is_moved_into_place():
    _, cache = prefilled("llama")
    taken = SlotCache.from_prefill(cache, 12, keep=False)
    taken.place(torch.arange(12, 18).expand(2, -1), 12, 18)
    states = torch.randn(2, 2, 6, 8)
    for layer in range(2):
        taken.update(states, states, layer)
    taken.keep_path(1, 12, [0, 3, 5])
    taken.move()
    for layer in taken.layers:
        assert torch.equal(layer.keys[1, :, 12:15], states[1][:, [0, 3, 5]])
        assert torch.equal(layer.keys[0, :, 12:18], states[0]), "the other row does not change"


def test_memory_grows_by_a_few_slots_at_a_time():
    _, cache = prefilled("llama")
    taken = SlotCache.from_prefill(cache, 12, keep=False)
    for first in range(12, 400, 3):
        taken.place(torch.arange(first, first + 4).expand(2, -1), first, first + 4)
        taken.update(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8), 0)
        assert taken.layers[0].keys.shape[2] <= first + 4 + GROWTH
