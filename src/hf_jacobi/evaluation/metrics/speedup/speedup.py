"""How much faster text was made."""

import statistics

import datasets
import evaluate


DESCRIPTION = """Ratio of the time of one way of decoding to that of another, in the same run on the same machine."""
INPUTS = """
Args:
    predictions: seconds that each text took.
    references: seconds that the same text took by what it is compared with, such as one token at a time.

Returns:
    speedup: ratio of the sums; above 1 is faster.
    median, slowest, fastest: of the ratios of single texts.

Example:
    >>> speedup.compute(predictions=[1.0, 2.0], references=[2.0, 10.0])
    {'speedup': 4.0, 'median': 3.5, 'slowest': 2.0, 'fastest': 5.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Speedup(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions, references):
        if min(predictions) <= 0:
            raise ValueError("seconds must be above 0.")
        ratios = [other / mine for mine, other in zip(predictions, references)]
        total = sum(references) / sum(predictions)
        spread = {"median": statistics.median(ratios), "slowest": min(ratios), "fastest": max(ratios)}
        return {"speedup": total, **spread}
