"""Sampled Jacobi decoding is lossless: the text depends on the seed alone and follows the model's distribution."""

from __future__ import annotations

import pytest
import torch
from fixtures import permuted_copy_batch
from models import padded_prompts, tiny_model, tokens_per_forward, trained_model
from transformers import LogitsProcessor, LogitsProcessorList

import hf_jacobi
from hf_jacobi.decoding.drafting import PromptTokens
from hf_jacobi.decoding.gumbel import GumbelNoise
from hf_jacobi.decoding.step import Step


CONFIGS = [
    {"block_size": 1, "pool_size": 0},
    {"block_size": 8},
    {"block_size": 64, "max_blocks": 2},
    {"block_size": 8, "window": "block", "max_blocks": 3, "spawn_ratio": 0.3, "pool_size": 2},
    {"block_size": 6, "pool_size": 8, "draft_init": "repeat"},
    {},
]


@pytest.fixture(scope="module")
def model():
    """A model less sure of its text than after training: samples differ, and drafts are still accepted."""
    model = hf_jacobi.enable(trained_model("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
    return model


def sample(model, inputs, config, seed, **kwargs):
    kwargs = {"do_sample": True, "max_new_tokens": 32, "return_dict_in_generate": True} | kwargs
    return model.generate(**inputs, decoding="jacobi", jacobi_config=config | {"seed": seed}, **kwargs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("warp", [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_the_text_depends_on_the_seed_alone(model, rows, warp):
    inputs = padded_prompts(rows)
    for seed in (0, 1):
        outs = [sample(model, inputs, config, seed, **warp) for config in CONFIGS]
        assert all(torch.equal(out.sequences, outs[0].sequences) for out in outs)
        accepted = [tokens_per_forward(out) for out in outs]
        assert accepted[0] == 1 and min(accepted[1:-1]) > 1.1, f"{accepted} tokens per forward"
    assert not torch.equal(
        sample(model, inputs, {}, 0, **warp).sequences, sample(model, inputs, {}, 1, **warp).sequences
    )


class Nothing(LogitsProcessor):
    """A processor that does nothing, which cannot be known in advance."""

    def __call__(self, input_ids, scores):
        return scores


def test_a_processor_that_does_nothing_changes_nothing(model):
    inputs = padded_prompts(1)
    plain = sample(model, inputs, {"block_size": 8}, 0, top_k=0)
    processed = sample(model, inputs, {"block_size": 8}, 0, top_k=0, logits_processor=LogitsProcessorList([Nothing()]))
    assert torch.equal(plain.sequences, processed.sequences)


@pytest.mark.parametrize("rows", [1, 3])
def test_sampled_logits_and_scores_are_the_models_own(model, rows):
    inputs = padded_prompts(rows)
    kwargs = {"top_k": 0, "temperature": 0.5, "output_logits": True, "output_scores": True, "eos_token_id": None}
    for config in CONFIGS:
        out = sample(model, inputs, config, 0, **kwargs)
        mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 32, dtype=torch.long)], 1)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            expected = model(out.sequences, attention_mask=mask, position_ids=positions).logits[:, 11:-1]
        torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack(out.scores, 1), expected / 0.5, atol=1e-4, rtol=1e-4)


def test_rows_of_the_same_prompt_differ(model):
    out = sample(model, padded_prompts(1), {"block_size": 8}, 0, num_return_sequences=4)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4


def test_a_row_does_not_depend_on_the_padding_beside_it(model):
    inputs = padded_prompts(3)
    batch = sample(model, inputs, {"block_size": 8}, 5).sequences[0]
    alone = sample(model, {name: tensor[:1] for name, tensor in inputs.items()}, {"block_size": 8}, 5).sequences[0]
    length = min(len(batch), len(alone))
    assert torch.equal(batch[:length], alone[:length])


def test_without_a_seed_torchs_generator_governs(model):
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(sample(model, padded_prompts(1), {"block_size": 8}, None).sequences)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_greedy_decoding_leaves_torchs_generator_alone(model):
    state = torch.get_rng_state()
    model.generate(**padded_prompts(1), max_new_tokens=8, do_sample=False, decoding="jacobi")
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_noise_makes_drafts_converge(permuted_copy, monkeypatch):
    prompt = permuted_copy_batch(1, 40, torch.Generator().manual_seed(5))
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}

    def tokens_per_forward():
        out = sample(permuted_copy, inputs, {"block_size": 8, "pool_size": 0}, 0, temperature=2.0, max_new_tokens=96)
        return out.jacobi_stats.tokens_per_forward

    keyed = tokens_per_forward()
    fresh = torch.Generator().manual_seed(0)
    draw = lambda self, scores, keys: scores.sub_(torch.empty_like(scores).exponential_(generator=fresh).log_())  # noqa: E731
    monkeypatch.setattr(GumbelNoise, "add_to", draw)
    assert keyed > tokens_per_forward()


def exact_two_token_distribution(model, inputs, temperature, top_k, top_p):
    """`[V, V]` probabilities of the two tokens after the prompt, by enumeration and in plain tensor operations."""

    def distribution(logits):
        logits = logits / temperature
        kept = logits >= logits.topk(top_k).values[..., -1:]
        probabilities = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return probabilities / probabilities.sum(-1, keepdim=True)

    prompt = inputs["input_ids"]
    with torch.no_grad():
        first = distribution(model(prompt).logits[0, -1])
        vocabulary = first.shape[0]
        continued = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
        second = distribution(model(continued).logits[:, -1])
    return first[:, None] * second


@pytest.mark.parametrize("processor", [{}, {"logits_processor": LogitsProcessorList([Nothing()])}])
@pytest.mark.parametrize("warp", [(1.0, 96, 1.0), (0.7, 8, 1.0), (1.3, 40, 0.8)])
def test_samples_follow_the_exact_distribution(warp, processor):
    model = hf_jacobi.enable(tiny_model("llama", seed=2))
    temperature, top_k, top_p = warp
    with torch.no_grad():  # a flatter distribution, so that many continuations are likely
        model.lm_head.weight.mul_(0.3)
    inputs = padded_prompts(1)
    exact = exact_two_token_distribution(model, inputs, temperature, top_k, top_p).flatten()
    draws, counts = 4000, torch.zeros_like(exact)
    for seed in range(4):
        out = sample(
            model,
            inputs,
            {"block_size": 4, "pool_size": 2},
            seed,
            max_new_tokens=2,
            eos_token_id=None,
            num_return_sequences=draws // 4,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            **processor,
        ).sequences[:, -2:]
        counts += torch.bincount(out[:, 0] * 96 + out[:, 1], minlength=exact.numel())
    assert counts[exact == 0].sum() == 0, "a continuation that the processors rule out was drawn"
    expected = exact * draws
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = expected > 1e-6
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = int(keep.sum()) - 1
    # Chi-squared has mean `freedom` and variance 2 * freedom; four standard deviations fail by chance 1 in 10,000.
    assert freedom >= 8
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


# Scores from which no token can be drawn


class Poisoned(LogitsProcessor):
    """Makes scores unusable from a certain length on, for some rows."""

    def __init__(self, value: float, length: int, rows: tuple[int, ...] = (0,)):
        self.value, self.length, self.rows = value, length, rows

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= self.length:
            for row in self.rows:
                scores[row, slice(None) if self.value == -torch.inf else 5] = self.value
        return scores


def error_of(model, inputs, **kwargs):
    """The error of Jacobi decoding, which must also be AR's."""
    found = []
    for decoding in ("ar", "jacobi"):
        try:
            model.generate(**inputs, do_sample=True, max_new_tokens=8, decoding=decoding, **kwargs)
            found.append(None)
        except Exception as error:
            found.append(error)
    kinds, messages = zip(*((type(error), str(error)) for error in found))
    assert kinds[0] == kinds[1] and messages[0][:30] == messages[1][:30], found  # some name shapes
    return kinds[1], messages[1]


UNDRAWABLE = (RuntimeError, "probability tensor contains either `inf`, `nan` or element < 0")
WARPS = [
    {},
    {"top_k": 0},
    {"top_k": 5, "top_p": 0.5},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 1e-3},
    {"eta_cutoff": 1e-3},
    {"top_h": 0.5},
    {"repetition_penalty": 1.2},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("warp", WARPS, ids=lambda warp: "-".join(warp) or "none")
def test_a_model_whose_logits_are_nan_raises_what_ar_raises(warp, rows):
    model = hf_jacobi.enable(tiny_model())
    model.lm_head.weight.data[5] = torch.nan
    kind, message = error_of(model, padded_prompts(rows), **warp)
    assert (kind, message) == UNDRAWABLE or kind is ValueError, "some processors check the distribution themselves"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_overflows_raises_what_ar_raises(value):
    model = hf_jacobi.enable(tiny_model())
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(96))
    model.lm_head.bias.data[7] = value
    assert error_of(model, padded_prompts(2), top_k=0) == UNDRAWABLE


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": list(range(96))},
        {"temperature": 1e-40},
        {"bad_words_ids": [[token] for token in range(96)]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_where_nothing_is_left_to_draw_it_raises_what_ar_raises(settings):
    model = hf_jacobi.enable(tiny_model())
    assert error_of(model, padded_prompts(2), top_k=0, eos_token_id=None, **settings) == UNDRAWABLE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1)])
def test_a_processor_that_ruins_some_rows_after_some_tokens(model, value, rows):
    inputs = padded_prompts(2)

    def processors():
        return LogitsProcessorList([Poisoned(value, 15, rows)])

    settings = {"eos_token_id": None, "top_k": 0}
    assert error_of(model, inputs, logits_processor=processors(), **settings) == UNDRAWABLE
    clean = sample(model, inputs, {"block_size": 6}, 1, logits_processor=LogitsProcessorList([Nothing()]), **settings)
    settings |= {"max_new_tokens": 3, "logits_processor": processors()}
    before = sample(model, inputs, {"block_size": 6}, 1, **settings)
    assert torch.equal(before.sequences, clean.sequences[:, : before.sequences.shape[1]]), "the text before"


@pytest.mark.parametrize("warp", [{"temperature": 0.3}, {"eta_cutoff": 0.1}, {"top_k": 5}])
def test_scores_at_a_rejected_draft_do_not_matter(model, warp, monkeypatch):
    """They are NaN wherever a draft was wrong, but the text does not change."""
    inputs, settings = padded_prompts(2), {"block_size": 8}
    expected = sample(model, inputs, settings, 3, **warp)
    text = expected.sequences
    score = Step.score
    spoilt = []

    def spoil(step, drafts, starts):
        layout = score(step, drafts, starts)
        for row, (draft, start) in enumerate(zip(drafts, starts)):
            for node in range(len(draft)):
                path = [draft.tokens[one] for one in draft.path(node)]
                if path != text[row, start : start + len(path)].tolist():
                    step.logits[row, node] = torch.nan
                    spoilt.append(node)
        return layout

    monkeypatch.setattr(Step, "score", spoil)
    out = sample(model, inputs, settings, 3, **warp)
    assert torch.equal(out.sequences, text) and len(spoilt) > 20
    assert tokens_per_forward(out) > 1.05


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.1},
        {"do_sample": False, "suppress_tokens": [0, 77]},
        {"temperature": 0.7},
        {"remove_invalid_values": True},
        {"top_h": 0.5},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_draft_at_which_the_model_overflows_spoils_no_text(settings, attention, monkeypatch):
    """A masked key that is NaN makes every sum NaN in which it takes part, even with a weight of 0."""
    model = hf_jacobi.enable(trained_model(attention=attention))
    model.model.embed_tokens.weight.data[77] = torch.nan
    model.lm_head.weight.data[77] = 0  # so that it is in no text
    inputs, tried = padded_prompts(3), []
    settings = {"max_new_tokens": 30, "return_dict_in_generate": True, "do_sample": True} | settings

    def propose(source, text, drafted, count):
        tried.append(count)
        return [77] * count

    monkeypatch.setattr(PromptTokens, "propose", propose)
    plain = {"block_size": 1, "pool_size": 0, "seed": 3}
    expected = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config=plain)
    tried.clear()
    drafts = {"block_size": 8, "pool_size": 0, "seed": 3, "draft_init": "prompt"}
    out = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config=drafts)
    assert torch.equal(out.sequences, expected.sequences)
    assert sum(tried) > 10 and tokens_per_forward(out) > 1.05


def test_text_of_a_float64_model_ties_where_ar_ties():
    model = hf_jacobi.enable(trained_model(dtype=torch.float64))
    head = model.lm_head.weight.data
    head[48:] = head[:48] * (1 + 1e-12)
    inputs, settings = padded_prompts(3), {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **settings, decoding="jacobi", jacobi_config={"block_size": 8})
    assert torch.equal(out.sequences, model.generate(**inputs, **settings).sequences) and tokens_per_forward(out) > 1
