# SPDX-License-Identifier: Apache-2.0
"""CRC32C (Castagnoli, as in iSCSI and ext4) in numpy: the fallback where there is no ISA-L, same values.

The CRC is linear, so many places are worked on at once: the buffer is cut into rows of `LANES` words, and all
words of the running row are multiplied by x^(32 LANES) before the next row is added. At the end the halves of
the row are folded together the same way until one word is left.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .buffers import Bytes

POLYNOMIAL = 0x82F63B78  # bit-reflected: bit 31 is the coefficient of x^0
LANES = 8192
ROW_BYTES = 4 * LANES

Words = NDArray[np.uint32]


def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _byte_table()


def crc32c(data: Bytes, value: int = 0) -> int:
    """CRC32C of the bytes, continued from `value` (0 at the start), as `zlib.crc32` chains."""
    register = value ^ 0xFFFFFFFF
    whole = data.size - data.size % ROW_BYTES
    if whole:
        register = _fold(data[:whole], register)
    for byte in data[whole:].tobytes():
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def _fold(data: Bytes, register: int) -> int:
    """The register after whole rows. The old register is added to the first word, where its bits belong."""
    # A copy per row keeps unaligned buffers and big-endian machines right.
    state = _row(data, 0)
    state[0] ^= np.uint32(register)
    for row in range(1, data.size // ROW_BYTES):
        state = _advance(state, LANES)
        state ^= _row(data, row)
    width = LANES
    while width > 1:
        width //= 2
        state = _advance(state[:width], width) ^ state[width:]
    # The last word still has to pass the end of the data by its own 32 bits.
    return int(_advance(state, 1)[0])


def _row(data: Bytes, row: int) -> Words:
    raw = data[row * ROW_BYTES : (row + 1) * ROW_BYTES].tobytes()
    return np.frombuffer(raw, dtype="<u4").astype(np.uint32)


def _advance(words: Words, distance: int) -> Words:
    """Each word times x^(32 distance), by a table for each half of the word."""
    low, high = _tables(distance)
    return low[words & np.uint32(0xFFFF)] ^ high[words >> np.uint32(16)]


@lru_cache(maxsize=32)
def _tables(distance: int) -> tuple[Words, Words]:
    """What `distance` zero words make of every 16-bit value in a register's lower and upper half."""
    images = _images(distance)
    tables = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1 << 16, dtype=np.uint32)
        for bit, image in enumerate(half):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ image
        tables.append(table)
    return tables[0], tables[1]


def _images(distance: int) -> Words:
    """What `distance` zero words, a power of two, make of each of a register's 32 bits."""
    if distance > 1:
        return _advance(_images(distance // 2), distance // 2)
    registers = [1 << bit for bit in range(32)]
    for _ in range(4):
        registers = [register >> 8 ^ _TABLE[register & 0xFF] for register in registers]
    return np.array(registers, dtype=np.uint32)
