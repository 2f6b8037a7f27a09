"""The metrics, loaded without a network, as users of `evaluate` load them."""

import doctest

import evaluate
import pytest

from hf_jacobi.evaluation.metrics import NAMES, path_of
from hf_jacobi.training.figures import Tally


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


def test_agreement_is_the_share_of_the_reference_as_in_the_training_log(tmp_path):
    metric = evaluate.load(path_of("agreement"), cache_dir=str(tmp_path))
    for text, other, share in (([1, 2], [1, 2, 3, 4], 0.5), ([1, 2, 3, 4], [1, 2], 1.0), ([], [], 1.0)):
        tally = Tally()
        tally.add([], 1, text, other)
        assert metric.compute(predictions=[text], references=[other]) == {
            "tokens": share,
            "texts": float(text == other),
        }
        assert tally.figures()["agreement"] == share or not other


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="there is no metric 'bleu'"):
        path_of("bleu")
