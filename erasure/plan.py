# SPDX-License-Identifier: Apache-2.0
"""A matrix as a short program of XORs, doublings and halvings over whole blocks: no tables, no special instructions.

Bit-sliced Horner: a row is evaluated from the highest bit of its coefficients to the lowest. Before each next
bit the sum is doubled (multiplied by x), then the inputs whose coefficient has that bit are added. Or the other way
round: any coefficient is also a sum of eight powers below or around x^0; the negative ones are evaluated from the
lowest, and the sum is halved each time.

Three things make it shorter. A row may start from rows already computed: in a Reed-Solomon stripe the XOR of
all symbols is zero, so the last of m parities (or of m lost symbols) is the XOR of everything else, without
any doubling. Parities have small coefficients, so inverses have few negative powers: two neighbours lost of four data
symbols come back by four halvings or doublings instead of seven doublings. And a sum of two inputs that several bits
need is computed once (Paar's greedy elimination).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple

from .field import PRODUCTS

# The price of a doubling or a halving (four passes over memory) in XORs (one pass). Only the order of rows and their
# direction hang on it.
SHIFT_COST = 4
# Eight consecutive powers of x are a basis of GF(2^8): these many halvings are enough for any row.
MAX_HALVINGS = 7
# How many finished rows one row may start from: 2^n combinations are tried.
MAX_REUSED_ROWS = 4
# Shared sums need scratch blocks in the cache, and finding them takes time for large matrices.
MAX_SHARED_SUMS = 6
MAX_SHARED_SIZE = 256

Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """dst = a ^ b, dst = x * a, dst = a / x, dst = a, or dst = 0."""

    op: Literal["xor", "double", "halve", "copy", "zero"]
    dst: int
    a: int = 0
    b: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over numbered operands: the inputs, then the outputs, then `scratch` blocks."""

    steps: tuple[Step, ...]
    scratch: int


@dataclass(frozen=True, slots=True, order=True)
class _Choice:
    """One way to compute one more row."""

    cost: int
    row: int
    reused: Row
    """The finished rows that it starts from."""
    halvings: int
    """How many negative powers of x there are."""


class _Lines(NamedTuple):
    """What a row sums up, in the order of evaluation, ending with x^0: a set of inputs for each power of x."""

    halved: list[set[int]]
    doubled: list[set[int]]


@lru_cache(maxsize=1024)
def program(coefficients: bytes, rows: int, columns: int) -> Program:
    """The program that computes matrix (rows, columns, given row by row) x inputs."""
    table = [tuple(coefficients[r * columns : (r + 1) * columns]) for r in range(rows)]
    order = _order(table)
    lines = [_lines(_reduced(table, choice.row, choice.reused), choice.halvings) for choice in order]
    shared: list[Step] = []
    if rows * columns <= MAX_SHARED_SIZE:
        shared = _share_sums([line for row in lines for part in row for line in part], columns + rows)
    steps = list(shared)
    apart = columns + rows + len(shared)  # the sum of a row's negative powers, while its positive ones are summed
    for choice, (halved, doubled) in zip(order, lines, strict=True):
        dst, more = columns + choice.row, [columns + r for r in choice.reused]
        if halved and doubled:
            steps.extend(_row_steps(halved, "halve", apart, []))
            steps.extend(_row_steps(doubled, "double", dst, [*more, apart]))
        elif halved:
            steps.extend(_row_steps(halved, "halve", dst, more))
        else:
            steps.extend(_row_steps(doubled, "double", dst, more))
    return Program(steps=tuple(steps), scratch=len(shared) + any(step.dst == apart for step in steps))


def _order(table: list[Row]) -> list[_Choice]:
    """Rows in the order in which they are computed."""
    todo = set(range(len(table)))
    order: list[_Choice] = []
    while todo:
        best = min(_choices(table, todo, [choice.row for choice in order[-MAX_REUSED_ROWS:]]))
        todo.remove(best.row)
        order.append(best)
    return order


def _choices(table: list[Row], todo: set[int], finished: list[int]) -> Iterator[_Choice]:
    subsets = [subset for n in range(len(finished) + 1) for subset in combinations(finished, n)]
    for row in todo:
        for reused in subsets:
            coefficients = _reduced(table, row, reused)
            for halvings in range(MAX_HALVINGS + 1):
                scaled = _scaled(coefficients, halvings)
                shifts = max(max(scaled).bit_length() - 1, halvings)
                xors = sum(value.bit_count() for value in scaled) + len(reused)
                yield _Choice(xors + SHIFT_COST * shifts, row, reused, halvings)


def _scaled(coefficients: Row, doublings: int) -> Row:
    """x^doublings times each."""
    return tuple(int(PRODUCTS[1 << doublings, value]) for value in coefficients)


def _reduced(table: list[Row], row: int, reused: Row) -> Row:
    """What is left to compute of a row that starts from the sum of others."""
    coefficients = list(table[row])
    for other in reused:
        coefficients = [a ^ b for a, b in zip(coefficients, table[other], strict=True)]
    return tuple(coefficients)


def _lines(coefficients: Row, halvings: int) -> _Lines:
    """Negative powers from the lowest and positive ones from the highest; x^0 is with these if there are any."""

    def line(power: int) -> set[int]:
        return {c for c, value in enumerate(scaled) if value >> (power + halvings) & 1}

    scaled = _scaled(coefficients, halvings)
    highest = max(scaled).bit_length() - 1 - halvings
    if not halvings:
        return _Lines([], [line(power) for power in range(max(highest, 0), -1, -1)])
    below = [line(power) for power in range(-halvings, 0)]
    if highest <= 0:
        return _Lines([*below, line(0)], [])
    return _Lines([*below, set()], [line(power) for power in range(highest, -1, -1)])


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


def _row_steps(lines: list[set[int]], shift: Literal["double", "halve"], dst: int, reused: list[int]) -> list[Step]:
    steps: list[Step] = []
    held: int | None = None  # the operand that holds the sum: another one until the first step writes dst
    for position, line in enumerate(lines):
        if held is not None:
            steps.append(Step(shift, dst, held))
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
