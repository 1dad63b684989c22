# SPDX-License-Identifier: Apache-2.0
"""GF(2^8) with the polynomial 0x11D (x^8 + x^4 + x^3 + x^2 + 1): tables and small matrices.

The field is the one of `reedsolo` with prim=0x11d; a test compares all 65,536 products.
"""

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x11D

Matrix = NDArray[np.uint8]


def _product_table() -> Matrix:
    """The 256 x 256 table of products, by doubling: row 2a is row a times x, row 2a+1 adds b once more."""
    values = np.arange(256, dtype=np.uint16)
    table = np.zeros((256, 256), dtype=np.uint16)
    for a in range(1, 256):
        doubled = table[a >> 1] << 1
        doubled ^= (doubled >> 8) * POLYNOMIAL
        table[a] = doubled ^ values if a & 1 else doubled
    return table.astype(np.uint8)


PRODUCTS: Matrix = _product_table()
PRODUCTS.flags.writeable = False
# The product that is 1 stands once in every row but the first; 0 has no inverse and its entry is never used.
INVERSES: Matrix = np.argmax(PRODUCTS == 1, axis=1).astype(np.uint8)
INVERSES.flags.writeable = False


def product(left: Matrix, right: Matrix) -> Matrix:
    """The matrix product over the field: (r, n) x (n, c) -> (r, c)."""
    out = np.zeros((left.shape[0], right.shape[1]), dtype=np.uint8)
    for i in range(left.shape[1]):
        out ^= PRODUCTS[left[:, i, None], right[None, i, :]]
    return out


def inverse(matrix: Matrix) -> Matrix:
    """The inverse of a square matrix over the field, by Gauss-Jordan elimination.

    Raises `ZeroDivisionError` if it is singular.
    """
    size = matrix.shape[0]
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for i in range(size):
        pivot = i + int(np.argmax(work[i:, i] != 0))
        if work[pivot, i] == 0:
            raise ZeroDivisionError(f"the {size} x {size} matrix is singular: no pivot in column {i}")
        if pivot != i:
            work[[i, pivot]] = work[[pivot, i]]
        work[i] = PRODUCTS[INVERSES[work[i, i]], work[i]]
        factors = work[:, i].copy()
        factors[i] = 0
        work ^= PRODUCTS[factors[:, None], work[None, i, :]]
    return np.ascontiguousarray(work[:, size:])
