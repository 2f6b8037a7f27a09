"""Tuning of a model whose forwards take a known time."""

import functools

import pytest
import torch
from models import tiny_model, tiny_tokenizer, trained_model

import hf_jacobi
from hf_jacobi import JacobiConfig, plots
from hf_jacobi.decoding.costs import CostCurve
from hf_jacobi.evaluation import measuring
from hf_jacobi.evaluation import tune as tune_module
from hf_jacobi.evaluation.tune import measure_costs, tune


PROMPTS = [[3 + (row + column) % 5 for column in range(10)] for row in range(2)]
GRID = ({}, {"block_size": 4}, {"block_size": 16}, {"block_size": 64})


class Clock:
    """A clock that only forwards advance, so that other load on the machine cannot change a figure."""

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


def drafting():
    """A model whose drafts and n-grams are accepted, and whose text never ends."""
    model = trained_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def report(clock):
    model = clock.timed(drafting(), knee_at_eight)
    return tune(model, tiny_tokenizer(), PROMPTS, grid=GRID, max_new_tokens=24)


def test_the_prediction_is_within_15_percent_of_the_measurement(report):
    assert report["predicted"] == pytest.approx(report["measured"], rel=0.15)


def widths_of(prompts, settings, new_tokens: int = 24) -> list[int]:
    """The number of tokens that each forward scores with these settings, counted while decoding; 1 for the prefill."""
    call = {"max_new_tokens": new_tokens, "do_sample": False, "decoding": "jacobi", "jacobi_config": settings}
    call |= {"return_dict_in_generate": True, "output_trajectory": True}
    model = hf_jacobi.enable(drafting())
    ids = [torch.tensor([prompt]) for prompt in prompts]
    outs = [model.generate(row, attention_mask=torch.ones_like(row), **call) for row in ids]
    return [len(step.draft) for out in outs for step in out.trajectory[0].steps]


def test_if_positions_cost_nothing_the_fewest_forwards_win(clock):
    """All forwards take equally long, so the speed-up is AR's number of forwards over the winner's."""
    report = tune(
        clock.timed(drafting(), lambda tokens: 0.01), tiny_tokenizer(), PROMPTS, grid=GRID, max_new_tokens=24
    )
    forwards = [len(widths_of(PROMPTS, settings)) for settings in GRID]
    assert len(set(forwards)) > 2
    assert len(widths_of(PROMPTS, report["jacobi"])) == min(forwards)
    assert report["decoding"] == "jacobi"
    assert report["speedup"] == pytest.approx(2 * 24 / min(forwards))


def test_if_wide_forwards_take_long_a_narrow_draft_wins(clock):
    """A forward over more than eight tokens costs a hundred times as much, so wider drafts cannot pay."""
    narrow, wide = {"block_size": 4, "pool_size": 0}, {"block_size": 16, "pool_size": 0}
    model = clock.timed(drafting(), lambda tokens: 0.01 if tokens <= 8 else 1.0)
    report = tune(model, tiny_tokenizer(), PROMPTS, grid=(wide, narrow), max_new_tokens=24)
    assert len(widths_of(PROMPTS, wide)) < len(widths_of(PROMPTS, narrow))
    assert (report["decoding"], report["jacobi"]) == ("jacobi", narrow)


@pytest.mark.parametrize(("speedup", "decoding"), [(1.005, "ar"), (1.05, "jacobi")])
def test_a_speedup_within_noise_is_not_worthwhile(clock, speedup, decoding):
    """A forward over a draft costs almost as much as AR takes for the tokens that it yields."""
    settings = {"block_size": 4, "pool_size": 0}
    widths = widths_of(PROMPTS[:1], settings)
    cost = (24 / speedup - widths.count(1)) / (len(widths) - widths.count(1))
    model = clock.timed(drafting(), lambda tokens: 0.01 * cost if 1 < tokens <= 4 else 0.01)
    report = tune(model, tiny_tokenizer(), PROMPTS[:1], grid=(settings,), max_new_tokens=24)
    assert report["speedup"] == pytest.approx(speedup, abs=1e-3)
    assert report["decoding"] == decoding


def test_the_chosen_settings_were_measured_and_give_the_same_text(report):
    assert set(report["checked"]) >= {"AR", str(report["jacobi"])} and len(report["checked"]) == 4
    assert all(row["identical"] == 1 for row in report["checked"].values())


def test_the_costs_are_those_of_the_model(report):
    tokens, seconds = report["costs"]["tokens"], report["costs"]["seconds"]
    assert tokens == [1, 2, 4, 8, 16, 32, 64, 128] and list(seconds) == ["1"]
    assert seconds["1"] == pytest.approx([knee_at_eight(count) for count in tokens])


def test_if_the_cost_is_proportional_to_the_tokens_ar_is_chosen(clock):
    model = clock.timed(drafting(), lambda tokens: 0.003 * tokens)
    report = tune(model, tiny_tokenizer(), PROMPTS[:1], grid=({"block_size": 8, "pool_size": 0},), max_new_tokens=8)
    assert report["decoding"] == "ar" and report["speedup"] < 1


def test_the_plots(report):
    assert len(plots.knee(report).lines[0].get_xdata()) == len(report["costs"]["tokens"])
    assert len(plots.tuned_settings(report).collections[-2].get_offsets()) == len(report["grid"])
    assert len(plots.predicted_against_measured(report).collections[0].get_offsets()) == 3


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="there are no prompts"):
        tune(hf_jacobi.enable(tiny_model()), tiny_tokenizer(), [])


def test_the_costs_of_a_model_with_a_sliding_window():
    assert len(measure_costs(tiny_model("gemma3"), sizes=(1, 4), repeats=1).points) == 2


def test_adaptive_settings_are_tried_with_the_measured_cost(report):
    """It is the cost of the forward alone, relative to one position; other settings need none."""
    costs = [row["settings"].get("position_cost") for row in report["grid"]]
    assert costs[1:] == [None] * 3 and costs[0][:4] == [[1, 1.0], [2, 1.0], [4, 1.0], [8, 1.0]]
    assert dict(map(tuple, costs[0]))[16] == pytest.approx(1 + 0.08 * 8)
    assert JacobiConfig(position_cost=costs[0]).adapts


def test_costs_are_measured_for_every_requested_batch_size(clock):
    model = clock.timed(drafting(), knee_at_eight)
    report = tune(model, tiny_tokenizer(), PROMPTS, grid=({},), batch_sizes=(4, 16), max_new_tokens=24)
    assert report["decoding"] == "jacobi" and list(report["costs"]["seconds"]) == ["1", "4", "16"]
    settings = JacobiConfig(**report["jacobi"])
    assert list(settings.position_cost) == ["1", "4", "16"]
    assert CostCurve.of(settings.position_cost, 3).points[-1][0] == 32, "128 tokens in total"
    assert len(plots.knee(report).get_legend().get_texts()) == 2


def test_a_checkpoints_old_costs_are_replaced(clock):
    model = clock.timed(drafting(), knee_at_eight)
    report = tune(model, tiny_tokenizer(), PROMPTS, grid=(), present={"position_cost": 5.0}, max_new_tokens=24)
    assert report["jacobi"]["position_cost"][0] == [1, 1.0] and report["decoding"] == "jacobi"


def test_the_costs_of_a_model_with_few_positions():
    curve = measure_costs(tiny_model(max_position_embeddings=64), repeats=1)
    assert [tokens for tokens, _ in curve.points] == [1, 2, 4, 8, 16, 32]


def test_a_setting_that_drafts_nothing_does_not_win(clock):
    model = clock.timed(drafting(), lambda tokens: 0.002)
    nothing = ({"block_size": 1, "pool_size": 0},)
    assert tune(model, tiny_tokenizer(), PROMPTS, grid=nothing, max_new_tokens=6)["decoding"] == "ar"


def test_the_present_settings_compete_and_are_kept_unless_others_are_faster(clock):
    """All forwards take equally long, so the fewest forwards are fastest."""
    present = {"block_size": 6, "pool_size": 0, "draft_init": "prompt"}
    model = clock.timed(drafting(), lambda tokens: 0.01)
    model.generation_config.jacobi = hf_jacobi.JacobiConfig(**present, seed=3).to_dict()
    run = functools.partial(tune, model, tiny_tokenizer(), PROMPTS, max_new_tokens=24)
    slower = {"block_size": 2, "pool_size": 0}
    report = run(grid=(slower,))
    assert [row["settings"] for row in report["grid"]] == [{**present, "seed": 3}, {**slower, "seed": 3}]
    assert report["jacobi"] == {**present, "seed": 3} and report["speedup"] > 1.5
    same = {**present, "ngram_size": 5}
    assert run(grid=(same,))["jacobi"] == {**present, "seed": 3}, "as fast as the present settings"
    faster = {**present, "block_size": 16}
    assert len(widths_of(PROMPTS, faster)) < len(widths_of(PROMPTS, present))
    assert run(grid=(slower, faster))["jacobi"] == {**faster, "seed": 3}


def test_all_settings_are_tried_with_the_present_table_of_n_grams(clock, tmp_path):
    texts = [{"prompt_ids": [1], "completion_ids": [2, 3] * 9}]
    present = {"block_size": 6, "ngram_table": str(hf_jacobi.build_ngram_table(texts, tmp_path))}
    model = clock.timed(drafting(), lambda tokens: 0.01)
    model.generation_config.jacobi = hf_jacobi.JacobiConfig(**present).to_dict()
    report = tune(model, tiny_tokenizer(), PROMPTS, grid=({"block_size": 2},), max_new_tokens=6)
    assert [row["settings"]["ngram_table"] for row in report["grid"]] == [present["ngram_table"]] * 2


def test_the_present_settings_are_measured_even_if_their_prediction_is_low(clock):
    model = clock.timed(drafting(), lambda tokens: 0.01)
    present = {"block_size": 1, "pool_size": 0}
    report = tune(model, tiny_tokenizer(), PROMPTS, grid=GRID, present=present, max_new_tokens=12)
    assert str(present) in report["checked"] and report["jacobi"] != present


def test_first_guesses_from_the_prompt_are_tried():
    prompt = [settings for settings in tune_module.GRID if settings.get("draft_init") == "prompt"]
    assert {"block_size": 32, "pool_size": 0, "draft_init": "prompt"} in prompt and len(prompt) > 2
