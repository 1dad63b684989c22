# SPDX-License-Identifier: Apache-2.0
"""The threads: same bytes, out of training's way, and gone when told to."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from refound.erasure import Code, ErasureError, Workers, checksum, pool
from refound.erasure.field import product


@pytest.mark.parametrize("threads", [1, 3])
def test_strips_give_the_bytes_of_the_whole(threads: int, rng: np.random.Generator, monkeypatch):
    monkeypatch.setattr(pool, "MIN_STRIP_BYTES", 4096)
    lengths = [100_001, 77_777, 0, 12_288]
    padded = rng.integers(0, 256, (4, 100_001), dtype=np.uint8)
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 0
    outs = np.full((2, 100_001), 9, dtype=np.uint8)
    ins = [row[:length].copy() for row, length in zip(padded, lengths, strict=True)]
    with Workers(threads) as workers:
        workers.apply(Code(4, 2).parity_matrix, ins, list(outs))
        assert workers.checksums([*ins, *outs]) == [checksum(buffer) for buffer in (*ins, *outs)]
    assert np.array_equal(outs, product(Code(4, 2).parity_matrix, padded))


def test_bad_input_is_refused_before_any_write():
    out = np.full(8, 9, dtype=np.uint8)
    with Workers(1) as workers:
        with pytest.raises(ErasureError, match="overlaps"):
            workers.apply([[1]], [out], [out])
        with pytest.raises(ErasureError, match="no contiguous buffer"):
            workers.checksums([b"fine", "text"])
    assert (out == 9).all()


def test_an_error_in_one_strip_comes_out_when_all_have_ended(monkeypatch, rng: np.random.Generator):
    monkeypatch.setattr(pool, "MIN_STRIP_BYTES", 4096)
    calls = []

    def failing(kernel, matrix, ins, outs, *, zero):
        calls.append(len(outs[0]))
        if len(calls) == 1:
            raise MemoryError("no room")

    monkeypatch.setattr(pool, "run_segments", failing)
    data = np.zeros(40_960, dtype=np.uint8)
    with Workers(1) as workers, pytest.raises(MemoryError, match="no room"):
        workers.apply([[1]], [data], [data.copy()])
    assert sum(calls) == data.size


def thread_priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_threads_stay_on_their_cores_at_low_priority():
    core, before = min(os.sched_getaffinity(0)), thread_priority()
    with Workers(1, cores=[core], niceness=7) as workers:
        affinity, priority = workers._executor.submit(lambda: (os.sched_getaffinity(0), thread_priority())).result()
    assert affinity == {core} and priority == max(before, 7)
    assert thread_priority() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("refound-erasure")]


def test_threads_of_a_job_that_was_started_nicer_stay_so():
    def from_a_nice_thread() -> int:  # a thread hands its niceness on to those that it starts
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 18)
        with Workers(1, niceness=3) as workers:
            return workers._executor.submit(thread_priority).result()

    with ThreadPoolExecutor(1) as other:
        assert other.submit(from_a_nice_thread).result() == 18


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads = 0"),
        ({"niceness": 20}, "niceness = 20"),
        ({"niceness": -1}, "niceness = -1"),
        ({"cores": [10_000]}, "cores = "),
        ({"cores": []}, "cores = "),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ErasureError, match=words):
        Workers(**options)
