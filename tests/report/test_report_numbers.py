"""Numbers as pages write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpp_nemo.report.numbers import change, count, share, size, work


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(0), "0"),
        (count(52), "52"),
        (count(999), "999"),
        (count(999.7), "1.00 K"),
        (count(3584), "3.58 K"),
        (count(262_144), "262 K"),
        (count(999_999), "1.00 M"),
        (count(72_271_360), "72.3 M"),
        (count(4_690_000_000), "4.69 B"),
        (size(0), "0 B"),
        (size(1536), "1.50 KiB"),
        (size(1023.9 * 1024), "1.00 MiB"),
        (size(139.8 * 2**30), "140 GiB"),
        (work(13.72e9), "13.7 GFLOP"),
        (work(0), "0 FLOP"),
        (share(1, 3), "33.3%"),
        (share(1, 0), "-"),
        (change(2, 2), "same"),
        (change(0, 3), "new"),
        (change(4, 5), "+25.0%"),
        (change(4, 3), "\N{MINUS SIGN}25.0%"),
        (change(1, 20), "x 20"),
    ],
)
def test_a_number_keeps_three_digits(text, expected):
    assert text == expected


@given(st.floats(min_value=1, max_value=1e16))
def test_what_is_written_is_within_half_a_percent(number):
    digits, _, unit = count(number).partition(" ")
    scale = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
    assert float(digits) * scale == pytest.approx(number, rel=0.006 if number >= 100 else 0.5)
