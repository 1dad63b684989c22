# SPDX-License-Identifier: Apache-2.0
"""The primitive in plain torch operations, for any device: slower than a kernel, in need of nothing."""

from collections.abc import Sequence

import torch

from .field import POLYNOMIAL, Matrix
from .plan import program

# Three blocks are in use at a time and should stay in the last cache before memory.
CPU_BLOCK_BYTES = 256 << 10
DEVICE_BLOCK_BYTES = 8 << 20
# 1 / x, as a signed byte.
HALVED = (POLYNOMIAL >> 1) - 256


def apply(matrix: Matrix, ins: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """outs = matrix x ins for checked tensors of one length.

    It works on bytes, not on packed words: a signed shift spreads the top bit in one pass, where words take a
    mask and a product more (28 against 42 us for a doubling of 256 KiB), and no tensor needs an alignment.
    """
    plan = program(matrix.tobytes(), *matrix.shape)
    size, device = len(outs[0]), outs[0].device
    block = min(size, CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES)
    scratch = torch.empty((plan.scratch + 1, block), dtype=torch.int8, device=device)
    for start in range(0, size, block):
        stop = min(start + block, size)
        blocks = [tensor[start:stop].view(torch.int8) for tensor in (*ins, *outs)]
        blocks.extend(row[: stop - start] for row in scratch)
        for step in plan.steps:
            _run(step.op, blocks[step.a], blocks[step.b], blocks[step.dst], blocks[-1])


def _run(op: str, a: torch.Tensor, b: torch.Tensor, dst: torch.Tensor, carry: torch.Tensor) -> None:
    if op == "xor":
        torch.bitwise_xor(a, b, out=dst)
    elif op == "double":
        torch.bitwise_right_shift(a, 7, out=carry)
        carry.bitwise_and_(POLYNOMIAL & 0xFF)
        torch.add(a, a, out=dst)
        dst.bitwise_xor_(carry)
    elif op == "halve":
        torch.bitwise_and(a, 1, out=carry)
        carry.mul_(HALVED)
        torch.bitwise_right_shift(a, 1, out=dst)
        dst.bitwise_and_(0x7F).bitwise_xor_(carry)
    elif op == "copy":
        dst.copy_(a)
    else:
        dst.zero_()
