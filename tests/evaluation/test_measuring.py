"""Measures decoding methods, and compares them."""

import pytest
import torch
from models import padded_prompts, tiny_model

import hf_jacobi
from hf_jacobi.decoding.compat import compiles_assisted_decoding
from hf_jacobi.evaluation import measuring
from hf_jacobi.evaluation.bench import methods_of
from hf_jacobi.evaluation.measuring import AR, COMPILED_LOOKUP, PROMPT_LOOKUP, Method, compare, measure, race


JACOBI = Method("Jacobi", "jacobi", {"block_size": 6})


def test_every_method_counts_the_same_text():
    model = hf_jacobi.enable(tiny_model())
    found = {method.name: measure(model, padded_prompts(1), method, 20) for method in (AR, PROMPT_LOOKUP, JACOBI)}
    assert len({str(measured.tokens) for measured in found.values()}) == 1
    ar, lookup, jacobi = found.values()
    assert ar.forwards == [ar.count] and ar.positions == ar.count
    assert lookup.forwards[0] <= ar.count and jacobi.forwards[0] <= ar.count < jacobi.positions
    assert lookup.positions >= ar.count
    assert all(0 < measured.first_seconds < measured.seconds for measured in found.values())
    assert all(measured.peak_bytes is None or measured.peak_bytes > 1e6 for measured in found.values())


def on_meta(**settings):
    """A model whose device is not the CPU."""
    return tiny_model(**settings).to("meta")


compiles = pytest.mark.skipif(
    not compiles_assisted_decoding(on_meta()), reason="this transformers does not compile assisted decoding"
)


@compiles
def test_compiled_forwards_are_counted(monkeypatch):
    """A compiled forward does not run the hook of a later call, so a hook would count only the prefill."""

    def compile_quickly():
        config = compile_here()
        config.backend = "eager"
        return config

    compile_here = measuring.compile_here
    monkeypatch.setattr(measuring, "compile_here", compile_quickly)
    torch._dynamo.reset()
    model = hf_jacobi.enable(tiny_model())
    model.generation_config.eos_token_id = None
    copying = {"input_ids": torch.tensor([[5, 6, 7, 8] * 5]), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    for inputs in (padded_prompts(1), padded_prompts(1), copying):
        plain, compiled = (measure(model, inputs, method, 20, room=60) for method in (PROMPT_LOOKUP, COMPILED_LOOKUP))
        assert compiled.tokens == plain.tokens
        assert compiled.forwards == plain.forwards and compiled.forwards[0] > 1
        assert compiled.positions == plain.positions >= 20
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert "get_compiled_call" not in vars(model)


@compiles
def test_prompt_lookup_is_compared_in_the_form_that_transformers_compiles():
    names = [method.name for method in methods_of(on_meta())]
    assert names[:3] == ["AR", "prompt lookup", "prompt lookup, compiled"]
    assert COMPILED_LOOKUP not in methods_of(tiny_model()), "compiling on a CPU takes minutes"
    windowed = on_meta(name="mistral", sliding_window=8)
    assert COMPILED_LOOKUP not in methods_of(windowed), "its static cache cannot be cropped"


def test_rows_of_a_batch_are_counted_up_to_their_end_token():
    model = hf_jacobi.enable(tiny_model())
    fifth = measure(model, padded_prompts(3), AR, 20).tokens[1][4]
    model.generation_config.eos_token_id = fifth  # so that one row ends early
    ar, jacobi = (measure(model, padded_prompts(3), method, 20) for method in (AR, JACOBI))
    assert ar.tokens == jacobi.tokens and len(ar.tokens[1]) <= 5
    assert ar.forwards == [len(row) for row in ar.tokens]


def test_a_race_compares_every_contestant_with_the_first():
    model = hf_jacobi.enable(tiny_model())
    other = hf_jacobi.enable(tiny_model(seed=1))
    contestants = {"AR": (model, AR), "Jacobi": (model, JACOBI), "another model": (other, JACOBI)}
    runs = list(race(contestants, [padded_prompts(1), padded_prompts(1)], 12))
    assert len(runs) == 2
    figures = compare(runs)
    assert figures["AR"]["speedup"] == figures["AR"]["identical"] == figures["AR"]["tokens_per_forward"] == 1.0
    assert figures["Jacobi"]["identical"] == 1.0 and figures["another model"]["identical"] == 0.0
    assert figures["Jacobi"]["slowest"] <= figures["Jacobi"]["median_speedup"] <= figures["Jacobi"]["fastest"]
    pace = [figures[name]["tokens_per_second"] for name in ("Jacobi", "AR")]
    assert figures["Jacobi"]["speedup"] == pytest.approx(pace[0] / pace[1])


def test_other_decoding_methods_in_a_generation_config_are_overridden():
    model = hf_jacobi.enable(tiny_model())
    expected = measure(model, padded_prompts(2), AR, 10).tokens
    model.generation_config.prompt_lookup_num_tokens = 5
    for method in (AR, JACOBI):
        assert measure(model, padded_prompts(2), method, 10).tokens == expected
