# SPDX-License-Identifier: Apache-2.0
"""Ending the writers of an older generation, so that nobody writes into memory that is about to be trusted."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

FENCE_TIMEOUT = timedelta(seconds=5)


@dataclass(kw_only=True, eq=False)
class Worker:
    """One training process known to this node. Its pidfd names the process even after the pid is reused."""

    rank: int
    pid: int
    pidfd: int
    generation: int
    local_world_size: int
    world_size: int

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        os.close(self.pidfd)


def end(workers: Iterable[Worker], timeout: timedelta = FENCE_TIMEOUT) -> list[Worker]:
    """Kill the workers and wait until they are gone. Returns those that would not die in time.

    torchrun has normally ended them already; those left are orphans of an agent that was killed.
    """
    pending = list(workers)
    for worker in pending:
        with contextlib.suppress(ProcessLookupError):  # it has already gone: what we wanted
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
    deadline = time.monotonic() + timeout.total_seconds()
    poll = select.poll()
    for worker in pending:
        poll.register(worker.pidfd, select.POLLIN)
    while pending and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            pending = [worker for worker in pending if worker.pidfd != fd]
    return pending
