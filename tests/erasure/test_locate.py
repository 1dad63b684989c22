# SPDX-License-Identifier: Apache-2.0
"""Naming the corrupt symbol where checksums cannot: found, told apart from a loss, or honestly not found."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.erasure import Code, ErasureError, TooManyLosses, Undecidable, apply, locate, locate_corrupt

Stripes = Callable[[int, int, int], np.ndarray]


def encoded(code: Code, size: int, seed: int = 5) -> dict[int, np.ndarray]:
    symbols = np.random.default_rng(seed).integers(0, 256, (code.k + code.m, size), dtype=np.uint8)
    apply(code.parity_matrix, list(symbols[: code.k]), list(symbols[code.k :]))
    return dict(enumerate(symbols))


@settings(deadline=None)
@given(st.data())
def test_as_many_as_can_be_told_are_told(data: st.DataObject):
    code = Code(data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6)))
    size = data.draw(st.integers(1, 400))
    symbols = encoded(code, size)
    for lost in data.draw(st.lists(st.sampled_from(range(code.k + code.m)), max_size=code.m, unique=True)):
        del symbols[lost]
    limit = (len(symbols) - code.k) // 2
    corrupt = data.draw(st.lists(st.sampled_from(sorted(symbols)), max_size=limit, unique=True))
    for index in corrupt:
        for column in data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50)):
            symbols[index][column] ^= data.draw(st.integers(1, 255))
    assert locate_corrupt(code, symbols) == tuple(sorted(corrupt))


def test_a_symbol_that_lies_only_beyond_the_first_sample_is_found():
    code, size = Code(4, 4), locate.BLOCK_BYTES + 1000
    symbols = encoded(code, size)
    symbols[2][:200] ^= 1
    symbols[7][-1] ^= 0x80
    assert locate_corrupt(code, symbols) == (2, 7)


def test_a_stripe_of_reedsolo_fits_together(stripes: Stripes):
    assert locate_corrupt(Code(5, 3), dict(enumerate(stripes(5, 3, 40)))) == ()


def test_what_cannot_be_told_is_refused():
    symbols = encoded(Code(4, 2), 100)
    symbols[0][3] ^= 1
    symbols[1][50] ^= 1
    with pytest.raises(Undecidable, match="first at byte 3, and no 1 of them being wrong explains it"):
        locate_corrupt(Code(4, 2), symbols)
    del symbols[1]
    with pytest.raises(Undecidable, match="no 0 of them"):
        locate_corrupt(Code(4, 2), symbols)
    one = encoded(Code(4, 1), 100)
    one[4][99] ^= 1
    with pytest.raises(Undecidable, match="first at byte 99"):
        locate_corrupt(Code(4, 1), one)


def test_two_lies_in_one_column_are_not_pinned_on_a_third():
    for flip in range(1, 248):
        symbols = encoded(Code(4, 2), 8)
        symbols[0] ^= 1
        symbols[1] ^= np.arange(flip, flip + 8, dtype=np.uint8)
        with pytest.raises(Undecidable):
            locate_corrupt(Code(4, 2), symbols)


@pytest.mark.parametrize(
    ("symbols", "error", "words"),
    [
        ({0: bytes(4), 1: bytes(4)}, TooManyLosses, "2 symbols are at hand, and 3 are needed"),
        ({0: bytes(4), 1: bytes(4), 5: bytes(4)}, ErasureError, "symbol 5 is none"),
        ({0: bytes(4), 1: bytes(4), 2: bytes(3)}, ErasureError, r"\[3, 4\] bytes"),
        ({0: b"", 1: b"", 2: b""}, ErasureError, "one length above zero"),
        ({0: bytes(4), 1: bytes(4), 2: "text"}, ErasureError, "symbol 2 is a str"),
    ],
)
def test_symbols_that_cannot_be_used_are_refused(symbols, error, words):
    with pytest.raises(error, match=words):
        locate_corrupt(Code(3, 2), symbols)
