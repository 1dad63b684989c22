# SPDX-License-Identifier: Apache-2.0
# The kernels are in Triton's dialect, which has no starred tuples and whose types are not Python's.
# ruff: noqa: RUF005
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportPrivateImportUsage=false
"""The primitive as one Triton kernel: each input is read once into registers, each output written once.

The program of XORs, doublings and halvings is a compile-time constant, unrolled: a new matrix costs one compilation,
about a second, and Triton keeps it on disk. A doubling or halving works on the four bytes of a word at once.
Triton comes with torch's CUDA builds. Without a GPU the kernel runs under TRITON_INTERPRET=1.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import eager
from .field import Matrix
from .plan import program

BLOCK_WORDS = 1024
# The kernel takes whole lines, so that all its loads are 16 bytes wide; the rest is done in eager torch.
LINE_BYTES = 64
# Unrolled code grows with the program, and so does the time to compile it; (16, 4) has about 200 steps.
MAX_STEPS = 1024

XOR, DOUBLE, HALVE, ZERO = 0, 1, 2, 3

# (operation, a, b): operands are numbered inputs first, then the values of earlier steps.
Steps = tuple[tuple[int, int, int], ...]


@triton.jit
def _double(word):
    """x times each of the four bytes of a word: shifted left, and 0x1D added where the top bit was set."""
    return ((word & 0x7F7F7F7F) << 1) ^ (((word >> 7) & 0x01010101) * 0x1D)


@triton.jit
def _halve(word):
    """Each of the four bytes of a word divided by x: shifted right, and 0x8E added where the lowest bit was set."""
    return ((word >> 1) & 0x7F7F7F7F) ^ ((word & 0x01010101) * 0x8E)


@triton.jit
def _kernel(ins, outs, words, STEPS: tl.constexpr, RESULTS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < words
    values = ()
    for c in tl.static_range(len(ins)):
        values = values + (tl.load(ins[c] + offsets, mask=inside, other=0),)
    for s in tl.static_range(len(STEPS)):
        if STEPS[s][0] == 0:
            values = values + (values[STEPS[s][1]] ^ values[STEPS[s][2]],)
        elif STEPS[s][0] == 1:
            values = values + (_double(values[STEPS[s][1]]),)
        elif STEPS[s][0] == 2:
            values = values + (_halve(values[STEPS[s][1]]),)
        else:
            values = values + (values[STEPS[s][1]] & 0,)
    for r in tl.static_range(len(RESULTS)):
        tl.store(outs[r] + offsets, values[RESULTS[r]], mask=inside)


@lru_cache(maxsize=1024)
def straight_line(coefficients: bytes, rows: int, columns: int) -> tuple[Steps, tuple[int, ...]]:
    """The program without assignments: every step makes a new value. Also which value each output is."""
    plan = program(coefficients, rows, columns)
    value = list(range(columns)) + [0] * (rows + plan.scratch)
    steps: list[tuple[int, int, int]] = []
    for step in plan.steps:
        a, b = value[step.a], value[step.b]
        if step.op == "copy":
            value[step.dst] = a
            continue
        operation = {"xor": XOR, "double": DOUBLE, "halve": HALVE, "zero": ZERO}[step.op]
        steps.append((operation, a, b if operation == XOR else 0))
        value[step.dst] = columns + len(steps) - 1
    return tuple(steps), tuple(value[columns : columns + rows])


def apply(matrix: Matrix, ins: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """outs = matrix x ins for checked tensors of one length.

    Unaligned tensors, the last bytes of a length and matrices beyond `MAX_STEPS` go to eager torch.
    """
    steps, results = straight_line(matrix.tobytes(), *matrix.shape)
    size = len(outs[0])
    whole = size - size % LINE_BYTES
    if len(steps) > MAX_STEPS or any(tensor.data_ptr() % 16 for tensor in (*ins, *outs)):
        whole = 0
    if whole:
        words = whole // 4
        with torch.cuda.device_of(outs[0]):  # Triton launches on the current device
            _kernel[(triton.cdiv(words, BLOCK_WORDS),)](
                tuple(tensor[:whole].view(torch.int32) for tensor in ins),
                tuple(tensor[:whole].view(torch.int32) for tensor in outs),
                words,
                steps,
                results,
                BLOCK_WORDS,
            )
    if whole < size:
        eager.apply(matrix, [tensor[whole:] for tensor in ins], [tensor[whole:] for tensor in outs])
