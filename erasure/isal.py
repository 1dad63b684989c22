# SPDX-License-Identifier: Apache-2.0
"""Intel's ISA-L through ctypes: erasure coding and CRC32C with the CPU's own byte-shuffle instructions.

The library is the one inside the `pyeclib` wheel (its shared library only: pyeclib's Python API copies too
much), else the system's. It is used only after it gave the right bytes for all 65,536 products and the CRC's
check value. ctypes releases the GIL during each call.
"""

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import golden
from .buffers import Bytes, address
from .field import PRODUCTS, Matrix

# Lengths are C ints; a multiple of the page keeps every chunk but the last aligned as the first was.
MAX_CALL_BYTES = 1 << 30
# A table of 32 bytes a coefficient is what every ISA-L version and instruction set fits in.
TABLE_BYTES = 32
SYSTEM_NAMES = ("libisal.so.2", "libisal.2.dylib")
CRC32C_CHECK = 0xE3069283  # of b"123456789"


class LibraryError(OSError):
    """No usable ISA-L, with the reason."""


@dataclass(frozen=True, eq=False)
class Library:
    """A loaded and verified ISA-L. All methods are thread-safe."""

    path: str
    _dll: ctypes.CDLL = field(repr=False)

    def apply(self, matrix: Matrix, ins: Sequence[Bytes], outs: Sequence[Bytes]) -> None:
        """outs = matrix x ins over GF(2^8), for checked buffers of one length."""
        rows, columns = matrix.shape
        tables = _tables(self, matrix.tobytes(), rows, columns)
        sources = [address(array) for array in ins]
        targets = [address(array) for array in outs]
        size = outs[0].size
        for start in range(0, size, MAX_CALL_BYTES):
            self._dll.ec_encode_data(
                min(MAX_CALL_BYTES, size - start),
                columns,
                rows,
                tables,
                (ctypes.c_void_p * columns)(*[source + start for source in sources]),
                (ctypes.c_void_p * rows)(*[target + start for target in targets]),
            )

    def crc32c(self, start: int, size: int, value: int) -> int:
        """CRC32C of `size` bytes at address `start`, continued from `value`."""
        # crc32_iscsi works on the register, which the CRC's definition inverts before and after.
        register = value ^ 0xFFFFFFFF
        for offset in range(0, size, MAX_CALL_BYTES):
            register = self._dll.crc32_iscsi(start + offset, min(MAX_CALL_BYTES, size - offset), register)
        return register ^ 0xFFFFFFFF


@lru_cache(maxsize=1024)
def _tables(library: Library, coefficients: bytes, rows: int, columns: int) -> ctypes.Array[ctypes.c_char]:
    tables = ctypes.create_string_buffer(TABLE_BYTES * rows * columns)
    library._dll.ec_init_tables(columns, rows, coefficients, tables)
    return tables


def candidates() -> Iterator[str]:
    """Where an ISA-L may be, best first: the wheel's file, then names for the system's loader."""
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent.parent / "pyeclib.libs"
        yield from sorted(str(path) for path in folder.glob("libisal*.so*"))
    yield from SYSTEM_NAMES


def load() -> Library:
    """The first candidate that loads and computes correctly. Raises `LibraryError` saying what was tried."""
    reasons = []
    for name in candidates():
        try:
            return open_library(name)
        except LibraryError as error:
            reasons.append(str(error))
    raise LibraryError("; ".join(reasons))


def open_library(name: str) -> Library:
    """Load one shared library and verify it. Raises `LibraryError`."""
    try:
        dll = ctypes.CDLL(name)
        pointers = ctypes.POINTER(ctypes.c_void_p)
        dll.ec_init_tables.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p]
        dll.ec_init_tables.restype = None
        dll.ec_encode_data.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_char_p,
            pointers,
            pointers,
        ]
        dll.ec_encode_data.restype = None
        dll.crc32_iscsi.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
        dll.crc32_iscsi.restype = ctypes.c_uint
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{name} is no usable ISA-L ({error})") from error
    library = Library(path=name, _dll=dll)
    verify(library)
    return library


def verify(library: Library) -> None:
    """Check every product, a dense matrix at an odd length, and the CRC, or raise `LibraryError`."""
    every = np.arange(256, dtype=np.uint8)
    products = np.zeros((256, 256), dtype=np.uint8)
    library.apply(every[:, None], [every], list(products))
    if not np.array_equal(products, PRODUCTS):
        wrong = np.argwhere(products != PRODUCTS)[0]
        raise LibraryError(f"{library.path} computes {wrong[0]} * {wrong[1]} wrong in GF(2^8) mod 0x11D")
    # 1,021 bytes reach the widest kernel, the narrower ones and the tail; 7 rows, two passes of kernels.
    matrix, data, expected = golden.case(7, 5, 1021)
    outs = np.zeros_like(expected)
    library.apply(matrix, list(data), list(outs))
    if not np.array_equal(outs, expected):
        raise LibraryError(f"{library.path} computes a wrong 7 x 5 matrix product")
    digits = np.frombuffer(b"123456789", dtype=np.uint8)
    if library.crc32c(address(digits), digits.size, 0) != CRC32C_CHECK:
        raise LibraryError(f"{library.path} computes a wrong CRC32C")
