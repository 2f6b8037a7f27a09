"""Tuning on a model whose forwards take a known time."""

import functools

import pytest
from models import tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi import plots
from hf_jacobi.evaluation import measuring
from hf_jacobi.evaluation import tune as tune_module
from hf_jacobi.evaluation.tune import Knee, measure_knee, tune


PROMPTS = [[3 + (row + column) % 5 for column in range(10)] for row in range(2)]
GRID = ({}, {"block_size": 4}, {"block_size": 16}, {"block_size": 64})


class Clock:
    """A clock that forwards alone move on, so that no busy machine can change a figure."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, model, cost):
        """The model, each of whose forwards takes `cost(tokens)` seconds."""
        plain = model.forward

        @functools.wraps(plain)
        def forward(*args, **kwargs):
            self.seconds += cost(kwargs["input_ids"].shape[1])
            return plain(*args, **kwargs)

        model.forward = forward
        return hf_jacobi.enable(model)


@pytest.fixture(scope="module")
def clock():
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (measuring, tune_module):
            patch.setattr(module, "now", lambda model: clock.seconds)
        yield clock


def knee_at_eight(tokens: int) -> float:
    return 0.01 + 0.0008 * max(0, tokens - 8)


def repeating():
    """A model that writes the same few tokens over and over, so that n-grams of its text come true."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def report(clock):
    model = clock.timed(repeating(), knee_at_eight)
    return tune(model, tiny_tokenizer(), PROMPTS, grid=GRID, max_new_tokens=24)


def test_the_prediction_is_within_15_percent_of_the_measurement(report):
    assert report["predicted"] == pytest.approx(report["measured"], rel=0.15)


def test_the_fastest_setting_is_chosen(report):
    checked = report["checked"]
    best = max((name for name in checked if name != "AR"), key=lambda name: checked[name]["tokens_per_second"])
    assert str(report["jacobi"]) == best
    assert report["speedup"] == checked[best]["speedup"]
    least = min(checked[best]["speedup"], checked[best]["median_speedup"])
    assert (report["decoding"] == "jacobi") == (least >= 1.02)
    assert all(row["identical"] == 1 for row in checked.values())


def test_the_knee_is_that_of_the_model(report):
    knee = Knee(**report["knee"])
    for tokens in (1, 2, 8, 16, 128):
        assert knee.step(tokens) - knee.overhead == pytest.approx(knee_at_eight(tokens))
    assert knee.step(3) == knee.step(1) < knee.step(12) < knee.step(16)


def test_where_tokens_cost_what_they_yield_it_says_ar(clock):
    model = clock.timed(repeating(), lambda tokens: 0.003 * tokens)
    report = tune(model, tiny_tokenizer(), PROMPTS[:1], grid=({"block_size": 8, "pool_size": 0},), max_new_tokens=8)
    assert report["decoding"] == "ar" and report["speedup"] < 1


def test_the_pictures(report):
    assert len(plots.knee(report).lines[0].get_xdata()) == len(report["knee"]["tokens"])
    assert len(plots.tuned_settings(report).collections[-2].get_offsets()) == len(report["grid"])
    assert len(plots.predicted_against_measured(report).collections[0].get_offsets()) == 3


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        tune(hf_jacobi.enable(tiny_model()), tiny_tokenizer(), [])


def test_the_knee_of_a_model_with_a_sliding_window():
    assert len(measure_knee(tiny_model("gemma3"), sizes=(1, 4), repeats=1).seconds) == 2


def test_the_cost_of_a_position_is_that_of_the_forward_alone():
    knee = Knee((1, 2, 4, 8), (1.0, 1.1, 1.3, 1.7), overhead=1.0)
    assert knee.position_cost == pytest.approx(0.1)


def test_settings_that_adapt_are_tried_at_the_measured_cost(report):
    costs = [row["settings"].get("position_cost") for row in report["grid"]]
    assert costs[0] is None and costs[-1] == Knee(**report["knee"]).position_cost
    assert type(costs[-1]) is float, "as settings are written into reports"


def test_the_knee_of_a_model_with_few_positions():
    knee = measure_knee(tiny_model(max_position_embeddings=64), repeats=1)
    assert knee.tokens == (1, 2, 4, 8, 16, 32)


def test_a_setting_that_drafts_nothing_is_no_winner(clock):
    model = clock.timed(repeating(), lambda tokens: 0.002)
    nothing = ({"block_size": 1, "pool_size": 0},)
    assert tune(model, tiny_tokenizer(), PROMPTS, grid=nothing, max_new_tokens=6)["decoding"] == "ar"
