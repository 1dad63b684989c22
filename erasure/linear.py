# SPDX-License-Identifier: Apache-2.0
"""The one primitive, a matrix over GF(2^8) applied to buffers: encoding, decoding and partial rebuild."""

from collections.abc import Iterator, Sequence

from numpy.typing import ArrayLike

from .backends import Kernel, backend
from .buffers import Buffer, as_bytes, as_matrix, check_overlap, check_shapes
from .field import Matrix


def apply(matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> None:
    """outs[r] = sum over c of matrix[r, c] * ins[c], byte by byte over GF(2^8).

    `matrix` has a row per output and a column per input; `Code.parity_matrix` encodes and
    `Code.rebuild_matrix` decodes. Buffers are one-dimensional, contiguous and of bytes: numpy arrays, mmap,
    memoryview, bytearray; inputs may be read-only and may share memory. All outputs have one length in bytes.
    An input shorter than that, even empty, counts as padded with zeros, which are neither stored nor read.

    Thread-safe, and the GIL is released while it works. Every backend gives the same bytes; see `backend`.
    Raises `ErasureError` (a `ValueError`) before any write: items that are no bytes, not contiguous, wrong
    counts or lengths, an output that is empty, read-only or overlaps another buffer.
    """
    apply_with(backend().kernel, matrix, ins, outs)


def apply_with(kernel: Kernel, matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> None:
    """`apply` on a given kernel."""
    coefficients = as_matrix(matrix)
    sources = [as_bytes(buffer, f"ins[{c}]") for c, buffer in enumerate(ins)]
    targets = [as_bytes(buffer, f"outs[{r}]") for r, buffer in enumerate(outs)]
    check_shapes(coefficients, sources, targets)
    check_overlap(sources, targets)
    for start, stop, columns in segments([source.size for source in sources], targets[0].size):
        if not columns:
            for target in targets:
                target[start:stop] = 0
            continue
        kernel(
            _columns(coefficients, columns),
            [sources[c][start:stop] for c in columns],
            [target[start:stop] for target in targets],
        )


def segments(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(start, stop, inputs that reach this far) for each stretch of the output between ends of inputs."""
    start = 0
    for stop in sorted({*lengths, size} - {0}):
        yield start, stop, [c for c, length in enumerate(lengths) if length >= stop]
        start = stop


def _columns(matrix: Matrix, columns: list[int]) -> Matrix:
    return matrix if len(columns) == matrix.shape[1] else matrix[:, columns].copy()
