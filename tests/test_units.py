"""Sizes in bytes: every spelling that means something, and a usable error for every one that does not."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.budget.units import LARGEST, format_bytes, parse_bytes
from loaders.errors import Usage


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("2g", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("2Gi", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("512m", 512 * 10**6),
        ("512MiB", 512 * 2**20),
        ("4k", 4000),
        ("4KB", 4000),
        ("4kib", 4096),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("1.5GB", 1_500_000_000),
        (".5GiB", 2**29),
        ("2.GB", 2 * 10**9),
        ("1.1GiB", 1_181_116_006),
        ("2 GB", 2 * 10**9),
        (" 2GB\n", 2 * 10**9),
        ("1e9", 10**9),
        ("1E9", 10**9),
        ("1.5e3 MB", 1_500_000_000),
        ("25e-1GB", 2_500_000_000),
        ("123", 123),
        ("123B", 123),
        ("1.9", 1),
        ("9007199254740993", 2**53 + 1),
        ("1152921504606846976", LARGEST),
        (1, 1),
        (2**53 + 1, 2**53 + 1),
        (1e9, 10**9),
        (1.9, 1),
        (np.int64(2**53 + 1), 2**53 + 1),
    ],
)
def test_parse_accepts(text, size):
    found = parse_bytes(text)
    assert found == size
    assert type(found) is int


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GB", "B", "two", "2XB", "2GBB", "2iB", "2 G B", "2  GB", "2\tGB", "2,000", "1,5GB", "2_000"),
        *("0x10", "NaN", "inf", "-inf", "Infinity", "∞", "٢GB", "2\u212aB", "2GB\0", "1e", "1e9e9", "+2GB", "--1"),
        *("1.2.3GB", "0", "0GB", "0.0", "-0", "-1", "-2GB", "-1e9", "0.4", "1e-999", "-0.1"),
        *("1152921504606846977", "1e999", "1e9999999999", "9" * 5000, "1048577TiB", "1e7TB"),
        *(0, -1, LARGEST + 1, 10**5000, -(10**5000), 0.0, 0.9, -0.1, math.nan, math.inf, -math.inf, 1e300),
        *(True, False, None, [], b"2GB", 2j),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else f"int of {value.bit_length()} bits",
)
def test_parse_refuses_and_says_what_would_do(text):
    with pytest.raises(Usage) as caught:
        parse_bytes(text, field="--ram-budget")
    message = str(caught.value)
    assert message.startswith("--ram-budget: ")
    assert "2GB" in message.split("expected", 1)[1]
    assert "\n" not in message
    assert len(message) < 200
    assert caught.value.exit_code == 2


def test_refusal_names_the_default_field_and_what_was_found():
    with pytest.raises(Usage, match=r"^--budget: '12 parsecs' is not a size \(expected "):
        parse_bytes("12 parsecs")
    with pytest.raises(Usage, match=r"'-2GB' is less than one byte"):
        parse_bytes("-2GB")
    with pytest.raises(Usage, match=r"'1e30' is more than 2\^60 bytes"):
        parse_bytes("1e30")


@given(st.text(max_size=80))
def test_parse_gives_a_size_or_usage(text):
    try:
        size = parse_bytes(text)
    except Usage:
        return
    assert 1 <= size <= LARGEST


@given(st.integers(1, LARGEST))
def test_parse_is_exact_on_bytes(n):
    assert parse_bytes(str(n)) == parse_bytes(n) == parse_bytes(f"{n} B") == n


UNITS = {"k": 1, "M": 2, "G": 3, "T": 4}


@given(
    st.integers(1, 10**6),
    st.integers(0, 3),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["", "B", "i", "iB"]),
    st.sampled_from([str.lower, str.upper, str]),
)
def test_parse_agrees_with_integer_arithmetic(digits, decimals, unit, ending, case):
    number = f"{digits / 10**decimals:.{decimals}f}"
    base = 1024 if "i" in ending else 1000
    expected = digits * base ** UNITS[unit] // 10**decimals
    if 1 <= expected <= LARGEST:
        assert parse_bytes(case(f"{number}{unit}{ending}")) == expected
        assert parse_bytes(case(f"{number} {unit}{ending}")) == expected
    else:
        with pytest.raises(Usage):
            parse_bytes(case(f"{number}{unit}{ending}"))


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_490_000_000, "1.49 GB"),
        (1_494_999_999, "1.49 GB"),
        (1_495_000_000, "1.50 GB"),
        (512_000_000, "512 MB"),
        (-12_300_000, "-12.3 MB"),
        (-5, "-5 B"),
        (9_995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (2**31, "2.15 GB"),
        (2 * 10**12, "2.00 TB"),
        (2**60, "1.15 EB"),
        (10**21, "1000 EB"),
    ],
)
def test_format(n, text):
    assert format_bytes(n) == text


@given(st.integers(-(10**18), 10**18))
def test_format_has_three_digits_and_never_a_thousand(n):
    text = format_bytes(n)
    assert re.fullmatch(r"-?(\d{1,3} B|(\d\.\d\d|\d\d\.\d|\d\d\d) [kMGTPE]B)", text)
    assert (n < 0) == text.startswith("-")


@given(st.integers(1, 999 * 10**12))
def test_what_is_shown_reads_back_within_half_a_percent(n):
    assert abs(parse_bytes(format_bytes(n)) - n) * 200 <= n


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_format_keeps_the_order(a, b):
    small, large = sorted((a, b))
    assert parse_or_zero(format_bytes(small)) <= parse_or_zero(format_bytes(large))


def parse_or_zero(text):
    scale = {"B": 0, "kB": 1, "MB": 2, "GB": 3, "TB": 4, "PB": 5}
    number, unit = text.split(" ")
    return float(number) * 1000 ** scale[unit]
