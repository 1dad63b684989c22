# SPDX-License-Identifier: Apache-2.0
"""Every backend that this machine can run, and stripes made by reedsolo itself."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import reedsolo
from refound.erasure import isal, portable
from refound.erasure.backends import Kernel


def _kernels() -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {"portable": portable.apply}
    # Absent only on platforms without the wheel; test_backends says which ones must have it.
    with contextlib.suppress(isal.LibraryError):
        kernels["isal"] = isal.load().apply
    return kernels


KERNELS = _kernels()


@pytest.fixture(scope="session", params=sorted(KERNELS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def reedsolo_stripes(k: int, m: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random data encoded by reedsolo, column by column: uint8, shape (k + m, columns)."""
    data = rng.integers(0, 256, (k, columns), dtype=np.uint8)
    if m == 0:
        return data
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0, prim=0x11D)
    words = [np.frombuffer(bytes(codec.encode(data[:, c].tobytes())), dtype=np.uint8) for c in range(columns)]
    return np.ascontiguousarray(np.stack(words, axis=1))


@pytest.fixture
def stripes(rng: np.random.Generator) -> Callable[[int, int, int], np.ndarray]:
    return lambda k, m, columns: reedsolo_stripes(k, m, columns, rng)
