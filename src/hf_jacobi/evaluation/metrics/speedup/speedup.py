"""The speed-up of one decoding method over another."""

import statistics

import datasets
import evaluate


DESCRIPTION = """The time of a reference method, such as AR, over the time of another method, measured in the same run
on the same machine. Above 1 the other method is faster."""
INPUTS = """
Args:
    predictions: seconds for each text.
    references: seconds for the same text with the reference method.

Returns:
    speedup: the sum of the references over the sum of the predictions.
    median, slowest, fastest: the median, lowest and highest speed-up of single texts.

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
