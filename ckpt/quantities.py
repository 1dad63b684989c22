# SPDX-License-Identifier: Apache-2.0
"""Quantities as people write them: '70B', '3.2TB', '100Gbit/s', '1h30m', '25%'.

A plain number is in the unit that the reader was told; a suffix says otherwise. All raise ValueError, saying how such
a quantity is written.
"""

import re

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {f"{prefix}b": 1000.0**power for power, prefix in enumerate(("", "k", "m", "g", "t", "p"))}
_BYTES |= {f"{prefix}ib": 1024.0**power for power, prefix in enumerate(("", "k", "m", "g", "t", "p")) if prefix}
_BITS = {f"{prefix}bit": 1000.0**power / 8 for power, prefix in enumerate(("", "k", "m", "g", "t"))}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([A-Za-z/%]*)", re.IGNORECASE)
_PART = re.compile(r"(\d+\.?\d*)\s*([A-Za-z]+)\s*")
_COMPOUND = re.compile(rf"(?:{_PART.pattern}){{2,}}")


def parse_count(text: str) -> float:
    """A number of things: '2048', '70e9', '70B'."""
    number, suffix = _split(text, "a count such as 2048, 70e9 or 70B")
    if suffix.lower() not in _COUNTS:
        raise ValueError(f"{text!r} is not a count such as 2048, 70e9 or 70B")
    return number * _COUNTS[suffix.lower()]


def parse_whole(text: str) -> int:
    """A whole number of things."""
    number = parse_count(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def parse_bytes(text: str, unit_bytes: float = 1.0) -> float:
    """Bytes: '3.2TB' (powers of 1000), '64GiB' (of 1024), or a plain number of `unit_bytes`."""
    number, suffix = _split(text, "a size such as 980GB, 3.2TB or 64GiB")
    if suffix and suffix.lower() not in _BYTES:
        raise ValueError(f"{text!r} is not a size such as 980GB, 3.2TB or 64GiB")
    return number * (_BYTES[suffix.lower()] if suffix else unit_bytes)


def parse_rate(text: str, unit_bytes_s: float = 1.0) -> float:
    """Bytes a second: '12.5GB/s', '100Gbit/s', '100Gbps' (bits), or a plain number of `unit_bytes_s`."""
    number, suffix = _split(text, "a rate such as 12.5GB/s or 100Gbit/s")
    if not suffix:
        return number * unit_bytes_s
    lower = suffix.lower()
    unit = lower.removesuffix("ps") + "it" if lower.endswith("bps") else lower.removesuffix("/s")
    if unit == lower or unit not in _BYTES | _BITS:
        raise ValueError(f"{text!r} is not a rate such as 12.5GB/s or 100Gbit/s")
    return number * (_BYTES | _BITS)[unit]


def parse_duration(text: str, unit_s: float = 1.0) -> float:
    """Seconds: '250ms', '90min', '12h', '54d', '1h30m', 'inf', or a plain number of `unit_s`."""
    how = "a length of time such as 250ms, 90min, 12h, 1h30m or 54d"
    if _COMPOUND.fullmatch(text.strip()):
        return sum(parse_duration("".join(part)) for part in _PART.findall(text))
    number, suffix = _split(text, how)
    if suffix and suffix.lower() not in _SECONDS:
        raise ValueError(f"{text!r} is not {how}")
    return number * (_SECONDS[suffix.lower()] if suffix else unit_s)


def parse_share(text: str) -> float:
    """A part of one: '0.25' or '25%'."""
    number, suffix = _split(text, "a share such as 0.25 or 25%")
    if suffix not in ("", "%"):
        raise ValueError(f"{text!r} is not a share such as 0.25 or 25%")
    return number / 100 if suffix else number


def _split(text: str, how: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not {how}")
    return float(match[1]), match[2]
