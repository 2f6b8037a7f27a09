"""Greedy Jacobi decoding gives the text of autoregressive decoding, on every architecture and configuration."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fixtures import permuted_copy_batch
from models import ARCHITECTURES, last_new_tokens, padded_prompts, tiny_model, tokens_per_forward, trained_model
from transformers import LogitsProcessor, LogitsProcessorList

import hf_jacobi
from hf_jacobi import JacobiConfig
from hf_jacobi.decoding import slot_cache


NEW_TOKENS = 32
CONFIGS = {
    "default": {},
    "block": {"block_size": 8, "window": "block", "draft_init": "prompt", "pool_size": 0},
    "sliding": {"block_size": 8, "pool_size": 0},
    "recycling": {"block_size": 5, "pool_size": 4},
    "blocks-in-flight": {"block_size": 6, "window": "block", "max_blocks": 2, "spawn_ratio": 0.5, "ngram_size": 12},
    "all": {"block_size": 16, "max_blocks": 3, "spawn_ratio": 0.3, "pool_size": 2, "draft_init": "repeat"},
}


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **({"max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs))


def jacobi(model, inputs, config=None, **kwargs):
    kwargs = {"return_dict_in_generate": True} | kwargs
    config = {"block_size": 8} if config is None else config
    return generate(model, inputs, decoding="jacobi", jacobi_config=config, **kwargs)


def check_architecture(name: str, attention: str | None = None) -> None:
    """
    Text and logits are AR's in every configuration, and each configuration does what it is for: drafts are accepted,
    n-grams are recycled, blocks are spawned.

    Logits are compared too, since a model that is sure of its text gives the same text even with a wrong mask.
    """
    model = hf_jacobi.enable(trained_model(name, attention=attention))
    recycled, spawned = Counter(), Counter()
    for rows in (1, 3):
        inputs = padded_prompts(rows)
        kwargs = {"max_new_tokens": 64, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
        expected = generate(model, inputs, **kwargs)
        if rows == 1:
            assert len(set(expected.sequences[0, 12:].tolist())) >= 6, "a text that repeats itself would test nothing"
        else:  # rows end at different times
            kwargs["eos_token_id"] = end = last_new_tokens(model, inputs)[1]
            expected = generate(model, inputs, **kwargs)
            ends = [(row.tolist() + [end]).index(end) for row in expected.sequences[:, 12:]]
            assert len(set(ends)) > 1, f"rows end at {ends}"
        for label, config in CONFIGS.items():
            out = jacobi(model, inputs, config, **kwargs)
            assert torch.equal(out.sequences, expected.sequences), label
            for row, length in enumerate(row.new_tokens for row in out.jacobi_stats.per_sequence):
                ours, theirs = (torch.stack(logits)[:length, row] for logits in (out.logits, expected.logits))
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
            accepted = tokens_per_forward(out)
            assert accepted > 1.3, f"{label}, {rows} rows: {accepted:.2f} tokens per forward"
            recycled[label] += out.jacobi_stats.recycled_tokens
            spawned[label] += out.jacobi_stats.blocks_spawned
    for label, config in CONFIGS.items():
        settings = JacobiConfig(**config)
        if not settings.adapts:  # otherwise n-grams with lower chances than the model's own guesses are not tried
            assert (recycled[label] > 0) == (settings.pool_size > 0), f"{label}: {recycled[label]} tokens recycled"
        assert (spawned[label] > 0) == (settings.max_blocks > 1), f"{label}: {spawned[label]} blocks spawned"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_identical_to_ar(name):
    check_architecture(name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3", "qwen2-mixed-window"])
def test_identical_with_eager_attention(name):
    check_architecture(name, attention="eager")


def test_window_of_sliding_layers_counts_positions_not_slots():
    # Many branches spread a step over more slots than positions: a window counted in slots would hide text.
    model = hf_jacobi.enable(tiny_model("mistral-window", seed=3))
    inputs = padded_prompts(1, length=40)
    inputs["input_ids"][0, 20:] = inputs["input_ids"][0, :20]
    out = jacobi(model, inputs, {"block_size": 16, "pool_size": 8, "ngram_size": 8}, max_new_tokens=64)
    assert torch.equal(out.sequences, generate(model, inputs, max_new_tokens=64))
    assert out.jacobi_stats.positions > 2 * out.jacobi_stats.forwards


def test_decoding_ar_and_no_decoding_are_transformers_own():
    model, inputs = tiny_model(), padded_prompts(2)
    expected = generate(model, inputs)
    hf_jacobi.enable(model)
    assert torch.equal(generate(model, inputs), expected)
    assert torch.equal(generate(model, inputs, decoding="ar"), expected)


def test_block_of_one_without_recycling_is_ar():
    out = jacobi(
        hf_jacobi.enable(tiny_model()), padded_prompts(1), {"block_size": 1, "pool_size": 0}, eos_token_id=None
    )
    assert out.jacobi_stats.forwards == NEW_TOKENS
    assert out.jacobi_stats.positions == NEW_TOKENS


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_multi_block_decoding_pays_where_acceptance_is_high(permuted_copy, window):
    prompt = permuted_copy_batch(1, 40, torch.Generator().manual_seed(5))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    expected = generate(permuted_copy, inputs, max_new_tokens=128)
    forwards = {}
    for blocks in (1, 2, 3):
        config = {"block_size": 8, "window": window, "max_blocks": blocks, "pool_size": 0}
        out = jacobi(permuted_copy, inputs, config, max_new_tokens=128)
        assert torch.equal(out.sequences, expected)
        forwards[blocks] = out.jacobi_stats.forwards
        assert (out.jacobi_stats.blocks_spawned > 0) == (blocks > 1)
    assert forwards[2] < 0.75 * forwards[1]
    assert forwards[3] <= forwards[2]
    assert 128 / forwards[1] > 3


def test_sliding_window_beats_blocks_where_acceptance_is_high(permuted_copy):
    prompt = permuted_copy_batch(1, 40, torch.Generator().manual_seed(5))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    block, sliding = (
        jacobi(permuted_copy, inputs, {"block_size": 8, "window": window, "pool_size": 0}, max_new_tokens=128)
        for window in ("block", "sliding")
    )
    assert sliding.jacobi_stats.forwards < block.jacobi_stats.forwards


def test_adaptive_window_grows_where_drafts_are_accepted_and_rests_where_not(permuted_copy):
    prompt = permuted_copy_batch(1, 40, torch.Generator().manual_seed(5))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    eager = jacobi(permuted_copy, inputs, JacobiConfig(), max_new_tokens=128).jacobi_stats
    assert eager.tokens_per_forward > 4
    random, cost = hf_jacobi.enable(tiny_model("gpt_oss")), {"position_cost": 0.1}
    hopeless = jacobi(random, padded_prompts(1), cost, eos_token_id=None, max_new_tokens=96).jacobi_stats
    assert hopeless.positions_per_token > 1 and 0.9 * hopeless.forwards + 0.1 * hopeless.positions < 1.03 * 96


def test_recycling_accepts_what_repeats():
    model = hf_jacobi.enable(tiny_model("qwen3"))  # a random model that falls into a cycle
    inputs = padded_prompts(1)
    config = {"block_size": 4, "draft_init": "prompt"}
    with_pool = jacobi(model, inputs, config | {"pool_size": 1}, max_new_tokens=96, eos_token_id=None)
    without = jacobi(model, inputs, config | {"pool_size": 0}, max_new_tokens=96, eos_token_id=None)
    assert torch.equal(with_pool.sequences, without.sequences)
    assert with_pool.jacobi_stats.recycled_tokens > 10
    assert without.jacobi_stats.recycled_tokens == 0
    assert with_pool.jacobi_stats.forwards < without.jacobi_stats.forwards


def test_cache_holds_one_slot_per_token_and_the_step_itself(monkeypatch):
    largest = []
    reserve = slot_cache.SlotLayer.reserve
    monkeypatch.setattr(
        slot_cache.SlotLayer, "reserve", lambda self, slots: (reserve(self, slots), largest.append(self))
    )
    out = jacobi(
        hf_jacobi.enable(tiny_model()), padded_prompts(2), {"block_size": 8, "pool_size": 4}, max_new_tokens=150
    )
    tokens, step = out.sequences.shape[1], 8 + 4 * JacobiConfig().ngram_size
    assert max(layer.keys.shape[2] for layer in largest) <= tokens + step + slot_cache.GROWTH
    assert {layer.keys.shape[0] for layer in largest} == {2}, "no copy per candidate in the batch dimension"


@pytest.mark.parametrize("rows", [1, 3])
def test_stats_add_up(rows):
    inputs = padded_prompts(rows)
    out = jacobi(hf_jacobi.enable(tiny_model("olmo")), inputs, {"block_size": 6, "max_blocks": 2, "spawn_ratio": 0.3})
    stats = out.jacobi_stats
    assert stats.new_tokens == sum(row.new_tokens for row in stats.per_sequence)
    assert stats.positions == sum(row.positions for row in stats.per_sequence)
    assert stats.forwards == max(row.forwards for row in stats.per_sequence) == len(stats.accepted_per_forward)
    assert stats.blocks_spawned == sum(row.blocks_spawned for row in stats.per_sequence)
    for row, sequence in zip(stats.per_sequence, out.sequences[:, 12:].tolist()):
        end = sequence.index(2) + 1 if 2 in sequence else NEW_TOKENS
        assert row.new_tokens == end == sum(row.accepted_per_forward)
        assert row.forwards == len(row.accepted_per_forward)
        assert row.tokens_per_forward == pytest.approx(end / row.forwards)


@pytest.mark.parametrize("config", [CONFIGS["block"], CONFIGS["all"], CONFIGS["blocks-in-flight"]])
def test_trajectory_steps_equal_plain_forwards(config):
    model, inputs = hf_jacobi.enable(tiny_model()), padded_prompts(1)
    out = jacobi(model, inputs, config, output_trajectory=True, eos_token_id=None)
    (trajectory,) = out.trajectory
    text = out.sequences[0].tolist()
    assert trajectory.tokens == text[12:]
    assert sum(len(step.accepted) for step in trajectory.steps) == NEW_TOKENS
    for step in trajectory.steps:
        with torch.no_grad():
            logits = model(torch.tensor([text[: step.start] + step.draft])).logits[0]
        assert logits[step.start :].argmax(-1).tolist() == step.predictions
        assert text[step.start + 1 :][: len(step.accepted)] == step.accepted


def test_trajectory_of_a_block_runs_from_its_first_guess_to_the_text():
    out = jacobi(hf_jacobi.enable(tiny_model()), padded_prompts(1), CONFIGS["block"], output_trajectory=True)
    (trajectory,) = out.trajectory
    blocks = trajectory.blocks(8)
    assert [token for states in blocks for token in states[-1]] == trajectory.tokens
    for states in blocks:
        assert len({len(state) for state in states}) == 1
        agreeing = [next((i for i, pair in enumerate(zip(s, states[-1])) if pair[0] != pair[1]), 8) for s in states]
        assert agreeing == sorted(agreeing), "the converged prefix never shrinks"
        assert agreeing[0] >= 1 and (len(states) == 1 or agreeing[0] < 8)


class Nothing(LogitsProcessor):
    """A processor that is not transformers' own makes the rows of a batch move in step."""

    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize("processors", [[], [Nothing()]])
@pytest.mark.parametrize("seed", range(4))
def test_trajectories_of_a_batch_are_those_of_its_texts(processors, seed):
    model, inputs = hf_jacobi.enable(tiny_model("olmo")), padded_prompts(3, seed=seed)
    eos = [2, 17, 24, 39, 40, 41, 50]
    kwargs = {"max_new_tokens": 60, "eos_token_id": eos, "logits_processor": LogitsProcessorList(processors)}
    out = jacobi(model, inputs, {"block_size": 16}, output_trajectory=True, **kwargs)
    for row, (trajectory, stats) in enumerate(zip(out.trajectory, out.jacobi_stats.per_sequence)):
        text = out.sequences[row].tolist()
        assert trajectory.tokens == text[12 : 12 + stats.new_tokens]
        assert trajectory.tokens[-1] in eos or stats.new_tokens == 60
        for step in trajectory.steps:
            assert text[step.start + 1 :][: len(step.accepted)] == step.accepted
            assert step.draft[0] == text[step.start]


def test_no_trajectory_unless_asked_for():
    assert jacobi(hf_jacobi.enable(tiny_model()), padded_prompts(1)).trajectory is None


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_default_device_of_torchs_changes_nothing(do_sample):
    model, inputs, put = hf_jacobi.enable(trained_model()), padded_prompts(1), []

    class Streamer:
        put = staticmethod(lambda tokens: put.extend(tokens.flatten().tolist()))
        end = staticmethod(lambda: None)

    settings = {"max_new_tokens": 40, "do_sample": do_sample, "decoding": "jacobi", "return_dict_in_generate": True}
    settings |= {"jacobi_config": {"block_size": 4, "pool_size": 8}}
    torch.manual_seed(0)
    expected = model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        out = model.generate(**inputs, **settings, streamer=Streamer())
    assert torch.equal(out.sequences, expected.sequences) and put == out.sequences[0].tolist()
    assert tokens_per_forward(out) > 1 and (do_sample or out.jacobi_stats.recycled_tokens > 0)


def test_first_guesses_out_of_the_vocabulary_leave_the_text_alone_and_follow_the_seed():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(3)
    expected = generate(model, inputs, eos_token_id=None)
    forwards = []
    for seed in (1, 1, 2, 3, 4):
        config = {"block_size": 8, "pool_size": 0, "draft_init": "vocabulary", "seed": seed}
        out = jacobi(model, inputs, config, eos_token_id=None)
        assert torch.equal(out.sequences, expected) and tokens_per_forward(out) > 1
        forwards.append(out.jacobi_stats.forwards)
    assert forwards[0] == forwards[1] and len(set(forwards)) > 1


def test_a_configuration_that_does_not_say_how_many_tokens_there_are(monkeypatch):
    """Only first guesses from the vocabulary need its size."""
    model, prompts = hf_jacobi.enable(trained_model()), padded_prompts(2)
    call = {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**prompts, **call)
    del model.config.vocab_size
    monkeypatch.delattr(type(model.config), "vocab_size")
    call |= {"decoding": "jacobi", "return_dict_in_generate": True}
    out = model.generate(**prompts, **call, jacobi_config={"block_size": 8})
    assert torch.equal(out.sequences, expected) and tokens_per_forward(out) > 1.3
    with pytest.raises(hf_jacobi.UsageError, match="whose number is not known here"):
        model.generate(**prompts, **call, jacobi_config={"draft_init": "vocabulary"})
