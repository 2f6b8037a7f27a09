"""Finished rows leave the forwards of the others, whose text does not change."""

from __future__ import annotations

import pytest
import torch
from models import last_new_tokens, padded_prompts, tokens_per_forward, trained_model
from test_draft_adapter import with_adapter

import hf_jacobi
from hf_jacobi.decoding.step import Step


ROWS = 6


@pytest.fixture
def served(monkeypatch):
    """How many rows each forward served."""
    counts = []
    run = Step.run
    monkeypatch.setattr(Step, "run", lambda step, ids, *rest: counts.append(ids.shape[0]) or run(step, ids, *rest))
    return counts


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "opt", "adapter"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "top_k": 20}, {"repetition_penalty": 1.01}, {"stop_strings": None}],
    ids=["greedy", "sampled", "penalty", "whole-batch"],
)
def test_text_is_that_of_a_batch_that_stays_whole(name, settings, served):
    model = with_adapter() if name == "adapter" else hf_jacobi.enable(trained_model(name))
    inputs = padded_prompts(ROWS)
    settings = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None} | settings
    if "stop_strings" in settings:  # a user's criterion, which may read all rows
        settings["stopping_criteria"] = [lambda ids, scores, **_: torch.zeros(len(ids), dtype=torch.bool)]
        del settings["stop_strings"]
    settings["eos_token_id"] = last_new_tokens(model, inputs)
    config = {"block_size": 6, "seed": 3}
    whole = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config=config, return_dict_in_generate=True)
    assert set(served) == {ROWS} and tokens_per_forward(whole) > 1
    served.clear()
    text = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config=config)
    assert torch.equal(text, whole.sequences)
    if not settings["do_sample"]:
        assert torch.equal(text, model.generate(**inputs, **settings, decoding="ar"))
    assert served == sorted(served, reverse=True)
    assert (served[-1] < ROWS) == ("stopping_criteria" not in settings)
