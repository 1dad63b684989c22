# SPDX-License-Identifier: Apache-2.0
"""What counts as a buffer, and the checks that come before any write."""

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ErasureError
from .field import Matrix

Bytes = NDArray[np.uint8]

# Anything that speaks the buffer protocol; numpy, mmap, memoryview, bytes and bytearray do.
Buffer = Any

# Address of the first byte, size in bytes.
Span = tuple[int, int]


def as_bytes(buffer: Buffer, name: str) -> Bytes:
    """A view (no copy) of a one-dimensional, contiguous buffer of bytes, or `ErasureError`."""
    if isinstance(buffer, np.ndarray):
        if buffer.dtype != np.uint8:
            raise ErasureError(f"{name} has dtype {buffer.dtype}, not uint8; view it as bytes first")
        array = buffer
    else:
        try:
            view = memoryview(buffer)
        except TypeError as error:
            raise ErasureError(f"{name} is a {type(buffer).__name__}, which is no buffer of bytes") from error
        if view.format not in ("B", "b", "c"):
            raise ErasureError(f"{name} has items of format {view.format!r}, not bytes; cast it to 'B'")
        if view.ndim == 1 and view.contiguous:
            return np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
        array = np.asarray(view)
    if array.ndim != 1:
        raise ErasureError(f"{name} has {array.ndim} dimensions, not one; use reshape(-1)")
    if not array.flags.c_contiguous:
        raise ErasureError(f"{name} is not contiguous (strides {array.strides})")
    return array


def as_matrix(matrix: ArrayLike) -> Matrix:
    """Coefficients as a contiguous uint8 array (rows, columns). Raises `ErasureError` for anything else."""
    array = np.asarray(matrix)
    if array.ndim != 2 or 0 in array.shape:
        raise ErasureError(f"the matrix has shape {array.shape}; it needs at least one row and one column")
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise ErasureError(f"the matrix (dtype {array.dtype}) must hold whole numbers in 0..255")
        array = array.astype(np.uint8)
    return np.ascontiguousarray(array)


def address(array: Bytes) -> int:
    """Where the array's first byte is. Writable arrays are asked the quick way: a call may have dozens."""
    if array.flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(cast(Any, array)))
    return array.ctypes.data


def check_shapes(matrix: Matrix, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> None:
    """Counts and sizes in bytes: a row per output, a column per input, equal outputs, no longer input."""
    rows, columns = matrix.shape
    if rows != len(out_sizes) or columns != len(in_sizes):
        raise ErasureError(
            f"a {rows} x {columns} matrix takes {columns} inputs and gives {rows} outputs;"
            f" found {len(in_sizes)} and {len(out_sizes)}"
        )
    size = out_sizes[0]
    if size == 0:
        raise ErasureError("the outputs have length zero: there is nothing to compute")
    for r, out_size in enumerate(out_sizes):
        if out_size != size:
            raise ErasureError(f"outs[{r}] has {out_size} bytes and outs[0] {size}; all must be equal")
    for c, in_size in enumerate(in_sizes):
        if in_size > size:
            raise ErasureError(f"ins[{c}] has {in_size} bytes, more than the {size} of the outputs")


def check_overlap(ins: Sequence[Span], outs: Sequence[Span]) -> None:
    """No output may share memory with another buffer. Inputs may share memory with each other."""
    spans = sorted(
        (start, size, is_out, index)
        for is_out, group in ((False, ins), (True, outs))
        for index, (start, size) in enumerate(group)
        if size
    )
    # The furthest end seen so far, over all buffers and over the outputs only.
    end_all = end_out = 0
    last_all = last_out = ""
    for start, size, is_out, index in spans:
        name = f"{'outs' if is_out else 'ins'}[{index}]"
        if start < (end_all if is_out else end_out):
            raise ErasureError(f"{name} overlaps {last_all if is_out else last_out} in memory")
        if start + size > end_all:
            end_all, last_all = start + size, name
        if is_out and start + size > end_out:
            end_out, last_out = start + size, name


def as_raw_bytes(buffer: Buffer) -> Bytes:
    """The bytes of any contiguous buffer, whatever its items. Raises `ErasureError` if it is none."""
    if isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8 and buffer.ndim == 1:
        return as_bytes(buffer, "the buffer")
    try:
        view = memoryview(cast(Any, buffer))
        if view.nbytes == 0:
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(view.cast("B"), dtype=np.uint8)
    except (TypeError, ValueError) as error:
        raise ErasureError(f"{type(buffer).__name__} is no contiguous buffer of bytes ({error})") from error
