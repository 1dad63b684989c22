# SPDX-License-Identifier: Apache-2.0
"""The code against reedsolo: field, parity, every loss pattern, and what it refuses."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.erasure import Code, ErasureError, TooManyLosses
from refound.erasure.backends import Kernel
from refound.erasure.field import INVERSES, PRODUCTS, inverse, product
from refound.erasure.linear import apply_with

Stripes = Callable[[int, int, int], np.ndarray]


def test_all_products_are_reedsolos():
    reedsolo.init_tables(prim=0x11D)
    expected = [[reedsolo.gf_mul(a, b) for b in range(256)] for a in range(256)]
    assert np.array_equal(PRODUCTS, np.array(expected, dtype=np.uint8))
    assert all(PRODUCTS[a, INVERSES[a]] == 1 for a in range(1, 256))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 2), (8, 2), (10, 4), (16, 4), (200, 55)])
def test_parity_is_what_reedsolo_appends(k: int, m: int, stripes: Stripes):
    stripe = stripes(k, m, 8)
    assert np.array_equal(product(Code(k, m).parity_matrix, stripe[:k]), stripe[k:])


def test_one_parity_is_xor():
    assert all((Code(k, 1).parity_matrix == 1).all() for k in range(1, 255))


def test_one_data_symbol_with_two_parities_is_not_repetition():
    assert Code(1, 2).parity_matrix.tolist() == [[3], [2]]


def test_no_parity_protects_nothing():
    code = Code(3, 0)
    assert code.parity_matrix.shape == (0, 3)
    assert np.array_equal(code.rebuild_matrix([2, 0, 1], [0, 1, 2]), [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    with pytest.raises(TooManyLosses, match="tolerates 0 losses"):
        code.rebuild_matrix([0, 1], [2])


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("k", range(1, 11))
def test_every_loss_pattern(k: int, m: int, stripes: Stripes, kernel: Kernel):
    code, stripe = Code(k, m), stripes(k, m, 19)
    symbols = range(k + m)
    for losses in range(1, m + 1):
        for lost in combinations(symbols, losses):
            # The last k survivors, so that as much parity as possible takes part.
            have = [i for i in symbols if i not in lost][-k:]
            rebuilt = np.zeros((losses, 19), dtype=np.uint8)
            apply_with(kernel, code.rebuild_matrix(have, lost), [stripe[i] for i in have], list(rebuilt))
            assert np.array_equal(rebuilt, stripe[list(lost)]), (lost, have)


@settings(deadline=None)
@given(st.data())
def test_any_code_rebuilds_any_symbols_from_any_survivors(data: st.DataObject):
    k = data.draw(st.integers(1, 40))
    m = data.draw(st.integers(0, 12))
    code = Code(k, m)
    have = data.draw(st.permutations(range(k + m)))[:k]
    want = data.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=8))
    message = data.draw(st.binary(min_size=k, max_size=k))
    word = np.frombuffer(message, dtype=np.uint8)[:, None]
    word = np.concatenate([word, product(code.parity_matrix, word)])
    assert np.array_equal(product(code.rebuild_matrix(have, want), word[have]), word[want])


def test_a_survivor_costs_nothing_to_rebuild():
    assert np.array_equal(Code(3, 2).rebuild_matrix([4, 0, 2], [0, 4]), [[0, 1, 0], [1, 0, 0]])


def test_codes_compare_by_value_and_matrices_are_read_only():
    assert Code(4, 2) == Code(np.int64(4), 2) and hash(Code(4, 2)) == hash(Code(4, 2))
    with pytest.raises(ValueError, match="read-only"):
        Code(4, 2).parity_matrix[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        Code(4, 2).rebuild_matrix([0, 1, 2, 3], [4])[0, 0] = 1
    with pytest.raises(AttributeError):
        Code(4, 2).k = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("k", "m", "words"),
    [
        (0, 1, "at least one data symbol"),
        (-1, 1, "at least one data symbol"),
        (1, -1, "cannot be negative"),
        (200, 56, "at most 255 symbols"),
        (2.0, 1, "whole number"),
        ("2", 1, "whole number"),
    ],
)
def test_impossible_codes_are_refused(k, m, words):
    with pytest.raises(ErasureError, match=words):
        Code(k, m)


@pytest.mark.parametrize(
    ("have", "want", "words"),
    [
        ([0, 1, 1, 2], [3], "names a symbol twice"),
        ([0, 1, 2, 3, 4], [5], "choose exactly k = 4"),
        ([0, 1, 2, 6], [3], "names symbol 6"),
        ([0, 1, 2, -1], [3], "names symbol -1"),
        ([0, 1, 2, 4], [6], "want names symbol 6"),
        ([0, 1, 2, 4], [], "want is empty"),
        ([0, 1, 2, 4.0], [3], "whole numbers"),
        (3, [3], "whole numbers"),
    ],
)
def test_impossible_rebuilds_are_refused(have, want, words):
    with pytest.raises(ErasureError, match=words):
        Code(4, 2).rebuild_matrix(have, want)


def test_too_many_losses_say_so():
    with pytest.raises(TooManyLosses, match="3 of the 6 symbols survive, and 4 are needed"):
        Code(4, 2).rebuild_matrix([0, 1, 5], [2])


def test_a_singular_matrix_is_not_inverted():
    with pytest.raises(ZeroDivisionError, match="singular"):
        inverse(np.array([[1, 1], [1, 1]], dtype=np.uint8))
