# SPDX-License-Identifier: Apache-2.0
"""A matrix as a short program of XORs and doublings over whole blocks: no tables, no special instructions.

Bit-sliced Horner: a row is evaluated from the highest bit of its coefficients to the lowest. Before each next
bit the sum is doubled (multiplied by x), then the inputs whose coefficient has that bit are added.

A row may also start from rows already computed: in a Reed-Solomon stripe the XOR of all symbols is zero, so
the last of m parities (or of m lost symbols) is the XOR of everything else, which costs no doubling at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

from .field import Matrix

# The price of a doubling (four passes over memory) in XORs (one pass). Only the order of rows hangs on it.
DOUBLING_COST = 4
# How many finished rows one row may start from: 2^n combinations are tried.
MAX_REUSED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Step:
    """dst = a ^ b, dst = x * a, dst = a, or dst = 0. Operands: inputs first, then outputs."""

    op: Literal["xor", "double", "copy", "zero"]
    dst: int
    a: int = 0
    b: int = 0


@lru_cache(maxsize=1024)
def _program(coefficients: bytes, rows: int, columns: int) -> tuple[Step, ...]:
    table = [tuple(coefficients[r * columns : (r + 1) * columns]) for r in range(rows)]
    todo = set(range(rows))
    done: list[int] = []
    steps: list[Step] = []
    while todo:
        _, row, reused = min(_choices(table, todo, done))
        steps.extend(_row_steps(_reduced(table, row, reused), columns + row, [columns + r for r in reused]))
        todo.remove(row)
        done.append(row)
    return tuple(steps)


def program(matrix: Matrix) -> tuple[Step, ...]:
    """The steps for a matrix (rows, columns), cached. Operand c < columns is input c, then outputs."""
    rows, columns = matrix.shape
    return _program(matrix.tobytes(), rows, columns)


def _reduced(table: list[tuple[int, ...]], row: int, reused: tuple[int, ...]) -> tuple[int, ...]:
    coefficients = list(table[row])
    for other in reused:
        coefficients = [a ^ b for a, b in zip(coefficients, table[other], strict=True)]
    return tuple(coefficients)


def _choices(
    table: list[tuple[int, ...]], todo: set[int], done: list[int]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(cost, row, finished rows to start from) for every way to compute one more row."""
    recent = done[-MAX_REUSED_ROWS:]
    subsets = [subset for n in range(len(recent) + 1) for subset in combinations(recent, n)]
    for row in todo:
        for reused in subsets:
            coefficients = _reduced(table, row, reused)
            xors = sum(value.bit_count() for value in coefficients) + len(reused)
            doublings = max(max(coefficients).bit_length() - 1, 0)
            yield xors + DOUBLING_COST * doublings, row, reused


def _row_steps(coefficients: tuple[int, ...], dst: int, reused: list[int]) -> list[Step]:
    steps: list[Step] = []
    held: int | None = None  # the operand that holds the sum: an input until the first step writes dst
    for bit in range(max(max(coefficients).bit_length() - 1, 0), -1, -1):
        if held is not None:
            steps.append(Step("double", dst, held))
            held = dst
        terms = [c for c, value in enumerate(coefficients) if value >> bit & 1]
        for term in terms + (reused if bit == 0 else []):
            if held is None:
                held = term
            else:
                steps.append(Step("xor", dst, held, term))
                held = dst
    if held is None:
        return [Step("zero", dst)]
    return steps or [Step("copy", dst, held)]
