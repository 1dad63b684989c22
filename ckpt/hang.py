# SPDX-License-Identifier: Apache-2.0
"""Workers that do not get on: one that has not reached `end_step` for `hang_s` is killed, so that torchrun restarts it.

Off unless `hang_s` is set, since only the user knows how long a step may take (an evaluation between two steps counts).
Time runs from the first `end_step` of a process to `close()`: what comes before the first, such as compiling, is not
watched. When one rank hangs the others wait for it and are found too; the whole group restarts anyway.
"""

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

from .client import Client
from .keeper import Keeper

HANG_ENV = "REFOUND_HANG_S"
_SAY_EVERY = 8
"""So many times within `hang_s` a worker says that it gets on."""
_LATE = timedelta(seconds=2)
"""A look may come this late without anything being amiss."""
_SAY_TIMEOUT = timedelta(seconds=2)


class Progress:
    """A worker's side: says now and then, on a connection of its own, that steps are made."""

    def __init__(self, socket_file: Path, rank: int, generation: int, hang_s: float) -> None:
        self._rank, self._generation, self._every_s = rank, generation, hang_s / _SAY_EVERY
        self._said_at = 0.0
        self._client: Client | None = Client(socket_file)
        self._client.sock.settimeout(_SAY_TIMEOUT.total_seconds())

    @classmethod
    def from_environment(cls, socket_file: str, rank: int, generation: int) -> "Progress | None":
        """None unless `hang_s` is set."""
        hang_s = float(os.environ.get(HANG_ENV, "0"))
        return cls(Path(socket_file), rank, generation, hang_s) if hang_s else None

    def step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if now - self._said_at >= self._every_s:
            self._said_at = now
            self._say(done=False)

    def close(self) -> None:
        """There will be no more steps, and nobody is to wait for them."""
        self._say(done=True)
        if self._client is not None:
            self._client.close()
            self._client = None

    def _say(self, *, done: bool) -> None:
        if self._client is None:
            return
        try:
            self._client.call({"op": "step", "rank": self._rank, "generation": self._generation, "done": done})
        except OSError:  # the snapshot process has gone or hangs: others see to that
            self._client.close()
            self._client = None


class Hangs:
    """The snapshot process's side."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._steps: dict[int, tuple[int, float]] = {}
        self._looked_at = time.monotonic()

    def step(self, rank: int, generation: int, *, done: bool) -> None:
        """A worker gets on, or has done all its steps."""
        with self._lock:
            self._steps.pop(rank, None)
            if not done:
                self._steps[rank] = (generation, time.monotonic())

    def look(self) -> None:
        """Kill the workers that hang. To be called again and again, every second or more often."""
        hang_s, now = self._keeper.conf.hang_s, time.monotonic()
        was_away, self._looked_at = now - self._looked_at > hang_s / 2 + _LATE.total_seconds(), now
        with self._lock:
            if was_away:  # this process was stopped, as its workers may have been: their time begins anew
                self._steps = {rank: (generation, now) for rank, (generation, _) in self._steps.items()}
            current = {r: at for r, (generation, at) in self._steps.items() if generation == self._keeper.generation}
        for rank, at in current.items():
            worker = self._keeper.workers.get(rank)
            if hang_s and now - at > hang_s and worker is not None and worker.generation == self._keeper.generation:
                self.step(rank, 0, done=True)
                self._keeper.event("worker hangs", rank=rank, pid=worker.pid, silent_s=round(now - at, 1))
                with contextlib.suppress(OSError):  # it has just ended by itself
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
