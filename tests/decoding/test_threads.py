"""A forward depends on its call alone, whatever else runs on a model with a draft-only adapter."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier, Thread

import pytest
import torch
from models import padded_prompts, tiny_model, tiny_tokenizer, tokens_per_forward, trained_model
from test_draft_adapter import with_adapter
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import hf_jacobi
from hf_jacobi.decoding import draft_adapter


peft = pytest.importorskip("peft")
LENGTH = {"max_new_tokens": 16}
DRAFTING = {"block_size": 6, "pool_size": 0}  # the adapter drafted the accepted tokens


def jacobi(settings, **kwargs):
    shown = {"return_dict_in_generate": True, "output_trajectory": True}
    return {"decoding": "jacobi", "jacobi_config": settings, **shown, **LENGTH, **kwargs}


# name -> how a call decodes
CALLS = {
    "ar": {"decoding": "ar", "do_sample": False, **LENGTH},
    "beams": {"decoding": "ar", "num_beams": 3, "do_sample": False, **LENGTH},
    "jacobi": jacobi(DRAFTING, do_sample=False),
    "jacobi-recycling": jacobi({"block_size": 4, "max_blocks": 2}, do_sample=False),
    "jacobi-sampled": jacobi(DRAFTING | {"seed": 5}, do_sample=True, temperature=0.7),
    "forward": None,
}
TURNS = [(name, rows) for name in CALLS for rows in (1, 3)]


def result_of(model, name: str, rows: int):
    """The results that no other call may change: tokens and how they were drafted, or logits."""
    inputs = padded_prompts(rows)
    if CALLS[name] is None:
        with torch.no_grad():
            return model(**inputs).logits
    out = model.generate(**inputs, **CALLS[name])
    if not hasattr(out, "jacobi_stats"):
        return out.tolist(), None
    return out.sequences.tolist(), [step.draft for row in out.trajectory for step in row.steps]


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, atol=1e-4)
    return one == other


def accepting_adapter(rank: int = 4):
    """A model whose adapter changes the drafts, and is correct often enough to be accepted."""
    return with_adapter(base=trained_model, scale=0.12 * (rank / 4) ** 0.25, rank=rank)


def check_four_threads(model, count: int) -> None:
    """`count` random calls of all kinds in four threads: each gives the same results as alone."""
    expected = {turn: result_of(model, *turn) for turn in TURNS}
    base = hf_jacobi.enable(trained_model("llama"))
    for name in ("ar", "beams", "forward"):
        for rows in (1, 3):
            assert same(expected[name, rows], result_of(base, name, rows)), "alone, it is the base model's"
    silent = with_adapter(base=trained_model, scale=0.0)
    for rows in (1, 3):
        text, drafts = expected["jacobi", rows]
        assert text == expected["ar", rows][0]
        assert drafts != result_of(silent, "jacobi", rows)[1], "the adapter drafts, not the base model"
        assert tokens_per_forward(model.generate(**padded_prompts(rows), **CALLS["jacobi"])) > 1.05
    start = Barrier(4)

    def work(number: int) -> list:
        draw = random.Random(number)
        start.wait()
        turns = [draw.choice(TURNS) for _ in range(count // 4)]
        return [turn for turn in turns if not same(result_of(model, *turn), expected[turn])]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            wrong = [turn for turns in pool.map(work, range(4)) for turn in turns]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, f"{len(wrong)} of {count} calls, such as {wrong[:3]}"
    assert_as_before(model)


def assert_as_before(model) -> None:
    """No call has left anything on a layer."""
    for module in model.modules():
        assert "below" not in vars(type(module)) and "forward" not in vars(module)
        assert not (hasattr(module, "lora_A") and module._forward_pre_hooks)


@pytest.mark.parametrize(("way", "through"), [("product", "model"), ("addition", "peft"), ("hooks", "peft")])
def test_four_threads_mixing_ways_of_decoding(monkeypatch, through, way):
    """For each way in which a layer applies the adapter."""
    model = accepting_adapter(rank=16 if way == "product" else 4)
    if way == "hooks":
        monkeypatch.setattr(draft_adapter, "_has_nothing_else", lambda layer: False)
    check_four_threads(model.get_base_model() if through == "model" else model, 36)


@pytest.mark.slow
@pytest.mark.parametrize("through", ["model", "peft"])
def test_a_thousand_calls_in_four_threads(through):
    model = accepting_adapter()
    check_four_threads(model.get_base_model() if through == "model" else model, 1000)


class Looking(LogitsProcessor):
    """Calls a function between the forwards of a call, and does not change the scores."""

    def __init__(self, look):
        self.look = look

    def __call__(self, input_ids, scores):
        self.look()
        return scores


def during(model, look, rows: int = 1):
    """A Jacobi call that calls `look` once per token."""
    processors = LogitsProcessorList([Looking(look)])
    return model.generate(**padded_prompts(rows), **CALLS["jacobi"], logits_processor=processors)


def test_other_forwards_of_the_same_thread_see_the_base_model():
    """Forwards as by a processor that also scores the text without the prompt (classifier-free guidance)."""
    model = accepting_adapter()
    expected, found = result_of(model, "forward", 1), []
    out = during(model, lambda: found.append(result_of(model, "forward", 1)))
    assert len(found) > 5 and all(same(one, expected) for one in found)
    assert out.jacobi_stats.tokens_per_forward > 1.05


def test_a_forward_inside_another_context_is_not_the_calls():
    adapter = draft_adapter.DraftAdapter.of(accepting_adapter().get_base_model())
    outside = copy_context()
    with adapter.on(3):
        assert draft_adapter._FORWARD.get() == (adapter, 3)
        assert outside.run(draft_adapter._FORWARD.get) == (None, 0)
        seen = []
        thread = Thread(target=lambda: seen.append(draft_adapter._FORWARD.get()))
        thread.start()
        thread.join()
        assert seen == [(None, 0)]
    assert draft_adapter._FORWARD.get() == (None, 0)


def test_copies_made_during_a_call_are_whole_and_their_own():
    model = accepting_adapter()
    expected = result_of(model, "jacobi", 1)
    copies = []

    def look():
        if not copies:
            copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])

    during(model, look)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in copies:
        assert_as_before(twin)
        assert result_of(hf_jacobi.enable(twin), "jacobi", 1) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_call_that_breaks_off_leaves_nothing_behind(error):
    model = accepting_adapter()
    expected = {turn: result_of(model, *turn) for turn in (("jacobi", 1), ("forward", 1))}
    calls = []

    def break_off(module, arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(break_off)
    with pytest.raises(error):
        result_of(model, "jacobi", 1)
    handle.remove()
    assert_as_before(model)
    assert draft_adapter._FORWARD.get() == (None, 0)
    for turn, result in expected.items():
        assert same(result_of(model, *turn), result)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.delete_adapter("default"),
        lambda model: model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ],
    ids=["disabled", "deleted", "added"],
)
def test_an_adapter_that_is_changed_during_a_call(change):
    model = accepting_adapter()
    base, expected = model.get_base_model(), result_of(model, "ar", 1)[0]
    changed = []

    def look():
        if not changed:
            changed.append(change(model))

    assert during(model, look).sequences.tolist() == expected
    assert base.generate(**padded_prompts(1), **CALLS["ar"]).tolist() == expected


def test_another_copy_of_the_module_may_be_over_or_under_ours(monkeypatch):
    """The copy in a published checkpoint has its own context variable and classes, and ends before ours or after."""
    name = "hf_jacobi.decoding.published_copy"
    spec = importlib.util.spec_from_file_location(name, draft_adapter.__file__)
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, other)
    spec.loader.exec_module(other)
    for inner_ends_first in (True, False):
        model = accepting_adapter().get_base_model()
        expected = result_of(model, "forward", 1)
        ours, theirs = draft_adapter.DraftAdapter.of(model), other.DraftAdapter.of(model)
        with torch.inference_mode():
            first, second = ours.listening(), theirs.listening()
            first.__enter__()
            second.__enter__()
            for adapter in (ours, theirs):
                with adapter.on(4):
                    assert not same(model(**padded_prompts(1)).logits, expected)
            order = (second, first) if inner_ends_first else (first, second)
            order[0].__exit__(None, None, None)
            with (ours if inner_ends_first else theirs).on(4):
                assert not same(model(**padded_prompts(1)).logits, expected)
            order[1].__exit__(None, None, None)
        assert_as_before(model)
        assert same(result_of(model, "forward", 1), expected)


def test_tasks_and_executors_of_an_event_loop():
    model = accepting_adapter().get_base_model()
    expected = {turn: result_of(model, *turn) for turn in TURNS}

    async def serve():
        return await asyncio.gather(*(asyncio.to_thread(result_of, model, *turn) for turn in TURNS))

    for turn, result in zip(TURNS, asyncio.run(serve())):
        assert same(result, expected[turn]), turn


def test_streams_of_two_threads():
    model = accepting_adapter().get_base_model()
    texts = []
    for way in ("ar", "jacobi"):
        streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True)
        call = padded_prompts(1) | CALLS[way] | {"streamer": streamer}
        thread = Thread(target=model.generate, kwargs=call)
        thread.start()
        texts.append((streamer, thread))
    found = []
    for streamer, thread in texts:
        found.append("".join(streamer))
        thread.join()
    assert found[0] == found[1] and found[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_forked_during_a_call_goes_on():
    model = accepting_adapter()
    expected = result_of(model, "jacobi", 1)
    children = []

    def look():
        if not children:
            child = os.fork()
            if not child:
                os._exit(0 if result_of(model, "jacobi", 1) == expected else 1)
            children.append(child)

    draft_adapter._LOCK.acquire()  # as another thread may have it
    child = os.fork()
    if not child:
        os._exit(0 if result_of(model, "jacobi", 1) == expected else 1)
    draft_adapter._LOCK.release()
    during(model, look)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in (child, *children))


@pytest.mark.slow
def test_compiled_forwards_know_whose_they_are():
    model = accepting_adapter()
    inner = model.get_base_model()
    expected = {turn: result_of(model, *turn) for turn in (("jacobi", 1), ("forward", 1), ("ar", 1))}
    inner.compile(backend="eager")
    assert same(result_of(model, "forward", 1), expected["forward", 1])
    assert result_of(model, "jacobi", 1)[0] == expected["jacobi", 1][0]
    for turn in (("forward", 1), ("ar", 1)):
        assert same(result_of(model, *turn), expected[turn])
    found = []
    out = during(model, lambda: found.append(result_of(model, "forward", 1)))
    assert out.sequences.tolist() == expected["jacobi", 1][0]
    assert all(same(one, expected["forward", 1]) for one in found)


def test_models_without_an_adapter_pay_nothing():
    model = hf_jacobi.enable(tiny_model())
    before = [type(module) for module in model.modules()]
    seen = []
    during(model, lambda: seen.append([type(module) for module in model.modules()]))
    assert all(types == before for types in seen)
