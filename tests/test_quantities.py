"""Sizes, rates and times: text to numbers and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metagpt_fast.errors import RecipeError
from metagpt_fast.quantities import (
    format_count,
    format_nbytes,
    format_rate,
    format_seconds,
    parse_nbytes,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1GiB", 2**30),
        ("5GB", 5 * 10**9),
        ("512M", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5 gb", 1_500_000_000),
        ("1.5GiB", 3 * 2**29),
        (" 100 ", 100),
        ("7b", 7),
        ("2TiB", 2 * 2**40),
        ("4kB", 4000),
        ("4K", 4096),
        (12345, 12345),
    ],
)
def test_sizes(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1GB",
        "0",
        "0.2",
        "1XB",
        "1 GB GB",
        "1e9",
        "nan",
        "١GB",
        "9" * 19,
        "9" * 18 + "TB",
        0,
        -3,
        2**63,
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match=r"memory: this is not a size: got .*, expected a number of bytes"):
        parse_nbytes(text, where="memory")


@given(st.integers(min_value=1, max_value=2**63 - 1))
def test_a_number_of_bytes_is_itself(nbytes):
    assert parse_nbytes(nbytes) == nbytes
    if nbytes < 10**18:
        assert parse_nbytes(str(nbytes)) == nbytes


@given(st.integers(min_value=1, max_value=10**17))
def test_what_is_printed_parses_to_within_its_digits(nbytes):
    text = format_nbytes(nbytes)
    if not text.endswith("PB"):
        assert parse_nbytes(text) == pytest.approx(nbytes, rel=0.0051)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_200_000_000, "2.20 GB"),
    ],
)
def test_printed_sizes_have_three_digits(nbytes, text):
    assert format_nbytes(nbytes) == text


def test_counts_and_rates():
    assert format_count(1_100_048_384) == "1.10 B"
    assert format_count(512) == "512"
    assert format_rate(12_700_000_000, 1.0) == "12.7 GB/s"
    assert format_rate(5, 0.0) == "–"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.8123, "812 ms"),
        (0.9996, "1.00 s"),
        (1.744, "1.74 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3785, "1 h 03 min"),
    ],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text
