"""How numbers are said: the digits, what is not known, what is 0."""

import math
import re

import pytest

from pyproelbo._results.numbers import parts, share, with_error


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (-23.9239, 0.01951, "-23.924 ± 0.020"),
        (0.0297, 0.0045, "0.0297 ± 0.0045"),
        (0.5, 0.0996, "0.50 ± 0.10"),  # the error itself is rounded first
        (-103.0, 0.25, "-103.00 ± 0.25"),
        (12345.678, 87.61, "12345.68 ± 87.61"),  # no fewer than two decimals
        (0.1, 0.00000049, "0.100000 ± 5e-07"),  # no more than six
        (0.1, 0.0000021, "0.100000 ± 0.000002"),
        (3.79493, 0.0, "3.7949"),
        (3.79493, None, "3.7949"),
        (-1e-9, 0.0, "0.0000"),  # without the sign
        (-1e-9, 0.1, "0.00 ± 0.10"),
        (1.0, math.nan, "1.0000 ± unknown"),
        (1.0, math.inf, "1.0000 ± inf"),
        (math.nan, 0.1, "unknown"),
        (math.nan, None, "unknown"),
        (-math.inf, None, "-inf"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(value, stderr, text):
    assert with_error(value, stderr) == text


@pytest.mark.parametrize("first", [1.0, 4.9999, 5.0001, 9.51, 9.96])
def test_an_error_that_is_not_0_is_never_said_to_be(first):
    for exponent in (*range(-12, 13), -300, 300):
        error = first * 10.0**exponent
        _, text = parts(1.0, error)
        assert float(text) == pytest.approx(error, rel=0.5)
        assert re.search("[1-9]", text)


def test_decimals_of_numbers_without_an_error():
    assert with_error(1.23456, None, decimals=1) == "1.2"
    assert with_error(1.23456, 0.01234, decimals=1) == "1.235 ± 0.012"


def test_shares():
    assert [share(x) for x in (0.0, 0.7167, 1.0, math.nan)] == [
        "0.0%",
        "71.7%",
        "100.0%",
        "unknown",
    ]
