"""Ways of decoding side by side, and the table of them."""

import pytest
from models import VOCABULARY, tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi.evaluation.bench import bench, methods_of, table
from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Method
from hf_jacobi.evaluation.plots import bench_bars


METHODS = (AR, PROMPT_LOOKUP, Method("Jacobi", "jacobi", {"block_size": 4}))
PROMPTS = [[3 + (7 * row + column) % (VOCABULARY - 3) for column in range(4 + row)] for row in range(5)]


@pytest.fixture(scope="module")
def report():
    model = hf_jacobi.enable(tiny_model())
    return bench(model, tiny_tokenizer(), PROMPTS, METHODS, batch_sizes=(1, 2), max_new_tokens=12, repeats=2)


def test_every_way_is_measured_at_every_batch_size(report):
    rows = [(row["batch_size"], row["decoding"], len(row["runs"])) for row in report["results"]]
    assert rows == [(1, "AR", 10), (1, "prompt lookup", 10), (1, "Jacobi", 10), (2, "AR", 4), (2, "Jacobi", 4)]
    assert all(row["identical"] == 1 for row in report["results"])
    assert report["setup"]["dtype"] == "float32" and report["setup"]["prompts"] == 5


def test_a_speedup_for_another_text_says_so(report):
    assert "*" not in table(report)
    model, other = hf_jacobi.enable(tiny_model()), hf_jacobi.enable(tiny_model(seed=1))
    differing = bench(model, tiny_tokenizer(), PROMPTS[:1], METHODS, max_new_tokens=12, base=other)
    lines = table(differing).splitlines()
    assert "x * |" in lines[4] and lines[-1].startswith("* Some of the text")
    assert "*" not in lines[2] + lines[3]


def test_the_picture_has_a_bar_for_each_figure(report):
    axes = bench_bars(report)
    assert len([patch for patch in axes.patches if patch.get_width()]) == len(report["results"])


def test_settings_of_the_checkpoint_are_compared_too():
    model = hf_jacobi.enable(tiny_model())
    assert "checkpoint" not in str(methods_of(model))
    model.generation_config.jacobi = {"block_size": 9}
    assert methods_of(model)[2].settings == {"block_size": 9}


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="too few for batches of 4"):
        bench(hf_jacobi.enable(tiny_model()), tiny_tokenizer(), PROMPTS[:3], METHODS, batch_sizes=(1, 4))
