# SPDX-License-Identifier: Apache-2.0
"""The code: systematic Reed-Solomon over GF(2^8), exactly the one that `reedsolo` defines."""

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import reedsolo

from .errors import ErasureError, TooManyLosses
from .field import POLYNOMIAL, Matrix, inverse, product

MAX_SYMBOLS = 255

# reedsolo keeps its tables in module globals, which every RSCodec call sets again.
_reedsolo_lock = threading.Lock()


@dataclass(frozen=True)
class Code:
    """k data and m parity symbols per stripe; any k of the k + m rebuild the rest.

    Symbol indices: 0..k-1 are data, k..k+m-1 parity. A stripe [d0, .., dk-1, p0, .., pm-1] is a codeword of
    `reedsolo.RSCodec(m, nsize=k+m, fcr=0, prim=0x11d)`, so whatever this code wrote, reedsolo can read.

    (k, 1) is plain XOR, and the XOR of all symbols of any stripe with m >= 1 is zero (1 is a root of the
    generator polynomial). (1, 1) is a copy; (1, m) with m >= 2 is *not* repetition: the parities are fixed
    non-zero multiples of the one data symbol, such as 3d and 2d at m = 2. m = 0 protects nothing.

    Raises `ErasureError` (a `ValueError`) unless k >= 1, m >= 0 and k + m <= 255.
    """

    k: int
    m: int

    def __post_init__(self) -> None:
        for name in ("k", "m"):
            value = getattr(self, name)
            try:
                number = operator.index(value)
            except TypeError as error:
                raise ErasureError(f"{name} must be a whole number, not {value!r}") from error
            object.__setattr__(self, name, number)
        if self.k < 1:
            raise ErasureError(f"k = {self.k}: a stripe needs at least one data symbol")
        if self.m < 0:
            raise ErasureError(f"m = {self.m}: the number of parity symbols cannot be negative")
        if self.k + self.m > MAX_SYMBOLS:
            raise ErasureError(
                f"k + m = {self.k + self.m}: Reed-Solomon over bytes has at most {MAX_SYMBOLS} symbols per"
                " stripe; use smaller sharding groups"
            )

    @property
    def parity_matrix(self) -> Matrix:
        """Coefficients of the parities, uint8, shape (m, k), read-only: parities = parity_matrix x data."""
        return _parity_matrix(self.k, self.m)

    def rebuild_matrix(self, have: Sequence[int], want: Sequence[int]) -> Matrix:
        """Coefficients that compute the symbols `want` from the surviving symbols `have`.

        `have` holds exactly k distinct indices, in the order in which the inputs will be given to `apply`.
        `want` holds any indices, data or parity, lost or not: decoding, partial rebuild and parity rebuild
        are one operation. Returns uint8, shape (len(want), k), read-only and cached.

        Raises `TooManyLosses` for fewer than k survivors, `ErasureError` for more, for a duplicate survivor,
        for an index that is no whole number or is out of range, and for an empty `want`.
        """
        survivors = self._indices(have, "have")
        wanted = self._indices(want, "want")
        if len(set(survivors)) != len(survivors):
            raise ErasureError(f"have = {list(survivors)} names a symbol twice")
        if len(survivors) < self.k:
            raise TooManyLosses(
                f"{len(survivors)} of the {self.k + self.m} symbols survive, and {self.k} are needed:"
                f" ({self.k}, {self.m}) tolerates {self.m} losses"
            )
        if len(survivors) > self.k:
            raise ErasureError(f"have names {len(survivors)} symbols; choose exactly k = {self.k} of them")
        if not wanted:
            raise ErasureError("want is empty: there is no symbol to compute")
        return _rebuild_matrix(self.k, self.m, survivors, wanted)

    def _indices(self, indices: Sequence[int], name: str) -> tuple[int, ...]:
        try:
            numbers = tuple(operator.index(index) for index in indices)
        except TypeError as error:
            raise ErasureError(f"{name} must hold whole numbers, not {indices!r}") from error
        for number in numbers:
            if not 0 <= number < self.k + self.m:
                raise ErasureError(
                    f"{name} names symbol {number}; ({self.k}, {self.m}) has symbols 0..{self.k + self.m - 1}"
                )
        return numbers


def reedsolo_correct(code: Code, word: bytearray, lost: Sequence[int]) -> bytes:
    """One stripe of k + m bytes as reedsolo corrects it, or `ReedSolomonError`. Slow."""
    with _reedsolo_lock:
        return bytes(_reedsolo_codec(code.k, code.m).decode(word, erase_pos=list(lost))[1])


@lru_cache(maxsize=16)
def _reedsolo_codec(k: int, m: int) -> reedsolo.RSCodec:
    return reedsolo.RSCodec(m, nsize=k + m, fcr=0, prim=POLYNOMIAL)


@lru_cache(maxsize=256)
def _parity_matrix(k: int, m: int) -> Matrix:
    """Column c is what reedsolo appends to the c-th unit vector: the code is linear, so that is all of it."""
    matrix = np.zeros((m, k), dtype=np.uint8)
    if m:
        with _reedsolo_lock:
            codec = _reedsolo_codec(k, m)
            for c in range(k):
                unit = bytearray(k)
                unit[c] = 1
                matrix[:, c] = codec.encode(unit)[k:]
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=4096)
def _rebuild_matrix(k: int, m: int, have: tuple[int, ...], want: tuple[int, ...]) -> Matrix:
    generator = np.concatenate([np.eye(k, dtype=np.uint8), _parity_matrix(k, m)])
    matrix = product(generator[list(want)], inverse(generator[list(have)]))
    matrix.flags.writeable = False
    return matrix
