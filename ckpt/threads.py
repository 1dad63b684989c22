# SPDX-License-Identifier: Apache-2.0
"""Starting threads in a process that may have run out of memory.

`threading.Thread.start` waits, without limit, for the new thread to say that it runs. One that cannot get its first few
bytes never says so, and whoever started it, perhaps with a lock in hand, stands still for ever.
"""

import _thread
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

_BEGIN_WITHIN = timedelta(seconds=5)
_TRY_AGAIN = timedelta(milliseconds=100)
PATIENCE = timedelta(seconds=5)
"""For threads that a process cannot do without."""


class NoThreadError(MemoryError):
    """The process gets no memory for another thread."""


def start_thread(target: Callable[..., None], *arguments: Any, patience: timedelta = timedelta(0)) -> None:
    """Run `target(*arguments)` in a daemon thread.

    Tries again for as long as `patience` says, since other threads may give memory back. Raises NoThreadError if none
    begins to run; it is certain then that `target` will not be called.
    """
    deadline = time.monotonic() + patience.total_seconds()
    while not _begin(target, arguments):
        if time.monotonic() > deadline:
            raise NoThreadError(f"no memory for another thread ({threading.active_count()} run)")
        time.sleep(_TRY_AGAIN.total_seconds())


def _begin(target: Callable[..., None], arguments: tuple[Any, ...]) -> bool:
    begun, decided = _thread.allocate_lock(), _thread.allocate_lock()
    begun.acquire()

    def run() -> None:
        if decided.acquire(blocking=False):  # else it comes too late: it has been given up
            begun.release()
            target(*arguments)

    try:
        _thread.start_new_thread(run, ())
    except (RuntimeError, MemoryError):
        return False
    return begun.acquire(timeout=_BEGIN_WITHIN.total_seconds()) or not decided.acquire(blocking=False)
