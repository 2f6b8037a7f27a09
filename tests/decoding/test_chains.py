"""Steps without branches by flash attention, with a slow kernel that implements the documented contract."""

from __future__ import annotations

import math

import pytest
import torch
from models import padded_prompts, tiny_model, tokens_per_forward, trained_model
from test_draft_adapter import with_adapter
from transformers import AttentionInterface

import hf_jacobi
from hf_jacobi.decoding import attention, compat, support


CHAINS = {"block_size": 6, "pool_size": 0}
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}


def slow_kernel(
    q, k_cache, v_cache, *, cache_seqlens, cache_leftpad, softmax_scale, causal, window_size, softcap
) -> torch.Tensor:
    """
    `flash_attn_with_kvcache` as flash-attn documents it: row b of queries `[B, Q, H, D]` attends to the slots from
    `cache_leftpad[b]` to `cache_seqlens[b]` of `[B, S, heads, D]`; a causal mask ends at the bottom right corner, and
    `window_size` limits how far each query sees to its left and right.
    """
    assert causal and cache_seqlens.dtype == cache_leftpad.dtype == torch.int32
    result = torch.zeros(*q.shape[:3], v_cache.shape[-1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    for row, (end, first) in enumerate(zip(cache_seqlens.tolist(), cache_leftpad.tolist())):
        assert first < end <= k_cache.shape[1]
        for query in range(q.shape[1]):
            newest = end - q.shape[1] + query
            oldest = first if window_size[0] < 0 else max(first, newest - window_size[0])
            if newest < oldest:
                continue
            for head in range(q.shape[2]):
                shared = head * k_cache.shape[2] // q.shape[2]
                scores = k_cache[row, oldest : newest + 1, shared] @ q[row, query, head] * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                result[row, query, head] = scores.softmax(0) @ v_cache[row, oldest : newest + 1, shared]
    return result


def slow_flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **_):
    """transformers' flash attention outside of steps: with the mask of a prompt, `[B, S]`, or without one."""
    rows, width, slots = query.shape[0], query.shape[2], key.shape[2]
    padding = torch.zeros(rows) if attention_mask is None else (attention_mask == 0).sum(1)
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
    arguments = {"softmax_scale": scaling, "softcap": softcap, "window_size": window, "causal": True}
    ends = torch.full((rows,), slots, dtype=torch.int32)
    states = (states.transpose(1, 2) for states in (query, key, value))
    assert width <= slots and not math.isnan(float(key.sum()))
    return slow_kernel(*states, cache_seqlens=ends, cache_leftpad=padding.to(torch.int32), **arguments), None


@pytest.fixture
def flash(monkeypatch):
    """Makes a model run flash attention by the slow kernel; gives the list of query counts that the kernel got."""
    before, widths = compat.registered_attention("flash_attention_2"), []

    def kernel(q, *arguments, **keywords):
        widths.append(q.shape[1])
        return slow_kernel(q, *arguments, **keywords)

    for module in (support, attention):
        monkeypatch.setattr(module, "flash_kernel", lambda: kernel)
    AttentionInterface.register("flash_attention_2", slow_flash)
    yield widths
    AttentionInterface.register("flash_attention_2", before)


STATIC = {"cache_implementation": "static", "max_cache_len": 100, "disable_compile": True}


@pytest.mark.parametrize("way", [{}, STATIC], ids=["growing", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_text_is_that_of_ar(name, rows, way, flash):
    model, inputs = hf_jacobi.enable(trained_model(name)), padded_prompts(rows)
    expected = model.generate(**inputs, **GREEDY, decoding="ar")
    with compat.attending_by(model, "flash_attention_2"):
        assert torch.equal(model.generate(**inputs, **GREEDY, decoding="ar"), expected)
        out = model.generate(
            **inputs, **GREEDY, **way, decoding="jacobi", jacobi_config=CHAINS, return_dict_in_generate=True
        )
        following = model.generate(
            out.sequences, **GREEDY | {"max_new_tokens": 5}, **{compat.CACHE: getattr(out, compat.CACHE)}
        )
    assert torch.equal(out.sequences, expected) and tokens_per_forward(out) > 1
    assert max(flash) > 1
    assert torch.equal(following, model.generate(expected, **GREEDY | {"max_new_tokens": 5})) or rows > 1


def test_rows_that_end_apart(flash):
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(4)
    free = model.generate(**inputs, **GREEDY)[:, 12:].tolist()
    settings = GREEDY | {"eos_token_id": [max(set(text), key=text.index) for text in free]}
    expected = model.generate(**inputs, **settings)
    with compat.attending_by(model, "flash_attention_2"):
        for kept in (False, True):
            out = model.generate(
                **inputs, **settings, decoding="jacobi", jacobi_config=CHAINS, return_dict_in_generate=kept
            )
            assert torch.equal(out.sequences if kept else out, expected)
    assert tokens_per_forward(out) > 1


def test_what_takes_a_mask_is_refused(flash, monkeypatch):
    model = hf_jacobi.enable(tiny_model())
    settings = GREEDY | {"decoding": "jacobi"}
    with compat.attending_by(model, "flash_attention_2"):
        with pytest.raises(ValueError, match=r"takes no mask.*pool_size=0.*'ar'"):
            model.generate(**padded_prompts(1), **settings)
        inputs = padded_prompts(2)
        inputs["attention_mask"][1, 8] = 0
        with pytest.raises(ValueError, match="padding between its tokens"):
            model.generate(**inputs, **settings, jacobi_config=CHAINS)
        monkeypatch.setattr(support, "flash_kernel", lambda: None)
        with pytest.raises(ValueError, match="flash-attn package"):
            model.generate(**padded_prompts(1), **settings, jacobi_config=CHAINS)
    adapted = with_adapter()
    monkeypatch.undo()
    monkeypatch.setattr(support, "flash_kernel", lambda: slow_kernel)
    with compat.attending_by(adapted, "flash_attention_2"), pytest.raises(ValueError, match="no such adapter"):
        adapted.generate(**padded_prompts(1), **settings, jacobi_config=CHAINS)
