# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, the checks on a foreign library, and the checksum of both implementations."""

import ctypes
import ctypes.util
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.erasure import Code, ErasureError, backend, backends, checksum, crc, isal
from refound.erasure.field import product

needs_isal = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """A backend chosen anew, and again after the test."""
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    backend.cache_clear()
    yield monkeypatch
    backend.cache_clear()


def test_linux_has_the_fast_backend(fresh: pytest.MonkeyPatch):
    assert backend().name == "isal" or not needs_isal
    assert backend().reason and backend().checksum_name.startswith("CRC32C")


def test_the_choice_can_be_forced(fresh: pytest.MonkeyPatch):
    fresh.setenv(backends.VARIABLE, "portable")
    assert backend().name == "portable" and backends.VARIABLE in backend().reason
    assert backend().library is None
    backend.cache_clear()
    fresh.setenv(backends.VARIABLE, "cuda")
    with pytest.raises(ErasureError, match="'cuda' is no backend"):
        backend()


def test_without_a_library_numpy_does_it_and_says_why(fresh: pytest.MonkeyPatch):
    fresh.setattr(isal, "candidates", lambda: iter(["libno-such-thing.so.9"]))
    assert backend().name == "portable"
    assert "libno-such-thing.so.9" in backend().reason and "pip install" in backend().reason
    assert checksum(b"123456789") == 0xE3069283
    backend.cache_clear()
    fresh.setenv(backends.VARIABLE, "isal")
    with pytest.raises(ErasureError, match="pip install"):
        backend()


def test_a_library_without_the_functions_is_refused():
    with pytest.raises(isal.LibraryError, match="no usable ISA-L"):
        isal.open_library(ctypes.util.find_library("c") or "libc.so.6")


class _Wrong:
    """ISA-L with one wrong answer."""

    def __init__(self, real: ctypes.CDLL, name: str):
        self._real, self._name = real, name

    def __getattr__(self, name: str):
        function = getattr(self._real, name)
        if name != self._name:
            return function
        if name == "crc32_iscsi":
            return lambda *args: function(*args) ^ 1

        def encode(size, columns, rows, tables, sources, targets):
            function(size, columns, rows, tables, sources, targets)
            if columns > 1 or size == 256:
                ctypes.memset(targets[rows - 1] + size - 1, 0xEE, 1)

        return encode


@pytest.mark.parametrize(("name", "words"), [("ec_encode_data", "wrong in GF"), ("crc32_iscsi", "wrong CRC32C")])
def test_a_library_that_computes_wrongly_is_refused(name: str, words: str):
    good = isal.load()
    bad = isal.Library(path="libwrong.so", _dll=_Wrong(good._dll, name))  # pyright: ignore[reportArgumentType]
    with pytest.raises(isal.LibraryError, match=words):
        isal.verify(bad)


@pytest.mark.parametrize("implementation", ["isal", "numpy"])
@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_checksums(implementation: str, data: bytes, value: int, fresh: pytest.MonkeyPatch):
    if implementation == "numpy":
        fresh.setenv(backends.VARIABLE, "portable")
    assert checksum(data) == value
    assert checksum(data[5:], checksum(data[:5])) == value


@settings(deadline=None)
@given(
    size=st.one_of(st.integers(0, 600), st.integers(32_700, 32_800), st.integers(98_300, 98_400)),
    cut=st.floats(0, 1),
    offset=st.integers(0, 9),
    value=st.integers(0, 2**32 - 1),
)
def test_both_checksums_agree_and_chain(size: int, cut: float, offset: int, value: int):
    data = np.random.default_rng(size).integers(0, 256, size + offset, dtype=np.uint8)[offset:]
    expected = checksum(data, value)
    assert crc.crc32c(data, value) == expected
    middle = int(size * cut)
    assert crc.crc32c(data[middle:], crc.crc32c(data[:middle], value)) == expected


def test_checksums_of_any_contiguous_buffer():
    values = np.arange(12, dtype=np.float64).reshape(3, 4)
    assert checksum(values) == checksum(values.tobytes()) == checksum(memoryview(values.tobytes()))
    assert checksum(np.empty((0, 3))) == checksum(b"") == 0
    with pytest.raises(ErasureError, match="contiguous"):
        checksum(values.T)
    with pytest.raises(ErasureError, match="contiguous"):
        checksum(np.zeros(9, dtype=np.uint8)[::2])
    with pytest.raises(ErasureError, match="no contiguous buffer"):
        checksum("text")
    for value in (-1, 2**32):
        with pytest.raises(ErasureError, match="no CRC32C"):
            checksum(b"", value)


def test_importing_it_does_not_import_torch():
    code = "import sys, refound.erasure as e; e.checksum(b'1'); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(sys.executable).parent)


def test_long_calls_are_cut_for_the_library(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator):
    monkeypatch.setattr(isal, "MAX_CALL_BYTES", 4096)
    library, data = isal.load(), rng.integers(0, 256, (3, 20_001), dtype=np.uint8)
    outs = np.zeros((2, 20_001), dtype=np.uint8)
    library.apply(Code(3, 2).parity_matrix, list(data), list(outs))
    assert np.array_equal(outs, product(Code(3, 2).parity_matrix, data))
    assert library.crc32c(data[0].ctypes.data, 20_001, 5) == crc.crc32c(data[0], 5)
