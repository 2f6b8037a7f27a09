"""The metrics, loaded as users of `evaluate` load them, without a network."""

import doctest

import evaluate
import pytest

from hf_jacobi.evaluation.metrics import NAMES, path_of


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_gives_what_its_example_says(name, tmp_path):
    metric = evaluate.load(path_of(name), cache_dir=str(tmp_path))
    (example,) = doctest.DocTestParser().get_examples(metric.inputs_description)
    assert eval(example.source, {name: metric}) == eval(example.want)


def test_a_text_that_ends_early_agrees_up_to_there(tmp_path):
    agreement = evaluate.load(path_of("agreement"), cache_dir=str(tmp_path))
    assert agreement.compute(predictions=[[1, 2]], references=[[1, 2, 3, 4]]) == {"tokens": 0.5, "texts": 0.0}


def test_a_metric_that_is_not_there():
    with pytest.raises(ValueError, match="there is no metric 'bleu'"):
        path_of("bleu")
