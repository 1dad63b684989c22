# SPDX-License-Identifier: Apache-2.0
"""The one primitive, a matrix over GF(2^8) applied to buffers: encoding, decoding and partial rebuild."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from .backends import Kernel, backend
from .buffers import Buffer, Bytes, address, as_bytes, as_matrix, check_overlap, check_shapes
from .errors import ErasureError
from .field import Matrix

Array = TypeVar("Array", bound=Any)


def apply(matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> None:
    """outs[r] = sum over c of matrix[r, c] * ins[c], byte by byte over GF(2^8).

    `matrix` has a row per output and a column per input; `Code.parity_matrix` encodes and
    `Code.rebuild_matrix` decodes. Buffers are one-dimensional, contiguous and of bytes: numpy arrays, mmap,
    memoryview, bytearray, or else uint8 torch tensors of one device, which are then worked on where they are.
    Inputs may be read-only and may share memory. All outputs have one length in bytes. An input shorter than
    that, even empty, counts as padded with zeros, which are neither stored nor read.

    Thread-safe, and the GIL is released while it works. Every backend gives the same bytes; see `backend`.
    Raises `ErasureError` (a `ValueError`) before any write: items that are no bytes, not contiguous, wrong
    counts or lengths, an output that is empty, read-only or overlaps another buffer.
    """
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(buffer, torch.Tensor) for buffer in (*ins, *outs)):
        from .tensors import apply_tensors

        apply_tensors(matrix, ins, outs)
    else:
        apply_with(backend().kernel, matrix, ins, outs)


def apply_with(kernel: Kernel, matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> None:
    """`apply` on a given kernel, for buffers of the host."""
    run_segments(kernel, *checked(matrix, ins, outs), zero=lambda out: out.fill(0))


def checked(
    matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]
) -> tuple[Matrix, list[Bytes], list[Bytes]]:
    """The arguments of `apply` as arrays that share their memory, or `ErasureError`."""
    coefficients = as_matrix(matrix)
    sources = [as_bytes(buffer, f"ins[{c}]") for c, buffer in enumerate(ins)]
    targets = [as_bytes(buffer, f"outs[{r}]") for r, buffer in enumerate(outs)]
    check_shapes(coefficients, [source.size for source in sources], [target.size for target in targets])
    for r, target in enumerate(targets):
        if not target.flags.writeable:
            raise ErasureError(f"outs[{r}] is read-only")
    check_overlap([(address(a), a.size) for a in sources], [(address(a), a.size) for a in targets])
    return coefficients, sources, targets


def run_segments(
    kernel: Callable[[Matrix, list[Array], list[Array]], None],
    matrix: Matrix,
    ins: Sequence[Array],
    outs: Sequence[Array],
    *,
    zero: Callable[[Array], Any],
) -> None:
    """Call `kernel` on stretches in which all inputs have one length, leaving out those that have ended."""
    for start, stop, columns in segments([len(source) for source in ins], len(outs[0])):
        targets = [out[start:stop] for out in outs]
        if columns:
            part = matrix if len(columns) == len(ins) else np.ascontiguousarray(matrix[:, columns])
            kernel(part, [ins[c][start:stop] for c in columns], targets)
        else:
            for target in targets:
                zero(target)


def segments(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(start, stop, inputs that reach this far) for each stretch of the output between ends of inputs."""
    start = 0
    for stop in sorted({*lengths, size} - {0}):
        yield start, stop, [c for c, length in enumerate(lengths) if length >= stop]
        start = stop
