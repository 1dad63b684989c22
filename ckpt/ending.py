# SPDX-License-Identifier: Apache-2.0
"""How a job ends when an agent is lost at the very end.

An agent whose workers have succeeded waits in torchrun's exit barrier for the agents of the other nodes, for 300 s. If
one of them has been killed, its successor waits at the rendezvous for the others, who will not come: nobody has
anything left to do, and all stand still. So the snapshot processes agree that the job is over, once every rank has
called `close()`: then the barrier waits a few seconds more and no longer, and an agent that comes then ends at once.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError  # pyright: ignore[reportPrivateImportUsage]

_BARRIER_KEY = "torchelastic/agent/terminal_state"
_GRACE = timedelta(seconds=5)
_LOOK_EVERY = timedelta(milliseconds=500)


class RoundStore:
    """The store of a round as torchrun's agent uses it: torch's own, but for the wait of the exit barrier."""

    def __init__(self, store: Any, over: Callable[[], bool], grace: timedelta = _GRACE) -> None:
        """over: whether all ranks of the job have said that they are done."""
        self._store, self._over, self._grace = store, over, grace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """As torch's `Store.wait`; in the exit barrier it also returns when the job is over and the grace is too."""
        if not any(key.startswith(_BARRIER_KEY) for key in keys):
            return self._store.wait(keys) if timeout is None else self._store.wait(keys, timeout)
        end = time.monotonic() + (timeout or self._store.timeout).total_seconds()
        over_since = None
        while True:
            try:
                return self._store.wait(keys, min(_LOOK_EVERY, self._grace))
            except DistStoreError:
                now = time.monotonic()
                if over_since is None and self._over():
                    over_since = now
                if over_since is not None and now - over_since >= self._grace.total_seconds():
                    return None
                if now >= end:
                    raise
