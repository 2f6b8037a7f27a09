"""Windows and chunks of layers: one rule for the masks of decoding and of training."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from hf_jacobi.decoding.attention import ALL_ROWS, AttentionMask, layer_kinds, layer_overlay


PADDING = torch.tensor([0, 3])


def config_with(**settings) -> LlamaConfig:
    config = LlamaConfig(attn_implementation="sdpa")
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["full_attention"]),
        ({"sliding_window": 4}, ["sliding_attention"]),
        ({"attention_chunk_size": 4}, ["chunked_attention"]),
        ({"sliding_window": 4, "layer_types": ["full_attention"] * 2}, ["full_attention"]),
        (
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            ["full_attention", "sliding_attention"],
        ),
    ],
)
def test_the_kinds_of_layers(settings, kinds):
    assert layer_kinds(config_with(**settings)) == kinds


def expected(kind: str, padding: int, query: int, key: int) -> bool:
    if kind == "sliding_attention":
        return query - key < 4
    return (query - padding) // 4 == (key - padding) // 4


@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_an_overlay_is_the_same_for_all_rows_at_once_and_by_index(kind):
    overlay = layer_overlay(kind, config_with(sliding_window=4, attention_chunk_size=4), PADDING)
    tokens = torch.arange(12)
    slow = [[[expected(kind, int(padding), q, k) for k in range(12)] for q in range(12)] for padding in PADDING]
    at_once = overlay(ALL_ROWS, None, tokens.view(1, -1, 1), tokens.view(1, 1, -1)).expand(2, 12, 12)
    by_index = overlay(torch.arange(2).view(-1, 1, 1), None, tokens.view(1, -1, 1), tokens.view(1, 1, -1))
    assert torch.equal(at_once, torch.tensor(slow)) and torch.equal(by_index.expand(2, 12, 12), at_once)


def test_full_attention_has_no_overlay():
    assert layer_overlay("full_attention", config_with(), PADDING) is None


@pytest.mark.parametrize("kind", ["sliding_attention", "chunked_attention"])
def test_a_mask_applies_the_overlay_to_the_indices_of_tokens(kind):
    """Slots 5 and 6 hold two branches for the same index, 5."""
    config = config_with(sliding_window=4, attention_chunk_size=4, layer_types=["full_attention", kind])
    mask = AttentionMask(config, torch.float32, PADDING)
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 5]]).expand(2, -1)
    visible = torch.ones(2, 2, 7, dtype=torch.bool)
    masks = mask(visible, places[:, 5:], places)
    assert mask.reads_places and masks["full_attention"].all()
    slow = [[[expected(kind, int(row), 5, int(k)) for k in places[0]]] * 2 for row in PADDING]
    assert torch.equal(masks[kind][:, 0], torch.tensor(slow))
