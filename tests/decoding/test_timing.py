"""Forwards are timed once, on slots that nothing reads, and the text does not change."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from models import last_new_tokens, padded_prompts, tiny_model, tokens_per_forward, trained_model

import hf_jacobi
from hf_jacobi.decoding import loop, timing
from hf_jacobi.decoding.adaptive import Economy
from hf_jacobi.decoding.costs import CostCurve, default_curve
from hf_jacobi.decoding.drafting import Draft
from hf_jacobi.decoding.running import Eager
from hf_jacobi.decoding.shapes import FixedShapes, GrowingShapes
from hf_jacobi.decoding.step import Step


pytestmark = pytest.mark.timed
CALL = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
CHEAP = CostCurve.of(0.01)


def jacobi(model, inputs, **kwargs):
    kwargs = CALL | {"decoding": "jacobi", "return_dict_in_generate": True} | kwargs
    return model.generate(**inputs, **kwargs)


@pytest.fixture
def measured(monkeypatch):
    """What was measured, and for how many rows; drafts then follow a cost that does not depend on this machine."""
    found = []

    def measure(step, texts, room):
        found.append((real(step, texts, room), len(texts)))
        return CHEAP

    real = timing.measure
    monkeypatch.setattr(timing, "measure", measure)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_text_logits_and_cache_are_those_of_a_call_that_timed_nothing(measured, name, rows, sampled):
    model, inputs = hf_jacobi.enable(trained_model(name)), padded_prompts(rows)
    call = {"do_sample": sampled, "output_logits": True}
    given = {"seed": 1, "position_cost": [[1, 1.0], [2, 1.01]]}
    plain = jacobi(model, inputs, **call, jacobi_config=given)
    assert not measured
    timed = jacobi(model, inputs, **call, jacobi_config={"seed": 1})
    assert [count for _, count in measured] == [rows]
    assert measured[0][0].cost(1) == 1 <= measured[0][0].cost(16)
    assert torch.equal(plain.sequences, timed.sequences) and tokens_per_forward(timed) > 1
    assert plain.jacobi_stats.to_dict() == timed.jacobi_stats.to_dict(), "the same drafts were accepted"
    for one, other in zip(plain.logits, timed.logits):
        torch.testing.assert_close(one, other)
    for one, other in zip(plain.past_key_values.layers, timed.past_key_values.layers):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
    if not sampled:
        assert torch.equal(timed.sequences, model.generate(**inputs, **CALL))


def test_nothing_reads_the_slots_that_the_timing_wrote(monkeypatch):
    """Whatever those slots hold: here, numbers so large that they would dominate attention."""
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(3)
    spoilt = []

    def measure(step, texts, room):
        real(step, texts, room)
        start = len(texts[0]) - 1
        for layer in step.cache.layers:
            assert layer.keys[0, :, start : start + timing.WIDTHS[-1]].abs().sum(-1).all()
            layer.keys[:, :, start:] = 1e4
            layer.values[:, :, start:] = 1e4
            spoilt.append(layer)
        return CHEAP

    real = timing.measure
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "BUDGET", 1000)
    out = jacobi(model, inputs)
    assert spoilt and tokens_per_forward(out) > 1
    assert torch.equal(out.sequences, model.generate(**inputs, **CALL))


def forwards_of(model, run) -> int:
    count = []
    handle = model.register_forward_hook(lambda *_: count.append(1))
    stats = run().jacobi_stats
    handle.remove()
    return len(count) - stats.forwards


def test_the_second_call_times_nothing():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(1)
    assert forwards_of(model, lambda: jacobi(model, inputs)) >= 5
    assert forwards_of(model, lambda: jacobi(model, inputs)) == 0
    assert forwards_of(model, lambda: jacobi(model, inputs, max_new_tokens=8)) == 0
    assert forwards_of(model, lambda: jacobi(model, padded_prompts(3))) > 0, "another batch"
    assert forwards_of(model, lambda: jacobi(model, padded_prompts(4))) == 0, "sizes are rounded to powers of two"
    model.double()
    assert forwards_of(model, lambda: jacobi(model, inputs)) > 0, "another dtype"
    other = copy.deepcopy(model)
    assert forwards_of(other, lambda: jacobi(other, inputs)) > 0, "another model"


@pytest.mark.parametrize(
    "call",
    [
        {"max_new_tokens": 31},
        {"synced_gpus": True},
        {"jacobi_config": {"position_cost": 0.05}},
        {"jacobi_config": {"position_cost": [[1, 1.0], [8, 1.5]]}},
        {"jacobi_config": {"position_cost": {"1": [[1, 1.0], [8, 1.5]]}}},
        {"jacobi_config": {"block_size": 8}},
        {"jacobi_config": {"window": "block"}},
    ],
    ids=str,
)
def test_nothing_is_timed_where_it_does_not_pay_or_may_not_be(monkeypatch, call):
    monkeypatch.setattr(loop, "go_on", lambda model, finished, synced_gpus, device: not finished)
    measured = []
    monkeypatch.setattr(timing, "measure", lambda *call: measured.append(call) or CHEAP)
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(1)
    jacobi(model, inputs, **call)
    assert not measured
    jacobi(model, inputs, max_new_tokens=32)
    assert len(measured) == 1


def test_models_that_are_gone_are_forgotten():
    model = hf_jacobi.enable(trained_model())
    gc.collect()
    before = len(timing._KNOWN)
    jacobi(model, padded_prompts(1))
    assert len(timing._KNOWN) == before + 1
    del model
    gc.collect()
    assert len(timing._KNOWN) == before


def test_with_given_costs_every_call_tries_the_same():
    model, inputs = hf_jacobi.enable(trained_model("gemma3")), padded_prompts(3)
    given = {"position_cost": {"1": [[1, 1.0], [2, 1.01]], "4": [[1, 1.0], [2, 1.02], [16, 1.3]]}, "seed": 0}
    runs = [jacobi(model, inputs, jacobi_config=given, output_trajectory=True) for _ in range(2)]
    assert runs[0].trajectory == runs[1].trajectory and tokens_per_forward(runs[0]) > 1


def test_a_call_beside_one_that_is_timing_takes_the_defaults(monkeypatch):
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(1)
    expected = model.generate(**inputs, **CALL)
    timing_now, others_done = Event(), Event()
    calls = []

    def measure(step, texts, room):
        calls.append(1)
        timing_now.set()
        assert others_done.wait(60)
        return CHEAP

    monkeypatch.setattr(timing, "measure", measure)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(jacobi, model, inputs)
        assert timing_now.wait(60)
        assert torch.equal(jacobi(model, inputs).sequences, expected)
        others_done.set()
        assert torch.equal(first.result().sequences, expected)
    jacobi(model, inputs)
    assert len(calls) == 1


def test_a_timing_that_fails_is_not_the_last(monkeypatch):
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(1)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure", lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            jacobi(model, inputs)
    assert forwards_of(model, lambda: jacobi(model, inputs)) > 0


@pytest.mark.parametrize("room", [1, 3, 9, 15, 16, 17])
def test_nothing_is_timed_beyond_the_positions_that_the_model_has(room):
    """GPT-2 has a table of positions; beyond it, a forward fails."""
    model = hf_jacobi.enable(tiny_model("gpt2", n_positions=64))
    inputs = padded_prompts(1, length=64 - room)
    out = jacobi(model, inputs, max_new_tokens=room)
    assert torch.equal(out.sequences, model.generate(**inputs, **CALL | {"max_new_tokens": room}))
    call = {"max_new_tokens": 60, "stopping_criteria": [lambda ids, scores: ids.shape[1] >= 64]}
    assert torch.equal(jacobi(model, inputs, **call).sequences, model.generate(**inputs, **CALL | call))


def fake(monkeypatch, cost):
    """A step of one row whose forwards take `cost(positions)`, and the widths of those that were run."""
    seconds, widths = [0.0], []
    step = Step.__new__(Step)
    step.device, step.draft_adapter, step.logits, step.copies = torch.device("cpu"), None, None, 0
    step.shapes, step.runner, step.graphs = GrowingShapes(), Eager(), None

    def forward(self, drafts, starts):
        chain = len(drafts[0])
        widths.append(-2 * chain if self.adapter_drafts and chain > 1 else chain)  # below 0 with an adapter
        seconds[0] += cost(widths)

    monkeypatch.setattr(Step, "__call__", forward)
    monkeypatch.setattr(timing.time, "thread_time", lambda: seconds[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds[0])
    return step, widths


AMD = CostCurve.of([[1, 77], [2, 130], [4, 136], [8, 163], [16, 216]])


def test_what_is_measured_is_what_forwards_take(monkeypatch):
    step, widths = fake(monkeypatch, lambda widths: 0.077 * AMD.cost(widths[-1]))
    curve = timing.measure(step, [[3] * 40], 100)
    assert [curve.cost(width) for width in timing.WIDTHS] == pytest.approx(
        [AMD.cost(width) for width in timing.WIDTHS]
    )
    assert sum(map(AMD.cost, widths)) < timing.BUDGET + 1


def test_where_positions_cost_much_the_widest_forwards_are_left_out(monkeypatch):
    step, widths = fake(monkeypatch, lambda widths: 0.1 * widths[-1])
    curve = timing.measure(step, [[3] * 40], 100)
    assert sum(widths) <= timing.BUDGET + 1 and curve.cost(16) == pytest.approx(16)


def test_a_forward_that_compiles_is_no_measure(monkeypatch):
    """The first forward over each number of positions takes a hundred times as long."""
    step, _ = fake(monkeypatch, lambda widths: AMD.cost(widths[-1]) * (100 if widths.count(widths[-1]) == 1 else 1))
    curve = timing.measure(step, [[3] * 40], 100)
    assert [curve.cost(width) for width in (2, 4, 16)] == pytest.approx([AMD.cost(width) for width in (2, 4, 16)])


def test_a_draft_only_adapter_is_timed_with_its_own_positions(monkeypatch):
    step, widths = fake(monkeypatch, lambda widths: AMD.cost(abs(widths[-1])) + 0.3 * (widths[-1] < 0))
    added = timing.measure_adapter(step, [[3] * 40])
    assert added == pytest.approx(0.3)
    assert set(widths) == {1, 4, -4} and sum(AMD.cost(abs(width)) for width in widths) < timing.BUDGET
    curve = timing.Known([AMD], added).with_adapter(AMD)
    assert [curve.cost(width) for width in (1, 2, 4, 8, 16)] == pytest.approx(
        [1.0, *(AMD.cost(width) + 0.3 for width in (2, 4, 8, 16))]
    )


@pytest.mark.parametrize("speed", [lambda count: 1.0, lambda count: 1 + 0.5 * (count // 6 % 2)])
def test_a_machine_whose_speed_changes_is_measured_correctly(monkeypatch, speed):
    """Each width is compared with the forwards just before it and after it."""
    step, _ = fake(monkeypatch, lambda widths: speed(len(widths)) * AMD.cost(widths[-1]))
    curve = timing.measure(step, [[3] * 40], 100)
    assert [curve.cost(width) for width in (2, 4, 8)] == pytest.approx(
        [AMD.cost(width) for width in (2, 4, 8)], rel=0.26
    )


def test_what_forwards_take_corrects_the_curve_of_later_calls(monkeypatch):
    """Four forwards over the same number of positions, near some over one position, count more than a measurement."""
    monkeypatch.setattr(timing, "MOST", 6)
    step, _ = fake(monkeypatch, lambda widths: AMD.cost(abs(widths[-1])) + 0.3 * (widths[-1] < 0))
    known = timing.Known([CostCurve.of([[1, 1.0], [2, 1.01], [4, 1.02], [16, 4.0]])], 0.0)
    monkeypatch.setattr(timing, "known_of", lambda step, rows: known)
    watch, before = timing.Watch(step, []), known.curve(AMD)

    def run(nodes, copies=0):
        step.copies, step.adapter_drafts = copies, copies > 0
        with watch.forward(step, nodes):
            step([Draft([3] * nodes)], [0])

    for _ in range(3):
        run(2)
    assert not known.seen, "no forward over one position to compare with"
    for count in range(7):
        for nodes, copies in ((1, 0), (1, 0), (1, 0), (2, 0), (2, 2)):
            run(nodes, copies)
        if count < 3:
            assert known.curve(AMD) == before
    curve = known.curve(AMD)
    assert curve.cost(2) == pytest.approx(AMD.cost(2)) and curve.cost(16) == 4.0
    assert known.with_adapter(curve).cost(4) == pytest.approx(AMD.cost(4) + 0.3, abs=0.02)
    assert len(known.seen[2]) == len(known.seen_with_adapter[4]) == 6, "then it stays as it is"


def test_without_a_measurement_there_are_defaults(monkeypatch):
    step, _ = fake(monkeypatch, lambda widths: 1.0)
    step.model = trained_model()
    row = SimpleNamespace(tokens=[3], room=100)
    assert timing.curves_of(step, [row] * 3, may_measure=False) == (default_curve("cpu", 3), None)


def test_fixed_shapes_are_timed_and_paid_for_as_they_are(monkeypatch):
    step, widths = fake(monkeypatch, lambda widths: AMD.cost(FixedShapes.width(widths[-1])))
    step.shapes = FixedShapes(100, 80)
    curve = timing.measure(step, [[3] * 40], 100)
    assert set(widths) == {1, 4, 8, 16}
    economy = Economy(curve, width=step.shapes.width)
    assert economy.cost(1) == economy.cost(3) < economy.cost(4)
    assert economy.cost(1) == pytest.approx(AMD.cost(4))


def test_the_costs_of_fewer_rows_are_followed_when_rows_leave(measured):
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(4)
    ends = last_new_tokens(model, inputs, 100)
    text = model.generate(**inputs, **CALL | {"max_new_tokens": 100, "eos_token_id": ends}, decoding="jacobi")
    assert torch.equal(text, model.generate(**inputs, **CALL | {"max_new_tokens": 100, "eos_token_id": ends}))
    assert measured[0][1] == 4 > measured[-1][1]


def test_positions_that_seem_dear_are_timed_again_and_the_cheapest_curve_counts(monkeypatch):
    """A busy machine during one measurement does not keep a model from drafting."""
    busy, quiet = CostCurve.of([[1, 1.0], [16, 9.0]]), CostCurve.of([[1, 1.0], [16, 1.4]])
    found = iter([busy, quiet])
    monkeypatch.setattr(timing, "measure", lambda *call: next(found))
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(1)
    rates = [tokens_per_forward(jacobi(model, inputs)) for _ in range(3)]  # a third timing would raise
    assert rates[1] == rates[2] >= rates[0] and rates[1] > 1
    found = iter([busy] * timing.ATTEMPTS)
    other = copy.deepcopy(model)
    for _ in range(timing.ATTEMPTS + 2):
        jacobi(other, inputs)


@pytest.mark.parametrize("rows", [1, 3])
def test_forwards_on_a_plateau_take_all_of_it(monkeypatch, rows):
    """On some CPUs a forward over 10 positions takes longer than one over 16."""
    level = CostCurve(((1, 1.0), (2, 1.01), (3, 1.1), (16, 1.1)))
    monkeypatch.setattr(timing, "measure", lambda *call: level)
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(rows)
    widths = []
    model.register_forward_hook(
        lambda model, arguments, keywords, out: widths.append(out.logits.shape[1]), with_kwargs=True
    )
    out = jacobi(model, inputs)
    assert 16 in widths and not set(range(3, 16)) & set(widths)
    assert torch.equal(out.sequences, model.generate(**inputs, **CALL)) and tokens_per_forward(out) > 1
