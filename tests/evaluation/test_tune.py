"""Tuning on a model whose forwards take a known time."""

import functools
import time

import pytest
from models import tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi import plots
from hf_jacobi.evaluation.tune import Knee, measure_knee, tune


PROMPTS = [[3 + (row + column) % 5 for column in range(10)] for row in range(2)]
GRID = ({}, {"block_size": 4}, {"block_size": 16}, {"block_size": 64})


def timed(model, seconds: float, per_token: float):
    """The model, each of whose forwards takes some time, and more for each token."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        start = time.perf_counter()
        output = plain(*args, **kwargs)
        tokens = kwargs["input_ids"].shape[1]
        while time.perf_counter() - start < seconds + per_token * tokens:
            time.sleep(0.0002)
        return output

    model.forward = forward
    return hf_jacobi.enable(model)


def repeating():
    """A model that writes the same few tokens over and over, so that n-grams of its text come true."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def report():
    model = timed(repeating(), 0.01, 0.0003)
    return tune(model, tiny_tokenizer(), PROMPTS, grid=GRID, max_new_tokens=24)


def test_the_prediction_is_within_15_percent_of_the_measurement(report):
    assert report["predicted"] == pytest.approx(report["measured"], rel=0.15)


def test_the_fastest_setting_is_chosen(report):
    checked = report["checked"]
    best = max((name for name in checked if name != "AR"), key=lambda name: checked[name]["tokens_per_second"])
    assert str(report["jacobi"]) == best
    assert report["speedup"] == checked[best]["speedup"]
    assert (report["decoding"] == "jacobi") == (report["speedup"] >= 1.02)
    assert all(row["identical"] == 1 for row in checked.values())


def test_the_knee_is_that_of_the_model(report):
    knee = Knee(**report["knee"])
    assert knee.step(1) - knee.overhead == pytest.approx(0.0103, rel=0.2)
    assert knee.step(128) - knee.step(1) == pytest.approx(127 * 0.0003, rel=0.2)
    assert knee.step(1) < knee.step(3) < knee.step(4)


def test_where_tokens_cost_what_they_yield_it_says_ar():
    model = timed(repeating(), 0.0, 0.003)
    report = tune(model, tiny_tokenizer(), PROMPTS[:1], grid=({"block_size": 8, "pool_size": 0},), max_new_tokens=8)
    assert report["decoding"] == "ar" and report["speedup"] < 1


def test_the_pictures(report):
    assert len(plots.knee(report).lines[0].get_xdata()) == len(report["knee"]["tokens"])
    assert len(plots.tuned_settings(report).collections[-2].get_offsets()) == len(GRID)
    assert len(plots.predicted_against_measured(report).collections[0].get_offsets()) == 3


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        tune(hf_jacobi.enable(tiny_model()), tiny_tokenizer(), [])


def test_the_knee_of_a_model_with_a_sliding_window():
    assert len(measure_knee(tiny_model("gemma3"), sizes=(1, 4), repeats=1).seconds) == 2


def test_the_knee_of_a_model_with_few_positions():
    knee = measure_knee(tiny_model(max_position_embeddings=64), repeats=1)
    assert knee.tokens == (1, 2, 4, 8, 16, 32)


def test_a_setting_that_drafts_nothing_is_no_winner():
    model = timed(repeating(), 0.002, 0.0)
    nothing = ({"block_size": 1, "pool_size": 0},)
    assert tune(model, tiny_tokenizer(), PROMPTS, grid=nothing, max_new_tokens=6)["decoding"] == "ar"
