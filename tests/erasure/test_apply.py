# SPDX-License-Identifier: Apache-2.0
"""The primitive on every backend: right at any length and offset, and strict before it writes."""

import mmap
import threading
from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.erasure import Code, ErasureError, apply, checksum, portable
from refound.erasure.backends import Kernel
from refound.erasure.field import PRODUCTS, product
from refound.erasure.linear import apply_with
from refound.erasure.plan import program

GUARD = 64
LENGTHS = [
    *range(1, 258),
    *range(4090, 4103),
    *range(portable.BLOCK_BYTES - 2, portable.BLOCK_BYTES + 3),
    500_001,
]


def guarded(size: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """A buffer of `size` bytes at an odd place between guard bytes, and the whole that it lies in."""
    whole = np.full(size + offset + 2 * GUARD, 0xA5, dtype=np.uint8)
    return whole[GUARD + offset : GUARD + offset + size], whole


def test_all_products(kernel: Kernel):
    every = np.arange(256, dtype=np.uint8)
    outs = np.zeros((256, 256), dtype=np.uint8)
    apply_with(kernel, every[:, None], [every], list(outs))
    assert np.array_equal(outs, PRODUCTS)


def test_every_length_at_odd_offsets_between_guards(kernel: Kernel, rng: np.random.Generator):
    code = Code(3, 2)
    for n, size in enumerate(LENGTHS):
        ins = []
        for c in range(3):
            source, _ = guarded(size, (n * 5 + c * 3) % 17)
            source[:] = rng.integers(0, 256, size, dtype=np.uint8)
            ins.append(source)
        outs, wholes = zip(*[guarded(size, (n * 7 + r) % 19) for r in range(2)], strict=True)
        before = [source.copy() for source in ins]
        apply_with(kernel, code.parity_matrix, ins, outs)
        assert np.array_equal(np.stack(outs), product(code.parity_matrix, np.stack(ins))), size
        assert all(np.array_equal(a, b) for a, b in zip(ins, before, strict=True))
        for out, whole in zip(outs, wholes, strict=True):
            assert int((whole == 0xA5).sum()) - int((out == 0xA5).sum()) == whole.size - size


@settings(deadline=None)
@given(st.data())
def test_any_matrix(kernel: Kernel, data: st.DataObject):
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 12))
    # Few distinct values make rows alike, which is where the program takes its short cuts.
    values = data.draw(st.sampled_from([st.integers(0, 255), st.integers(0, 3), st.just(1)]))
    cells = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    matrix = np.array(cells, dtype=np.uint8).reshape(rows, columns)
    size = data.draw(st.integers(1, 600))
    ins = np.random.default_rng(size).integers(0, 256, (columns, size), dtype=np.uint8)
    outs = np.full((rows, size), 7, dtype=np.uint8)
    apply_with(kernel, matrix, list(ins), list(outs))
    assert np.array_equal(outs, product(matrix, ins))


@settings(deadline=None)
@given(st.data())
def test_any_code_length_and_loss(kernel: Kernel, data: st.DataObject):
    k, m = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    code, size = Code(k, m), data.draw(st.integers(1, 5000))
    lost = data.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=m, unique=True))
    symbols = np.random.default_rng(size).integers(0, 256, (k + m, size), dtype=np.uint8)
    apply_with(kernel, code.parity_matrix, list(symbols[:k]), list(symbols[k:]))
    have = data.draw(st.permutations([i for i in range(k + m) if i not in lost]))[:k]
    rebuilt = np.zeros((len(lost), size), dtype=np.uint8)
    apply_with(kernel, code.rebuild_matrix(have, lost), [symbols[i] for i in have], list(rebuilt))
    assert np.array_equal(rebuilt, symbols[lost])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=4, max_size=4), extra=st.integers(0, 50))
def test_short_inputs_count_as_padded_with_zeros(kernel: Kernel, lengths: list[int], extra: int):
    size = max(*lengths, 1) + extra
    padded = np.zeros((4, size), dtype=np.uint8)
    for row, length in zip(padded, lengths, strict=True):
        row[:length] = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    outs = np.full((2, size), 9, dtype=np.uint8)
    ins = [row[:length].copy() for row, length in zip(padded, lengths, strict=True)]
    apply_with(kernel, Code(4, 2).parity_matrix, ins, list(outs))
    assert np.array_equal(outs, product(Code(4, 2).parity_matrix, padded))


def test_every_kind_of_buffer(kernel: Kernel):
    with mmap.mmap(-1, 5) as mapped:
        mapped[:] = b"mmap!"
        out, plain = bytearray(5), np.zeros(5, dtype=np.uint8)
        sources = [mapped, memoryview(b"views"), b"bytes", bytearray(b"arrays"[:5])]
        apply_with(kernel, [[1, 1, 1, 1], [0, 0, 1, 0]], sources, [out, plain])
        # No view of the mapping is kept, or closing it would raise.
    expected = bytes(a ^ b ^ c ^ d for a, b, c, d in zip(b"mmap!", b"views", b"bytes", b"array", strict=True))
    assert bytes(out) == expected and plain.tobytes() == b"bytes"


def test_threads_do_not_disturb_each_other(kernel: Kernel, rng: np.random.Generator):
    matrix = Code(4, 2).parity_matrix
    ins = rng.integers(0, 256, (4, 400_000), dtype=np.uint8)
    expected = product(matrix, ins)
    results = [np.zeros((2, 400_000), dtype=np.uint8) for _ in range(4)]
    threads = [threading.Thread(target=apply_with, args=(kernel, matrix, list(ins), list(r))) for r in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, expected) for result in results)


def test_the_default_backend_is_used_by_apply():
    out = bytearray(3)
    apply([[2, 1]], [b"\x80\x01\x00", b"\x01"], [out])
    assert bytes(out) == bytes([0x1D ^ 1, 2, 0])


def _zeros(size: int = 8) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


_shared = np.zeros(100, dtype=np.uint8)


@pytest.mark.parametrize(
    ("matrix", "ins", "outs", "words"),
    [
        ([[1]], [_shared[:8]], [_shared[7:15]], r"outs\[0\] overlaps ins\[0\]"),
        ([[1]], [_shared[:8]], [_shared[:8]], "overlaps"),
        ([[1]], [_shared[8:16]], [_shared[:9]], r"ins\[0\] overlaps outs\[0\]"),
        ([[1], [1]], [_zeros()], [_shared[:8], _shared[4:12]], r"outs\[1\] overlaps outs\[0\]"),
        ([[1, 1]], [_shared[:50], _shared[10:20]], [_shared[30:80]], r"outs\[0\] overlaps ins\[0\]"),
        ([[1]], [_zeros().astype(np.int8)], [_zeros()], r"ins\[0\] has dtype int8"),
        ([[1]], [array("d", [1.0])], [_zeros()], "format 'd'"),
        ([[1]], [3], [_zeros()], "int, which is no buffer"),
        ([[1]], [_zeros(16)[::2]], [_zeros()], "not contiguous"),
        ([[1]], [memoryview(bytes(16))[::2]], [_zeros()], "not contiguous"),
        ([[1]], [_zeros().reshape(2, 4)], [_zeros()], "2 dimensions"),
        ([[1]], [_zeros()], [_zeros(16)[::2]], r"outs\[0\] is not contiguous"),
        ([[1]], [_zeros()], [bytes(8)], "read-only"),
        ([[1]], [_zeros(9)], [_zeros(8)], r"ins\[0\] has 9 bytes"),
        ([[1], [1]], [_zeros()], [_zeros(8), _zeros(7)], r"outs\[1\] has 7 bytes"),
        ([[1]], [_zeros(0)], [_zeros(0)], "length zero"),
        ([[1, 1]], [_zeros()], [_zeros()], "takes 2 inputs"),
        ([[1], [1]], [_zeros()], [_zeros()], "gives 2 outputs"),
        (np.zeros((0, 1), dtype=np.uint8), [_zeros()], [], "at least one row"),
        (np.zeros((1, 0), dtype=np.uint8), [], [_zeros()], "at least one row"),
        ([1], [_zeros()], [_zeros()], "shape"),
        ([[256]], [_zeros()], [_zeros()], r"0\.\.255"),
        ([[-1]], [_zeros()], [_zeros()], r"0\.\.255"),
        ([[1.0]], [_zeros()], [_zeros()], r"0\.\.255"),
    ],
)
def test_bad_input_is_refused_before_any_write(kernel: Kernel, matrix, ins, outs, words):
    for buffer in outs:
        if not isinstance(buffer, bytes):
            buffer[:] = 0x5A
    with pytest.raises(ErasureError, match=words):
        apply_with(kernel, matrix, ins, outs)
    for buffer in outs:
        assert isinstance(buffer, bytes) or (buffer == 0x5A).all()


def test_inputs_may_share_memory(kernel: Kernel):
    data, out = np.arange(100, dtype=np.uint8), np.zeros(60, dtype=np.uint8)
    apply_with(kernel, [[1, 2]], [data[:60], data[40:]], [out])
    assert np.array_equal(out, data[:60] ^ PRODUCTS[2, data[40:]])


def test_the_last_parity_is_a_plain_xor_of_the_others():
    doublings = [step for step in program(Code(4, 2).parity_matrix.tobytes(), 2, 4).steps if step.op == "double"]
    assert {step.dst for step in doublings} != {4, 5}, "one of the two parities needs no doubling"


def test_neighbours_lost_are_rebuilt_by_few_halvings():
    """Of (4, 2): two data symbols side by side. By doublings alone it takes seven of them."""
    for first in range(3):
        lost = (first, first + 1)
        matrix = Code(4, 2).rebuild_matrix([c for c in range(6) if c not in lost], lost)
        operations = Counter(step.op for step in program(matrix.tobytes(), 2, 4).steps)
        assert operations["double"] + operations["halve"] <= 4, lost


def test_blocks_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    monkeypatch.setattr(portable, "BLOCK_BYTES", 4093)
    ins = rng.integers(0, 256, (4, 20_001), dtype=np.uint8)
    outs = np.zeros((2, 20_001), dtype=np.uint8)
    apply_with(portable.apply, Code(4, 2).parity_matrix, list(ins), list(outs))
    assert np.array_equal(outs, product(Code(4, 2).parity_matrix, ins))


def test_more_than_two_gibibytes():
    """Lengths in ISA-L are 32-bit integers. The first input is zero pages, which take no memory."""
    size = (1 << 31) + 4097
    first, out = np.zeros(size, dtype=np.uint8), np.empty(size, dtype=np.uint8)
    places = [0, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, 1 << 31, size - 1]
    first[places] = range(1, 7)
    apply([[1, 1]], [first, b"\x10" * 4097], [out])
    assert out[places].tolist() == [0x11, 2, 3, 4, 5, 6]
    assert out[4096] == 0x10 and out[4097] == 0
    assert checksum(out) == checksum(out[1 << 30 :], checksum(out[: 1 << 30]))
