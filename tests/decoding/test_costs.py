"""The cost of a forward as a curve over its positions."""

import json

import pytest

from hf_jacobi import JacobiConfig
from hf_jacobi.decoding.costs import CostCurve, default_curve


AMD = [[1, 77], [2, 130], [4, 136], [8, 163], [16, 216]]  # milliseconds


def test_between_two_points_it_is_a_line_and_goes_on_beyond_the_last():
    curve = CostCurve.of(AMD)
    assert [curve.cost(positions) for positions, _ in AMD] == pytest.approx([ms / 77 for _, ms in AMD])
    assert curve.cost(3) == pytest.approx(133 / 77) and curve.cost(12) == pytest.approx((163 + 216) / 2 / 77)
    assert curve.cost(32) == pytest.approx((216 + 2 * (216 - 163)) / 77)


def test_a_number_is_what_each_position_adds():
    assert [CostCurve.of(0.05).cost(positions) for positions in (1, 2, 21)] == pytest.approx([1, 1.05, 2])
    assert CostCurve.of(0).cost(1000) == 1
    assert CostCurve.of([[1, 5.0]]).cost(9) == 1, "nothing is known of more positions"


def test_it_never_falls():
    curve = CostCurve.of([[1, 10], [2, 13], [4, 12], [8, 9], [16, 14]])
    assert [curve.cost(positions) for positions in (1, 2, 4, 8, 16)] == pytest.approx([1, 1.3, 1.3, 1.3, 1.4])
    assert CostCurve.of([[1, 10], [16, 8]]).cost(16) == 1


def test_of_several_batch_sizes_the_nearest_counts():
    by_size = {1: [[1, 1], [2, 1.1]], 4: [[1, 1], [2, 1.4]], 16: [[1, 1], [2, 1.9]]}
    found = [CostCurve.of(by_size, rows).cost(2) for rows in (1, 3, 4, 6, 12, 64)]
    assert found == pytest.approx([1.1, 1.4, 1.4, 1.4, 1.9, 1.9])
    assert CostCurve.of(json.loads(json.dumps(by_size)), 16).cost(2) == pytest.approx(1.9), "keys are strings in JSON"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_there_is_a_default_for_every_device(device):
    curve = default_curve(device)
    assert curve.cost(1) == 1 < curve.cost(2) < curve.cost(64)
    assert default_curve(device, 64).cost(16) > curve.cost(16), "more rows keep it busy sooner"


@pytest.mark.parametrize("cost", [0.05, 0, AMD, {"1": AMD, "8": AMD}, None])
def test_settings_with_costs_survive_json(cost):
    config = JacobiConfig(position_cost=cost)
    assert JacobiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config and config.adapts


@pytest.mark.parametrize(
    "cost",
    [
        -0.1,
        float("nan"),
        float("inf"),
        True,
        "cheap",
        [],
        {},
        [1, 2],
        [[2, 1.0], [4, 2.0]],
        [[1, 1.0], [1, 2.0]],
        [[1, 1.0], [4, 2.0], [2, 1.5]],
        [[1, 0.0], [2, 1.0]],
        [[1, 1.0], [2, float("nan")]],
        [[1, 1.0], [2.5, 2.0]],
        [[1, 1.0], ["2", 2.0]],
        [[1, 1.0, 1.0]],
        ["1", "2"],
        {"1": 0.05},
        {"many": AMD},
        {0: AMD},
        {None: AMD},
        {1.5: AMD},
    ],
)
def test_what_is_no_cost_is_refused_in_one_sentence(cost):
    with pytest.raises(ValueError, match="`position_cost` must be a number of at least 0, a list of") as error:
        JacobiConfig(position_cost=cost)
    assert repr(cost) in str(error.value)


def test_numbers_of_positions_that_cost_nearly_the_same_form_a_plateau():
    curve = CostCurve.of([[1, 59], [2, 68], [4, 106], [8, 129], [16, 132]]).levelled()
    assert [curve.cost(positions) for positions in (9, 10, 15, 16)] == pytest.approx(4 * [132 / 59])
    assert curve.cost(8) == pytest.approx(129 / 59) and curve.cost(3) == pytest.approx(87 / 59)
    assert curve.plateaus == [(9, 16)]
    rising = CostCurve.of([[1, 10], [2, 10], [4, 12], [8, 15]])
    assert rising.levelled() == rising and not rising.plateaus, "one position is never made two"
    fallen = CostCurve.of([[1, 10], [2, 13], [8, 12], [16, 19]]).levelled()
    assert fallen.plateaus == [(2, 8)], "two positions take no longer as eight"
