"""The other promises of `generate`: processors, stopping criteria, streamers, scores, caches, embeddings."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from models import VOCABULARY, last_new_tokens, padded_prompts, tiny_model, tokens_per_forward, trained_model
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import hf_jacobi
from hf_jacobi.decoding.compat import CACHE, cache_of


CONFIGS = [
    {},
    {"block_size": 8, "window": "block", "pool_size": 0},
    {"block_size": 12, "max_blocks": 2, "pool_size": 3, "spawn_ratio": 0.4},
]


MODEL = hf_jacobi.enable(trained_model("olmo"))
A, B, C = last_new_tokens(MODEL, padded_prompts(3))  # of text that occurs late


@pytest.fixture
def model():
    return MODEL


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE(vocab={chr(31 + index): index for index in range(VOCABULARY)}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=chr(31), eos_token="!")  # tokens 0 and 2


def both(model, inputs, config, make_kwargs=dict, drafts=True, **kwargs):
    """
    The outputs of AR and of Jacobi decoding; `make_kwargs` makes new stateful arguments for each.

    Unless `drafts` is false, drafts must be accepted if a block size is given, because otherwise Jacobi decoding is
    just AR. The default settings may draft nothing in texts this short.
    """
    kwargs = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True} | kwargs
    expected = model.generate(**inputs, **kwargs, **make_kwargs())
    out = model.generate(**inputs, **kwargs, **make_kwargs(), decoding="jacobi", jacobi_config=config)
    assert tokens_per_forward(out) > 1 or not drafts or not config
    return expected, out


PROCESSING = {
    "repetition penalty": {"repetition_penalty": 1.4},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 30, "eos_token_id": [A, B]},
    "min_length": {"min_length": 30, "eos_token_id": [A, B]},
    "several eos ids": {"eos_token_id": [A, B, C]},
    "bad words": {"bad_words_ids": [[A], [B, C]]},
    "sequence bias": {"sequence_bias": {(A,): -9.0, (B, C): 9.0}},
    "forced eos": {"forced_eos_token_id": 2},
    "suppressed tokens": {"suppress_tokens": [A, B]},
    "length penalty": {"exponential_decay_length_penalty": (5, 1.5)},
    "max_length": {"max_length": 31, "max_new_tokens": None},
    "one new token": {"max_new_tokens": 1},
    "two new tokens": {"max_new_tokens": 2},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=2.0, seeding_scheme="lefthash")},
    "guidance": {"guidance_scale": 1.5},
    "renormalized": {"renormalize_logits": True, "output_scores": True},
}
NO_ROOM = ("one new token", "two new tokens")  # for drafts
UNMOVED = ("repetition penalty", "watermark", "guidance")  # these leave a model sure of its text


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("label", PROCESSING)
def test_processors_and_lengths(model, label, rows):
    inputs = padded_prompts(rows)
    if label in UNMOVED:
        model = hf_jacobi.enable(tiny_model("olmo"))
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    for config in CONFIGS:
        expected, out = both(model, inputs, config, drafts=label not in NO_ROOM + UNMOVED, **PROCESSING[label])
        assert torch.equal(out.sequences, expected.sequences), config
        assert label == "renormalized" or not torch.equal(out.sequences, plain), "this had no effect"


@pytest.mark.parametrize("rows", [1, 3])
def test_prefix_allowed_tokens_fn_knows_its_row(model, rows):
    def allowed(row, text):
        return list(range(3 + row, VOCABULARY, 2 + (len(text) % 2)))

    for config in CONFIGS:
        expected, out = both(model, padded_prompts(rows), config, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(out.sequences, expected.sequences)


class Counting(LogitsProcessor):
    """Depends on the number of calls and on the row: an extra, missing or misplaced call changes the text."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        shift = len(self.calls) % 3
        scores = scores.clone()
        for row in range(scores.shape[0]):
            scores[row, (row + shift) :: 5] -= 2.0
        return scores


class CountingStop(StoppingCriteria):
    """Stops a row once the sum of its tokens over all calls is large enough."""

    def __init__(self):
        self.calls = []
        self.total = None

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append(input_ids.tolist())
        newest = input_ids[:, -1]
        self.total = newest if self.total is None else self.total + newest
        return self.total > 600


@pytest.mark.parametrize("eos", [2, None])
@pytest.mark.parametrize("rows", [1, 3])
def test_stateful_processors_and_criteria_are_called_as_ar_calls_them(model, rows, eos):
    for config in CONFIGS:
        processors, criteria = [], []

        def stateful(processors=processors, criteria=criteria):
            processors.append(Counting())
            criteria.append(CountingStop())
            return {
                "logits_processor": LogitsProcessorList([processors[-1]]),
                "stopping_criteria": StoppingCriteriaList([criteria[-1]]),
            }

        expected, out = both(model, padded_prompts(rows), config, stateful, eos_token_id=eos)
        assert torch.equal(out.sequences, expected.sequences)
        assert criteria[0].calls == criteria[1].calls
        assert processors[0].calls == processors[1].calls


def test_criterion_that_returns_a_plain_bool(model):
    class Plain(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return bool(input_ids[0, -1] == A)

    for rows in (1, 3):
        expected, out = both(
            model, padded_prompts(rows), {"block_size": 8}, stopping_criteria=StoppingCriteriaList([Plain()])
        )
        assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(model, tokenizer, rows):
    inputs = padded_prompts(rows)
    text = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    stop = tokenizer.decode(text[0, 20:22])
    for config in CONFIGS:
        expected, out = both(model, inputs, config, stop_strings=[stop], tokenizer=tokenizer)
        assert torch.equal(out.sequences, expected.sequences)
        lengths = [row.new_tokens for row in out.jacobi_stats.per_sequence]
        assert lengths == [10] + [40] * (rows - 1), "the first row stops, the others never write that string"
        for row, length in enumerate(lengths):
            assert torch.equal(out.sequences[row, : 12 + length], text[row, : 12 + length])
            assert not out.sequences[row, 12 + length :].any(), "padding"


def test_stop_strings_of_the_generation_config(model, tokenizer):
    inputs = padded_prompts(1)
    text = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    model.generation_config.stop_strings = [tokenizer.decode(text[0, 20:22])]
    try:
        expected, out = both(model, inputs, {"block_size": 8}, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(**inputs, decoding="jacobi")
        assert model.generation_config.stop_strings
    finally:
        model.generation_config.stop_strings = None
    assert torch.equal(out.sequences, expected.sequences) and out.sequences.shape[1] <= 22


def test_max_time_stops(model):
    start = time.time()
    out = model.generate(
        **padded_prompts(1), max_new_tokens=100_000, max_time=0.3, eos_token_id=None, decoding="jacobi"
    )
    assert time.time() - start < 3
    assert 12 < out.shape[1] < 100_000


class Recorder:
    """A streamer that keeps everything it receives."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rows", [1, 3])
def test_streamer_gets_exactly_what_ar_puts(model, rows):
    for config in CONFIGS:
        recorders = []

        def recording(recorders=recorders):
            recorders.append(Recorder())
            return {"streamer": recorders[-1]}

        both(model, padded_prompts(rows), config, recording)
        assert recorders[0].values == recorders[1].values
        assert recorders[1].ended == 1


def test_text_streamers(model, tokenizer, capsys):
    inputs = padded_prompts(1)
    texts = []
    for decoding in ("ar", "jacobi"):
        streamer = TextStreamer(tokenizer)
        model.generate(**inputs, max_new_tokens=20, do_sample=False, decoding=decoding, streamer=streamer)
        texts.append(capsys.readouterr().out)
        iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
        out = model.generate(**inputs, max_new_tokens=20, do_sample=False, decoding=decoding, streamer=iterator)
        assert "".join(iterator) == tokenizer.decode(out[0, 12:])
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "extra", [{}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "top_k": 5, "do_sample": True}]
)
def test_scores_and_logits(model, rows, extra):
    inputs = padded_prompts(rows)
    kwargs = {"output_scores": True, "output_logits": True, "eos_token_id": None} | extra
    for config in CONFIGS:
        expected, out = both(model, inputs, config, **kwargs)
        assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - 12 == 40
        if extra.get("do_sample"):
            assert out.scores[0].shape == (rows, VOCABULARY)
            chosen = torch.stack(out.scores, 1).gather(2, out.sequences[:, 12:, None])
            assert torch.isfinite(chosen).all()
            continue
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_scores_of_rows_that_ended_are_zero(model):
    _, out = both(model, padded_prompts(3), {"block_size": 8}, output_scores=True, eos_token_id=[A, B, C])
    for row, stats in enumerate(out.jacobi_stats.per_sequence):
        for position, scores in enumerate(out.scores):
            assert bool((scores[row] == 0).all()) == (position >= stats.new_tokens)


@pytest.mark.parametrize("name", ["olmo", "mistral-window", "gemma3"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("first", ["ar", "jacobi"])
@pytest.mark.parametrize("second", ["ar", "jacobi"])
def test_a_following_call_continues_from_the_cache(name, rows, first, second):
    model = hf_jacobi.enable(trained_model(name))
    inputs = padded_prompts(rows)
    ends = last_new_tokens(model, inputs)
    settings = {"do_sample": False, "eos_token_id": ends, "return_dict_in_generate": True}
    blocks = {"ar": {"decoding": "ar"}, "jacobi": {"decoding": "jacobi", "jacobi_config": {"block_size": 8}}}

    def two_turns(decodings):
        out = model.generate(**inputs, **settings, max_new_tokens=20, **blocks[decodings[0]])
        question = torch.randint(3, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(9))
        text = torch.cat([out.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, text.shape[1] - 12, dtype=torch.long)], 1)
        assert decodings[0] == "ar" or tokens_per_forward(out) > 1
        cache = cache_of(out)
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        return model.generate(
            text, attention_mask=mask, **{CACHE: cache}, **settings, max_new_tokens=20, **blocks[decodings[1]]
        )

    assert torch.equal(two_turns((first, second)).sequences, two_turns(("ar", "ar")).sequences)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_following_call_may_pass_the_new_tokens_only(model, rows):
    inputs = padded_prompts(rows)
    question = torch.randint(3, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(9))
    texts = []
    for decoding in ("ar", "jacobi"):
        with torch.no_grad():
            cache = cache_of(model(**inputs, **{CACHE: DynamicCache(config=model.config)}))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
        texts.append(
            model.generate(
                question,
                attention_mask=mask,
                **{CACHE: cache},
                max_new_tokens=20,
                do_sample=False,
                decoding=decoding,
            )
        )
    assert torch.equal(*texts)


def test_the_cache_of_the_caller_is_filled_in_place(model):
    inputs = padded_prompts(1)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache, decoding in zip(caches, ("ar", "jacobi")):
        model.generate(**inputs, **{CACHE: cache}, max_new_tokens=20, do_sample=False, decoding=decoding)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() > 20
    for ar, ours in zip(caches[0].layers, caches[1].layers):
        torch.testing.assert_close(ours.keys, ar.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, ar.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_inputs_embeds(model, rows):
    inputs = padded_prompts(rows)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    for config in CONFIGS:
        expected, out = both(model, given, config)
        assert torch.equal(out.sequences, expected.sequences)
        expected, out = both(model, given | {"input_ids": inputs["input_ids"]}, config)
        assert torch.equal(out.sequences, expected.sequences)


def test_chunked_prefill(model):
    expected, out = both(model, padded_prompts(3), {"block_size": 8}, prefill_chunk_size=5)
    assert torch.equal(out.sequences, expected.sequences)


def test_prompt_without_attention_mask(model):
    inputs = {"input_ids": padded_prompts(1)["input_ids"]}
    expected, out = both(model, inputs, {"block_size": 8})
    assert torch.equal(out.sequences, expected.sequences)


def test_plain_return_value_is_a_tensor(model):
    out = model.generate(**padded_prompts(2), max_new_tokens=5, decoding="jacobi", do_sample=False)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 17) and out.dtype == torch.long


def test_transition_scores_can_be_computed(model):
    expected, out = both(model, padded_prompts(1), {"block_size": 8}, output_scores=True, eos_token_id=None)
    ours = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    theirs = model.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama4", "mistral-window", "llama"])
def test_padding_inside_the_prompt(name):
    model = hf_jacobi.enable(trained_model(name))
    inputs = padded_prompts(3)
    inputs["attention_mask"][0, 4:6] = 0  # as between the turns of a batch of conversations
    for config in CONFIGS:
        expected, out = both(model, inputs, config)
        assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_drafts_stay_within_the_position_table(name):
    sizes = {"n_positions": 40, "max_position_embeddings": 40}
    model = hf_jacobi.enable(tiny_model(name, **sizes))
    inputs = padded_prompts(1)
    text = model.generate(**inputs, max_new_tokens=28, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    end = next(token for index, token in enumerate(text) if index > 20 and token not in text[:index])
    for config in ({"block_size": 32}, {"block_size": 16, "max_blocks": 3, "pool_size": 4}):
        expected, out = both(model, inputs, config, max_new_tokens=100, eos_token_id=end)
        assert torch.equal(out.sequences, expected.sequences)


def test_token_types():
    model = hf_jacobi.enable(tiny_model("gpt2"))
    inputs = padded_prompts(2)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, -1] = 5
    expected, out = both(model, inputs | {"token_type_ids": types}, {"block_size": 16}, eos_token_id=None)
    assert torch.equal(out.sequences, expected.sequences)
    assert not torch.equal(out.sequences, both(model, inputs, {}, eos_token_id=None)[0].sequences)


def test_threads_with_stop_strings_on_one_model(tokenizer):
    model, inputs = hf_jacobi.enable(tiny_model("olmo")), padded_prompts(1)
    text = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
    model.generation_config.stop_strings = [tokenizer.decode(text[0, 20:22])]
    kwargs = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "tokenizer": tokenizer}
    expected = model.generate(**inputs, **kwargs)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(model.generate, **inputs, **kwargs, decoding="jacobi") for _ in range(16)]
        assert all(torch.equal(call.result(), expected) for call in calls)
    assert expected.shape[1] <= 22


def test_max_time_ends_all_rows_of_a_batch_at_once(model):
    inputs = padded_prompts(3)
    kwargs = {"do_sample": False, "eos_token_id": 95}
    out = model.generate(**inputs, **kwargs, max_new_tokens=100_000, max_time=0.3, decoding="jacobi")
    expected = model.generate(**inputs, **kwargs, max_new_tokens=out.shape[1] - 12)
    assert torch.equal(out, expected), "no padding after a row that had not ended"


def test_criteria_of_the_user_see_the_scores_that_ar_shows_them(model):
    shown = []

    class Watching(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            shown.append((input_ids.shape, len(scores), scores[-1].argmax(-1).tolist()))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    kwargs = {"stopping_criteria": StoppingCriteriaList([Watching()]), "output_scores": True, "eos_token_id": None}
    both(model, padded_prompts(3), {"block_size": 8}, max_new_tokens=20, **kwargs)
    assert shown[:20] == shown[20:] and len(shown) == 40
