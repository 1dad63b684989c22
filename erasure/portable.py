# SPDX-License-Identifier: Apache-2.0
"""The portable backend: XORs, doublings and halvings in numpy, in blocks that stay in the L2 cache.

numpy releases the GIL in every step. All steps on the caller's buffers work on bytes: no alignment is needed.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .buffers import Bytes
from .field import POLYNOMIAL, Matrix
from .plan import program

# Three blocks are in use at a time (the sum, its carry, an input) and should stay in the L2 cache of a core;
# smaller blocks cost more calls. Measured best between 160 and 256 KiB where L2 has 1 MiB.
BLOCK_BYTES = 192 << 10

_local = threading.local()

# (function, a, b, dst): the last three are indices of blocks.
Call = tuple[np.ufunc, int, int, int]


def apply(matrix: Matrix, ins: Sequence[Bytes], outs: Sequence[Bytes]) -> None:
    """outs = matrix x ins over GF(2^8), for checked buffers of one length. Thread-safe."""
    calls, shared = _compiled(matrix.tobytes(), *matrix.shape)
    size = outs[0].size
    block = min(BLOCK_BYTES, size)
    operands = [*ins, *outs]
    scratch = _scratch(shared + 1, block)
    for start in range(0, size, block):
        stop = min(start + block, size)
        width = stop - start
        blocks: list[Any] = [operand[start:stop] for operand in operands]
        blocks.extend(row[:width] for row in scratch)
        blocks += [scratch[-1][:width].view(np.bool_), scratch[-1][: width + 1 & -2].view(np.uint16), *_CONSTANTS]
        for function, a, b, dst in calls:
            function(blocks[a], blocks[b], blocks[dst])


def _scratch(rows: int, block: int) -> list[NDArray[np.uint8]]:
    """This thread's scratch blocks; kept, as fresh pages cost more than the work on them."""
    stride = (block + 1 & -2) + 320  # rows a whole number of pages apart would share the same few cache sets
    held = getattr(_local, "scratch", None)
    if held is None or held.size < rows * stride:
        held = _local.scratch = np.empty(rows * stride, dtype=np.uint8)
    return [held[r * stride : (r + 1) * stride] for r in range(rows)]


_CONSTANTS = (np.uint8(1), np.uint8(127), np.uint16(POLYNOMIAL & 0xFF), np.uint16(POLYNOMIAL >> 1))


@lru_cache(maxsize=1024)
def _compiled(coefficients: bytes, rows: int, columns: int) -> tuple[list[Call], int]:
    """The program as calls on the blocks that `apply` lists, and how many shared sums it needs room for."""
    plan = program(coefficients, rows, columns)
    carry = rows + columns + plan.scratch
    flags, pairs, one, half, doubled, halved = range(carry + 1, carry + 7)
    calls: list[Call] = []
    for step in plan.steps:
        if step.op == "xor":
            calls.append((np.bitwise_xor, step.a, step.b, step.dst))
        elif step.op == "double":
            # x * a is a << 1, plus 0x1D where the top bit was set: 0 or 1 there, times 0x1D.
            # No carry crosses bytes, so the product may be taken of two bytes at once.
            calls.append((np.greater, step.a, half, flags))
            calls.append((np.multiply, pairs, doubled, pairs))
            calls.append((np.add, step.a, step.a, step.dst))
            calls.append((np.bitwise_xor, step.dst, carry, step.dst))
        elif step.op == "halve":
            # a / x is a >> 1, plus 0x8E where the lowest bit was set: what doubling makes 0x100 + 0x1C + 1 of.
            calls.append((np.bitwise_and, step.a, one, carry))
            calls.append((np.multiply, pairs, halved, pairs))
            calls.append((np.right_shift, step.a, one, step.dst))
            calls.append((np.bitwise_xor, step.dst, carry, step.dst))
        elif step.op == "copy":
            calls.append((np.bitwise_or, step.a, step.a, step.dst))
        else:
            calls.append((np.bitwise_xor, step.dst, step.dst, step.dst))
    return calls, plan.scratch
