"""Tokens per forward, the hardware-independent measure of parallel decoding."""

import datasets
import evaluate


DESCRIPTION = """TPF: new tokens over forward passes, the prefill counted as one. Autoregressive decoding has 1."""
INPUTS = """
Args:
    predictions: new tokens of each text (`output.jacobi_stats.per_sequence[i].new_tokens`).
    references: forward passes that each text took part in (`output.jacobi_stats.per_sequence[i].forwards`).

Returns:
    tokens_per_forward: the sum of the new tokens over the sum of the forward passes.

Example:
    >>> tokens_per_forward.compute(predictions=[12, 20], references=[4, 4])
    {'tokens_per_forward': 4.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class TokensPerForward(evaluate.Metric):
    def _info(self):
        counts = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": counts, "references": counts}),
        )

    def _compute(self, predictions, references):
        if min(references) < 1:
            raise ValueError("every text takes at least one forward: pass counts of 1 or more.")
        return {"tokens_per_forward": sum(predictions) / sum(references)}
