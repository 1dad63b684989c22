# SPDX-License-Identifier: Apache-2.0
"""The portable backend: XORs and doublings in numpy, in blocks that stay in the L2 cache.

numpy releases the GIL in every step. All steps work on bytes, so that no buffer needs an alignment.
"""

import threading
from collections.abc import Sequence

import numpy as np

from .buffers import Bytes
from .field import POLYNOMIAL, Matrix
from .plan import Step, program

# Every block of every operand together should stay in the L2 cache of one core.
WORKING_SET_BYTES = 768 << 10
MAX_BLOCK_BYTES = 128 << 10
MIN_BLOCK_BYTES = 16 << 10

_SEVEN = np.int8(7)
_REDUCTION = np.int8(POLYNOMIAL & 0xFF)
_local = threading.local()


def apply(matrix: Matrix, ins: Sequence[Bytes], outs: Sequence[Bytes]) -> None:
    """outs = matrix x ins over GF(2^8), for checked buffers of one length. Thread-safe."""
    steps = program(matrix)
    size = outs[0].size
    block = WORKING_SET_BYTES // (len(ins) + len(outs) + 1) & -4096
    block = min(max(block, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    carry = _carry(block)
    operands = [*ins, *outs]
    for start in range(0, size, block):
        stop = min(start + block, size)
        _run(steps, [operand[start:stop] for operand in operands], carry[: stop - start])


def _carry(size: int) -> np.ndarray:
    """This thread's scratch for doublings; made once, as fresh pages cost more than the work on them."""
    carry = getattr(_local, "carry", None)
    if carry is None or carry.size < size:
        carry = _local.carry = np.empty(size, dtype=np.int8)
    return carry[:size]


def _run(steps: tuple[Step, ...], block: list[Bytes], carry: np.ndarray) -> None:
    for step in steps:
        dst, a = block[step.dst], block[step.a]
        if step.op == "xor":
            np.bitwise_xor(a, block[step.b], out=dst)
        elif step.op == "double":
            # x * a = (a << 1) ^ 0x1D where the top bit is set; the signed shift spreads it over the byte.
            np.right_shift(a.view(np.int8), _SEVEN, out=carry)
            np.bitwise_and(carry, _REDUCTION, out=carry)
            np.add(a, a, out=dst)
            np.bitwise_xor(dst, carry.view(np.uint8), out=dst)
        elif step.op == "copy":
            np.copyto(dst, a)
        else:
            dst.fill(0)
