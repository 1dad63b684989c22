# SPDX-License-Identifier: Apache-2.0
"""What people write for counts, sizes, rates, times and shares, and what is refused."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.quantities import parse_bytes, parse_count, parse_duration, parse_rate, parse_share, parse_whole


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "70e9", 70e9),
        (parse_count, "70B", 70e9),
        (parse_count, "1.5T", 1.5e12),
        (parse_count, "135m", 135e6),
        (parse_whole, "2_048", 2048),
        (parse_whole, "2k", 2000),
        (parse_bytes, "3.2TB", 3.2e12),
        (parse_bytes, "64 GiB", 64 * 2**30),
        (parse_bytes, "980", 980),
        (parse_rate, "100Gbit/s", 12.5e9),
        (parse_rate, "100Gbps", 12.5e9),
        (parse_rate, "12.5 GB/s", 12.5e9),
        (parse_rate, "1GiB/s", 2**30),
        (parse_duration, "250ms", 0.25),
        (parse_duration, "12h", 43200),
        (parse_duration, "54 d", 54 * 86400),
        (parse_duration, "1h30m", 5400),
        (parse_duration, "1 h 30 min", 5400),
        (parse_duration, "2d 12h", 60 * 3600),
        (parse_duration, ".5s", 0.5),
        (parse_duration, "inf", math.inf),
        (parse_share, "25%", 0.25),
        (parse_share, "0.25", 0.25),
    ],
)
def test_read(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


def test_a_plain_number_is_in_the_unit_asked_for() -> None:
    assert parse_bytes("64", 1e9) == 64e9 and parse_bytes("64GiB", 1e9) == 64 * 2**30
    assert parse_rate("12.5", 1e9) == 12.5e9 and parse_rate("100Mbit/s", 1e9) == 12.5e6
    assert parse_duration("3", 3600) == 10800 and parse_duration("3min", 3600) == 180


@pytest.mark.parametrize(
    ("parse", "text", "told"),
    [
        (parse_count, "seventy", "70B"),
        (parse_count, "70GB", "70B"),
        (parse_whole, "2.5", "whole"),
        (parse_whole, "inf", "whole"),
        (parse_bytes, "3.2TBs", "3.2TB"),
        (parse_bytes, "12h", "3.2TB"),
        (parse_rate, "12.5GB", "GB/s"),
        (parse_rate, "3min/s", "GB/s"),
        (parse_duration, "12 parsecs", "12h"),
        (parse_duration, "1h30x", "12h"),
        (parse_duration, "1h30", "12h"),
        (parse_duration, "h", "12h"),
        (parse_duration, "nan", "12h"),
        (parse_duration, "", "12h"),
        (parse_share, "25 %%", "25%"),
    ],
)
def test_refused(parse: Callable[[str], float], text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    for parse in (parse_count, parse_whole, parse_bytes, parse_rate, parse_duration, parse_share):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert not math.isnan(value)
