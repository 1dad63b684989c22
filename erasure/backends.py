# SPDX-License-Identifier: Apache-2.0
"""Which implementation does the work in this process, and why. All of them give the same bytes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from . import crc, isal, portable
from .buffers import Buffer, Bytes, address, as_raw_bytes
from .errors import ErasureError
from .field import Matrix

VARIABLE = "REFOUND_ERASURE"  # "isal" or "portable": use this one only

Kernel = Callable[[Matrix, Sequence[Bytes], Sequence[Bytes]], None]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What `apply` and `checksum` run on: names, and the reason for the choice in words."""

    name: str
    reason: str
    checksum_name: str
    library: str | None
    kernel: Kernel = field(repr=False, compare=False)
    crc32c: Callable[[Bytes, int], int] = field(repr=False, compare=False)


def _from_library(library: isal.Library) -> Backend:
    return Backend(
        name="isal",
        reason=f"ISA-L at {library.path}; all 65,536 products and the CRC checked",
        checksum_name="CRC32C (ISA-L)",
        library=library.path,
        kernel=library.apply,
        crc32c=lambda data, value: library.crc32c(address(data), data.size, value),
    )


def _portable(reason: str) -> Backend:
    return Backend(
        name="portable",
        reason=reason,
        checksum_name="CRC32C (numpy)",
        library=None,
        kernel=portable.apply,
        crc32c=crc.crc32c,
    )


@lru_cache(maxsize=1)
def backend() -> Backend:
    """The backend of this process, chosen once: ISA-L if one is found and computes correctly, else numpy.

    The environment variable REFOUND_ERASURE (`isal` or `portable`) allows only one of them.
    Raises `ErasureError` if it names neither, or names ISA-L where there is none.
    """
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", "isal", "portable"):
        raise ErasureError(f"{VARIABLE}={choice!r} is no backend; use isal or portable, or unset it")
    if choice == "portable":
        return _portable(f"numpy, because {VARIABLE}=portable")
    try:
        return _from_library(isal.load())
    except isal.LibraryError as error:
        if choice == "isal":
            raise ErasureError(f"{VARIABLE}=isal, but {error}; pip install 'pyeclib>=1.8,<2'") from error
        return _portable(f"numpy, because {error}; pip install 'pyeclib>=1.8,<2' for the fast one")


def checksum(buffer: Buffer, value: int = 0) -> int:
    """CRC32C of a contiguous buffer of any item type; `value` continues an earlier one, as in `zlib.crc32`.

    checksum(b"123456789") == 0xE3069283. The GIL is released where ISA-L does the work.
    Raises `ErasureError` for a buffer that is not contiguous or a value outside 0..2^32-1.
    """
    if not 0 <= value <= 0xFFFFFFFF:
        raise ErasureError(f"value = {value} is no CRC32C: it must be in 0..2^32-1")
    return backend().crc32c(as_raw_bytes(buffer), value)
