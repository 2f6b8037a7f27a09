"""Pictures are drawn of what the library returns, and show its numbers."""

import pytest
from packing_example import PACKED


matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


from hf_jacobi.evaluation import plots  # noqa: E402
from hf_jacobi.trajectories import packing_statistics  # noqa: E402


def test_noise_levels():
    axes = plots.noise_levels(packing_statistics([PACKED]))
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [0.667, 0, 0, 0, 0, 0.333, 0, 0, 0, 0, 0]
    assert "3 noisy blocks" in axes.get_title()


def test_a_packed_row_shows_every_entry():
    axes = plots.packed_row(PACKED)
    written = [text.get_text() for text in axes.texts]
    for column, values in PACKED.items():
        assert column in written
        for value in values:
            assert ("·" if value == -100 else str(value)) in written
    assert len(axes.patches) == 7 * 12
