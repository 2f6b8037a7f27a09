"""`bench` compares decoding methods, and `table` prints the result."""

import pytest
from models import VOCABULARY, tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi.evaluation.bench import DEFAULT_METHODS, bench, methods_of, table
from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Method
from hf_jacobi.evaluation.plots import bench_bars


METHODS = (AR, PROMPT_LOOKUP, Method("Jacobi", "jacobi", {"block_size": 4}))
PROMPTS = [[3 + (7 * row + column) % (VOCABULARY - 3) for column in range(4 + row)] for row in range(5)]


@pytest.fixture(scope="module")
def report():
    model = hf_jacobi.enable(tiny_model())
    return bench(model, tiny_tokenizer(), PROMPTS, METHODS, batch_sizes=(1, 2), max_new_tokens=12, repeats=2)


def test_every_method_is_measured_at_every_batch_size(report):
    rows = [(row["batch_size"], row["decoding"], len(row["runs"])) for row in report["results"]]
    assert rows == [(1, "AR", 10), (1, "prompt lookup", 10), (1, "Jacobi", 10), (2, "AR", 4), (2, "Jacobi", 4)]
    assert all(row["identical"] == 1 for row in report["results"])
    assert report["setup"]["dtype"] == "float32" and report["setup"]["prompts"] == 5


def test_a_speedup_for_a_different_text_is_marked(report):
    assert "*" not in table(report)
    model, other = hf_jacobi.enable(tiny_model()), hf_jacobi.enable(tiny_model(seed=1))
    differing = bench(model, tiny_tokenizer(), PROMPTS[:1], METHODS, max_new_tokens=12, base=other)
    lines = table(differing).splitlines()
    assert "x*" in lines[3] and lines[-1].startswith("* Some of the text")
    assert "*" not in lines[1] + lines[2]


def test_the_table_fits_80_columns_and_names_each_method():
    figures = {
        "tokens_per_forward": 12.34,
        "tokens_per_second": 12345.6,
        "speedup": 12.34,
        "slowest": 10.12,
        "fastest": 13.45,
        "identical": 0.5,
        "first_token_seconds": 1.234,
        "peak_bytes": 9.9e9,
    }
    names = [*(method.name for method in DEFAULT_METHODS), "Jacobi, block_size=64, window=block, max_blocks=2"]
    results = [{"batch_size": size, "decoding": name, **figures} for size in (1, 16) for name in names]
    results.append({"batch_size": 16, "decoding": "last", **figures, "peak_bytes": 7.5e10})
    lines = table({"results": results}).splitlines()
    assert max(map(len, lines)) <= 80
    row = "12.34 12345.6 12.34x* 10.12-13.45x 1234 ms 9900 MB 50%"
    assert [" ".join(line.split()) for line in lines].count(f"AR {row}") == 2, "once for each batch size"
    assert f"prompt lookup {row}" in " ".join(lines[2].split())
    at = next(number for number, line in enumerate(lines) if line.startswith("Jacobi, block_size"))
    written = f"{lines[at][:22]} {lines[at + 1]} {lines[at + 2]}"
    assert " ".join(written.split()) == names[-1], "wrapped over several lines"
    assert "75.0 GB" in next(line for line in lines if line.startswith("last"))


def test_the_table_says_from_which_batch_size_on_jacobi_decoding_does_not_pay():
    same = dict.fromkeys(("tokens_per_forward", "tokens_per_second", "slowest", "fastest", "first_token_seconds"), 1.0)
    same |= {"identical": 1, "peak_bytes": None}
    paces = {1: (1.0, 1.4, 1.9), 4: (1.0, 1.1, 1.2), 16: (1.0, 0.99, 0.8)}
    results = [
        {"batch_size": size, "decoding": name, **same, "speedup": pace}
        for size, paces_of_size in paces.items()
        for name, pace in zip(("AR", "Jacobi, default", "Jacobi, n=16"), paces_of_size)
    ]
    text = table({"results": results})
    assert "   4     1.20x  Jacobi, n=16\n  16     0.99x  Jacobi, default\nIt stops paying at batches of 16.\n" in text
    assert "It pays at every batch size." in table({"results": results[:6]})
    assert "pay" not in table({"results": results[:3]}), "one batch size shows no limit"


def test_the_plot_has_a_bar_for_each_figure(report):
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
