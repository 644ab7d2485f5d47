"""Figures for people."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efftrain.units import GIB, KIB, MIB, format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (KIB * KIB - 1, "1.0 MiB"),
        (MIB, "1.0 MiB"),
        (5 * GIB, "5.0 GiB"),
        (5000 * GIB, "5000.0 GiB"),
        (-1536, "-1.5 KiB"),
        (1023.9, "1.0 KiB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (54_314, "54.3 k"), (999_960, "1.0 M"), (999.7, "1.0 k"), (2.5e9, "2.5 G")],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ms"),
        (0.0124, "12 ms"),
        (0.9996, "1.0 s"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (75.2, "1 min 15 s"),
        (119.6, "2 min 0 s"),
        (3599, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (3700, "1 h 2 min"),
        (86_369, "23 h 59 min"),
        (86_399, "1 d 0 h"),
        (604_807, "7 d 0 h"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


@given(st.floats(0, 1e15))
def test_a_larger_unit_is_used_before_four_digits_and_a_decimal(value: float) -> None:
    """1024.0 KiB and 1000.0 k are never written: rounding moves on to the next unit."""
    assert format_bytes(value).split()[1] == "GiB" or float(format_bytes(value).split()[0]) < 1024
    number, _, unit = format_count(value).partition(" ")
    assert unit == "G" or float(number) < 1000
