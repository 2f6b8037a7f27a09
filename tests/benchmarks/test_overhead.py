"""A step runs few operations outside the model, whatever the batch."""

from __future__ import annotations

import pytest

from benchmarks.overhead import CALLS, operations_per_step


@pytest.mark.parametrize(("name", "most"), [("greedy", 25), ("sampled", 40), ("8 rows, sampled", 50)])
def test_operations_outside_the_model(name, most):
    rows, settings = CALLS[name]
    found, counts = operations_per_step(rows, **settings)
    assert 5 < found <= most, counts
