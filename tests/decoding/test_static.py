"""Fixed shapes: `cache_implementation="static"` gives AR's text, compiled, in few graphs and limited memory."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import ARCHITECTURES, last_new_tokens, padded_prompts, tiny_model, tokens_per_forward, trained_model
from peft import LoraConfig, get_peft_model
from test_draft_adapter import with_adapter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, CompileConfig, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_jacobi
from hf_jacobi.decoding import draft_adapter
from hf_jacobi.decoding import step as step_module
from hf_jacobi.decoding.attention import fold_groups
from hf_jacobi.decoding.call import DecodeCall
from hf_jacobi.decoding.compat import CACHE
from hf_jacobi.decoding.layout import Layout
from hf_jacobi.decoding.running import Eager
from hf_jacobi.decoding.shapes import FixedShapes
from hf_jacobi.decoding.step import Step


GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
STATIC = {"decoding": "jacobi", "cache_implementation": "static", "return_dict_in_generate": True}
EAGER = STATIC | {"disable_compile": True}
# Traced as a whole, then run without a compiler: how a graph is compiled is not tested here.
TRACED = STATIC | {"compile_config": CompileConfig(backend="eager", fullgraph=True)}


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch.compiler.reset()
    counters.clear()


def same_as_ar(model, inputs, way, **settings):
    settings = GREEDY | settings
    expected = model.generate(**inputs, **settings, decoding="ar")
    out = model.generate(**inputs, **settings, **way)
    assert torch.equal(out.sequences, expected)
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_is_that_of_ar(name):
    settings = {"jacobi_config": {"block_size": 8}}
    out = same_as_ar(hf_jacobi.enable(trained_model(name)), padded_prompts(4), EAGER | settings)
    assert tokens_per_forward(out) > 1.3


MASKS = ["llama", "gemma2", "gemma3", "mistral-window", "llama4", "gpt_oss", "gpt2", "qwen3_moe"]


@pytest.mark.compile
@pytest.mark.parametrize("name", MASKS)
def test_text_is_that_of_ar_when_its_forwards_are_traced(name):
    settings = {"jacobi_config": {"block_size": 8}}
    out = same_as_ar(hf_jacobi.enable(trained_model(name)), padded_prompts(4), TRACED | settings)
    assert tokens_per_forward(out) > 1.3
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


@pytest.mark.compile
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_text_is_that_of_ar_when_its_forwards_are_compiled(name):
    out = same_as_ar(hf_jacobi.enable(trained_model(name)), padded_prompts(2), STATIC)
    assert tokens_per_forward(out) > 1.3
    assert counters["inductor"] and not counters["graph_break"]


@pytest.mark.parametrize("way", [EAGER, TRACED], ids=["eager", "traced"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_only_adapter_drafts(rows, way):
    model, inputs = with_adapter(), padded_prompts(rows)
    settings = hf_jacobi.JacobiConfig(block_size=6, pool_size=0)
    drafting = model.generate(
        **inputs, **GREEDY, decoding="jacobi", jacobi_config=settings, return_dict_in_generate=True
    )
    out = same_as_ar(model, inputs, way | {"jacobi_config": settings})
    assert out.jacobi_stats.accepted_per_forward == drafting.jacobi_stats.accepted_per_forward
    assert out.jacobi_stats.tokens_per_forward > 1
    assert not counters["graph_break"]


def test_a_graph_with_the_adapter_on_is_no_other_calls():
    model, inputs = with_adapter(), padded_prompts(2)
    same_as_ar(model, inputs, TRACED)
    layer, states = model.base_model.model.model.layers[0].self_attn.q_proj, torch.randn(2, 8, 32)
    expected = layer.base_layer(states)
    with draft_adapter.DraftAdapter.of(model).listening(), torch.no_grad():
        compiled = torch.compile(layer, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(states), expected)
    torch.testing.assert_close(layer(states), expected)


@pytest.mark.compile
@pytest.mark.parametrize("rows", [1, 4])
def test_few_graphs_serve_a_long_text_and_the_next(rows):
    """While text grows, rows end and windows move, and between calls."""
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(rows)
    model.config.max_position_embeddings = 1024
    ends = None if rows == 1 else last_new_tokens(model, inputs)
    settings = {"max_new_tokens": 512, "eos_token_id": ends, "do_sample": False}
    out = model.generate(**inputs, **settings, **TRACED)
    assert len(set(out.jacobi_stats.accepted_per_forward)) > 1
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 6
    model.generate(**inputs, **settings, **TRACED)
    model.generate(**inputs, **settings | {"max_new_tokens": 509}, **TRACED)  # within the same bucket
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


def a_call(model, inputs, do_sample, **settings):
    """A call after its prefill."""
    calls = []

    def stop_there(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        config = hf_jacobi.JacobiConfig(seed=0, **settings)
        prepared = (logits_processor, stopping_criteria, generation_config)
        calls.append(DecodeCall(model, input_ids, *prepared, config, kwargs))
        calls[0].prefill()
        return input_ids

    model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=do_sample,
        eos_token_id=None,
        cache_implementation="static",
        disable_compile=True,
        custom_generate=stop_there,
    )
    return calls[0]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_nothing_waits_for_the_device_between_upload_and_read(rows, do_sample, adapter):
    model = with_adapter() if adapter else hf_jacobi.enable(tiny_model())
    call = a_call(model, padded_prompts(rows), do_sample)
    step, drafts = call.step, [row.propose() for row in call.rows]
    starts = [row.length - 1 for row in call.rows]
    if adapter:
        step.copies = step.shapes.width(max(draft.chain_length for draft in drafts))

    class Stop(Exception):
        pass

    seen = []

    def look(layout, end):
        with FakeTensorMode(allow_non_fake_inputs=True):
            logits = type(step).forward(step, layout, end)
            seen.append(step.chooser.predict(logits, layout.keys))
            with pytest.raises(Exception, match="_local_scalar_dense"):
                seen[0].tolist()  # a wait does raise
        raise Stop

    step.forward = look
    adapts = step.draft_adapter.listening() if adapter else torch.no_grad()
    with torch.no_grad(), adapts, pytest.raises(Stop):
        step(drafts, starts)
    assert seen[0].shape[0] == rows and seen[0].shape[1] > 1


def test_memory_is_that_of_the_text_and_one_step():
    model = hf_jacobi.enable(tiny_model())
    for length in (40, 500, 3000):
        shapes = FixedShapes(length, 80)
        assert length + 80 <= shapes.total <= 1.05 * (length + 80)
    call = a_call(model, padded_prompts(2), False)
    theirs = StaticCache(config=model.config, max_cache_len=52 + FixedShapes.width(80))
    key = torch.zeros(2, model.config.num_key_value_heads, 1, model.config.head_dim)
    for index, layer in enumerate(call.step.cache.layers):
        theirs.update(key, key, index)
        ours = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        assert ours <= 1.05 * (theirs.layers[index].keys.nbytes + theirs.layers[index].values.nbytes)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
@pytest.mark.parametrize("length", [7, 30])
def test_a_cache_of_the_callers_is_taken_over_and_handed_back(name, length):
    """Two turns in one `StaticCache`, then AR; windows are shorter than some of the text."""
    model = hf_jacobi.enable(trained_model(name))
    turns = [padded_prompts(1, seed=seed)["input_ids"] for seed in (1, 2, 3)]

    def chat(ways, cache):
        text, accepted = torch.zeros(1, 0, dtype=torch.long), []
        for way, turn in zip(ways, turns):
            text = torch.cat([text, turn], 1)
            out = model.generate(
                text, **GREEDY | {"max_new_tokens": length}, **{CACHE: cache}, **way, return_dict_in_generate=True
            )
            text = out.sequences
            accepted.append(getattr(out, "jacobi_stats", None))
        return text, accepted

    ar = {"decoding": "ar"}
    jacobi = {"decoding": "jacobi", "disable_compile": True, "jacobi_config": {"block_size": 8}}
    expected, _ = chat([ar, ar, ar], DynamicCache(config=model.config))
    text, stats = chat([jacobi, jacobi, ar], StaticCache(config=model.config, max_cache_len=200))
    assert torch.equal(text, expected)
    assert max(stats[0].tokens_per_forward, stats[1].tokens_per_forward) > 1


def test_the_cache_of_a_call_comes_back_static():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(2)
    out = same_as_ar(model, inputs, EAGER, max_cache_len=300)
    cache = getattr(out, CACHE)
    assert isinstance(cache, StaticCache) and cache.layers[0].keys.shape[2] == 300
    assert int(cache.get_seq_length()) == out.sequences.shape[1] - 1


def test_a_cache_that_is_too_small_is_refused():
    model = hf_jacobi.enable(tiny_model())
    cache = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match=r"holds 30 tokens.*52"):
        model.generate(**padded_prompts(1), **GREEDY, decoding="jacobi", **{CACHE: cache})
    cache = StaticCache(config=model.config, max_cache_len=51)  # the newest token is not cached
    out = model.generate(**padded_prompts(1), **GREEDY, **{CACHE: cache}, decoding="jacobi", disable_compile=True)
    assert out.shape[1] == 52


def test_a_cache_that_is_too_small_for_what_it_holds_or_for_embeddings_is_refused():
    """The maximum length of such calls does not count them either."""
    model, prompt = hf_jacobi.enable(tiny_model()), padded_prompts(1)["input_ids"]
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    caches = {size: StaticCache(config=model.config, max_cache_len=size) for size in (30, 31, 51, 200)}
    embeddings = model.get_input_embeddings()(prompt)
    with pytest.raises(ValueError, match=r"holds 30 tokens.*32"):
        model.generate(inputs_embeds=embeddings, **settings, decoding="jacobi", **{CACHE: caches[30]})
    model.generate(inputs_embeds=embeddings, **settings, decoding="jacobi", **{CACHE: caches[31]})

    def second_turn(cache, decoding):
        first = model.generate(prompt, **settings, decoding=decoding, **{CACHE: cache})
        turn = {"input_ids": first[:, -1:], "attention_mask": torch.ones_like(first)}
        return model.generate(**turn, **settings, decoding=decoding, **{CACHE: cache})

    expected = second_turn(caches[200], "ar")
    with pytest.raises(ValueError, match=r"holds 50 tokens.*52"):
        second_turn(StaticCache(config=model.config, max_cache_len=50), "jacobi")
    assert torch.equal(second_turn(caches[51], "jacobi"), expected)


def test_a_cache_for_another_batch_or_model_is_refused_before_work_is_lost():
    model, way = hf_jacobi.enable(tiny_model()), {"disable_compile": True, "decoding": "jacobi"}
    settings, forwards = GREEDY | way, []
    for before, now in ((1, 2), (2, 1)):
        cache = StaticCache(config=model.config, max_cache_len=60)
        model.generate(**padded_prompts(before), **settings, **{CACHE: cache})
        cache.reset()
        with model.register_forward_hook(lambda *_: forwards.append(1)), pytest.raises(ValueError, match="batches of"):
            model.generate(**padded_prompts(now), **settings, **{CACHE: cache})
        same_as_ar(model, padded_prompts(before), way | {CACHE: cache, "return_dict_in_generate": True})
    cache = StaticCache(config=tiny_model(num_hidden_layers=1).config, max_cache_len=60)
    with model.register_forward_hook(lambda *_: forwards.append(1)), pytest.raises(ValueError, match="1 layers"):
        model.generate(**padded_prompts(1), **settings, **{CACHE: cache})
    assert not forwards


@pytest.mark.parametrize("place", ["process", "call", "around"])
def test_attention_that_someone_else_registered_as_sdpa_stays_in_force(place):
    """Also if it was registered after ours, or wraps ours."""
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(3)
    settings = {"jacobi_config": {"block_size": 8}}
    usual = same_as_ar(model, inputs, EAGER | settings).sequences
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def other(module, query, *arguments, **keywords):
        output, weights = plain(module, query * -2, *arguments, **keywords)
        return output * 3, weights

    if place == "call":
        ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    else:
        AttentionInterface.register("sdpa", functools.wraps(plain)(other) if place == "around" else other)
    try:
        for way in (EAGER, TRACED):
            assert not torch.equal(same_as_ar(model, inputs, way | settings).sequences, usual)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"].__code__ is other.__code__
    finally:
        if place == "call":
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        AttentionInterface.register("sdpa", plain)


@torch._dynamo.config.patch(recompile_limit=2)  # of 8, beyond which torch stops compiling a function
def test_texts_of_many_lengths_are_compiled():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(2)
    model.config.max_position_embeddings = 2048
    stop = {"stopping_criteria": [lambda ids, scores: ids.shape[1] >= 24]}
    for length in (1050, 1150, 1250):
        same_as_ar(model, inputs, TRACED, max_new_tokens=length, **stop)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_adapters_than_torch_compiles_one_function_for():
    model, inputs = trained_model(), padded_prompts(2)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["v_proj"], init_lora_weights=False)
    model = hf_jacobi.enable(get_peft_model(model, config, adapter_name="0"))
    for number in range(1, 4):
        model.add_adapter(str(number), config)
    texts = set()
    for number in range(4):
        model.set_adapter(str(number))
        texts.add(str(same_as_ar(model, inputs, TRACED, max_new_tokens=10).sequences))
    assert len(texts) > 1


def test_sampled_text_is_that_of_growing_slots():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(3)
    settings = {"max_new_tokens": 40, "do_sample": True, "eos_token_id": None, "jacobi_config": {"seed": 5}}
    growing = model.generate(**inputs, **settings, decoding="jacobi")
    out = model.generate(**inputs, **settings, **EAGER)
    assert torch.equal(out.sequences, growing) and tokens_per_forward(out) > 1


def test_rows_that_end_far_apart():
    model, inputs = hf_jacobi.enable(trained_model()), padded_prompts(4)
    out = same_as_ar(model, inputs, EAGER, eos_token_id=last_new_tokens(model, inputs), max_new_tokens=100)
    assert tokens_per_forward(out) > 1


def test_no_keys_or_values_are_copied_for_grouped_queries():
    """The tensors of a step are smaller than the keys of one layer with a copy for each query head."""
    model = hf_jacobi.enable(
        tiny_model(num_attention_heads=8, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024)
    )
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    largest.append((tensor.untyped_storage().nbytes() // 4, function))
            return result

    prompt = padded_prompts(1, length=700)
    call = a_call(model, prompt, False)
    drafts = [row.propose() for row in call.rows]
    with torch.no_grad(), Watch():
        call.step(drafts, [row.length - 1 for row in call.rows])
    slots = call.step.cache.plan.end
    assert len(drafts[0]) > 1 and slots >= 700
    step = call.step
    mask = step.logits.shape[1] * 4 * step.shapes.total  # as many rows as there are queries, once for all layers
    most = max(2 * step.shapes.total * 16, step.logits.numel())
    assert sum(size == mask for size, _ in largest) < 6
    largest = [(size, function) for size, function in largest if size != mask]
    assert not [(size, function) for size, function in largest if size > most]


def test_folded_attention_is_the_plain_one():
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 30, 8)
    mask = torch.rand(2, 1, 5, 30) > 0.3
    mask[..., 0] = True
    module = torch.nn.Module()
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), key.repeat_interleave(3, 1), mask, scale=0.4
    )
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    folded, _ = fold_groups(None)(module, query, key, key, added.repeat(1, 1, 3, 1), scaling=0.4)
    torch.testing.assert_close(folded, plain.transpose(1, 2))


def test_what_pads_a_step_stays_in_the_cache():
    layout = Layout(1, 8, 4, torch.device("cpu"))
    layout.fill([hf_jacobi.decoding.drafting.Draft([1, 2])], [60], [0])
    layout.fix(64)
    assert layout.slots.tolist() == [[60, 61, 62, 63, 63, 63, 63, 63]] and layout.end == 64


def test_a_step_of_rows_grows():
    call = a_call(hf_jacobi.enable(tiny_model()), padded_prompts(2), False)
    part = call.step.of_rows([1], 5)
    assert isinstance(part, Step) and part.shapes.width(3) == 3


class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """A stand-in for a CUDA graph: repeats every operation in order on the same tensors, without the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        assert function is not torch.ops.aten._local_scalar_dense.default, "a wait for the device"
        self.operations.append((function, arguments, keywords or {}, result))
        return result

    def replay(self):
        for function, arguments, keywords, result in self.operations:
            before = result if isinstance(result, (tuple, list)) else [result]
            again = function(*arguments, **keywords)
            for old, new in zip(before, again if isinstance(again, (tuple, list)) else [again]):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """Makes a CPU record and replay steps; gives a list with the tape of each recorded step."""
    tapes = []

    def record(function, pool):
        with Tape() as tape:
            result = function()
        tapes.append(tape)
        return tape.replay, result

    class Plain(Eager):
        name = "as written"

    monkeypatch.setattr(step_module, "recorder_of", lambda device: record)
    monkeypatch.setattr(step_module, "Compiled", lambda *settings: Plain())
    return tapes


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "gpt2", "adapter"])
def test_what_was_recorded_is_replayed_in_this_call_and_the_next(name, taped):
    model = with_adapter() if name == "adapter" else hf_jacobi.enable(trained_model(name))
    for seed in (0, 1, 2, 0):  # prompts of other lengths, with other padding
        inputs = padded_prompts(3, length=12 + seed, seed=seed)
        config = {"block_size": 6, "pool_size": 0 if name == "adapter" or seed == 1 else 4}
        before = len(taped)
        out = same_as_ar(model, inputs, STATIC | {"jacobi_config": config}, max_new_tokens=60 - seed)
        assert out.jacobi_stats.tokens_per_forward > 1 or seed
    assert len(taped) > 1 and len(taped) - before <= 1, "a shape is recorded at its third run"
    assert all(tape.operations for tape in taped)


def test_other_weights_or_adapters_are_not_served_by_what_was_recorded(taped):
    model, inputs = with_adapter(), padded_prompts(2)
    for change in (
        lambda: None,
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: setattr(model.get_base_model().lm_head, "weight", torch.nn.Parameter(torch.randn(96, 32))),
    ):
        change()
        before = len(taped)
        same_as_ar(model, inputs, STATIC)
        assert len(taped) > before


def test_two_calls_at_once_do_not_share_what_was_recorded(taped):
    model = hf_jacobi.enable(trained_model())
    prompts = [padded_prompts(2, seed=seed) for seed in range(6)]
    expected = [model.generate(**inputs, **GREEDY, decoding="ar") for inputs in prompts]
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda inputs: model.generate(**inputs, **GREEDY, **STATIC).sequences, prompts))
    assert all(torch.equal(text, own) for text, own in zip(texts, expected))
