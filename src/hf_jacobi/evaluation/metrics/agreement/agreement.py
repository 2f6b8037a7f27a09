"""The share of a reference text that another text repeats from its start."""

import datasets
import evaluate


DESCRIPTION = """The agreement with reference texts: those of the same model decoded by AR, or of the model before
training. It is the share of the reference's tokens before the first difference, as in the training log."""
INPUTS = """
Args:
    predictions: token ids of each text.
    references: token ids of each reference text.

Returns:
    tokens: tokens before the first difference over the tokens of the references, 0 to 1.
    texts: the share of texts that equal their references, 0 to 1.

Example:
    >>> agreement.compute(predictions=[[5, 6, 7], [8]], references=[[5, 6, 9], [8]])
    {'tokens': 0.75, 'texts': 0.5}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Agreement(evaluate.Metric):
    def _info(self):
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references):
        same = 0
        for text, other in zip(predictions, references):
            differs = (place for place, pair in enumerate(zip(text, other)) if pair[0] != pair[1])
            same += next(differs, min(len(text), len(other)))
        total = sum(map(len, references))
        texts = sum(list(text) == list(other) for text, other in zip(predictions, references))
        return {"tokens": same / total if total else 1.0, "texts": texts / len(predictions)}
