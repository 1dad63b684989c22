# SPDX-License-Identifier: Apache-2.0
"""A few threads that do erasure coding and checksums beside a training job without taking its cores."""

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from numpy.typing import ArrayLike

from .backends import backend
from .buffers import Buffer, as_raw_bytes
from .errors import ErasureError
from .linear import checked, run_segments

# Below this a strip costs more to hand over than it saves; above, one slow thread would hold up the rest.
MIN_STRIP_BYTES = 1 << 20
MAX_STRIP_BYTES = 32 << 20
STRIPS_PER_THREAD = 4
PAGE_BYTES = 4096


class Workers:
    """Threads for `apply` and `checksum`. Calls return when the work is done and may come from any thread.

    Strips of all inputs are worked on together, so each byte is read once. On Linux the threads run at a
    lower priority (`niceness`, 0..19), so that a training thread that wants the core gets it, and on `cores`
    only, if those are given. A context manager: leaving it ends the threads.

    Raises `ErasureError` for a number of threads below 1, a niceness outside 0..19, or cores that this
    process may not use.
    """

    def __init__(self, threads: int = 2, *, cores: Iterable[int] | None = None, niceness: int = 10) -> None:
        if threads < 1:
            raise ErasureError(f"threads = {threads}: at least one is needed")
        if not 0 <= niceness <= 19:
            raise ErasureError(f"niceness = {niceness}: it must be in 0..19")
        self._threads = threads
        self._cores = None if cores is None else _usable_cores(cores)
        self._niceness = niceness
        self._executor = ThreadPoolExecutor(threads, "refound-erasure", initializer=self._enter_thread)

    def _enter_thread(self) -> None:
        if sys.platform == "linux":  # where affinity and priority are a thread's own
            if self._cores is not None:
                os.sched_setaffinity(0, self._cores)
            thread = threading.get_native_id()
            # Never up: that is not for everyone to do, where the job itself was started with `nice`.
            niceness = max(os.getpriority(os.PRIO_PROCESS, thread), self._niceness)
            os.setpriority(os.PRIO_PROCESS, thread, niceness)

    def apply(self, matrix: ArrayLike, ins: Sequence[Buffer], outs: Sequence[Buffer]) -> None:
        """`refound.erasure.apply` on the threads, for buffers of the host. Raises what that raises."""
        coefficients, sources, targets = checked(matrix, ins, outs)
        kernel, size = backend().kernel, targets[0].size
        strip = size // (self._threads * STRIPS_PER_THREAD) // PAGE_BYTES * PAGE_BYTES
        strip = min(max(strip, MIN_STRIP_BYTES), MAX_STRIP_BYTES)
        futures = [
            self._executor.submit(
                run_segments,
                kernel,
                coefficients,
                [source[start : start + strip] for source in sources],
                [target[start : start + strip] for target in targets],
                zero=lambda out: out.fill(0),
            )
            for start in range(0, size, strip)
        ]
        _finish(futures)

    def checksums(self, buffers: Sequence[Buffer]) -> list[int]:
        """`refound.erasure.checksum` of each buffer. Raises what that raises."""
        crc32c = backend().crc32c
        arrays = [as_raw_bytes(buffer) for buffer in buffers]
        futures = [self._executor.submit(crc32c, array, 0) for array in arrays]
        _finish(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads, after the work that was already given to them."""
        self._executor.shutdown()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _usable_cores(cores: Iterable[int]) -> frozenset[int]:
    wanted = frozenset(cores)
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else wanted
    if not wanted or wanted - allowed:
        raise ErasureError(f"cores = {sorted(wanted)}; this process may use {sorted(allowed)}")
    return wanted


def _finish(futures: Sequence[Future]) -> None:
    """Wait for all before raising for any: no thread may still be writing when the caller takes over."""
    wait(futures)
    for future in futures:
        future.result()
