# SPDX-License-Identifier: Apache-2.0
"""Known answers from the field's table, asked of every kernel that is not plain numpy before it is used."""

import numpy as np

from .field import PRODUCTS, Matrix


def case(rows: int, columns: int, size: int) -> tuple[Matrix, Matrix, Matrix]:
    """A dense matrix (rows, columns), data (columns, size), and their product.

    From a size of 256 on, each input has every byte value.
    """
    matrix = (np.arange(rows * columns, dtype=np.uint32) * 29 + 3).astype(np.uint8).reshape(rows, columns)
    # An odd factor steps through all 256 values, from another start and at another pace in each input.
    data = np.stack([(np.arange(size, dtype=np.uint32) * (2 * c + 5) + c) for c in range(columns)])
    data = data.astype(np.uint8)
    return matrix, data, np.bitwise_xor.reduce(PRODUCTS[matrix[:, :, None], data[None]], axis=1)
