# SPDX-License-Identifier: Apache-2.0
"""Which symbol of a stripe lies, where no checksum can say: `reedsolo` corrects a sample and names it.

Redundancy that no loss has used up can find errors. All columns are checked with the fast code, `reedsolo`
decodes a few of those that do not add up, and what it names is believed only if all the rest then fits.
"""

from collections.abc import Mapping

import numpy as np
import reedsolo

from .buffers import Buffer, Bytes, as_bytes
from .code import Code, reedsolo_correct
from .errors import ErasureError, TooManyLosses
from .linear import apply

# Columns are checked a block at a time, in scratch of this size a symbol.
BLOCK_BYTES = 1 << 20
SAMPLE_COLUMNS = 32


class Undecidable(ErasureError):
    """The symbols contradict each other and too few are right to tell which: rebuilding would be a guess."""


def locate_corrupt(code: Code, symbols: Mapping[int, Buffer]) -> tuple[int, ...]:
    """The symbols that differ from the one codeword that all others agree on, in ascending order.

    `symbols` maps the index (0..k+m-1) of each symbol at hand to its bytes, all of one length; those left
    out are losses. An empty answer means that all fit together. With s symbols at hand, up to (s - k) // 2
    corrupt ones are found: one for (k, 2) without a loss, two for (k, 4). With s = k + 1 a contradiction is
    seen but cannot be located, and with s = k it is not seen.

    Raises `TooManyLosses` below k symbols, `Undecidable` for a contradiction that this many corrupt symbols
    do not explain, `ErasureError` for indices or buffers that cannot be used.
    """
    arrays = _checked(code, symbols)
    limit = (len(arrays) - code.k) // 2
    corrupt: set[int] = set()
    while columns := _contradictions(code, {i: array for i, array in arrays.items() if i not in corrupt}):
        # A symbol may lie only where the first sample did not look, so the rest is asked again.
        named = set().union(*(_corrected(code, arrays, column) for column in columns))
        if named <= corrupt or len(corrupt | named) > limit:
            raise Undecidable(
                f"the {len(arrays)} symbols at hand of a ({code.k}, {code.m}) stripe contradict each other,"
                f" first at byte {columns[0]}, and no {limit} of them being wrong explains it;"
                " nothing was changed: use an older snapshot"
            )
        corrupt |= named
    return tuple(sorted(corrupt))


def _checked(code: Code, symbols: Mapping[int, Buffer]) -> dict[int, Bytes]:
    arrays = {index: as_bytes(buffer, f"symbol {index}") for index, buffer in symbols.items()}
    for index in arrays:
        if not 0 <= index < code.k + code.m:
            raise ErasureError(f"symbol {index} is none of 0..{code.k + code.m - 1}")
    if len(arrays) < code.k:
        raise TooManyLosses(f"{len(arrays)} symbols are at hand, and {code.k} are needed")
    sizes = {array.size for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ErasureError(f"the symbols have {sorted(sizes)} bytes; they need one length above zero")
    return arrays


def _contradictions(code: Code, arrays: Mapping[int, Bytes]) -> list[int]:
    """The first few columns in which the symbols beyond the first k are not what those k say."""
    have, extra = sorted(arrays)[: code.k], sorted(arrays)[code.k :]
    if not extra:
        return []
    matrix = code.rebuild_matrix(have, extra)
    size = arrays[have[0]].size
    scratch = [np.empty(min(BLOCK_BYTES, size), dtype=np.uint8) for _ in extra]
    found: list[int] = []
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)
        computed = [row[: stop - start] for row in scratch]
        apply(matrix, [arrays[index][start:stop] for index in have], computed)
        wrong = np.zeros(stop - start, dtype=bool)
        for row, index in zip(computed, extra, strict=True):
            wrong |= row != arrays[index][start:stop]
        found.extend(start + int(column) for column in np.flatnonzero(wrong)[: SAMPLE_COLUMNS - len(found)])
        if len(found) == SAMPLE_COLUMNS:
            break
    return found


def _corrected(code: Code, arrays: Mapping[int, Bytes], column: int) -> set[int]:
    """The symbols at hand that reedsolo changes in one column; none if it cannot correct it."""
    word = bytearray(code.k + code.m)
    for index, array in arrays.items():
        word[index] = array[column]
    lost = [index for index in range(code.k + code.m) if index not in arrays]
    try:
        corrected = reedsolo_correct(code, word, lost)
    except reedsolo.ReedSolomonError:
        return set()
    return {index for index in arrays if corrected[index] != word[index]}
