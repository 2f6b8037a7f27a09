"""Share of the text that stayed the same."""

import datasets
import evaluate


DESCRIPTION = """Share of tokens, up to the first that differs, and share of whole texts that are those of a reference:
of the same model decoded one token at a time, or as it was before training."""
INPUTS = """
Args:
    predictions: token ids of each text.
    references: those of the text it is compared with.

Returns:
    tokens: tokens before the first that differs, over the tokens of the longer text; 0 to 1.
    texts: share of texts that are the same, 0 to 1.

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
        total = sum(max(len(text), len(other)) for text, other in zip(predictions, references))
        texts = sum(list(text) == list(other) for text, other in zip(predictions, references))
        return {"tokens": same / total if total else 1.0, "texts": texts / len(predictions)}
