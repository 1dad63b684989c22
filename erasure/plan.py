# SPDX-License-Identifier: Apache-2.0
"""A matrix as a short program of XORs and doublings over whole blocks: no tables, no special instructions.

Bit-sliced Horner: a row is evaluated from the highest bit of its coefficients to the lowest. Before each next
bit the sum is doubled (multiplied by x), then the inputs whose coefficient has that bit are added.

Two things make it shorter. A row may start from rows already computed: in a Reed-Solomon stripe the XOR of
all symbols is zero, so the last of m parities (or of m lost symbols) is the XOR of everything else, without
any doubling. And a sum of two inputs that several bits need is computed once (Paar's greedy elimination).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

# The price of a doubling (four passes over memory) in XORs (one pass). Only the order of rows hangs on it.
DOUBLING_COST = 4
# How many finished rows one row may start from: 2^n combinations are tried.
MAX_REUSED_ROWS = 4
# Shared sums need scratch blocks in the cache, and finding them takes time for large matrices.
MAX_SHARED_SUMS = 6
MAX_SHARED_SIZE = 256

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """dst = a ^ b, dst = x * a, dst = a, or dst = 0."""

    op: Literal["xor", "double", "copy", "zero"]
    dst: int
    a: int = 0
    b: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over numbered operands: the inputs, then the outputs, then `scratch` blocks."""

    steps: tuple[Step, ...]
    scratch: int


@lru_cache(maxsize=1024)
def program(coefficients: bytes, rows: int, columns: int) -> Program:
    """The program that computes matrix (rows, columns, given row by row) x inputs."""
    table = [tuple(coefficients[r * columns : (r + 1) * columns]) for r in range(rows)]
    order = _order(table)
    lines = [_lines(_reduced(table, row, reused)) for row, reused in order]
    shared: list[Step] = []
    if rows * columns <= MAX_SHARED_SIZE:
        shared = _share_sums([line for row in lines for line in row], columns + rows)
    steps = list(shared)
    for (row, reused), row_lines in zip(order, lines, strict=True):
        steps.extend(_row_steps(row_lines, columns + row, [columns + r for r in reused]))
    return Program(steps=tuple(steps), scratch=len(shared))


def _order(table: list[Row]) -> list[tuple[int, Row]]:
    """Rows in the order in which they are computed, each with the finished rows that it starts from."""
    todo = set(range(len(table)))
    order: list[tuple[int, Row]] = []
    while todo:
        _, row, reused = min(_choices(table, todo, [row for row, _ in order[-MAX_REUSED_ROWS:]]))
        todo.remove(row)
        order.append((row, reused))
    return order


def _choices(table: list[Row], todo: set[int], finished: list[int]) -> Iterator[tuple[int, int, Row]]:
    """(cost, row, finished rows to start from) for every way to compute one more row."""
    subsets = [subset for n in range(len(finished) + 1) for subset in combinations(finished, n)]
    for row in todo:
        for reused in subsets:
            coefficients = _reduced(table, row, reused)
            xors = sum(value.bit_count() for value in coefficients) + len(reused)
            doublings = max(max(coefficients).bit_length() - 1, 0)
            yield xors + DOUBLING_COST * doublings, row, reused


def _reduced(table: list[Row], row: int, reused: Row) -> Row:
    """What is left to compute of a row that starts from the sum of others."""
    coefficients = list(table[row])
    for other in reused:
        coefficients = [a ^ b for a, b in zip(coefficients, table[other], strict=True)]
    return tuple(coefficients)


def _lines(coefficients: Row) -> list[set[int]]:
    """For each bit, the highest first and at least one: the inputs whose coefficient has it."""
    bits = max(max(coefficients).bit_length(), 1)
    return [{c for c, value in enumerate(coefficients) if value >> bit & 1} for bit in reversed(range(bits))]


def _share_sums(lines: list[set[int]], first: int) -> list[Step]:
    """Replace, in place, the pair that most lines contain by a new operand, while that saves anything."""
    steps: list[Step] = []
    while len(steps) < MAX_SHARED_SUMS:
        counts = Counter(pair for line in lines for pair in combinations(sorted(line), 2))
        (a, b), count = max(counts.items(), key=lambda item: (item[1], item[0]), default=((0, 0), 0))
        if count < 2:
            break
        operand = first + len(steps)
        steps.append(Step("xor", operand, a, b))
        for line in lines:
            if a in line and b in line:
                line -= {a, b}
                line.add(operand)
    return steps


def _row_steps(lines: list[set[int]], dst: int, reused: list[int]) -> list[Step]:
    steps: list[Step] = []
    held: int | None = None  # the operand that holds the sum: another one until the first step writes dst
    for position, line in enumerate(lines):
        if held is not None:
            steps.append(Step("double", dst, held))
            held = dst
        for term in sorted(line) + (reused if position == len(lines) - 1 else []):
            if held is None:
                held = term
            else:
                steps.append(Step("xor", dst, held, term))
                held = dst
    if held is None:
        return [Step("zero", dst)]
    return steps or [Step("copy", dst, held)]
