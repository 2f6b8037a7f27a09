"""One check of ranges for all settings, with one form of message."""

from __future__ import annotations

import pytest

from hf_jacobi.decoding.errors import UsageError, check_range


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"least": 1, "whole": True}),
        (1.0, {"least": 1}),
        (0, {"least": 0, "most": 1}),
        (1, {"above": 0, "most": 1}),
        (float("inf"), {"least": 0}),
        (-5, {"whole": True}),
        (None, {"least": 1, "optional": True}),
    ],
)
def test_values_of_the_range_pass(value, bounds):
    check_range("`x`", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"least": 1, "whole": True}, "`x` must be at least 1, got 0."),
        (0.0, {"above": 0}, "`x` must be above 0, got 0.0."),
        (2, {"least": 0, "most": 1}, "`x` must be from 0 to 1, got 2."),
        (2, {"above": 0, "most": 1}, "`x` must be above 0 and at most 1, got 2."),
        (3, {"most": 2}, "`x` must be at most 2, got 3."),
        (float("nan"), {"least": 0, "most": 1}, "`x` must be from 0 to 1, got nan."),
        (2.5, {"least": 1, "whole": True}, "`x` must be a whole number of at least 1, got 2.5."),
        (True, {"least": 1, "whole": True}, "`x` must be a whole number of at least 1, got True."),
        ("a", {"least": 0, "most": 1}, "`x` must be a number from 0 to 1, got 'a'."),
        ("a", {"above": 0}, "`x` must be a number above 0, got 'a'."),
        ("a", {"whole": True, "optional": True}, "`x` must be a whole number, or None, got 'a'."),
        (None, {"least": 1}, "`x` must be a number of at least 1, got None."),
    ],
)
def test_other_values_are_refused_in_one_sentence(value, bounds, message):
    with pytest.raises(UsageError) as error:
        check_range("`x`", value, **bounds)
    assert str(error.value) == message
