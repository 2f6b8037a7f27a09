"""Jacobi drafts for vLLM, tested against a fake: without vLLM and without a model."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import PLACEHOLDER, VOCABULARY, FakeRunner, config_of, install, spread

from hf_jacobi import JacobiConfig, UsageError, build_ngram_table
from hf_jacobi.decoding.costs import CostCurve
from hf_jacobi.decoding.drafting import DraftRule
from hf_jacobi.serving import vllm as serving
from hf_jacobi.serving.step_times import StepTimes
from hf_jacobi.serving.vllm import STEPS_KEPT, JacobiProposer, JacobiWorker, tokens_per_forward


FIXED = {"block_size": 16, "adaptive": False}
SHUFFLED = random.Random(7).sample(range(VOCABULARY), VOCABULARY)


def copies(tokens: list[int]) -> int:
    """A model whose every token depends on the one eight before: whole drafts are accepted, n-grams rarely repeat."""
    return SHUFFLED[tokens[-8]] if len(tokens) >= 8 else tokens[-1]


def wanders(tokens: list[int]) -> int:
    """A model that is half predictable in parallel: some tokens depend on the one before."""
    return SHUFFLED[tokens[-8]] if tokens[-8] % 3 else (tokens[-1] * 7 + tokens[-2]) % VOCABULARY


def hashes(tokens: list[int]) -> int:
    """An unpredictable model."""
    return hash(tuple(tokens[-9:])) % VOCABULARY


def repeats(tokens: list[int]) -> int:
    """A model whose text repeats after twelve tokens."""
    return (tokens[-1] + 1) % 12


def prompt_of(number: int, length: int = 20) -> list[int]:
    return random.Random(number).choices(range(VOCABULARY), k=length)


def plain(predict, prompt: list[int], new_tokens: int) -> list[int]:
    """AR."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(predict(tokens))
    return tokens[len(prompt) :]


def forwards_of_the_rule(predict, prompt: list[int], new_tokens: int, config: JacobiConfig) -> int:
    """The number of forwards that the draft rule needs without vLLM."""
    rule = DraftRule(config, prompt, f"{config.seed or 0}/0")
    rule.begin(predict(prompt))
    forwards, text = 1, [predict(prompt)]
    while len(text) < new_tokens:
        chain = rule.propose(config.size).chain
        said = [predict(prompt + text + chain[1 : count + 1]) for count in range(len(chain))]
        right = next((i for i, (a, b) in enumerate(zip(chain[1:], said)) if a != b), len(chain) - 1)
        rule.observe(said[: right + 1], said, list(range(right + 1)))
        text += said[: right + 1]
        forwards += 1
    return forwards


@pytest.fixture
def serve(monkeypatch):
    """A function that creates a runner for a model, with a proposer."""

    def make(predict=copies, length=15, jacobi=None, runner=None, sampler=None, **config) -> FakeRunner:
        sampler = install(monkeypatch, sampler)
        jacobi = FIXED | {"draft_lengths": {1: length}} | (jacobi or {})
        proposer = JacobiProposer(config_of(length, jacobi, **config))
        proposer.load_model(object())
        return FakeRunner(proposer, sampler, predict, config.get("max_model_len", 512), **runner or {})

    return make


def check(request, predict) -> float:
    """The text is AR's; returns tokens per forward."""
    assert request.text == plain(predict, request.prompt, request.new_tokens)
    return len(request.text) / request.steps


def test_it_needs_neither_vllm_nor_torch_to_be_imported():
    code = "import sys, hf_jacobi.serving.vllm; print({'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("predict", [copies, wanders, repeats])
def test_text_is_ars_and_takes_as_many_forwards_as_the_rule_alone(serve, predict):
    settings = FIXED | {"pool_size": 0}
    for number in range(5):
        runner = serve(predict, jacobi=settings)
        request = runner.add(prompt_of(number), 150)
        runner.run()
        assert check(request, predict) > 1.5
        assert request.steps == forwards_of_the_rule(predict, request.prompt, 150, JacobiConfig(**settings))


def test_no_draft_comes_true_where_nothing_can_be_predicted(serve):
    runner = serve(hashes)
    request = runner.add(prompt_of(0), 100)
    runner.run()
    assert check(request, hashes) < 1.2


def test_requests_that_come_and_go_are_told_apart(serve):
    runner, done = serve(wanders), []
    draw = random.Random(3)
    for number in range(40):
        done.append(runner.add(prompt_of(number, draw.randint(9, 40)), draw.randint(1, 120)))
        for _ in range(draw.randint(0, 4)):
            runner.step()
    runner.run()
    settings = JacobiConfig(**FIXED, pool_size=0)
    for request in done:
        check(request, wanders)
        expected = forwards_of_the_rule(wanders, request.prompt, request.new_tokens, settings)
        assert request.steps == expected, "it keeps its own rule"


def test_requests_that_begin_alike_are_told_apart(serve):
    """Requests change rows while their texts still have the same length and the same last tokens."""
    runner = serve(wanders)
    prompts = [[number, *prompt_of(0, 30)] for number in range(4)]
    requests = [runner.add(prompt, 60 + 30 * number) for number, prompt in enumerate(prompts)]
    runner.run()
    assert all(check(request, wanders) > 1.5 for request in requests)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_prompts_read_in_pieces(serve, chunk):
    runner = serve(runner={"chunk": chunk})
    first = runner.add(prompt_of(1), 200)
    runner.step()
    others = [runner.add(prompt_of(number, 50), 40) for number in range(2, 5)]
    runner.run()
    assert all(check(request, copies) > 3 for request in [first, *others])


def test_a_request_left_out_of_some_steps_goes_on_as_it_was(serve):
    runner = serve(wanders)
    first, second = runner.add(prompt_of(1), 120), runner.add(prompt_of(2), 120)
    for _ in range(4):
        runner.step()
    rule = runner.proposer.rows[0].rule
    runner.remove(first)
    for _ in range(3):
        runner.step()
    runner.rows.append(first)
    runner.step()
    assert any(request.rule is rule for request in runner.proposer.rows)
    runner.run()
    assert check(first, wanders) > 1.5 and check(second, wanders) > 1.5
    assert runner.proposer.stats.requests == 2


@pytest.mark.parametrize("chunk", [5, 1000])
def test_a_preempted_request_goes_on_as_it_was(serve, chunk):
    runner = serve(runner={"chunk": chunk})
    first, second = runner.add(prompt_of(1), 150), runner.add(prompt_of(2), 150)
    while len(first.text) < 20:
        runner.step()
    runner.preempt(first)
    runner.step()
    runner.rows.append(first)
    runner.run()
    assert check(first, copies) > 3 and check(second, copies) > 3
    assert runner.proposer.stats.requests == 2


def test_a_draft_that_is_cut_short_keeps_the_models_predictions(serve):
    runner = serve(copies, runner={"scored": 5})
    request = runner.add(prompt_of(1), 200)
    runner.run()
    assert runner.most_drafted == 15
    assert check(request, copies) > 3, "six tokens, then one, because nothing is predicted beyond the scored tokens"


def test_a_draft_that_is_not_scored_at_all_costs_nothing(serve):
    runner = serve(copies, jacobi={"block_size": None, "adaptive": None})
    request = runner.add(prompt_of(1), 150)
    while not request.draft:
        runner.step()
    economy = runner.proposer.rows[0].economy
    spent = economy.spent
    runner.scored = 0
    runner.step()
    assert economy.spent == spent + 1
    runner.scored = 16
    runner.run()
    assert check(request, copies) > 1.5


def test_placeholders_that_vllm_scores_in_place_of_a_draft(serve):
    runner = serve(copies)
    request = runner.add(prompt_of(1), 100)
    for step in range(20):
        runner.step()
        if step % 3 == 0:
            request.draft = [PLACEHOLDER] * 15
    runner.run()
    assert check(request, copies) > 1.5


def test_predictions_are_read_before_the_sampler_changes_the_logits(serve):
    runner = serve(copies)
    request = runner.add(prompt_of(1), 100)
    runner.run()
    assert check(request, copies) > 5


def test_a_step_whose_drafts_were_all_dropped_is_sampled_as_one_without(monkeypatch):
    sampler = install(monkeypatch)
    JacobiProposer(config_of())
    asked = []
    sampler.sampler = lambda self, **given: asked.append(given) or "sampled"
    logits, settings = torch.zeros(2, VOCABULARY), object()
    metadata = SimpleNamespace(num_draft_tokens=[0, 0], draft_token_ids=torch.zeros(0))
    assert sampler().forward(metadata, None, logits, settings) == "sampled"
    assert asked == [{"logits": logits, "sampling_metadata": settings}]


def test_what_was_captured_for_another_step_is_not_used(serve):
    runner = serve(copies)
    first, _ = runner.add(prompt_of(1), 100), runner.add(prompt_of(2), 100)
    for _ in range(3):
        runner.step()
    runner._sample([3], [1, 2, 3], runner._logits([1] * 9).repeat(4, 1))  # a step after which no drafts were requested
    runner.remove(first)
    runner.add(prompt_of(3), 30)
    runner.rows.append(first)
    runner.run()
    assert check(first, copies) > 4


def test_cancelled_requests_are_forgotten(serve):
    runner = serve(copies)
    kept = runner.add(prompt_of(0), 450)
    for number in range(1, 12):
        cancelled = runner.add(prompt_of(number), 400)
        runner.step()
        runner.step()
        runner.remove(cancelled)
    assert 0 < len(runner.proposer.away) <= STEPS_KEPT
    runner.proposer.step += STEPS_KEPT
    runner.step()
    assert runner.proposer.away == []
    runner.run()
    assert check(kept, copies) > 3


def test_draft_length_falls_with_the_number_of_requests(serve):
    runner = serve(copies, jacobi={"draft_lengths": {"1": 9, "3": 4, "5": 0}})
    for number in range(6):
        runner.add(prompt_of(number), 60 if number else 400)
    runner.step()
    longest = {len(runner.rows): max(len(row.draft) for row in runner.rows)}
    while runner.rows:
        count = len(runner.rows)
        runner.step()
        if len(runner.rows) == count:
            longest[count] = max(len(row.draft) for row in runner.rows)
    assert longest[6] == 0 and longest[1] == 9


def test_blocks_in_flight_do_not_make_drafts_longer_than_vllm_takes(serve):
    blocks = {"block_size": 16, "window": "block", "max_blocks": 4, "spawn_ratio": 0.1, "draft_lengths": {1: 99}}
    runner = serve(wanders, jacobi=blocks)
    request = runner.add(prompt_of(0), 150)
    runner.run()
    assert check(request, wanders) > 1.5
    assert runner.most_drafted == 15


def test_default_draft_lengths_fall(serve):
    lengths = [
        serve(jacobi={"draft_lengths": None}, length=31).proposer._draft_length(count) for count in range(1, 300)
    ]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 31 > lengths[-1] > 0


def test_vllms_own_table_of_draft_lengths_counts(serve):
    table = [(1, 4, 8), (5, 64, 2)]
    proposer = serve(jacobi={"draft_lengths": None}, num_speculative_tokens_per_batch_size=table).proposer
    assert [proposer._draft_length(count) for count in (1, 4, 5, 99)] == [8, 8, 2, 2]


def test_nothing_is_drafted_beyond_the_end_of_the_model(serve):
    runner = serve(copies, max_model_len=64)
    request = runner.add(prompt_of(0), 44)
    runner.run()
    assert len(request.tokens) == 64
    assert check(request, copies) > 2


def test_without_acceptance_drafting_rests(serve, monkeypatch):
    monkeypatch.setattr(StepTimes, "curve", lambda self, requests, given: given)  # whatever this machine takes
    runner = serve(hashes, jacobi={"block_size": None, "adaptive": None})
    request = runner.add(prompt_of(0), 300)
    runner.run()
    check(request, hashes)
    assert runner.proposer.stats.drafted < 60


def test_drafting_that_rests_is_tried_again(serve):
    turns = lambda tokens: hashes(tokens) if len(tokens) < 150 else copies(tokens)  # noqa: E731
    runner = serve(turns, jacobi={"block_size": None, "adaptive": None})
    request = runner.add(prompt_of(0), 450)
    runner.run()
    assert check(request, turns) > 1.2


def test_settings_come_from_additional_config_else_from_the_checkpoint(serve):
    kept = {"decoding": "jacobi", "jacobi": JacobiConfig(block_size=8, draft_init="repeat", pool_size=4).to_dict()}
    given = {"block_size": 8, "adaptive": None, "draft_lengths": None, "draft_init": "prompt"}
    config = serve(jacobi=given, kept=kept).proposer.config
    assert (config.size, config.draft_init, config.pool_size) == (8, "prompt", 0)
    install_only = config_of(15, None, kept)
    config = JacobiProposer(install_only).config
    assert (config.size, config.draft_init, config.adapts) == (8, "repeat", False)
    config = JacobiProposer(config_of(31)).config
    assert (config.size, config.draft_init, config.adapts) == (32, "ngram", True)


def test_a_block_size_that_is_not_the_number_of_drafts_is_warned_of(serve, caplog):
    with caplog.at_level(logging.WARNING, logger="vllm"):
        runner = serve(length=31, jacobi={"draft_lengths": {1: 31}})
    assert "at most 15 tokens" in caplog.text
    runner.add(prompt_of(0), 100)
    runner.run()
    assert runner.most_drafted == 15


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rejection_sample_method": "synthetic"}, "'synthetic' does not preserve the text"),
        ({"rejection_sample_method": "block"}, "'block' does not preserve the text"),
        ({"stages": 2}, "does not support pipeline_parallel_size=2"),
        ({"jacobi": {"blocksize": 4}}, "unknown settings \\['blocksize'\\]"),
        ({"jacobi": {"block_size": 0}}, "`block_size` must be"),
        ({"jacobi": [1]}, "must be a dict"),
        ({"jacobi": {"draft_lengths": {"one": 4}}}, "`draft_lengths` must map"),
        ({"jacobi": {"draft_lengths": {0: 4}}}, "`draft_lengths` must map"),
        ({"jacobi": {"draft_lengths": {1: -1}}}, "`draft_lengths` must map"),
        ({"jacobi": {"draft_lengths": 4}}, "`draft_lengths` must map"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(monkeypatch, config, message):
    install(monkeypatch)
    with pytest.raises(UsageError, match=message) as error:
        JacobiProposer(config_of(**config))
    assert "\n" not in str(error.value)


def test_the_standard_acceptance_is_not_refused(serve):
    serve(rejection_sample_method="standard")


class OtherSampler:
    """The sampler of an unknown vLLM, with other parameters."""

    def forward(self, metadata, logits, sampling_metadata, draft_logits=None):
        raise AssertionError


@pytest.mark.parametrize(("predict", "least"), [(repeats, 3.0), (copies, 1.0)])
def test_a_vllm_with_another_sampler_gets_n_grams_alone(serve, monkeypatch, caplog, predict, least):
    with caplog.at_level(logging.WARNING, logger="vllm"):
        runner = serve(predict, sampler=OtherSampler)
    assert "n-grams of the text, without" in caplog.text
    runner._sample = lambda counts, tried, logits: Known.forward(counts, tried, logits)
    request = runner.add(prompt_of(0), 120)
    runner.run()
    assert check(request, predict) >= least
    assert "captures_for_jacobi" not in vars(OtherSampler.forward)


class Known:
    """How the other sampler samples."""

    @staticmethod
    def forward(counts, tried, logits):
        best, sampled = logits.argmax(-1).tolist(), []
        for count in counts:
            draft, said = tried[:count], best[: count + 1]
            del tried[:count], best[: count + 1]
            right = next((i for i, (a, b) in enumerate(zip(draft, said)) if a != b), count)
            sampled.append(said[: right + 1])
        return sampled


def test_n_grams_alone_rest_too(serve):
    runner = serve(hashes, jacobi={"block_size": None, "adaptive": None}, sampler=OtherSampler)
    runner._sample = lambda counts, tried, logits: Known.forward(counts, tried, logits)
    request = runner.add(prompt_of(0), 300)
    runner.run()
    check(request, hashes)
    assert runner.proposer.stats.drafted < 60


def test_counts(serve):
    runner = serve(copies)
    requests = [runner.add(prompt_of(number), 37) for number in range(3)]
    runner.run()
    stats = JacobiWorker.jacobi_stats(
        type("Worker", (), {"model_runner": type("R", (), {"drafter": runner.proposer})})
    )
    assert stats["requests"] == 3
    assert stats["requests"] + stats["drafts"] == sum(request.steps for request in requests)
    assert stats["drafted"] == 15 * stats["drafts"]
    assert stats["tokens"] > 3 * 37, "the last drafts extended beyond the end of the texts"
    assert tokens_per_forward(3 * 37, stats) == 3 * 37 / sum(request.steps for request in requests)
    assert stats["tokens_per_forward"] > tokens_per_forward(3 * 37, stats) > 4


def test_what_the_drafts_brought_is_logged_now_and_then(serve, monkeypatch, caplog):
    monkeypatch.setattr(serving, "LOG_EVERY", 0.0)
    runner = serve(copies)
    runner.add(prompt_of(0), 60)
    with caplog.at_level(logging.INFO, logger="vllm"):
        runner.run()
        runner.proposer._log()
    lines = [record.getMessage() for record in caplog.records if "tokens per forward" in record.getMessage()]
    assert len(lines) == runner.proposer.stats.drafts + 1, "no line without a step"
    assert lines[0].startswith("Jacobi drafts: 1.00 tokens per forward (1 tokens, 0 drafts, 1 requests)")


def test_temperatures_that_vllm_does_not_spread_are_spread(monkeypatch):
    install(monkeypatch, expand_batch_to_tokens=lambda x, ends, count, *_: torch.zeros(count))
    JacobiProposer(config_of())
    mended = sys.modules["vllm.v1.sample.rejection_sampler"].expand_batch_to_tokens
    for values in (torch.tensor([0.0, 0.7, 2.0]), torch.tensor([3, 0, 5], dtype=torch.int32)):
        ends = torch.tensor([2, 2, 5], dtype=torch.int32)
        result = mended(values, ends, 5, replace_from=0, replace_to=1)
        assert result.dtype == values.dtype and result.tolist() == spread(values, ends, 5, 0, 1).tolist()


def test_a_sampler_that_works_is_left_alone(monkeypatch):
    install(monkeypatch)
    JacobiProposer(config_of())
    assert sys.modules["vllm.v1.sample.rejection_sampler"].expand_batch_to_tokens is spread


def test_positions_cost_more_where_more_requests_run():
    for cost in (None, 0.05, [[1, 10], [2, 12], [16, 20]]):
        curves = [serving.curve_of(cost, "cpu", requests) for requests in (1, 2, 8, 64)]
        costs = [curve.cost(4) for curve in curves]
        assert costs[0] < costs[-1] < 4, "with two requests, the jump at the second position is part of the base cost"
        assert [curve.cost(1) for curve in curves] == [1.0] * 4
    assert serving.curve_of(0.05, "cpu", 1).cost(16) == pytest.approx(1.75)
    assert serving.curve_of(0.05, "cpu", 8).cost(16) == pytest.approx((1 + 0.05 * 127) / (1 + 0.05 * 7))
    assert serving.curve_of({"1": [[1, 1], [2, 1]], "8": [[1, 1], [2, 3]]}, "cpu", 8).cost(2) == 3


@pytest.mark.parametrize("settings", [FIXED, {"block_size": None, "adaptive": None, "position_cost": 0.02}])
def test_drafts_come_from_a_table_of_n_grams_too(serve, tmp_path, settings):
    texts = [{"prompt_ids": prompt_of(0), "completion_ids": plain(wanders, prompt_of(0), 150)}]
    steps = []
    for table in (None, str(build_ngram_table(texts, tmp_path, order=8))):
        runner = serve(wanders, jacobi=settings | {"pool_size": 0, "ngram_table": table})
        request = runner.add(prompt_of(0), 150)
        runner.run()
        assert check(request, wanders) > 1
        steps.append(request.steps)
    assert 1.25 * steps[1] < steps[0]


def test_fewer_guesses_are_tried_where_more_requests_run(serve):
    drafted = []
    for requests in (1, 32):
        runner = serve(
            copies, jacobi={"block_size": None, "adaptive": None, "position_cost": 0.05}, max_model_len=4096
        )
        served = [runner.add(prompt_of(number), 200) for number in range(requests)]
        runner.run()
        assert all(request.text == plain(copies, request.prompt, 200) for request in served)
        drafted.append(runner.proposer.stats.drafted / requests)
    assert drafted[1] < drafted[0]


def timed(monkeypatch, serve, predict, cost, requests=1, **jacobi) -> tuple[float, float]:
    """
    Serves eight batches of requests in steps that take `cost(positions)`. Returns figures of the last two batches: the
    time per token, in steps without drafts, and the positions of each request per step.
    """
    clock, seconds, positions = [0.0], [], []
    monkeypatch.setattr(serving.time, "perf_counter", lambda: clock[0])
    runner = serve(predict, jacobi={"adaptive": True, "block_size": None} | jacobi)
    for times in range(8):
        served = [runner.add(prompt_of(number + times), 200) for number in range(requests)]
        while runner.rows:
            tried = sum(1 + len(request.draft) for request in runner.rows)
            clock[0] += cost(tried) / cost(len(runner.rows))
            seconds += [cost(tried) / cost(len(runner.rows))] * (times > 5)
            positions += [tried / len(runner.rows)] * (times > 5)
            runner.step()
        for request in served:
            check(request, predict)
    return sum(seconds) / 400, sum(positions) / len(positions)


@pytest.mark.parametrize("requests", [1, 4])
def test_what_a_step_costs_is_learned_from_steps(monkeypatch, serve, requests):
    """Drafts end where positions are expensive, whatever the default curve says, and grow where they are cheap."""
    dear, _ = timed(monkeypatch, serve, wanders, lambda positions: 1.0 + 1.2 * positions, requests)
    cheap, wide = timed(monkeypatch, serve, wanders, lambda positions: 1.0 + 0.001 * positions, requests)
    unknown, _ = timed(monkeypatch, serve, hashes, lambda positions: 1.0 + 1.2 * positions, requests)
    assert dear < 1.03 and unknown < 1.03, (dear, unknown)
    assert cheap < 0.7 and wide > 4, (cheap, wide)


def test_a_given_cost_counts_whatever_steps_take(monkeypatch, serve):
    given = {"position_cost": 0.001}
    _, wide = timed(monkeypatch, serve, wanders, lambda positions: 1.0 + 1.2 * positions, **given)
    assert wide > 4


def test_steps_that_waited_for_something_else_do_not_count():
    times, default = StepTimes(), CostCurve.of(0.5)
    for _ in range(9):
        times.saw(2, 2, 1.0)
        assert times.curve(2, default) is default or len(times.seconds) > 1
        times.saw(2, 16, 1.5)
        times.saw(2, 2, 60.0) if len(times.seconds[2, 1]) > 3 else None
    assert [times.curve(2, default).cost(width) for width in (1, 8)] == pytest.approx([1.0, 1.5])
    assert times.curve(2, default).cost(16) == pytest.approx(1.5 * default.cost(16) / default.cost(8))
    assert times.curve(1, default) is default, "no step of that size was timed"


def test_first_guesses_may_come_out_of_the_vocabulary(serve):
    drafts = []
    for seed in (1, 1, 2):
        settings = {"block_size": 8, "pool_size": 0, "draft_init": "vocabulary", "seed": seed}
        runner = serve(wanders, jacobi=settings)
        request = runner.add(prompt_of(0), 100)
        runner.run()
        assert check(request, wanders) > 1
        rule = DraftRule(JacobiConfig(**settings), prompt_of(0), f"{seed}/0", VOCABULARY)
        rule.begin(5)
        drafts.append((request.steps, rule.propose(8).chain))
    assert drafts[0] == drafts[1] != drafts[2]
