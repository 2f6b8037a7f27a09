"""Property-based: whatever the prompts, the batch, the settings, the processors and the stops, the text is AR's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, tokens_per_forward, trained_model

import hf_jacobi


MODELS = {
    name: hf_jacobi.enable(trained_model(name)) for name in ("llama", "gpt2", "olmo", "gemma3", "mistral-window")
}


@st.composite
def batches(draw):
    """Left-padded prompts of one to four rows; few symbols, so that n-grams repeat."""
    rows = draw(st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=20), min_size=1, max_size=4))
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


jacobi_settings = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 3, 7, 16, 40]),
        "max_blocks": st.integers(1, 3),
        "spawn_ratio": st.sampled_from([0.1, 0.5, 0.85, 1.0]),
        "draft_init": st.sampled_from(["prompt", "ngram", "repeat", "vocabulary"]),
        "pool_size": st.integers(0, 6),
        "ngram_size": st.integers(1, 8),
        "pool_prompt": st.booleans(),
    }
) | st.just({})
windows = st.sampled_from([{"window": "block"}, {"window": "sliding"}, {"adaptive": True}])
processing = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.2]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 20),
        "bad_words_ids": st.just([[5], [7, 9]]),
        "suppress_tokens": st.just([11, 30]),
    },
)
stops = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(30, 50) | st.integers(1, 40),
        "eos_token_id": st.none() | st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4, unique=True),
    }
)


def test_text_is_that_of_ar():
    accepted = Counter()

    @given(st.sampled_from(sorted(MODELS)), batches(), jacobi_settings, windows, processing, stops)
    def check(name, inputs, config, window, processing, stops):
        model = MODELS[name]
        kwargs = {"do_sample": False, "pad_token_id": 0} | processing | stops
        expected = model.generate(**inputs, **kwargs)
        config = config | window if config else config
        kwargs |= {"decoding": "jacobi", "jacobi_config": config, "return_dict_in_generate": True}
        out = model.generate(**inputs, **kwargs)
        assert torch.equal(out.sequences, expected)
        accepted[tokens_per_forward(out) > 1] += 1

    check()
    assert 2 * accepted[True] > accepted[False], f"only {accepted[True]} of {accepted.total()} accepted a draft"


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_is_that_of_ar_on_every_architecture(name, record_property):
    model = hf_jacobi.enable(trained_model(name))
    cases = Counter()

    count = max(20, settings().max_examples // 9)  # over 2,000 for all architectures with the profile "thorough"

    @settings(max_examples=count)
    @given(batches(), jacobi_settings, windows, processing, stops)
    def check(inputs, config, window, processing, stops):
        kwargs = {"do_sample": False, "pad_token_id": 0} | processing | stops
        config = config | window if config else config
        out = model.generate(**inputs, **kwargs, decoding="jacobi", jacobi_config=config, return_dict_in_generate=True)
        assert torch.equal(out.sequences, model.generate(**inputs, **kwargs))
        rows = out.jacobi_stats.per_sequence
        cases.update(cases=1, tokens=sum(row.new_tokens for row in rows), forwards=sum(row.forwards for row in rows))

    check()
    per_forward = cases["tokens"] / cases["forwards"]
    record_property("tokens_per_forward", per_forward)
    print(f"{name}: {cases['cases']} cases, {per_forward:.2f} tokens per forward")
    assert cases["cases"] >= count
    assert per_forward > (1.3 if count >= 55 else 1.1)  # the first cases are the smallest


def test_sampled_text_is_that_of_its_seed():
    accepted = Counter()

    @given(
        st.sampled_from(sorted(MODELS)), batches(), jacobi_settings, windows, processing, stops, st.integers(0, 2**40)
    )
    def check(name, inputs, config, window, processing, stops, seed):
        kwargs = {"do_sample": True, "temperature": 0.8, "pad_token_id": 0} | processing | stops
        kwargs |= {"decoding": "jacobi", "return_dict_in_generate": True}

        def decode(config):
            return MODELS[name].generate(**inputs, **kwargs, jacobi_config=config | {"seed": seed})

        out = decode(config | window)
        assert torch.equal(out.sequences, decode({"block_size": 1, "pool_size": 0}).sequences)
        accepted[tokens_per_forward(out) > 1] += 1

    check()
    assert 2 * accepted[True] > accepted[False], f"only {accepted[True]} of {accepted.total()} accepted a draft"
