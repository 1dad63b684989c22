# SPDX-License-Identifier: Apache-2.0
"""Where a conversion reads the shards of all ranks: a checkpoint on disk, or a live job's committed snapshot."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .checkpoints import facts_of, snapshot_of
from .client import Client, sockets_of
from .copier import SlotMemory
from .errors import ConfigError, DamageError, ProtocolError, SnapshotError
from .examine import find_checkpoints
from .folder import Folder, shard_name
from .held import failing_buckets, unpack_record

_TRIES, _PAUSE = 100, timedelta(milliseconds=50)


class Source(Protocol):
    """The shards of one snapshot of a job."""

    facts: dict[str, Any]
    """step, generation, world_size, job."""

    def shard(self, rank: int) -> np.ndarray:
        """uint8, read-only use, proven. Raises DamageError."""
        ...


class DiskSource:
    """A checkpoint. Sound files are mapped, damaged ones rebuilt in memory from parity."""

    def __init__(self, path: Path) -> None:
        path = find_checkpoints(path)[-1].resolve()
        snapshot = snapshot_of(path)
        assert snapshot is not None
        self._folder = Folder(path)
        facts = facts_of(path.parent, snapshot)
        self.facts = {name: facts.get(name) for name in ("step", "generation", "world_size", "job")}

    def shard(self, rank: int) -> np.ndarray:
        record = self._folder.place(rank).record
        with contextlib.suppress(OSError, ValueError):  # missing, unreadable or empty: rebuilt below
            found = np.memmap(self._folder.path / shard_name(rank), np.uint8, "r")
            if len(found) == record.size_bytes and not failing_buckets(found, record.checksums):
                return found
        array = np.empty(record.size_bytes, np.uint8)
        self._folder.fill(rank, array)
        return array


@dataclass
class _Pinned:
    client: Client
    facts: dict[str, Any]


class LiveSource:
    """The newest committed snapshot of a job whose nodes are all on this machine, kept from being replaced."""

    def __init__(self, pinned: list[_Pinned]) -> None:
        self._holder = {rank: p.client for p in pinned for rank in p.facts["ranks"]}
        self.facts = {name: pinned[0].facts[name] for name in ("step", "generation", "world_size", "job")}
        if missing := sorted(set(range(self.facts["world_size"])) - set(self._holder)):
            raise SnapshotError(
                f"ranks {missing} of job {self.facts['job']!r} are on other machines. Convert a checkpoint of it"
            )

    def shard(self, rank: int) -> np.ndarray:
        reply, body, fds = self._holder[rank].call({"op": "look", "rank": rank})
        try:
            record = unpack_record(reply.get("ranks"), body).get(rank)
            if record is None or len(fds) != 1:
                raise ProtocolError("the snapshot process sent no shard")
            array = SlotMemory(fds[0], record.size_bytes, writable=False).array
        finally:
            for fd in fds:
                os.close(fd)
        if bad := failing_buckets(array, record.checksums):
            raise DamageError(
                f"rank {rank}'s shard is damaged in memory (buckets {bad[:4]}); the next snapshot heals it"
            )
        return array


@contextmanager
def open_source(source: str) -> Iterator[Source]:
    """A checkpoint's path (or that of a directory of them: the newest), or a job's name.

    Raises ConfigError if it is neither.
    """
    if Path(source).exists() or "/" in source:
        yield DiskSource(Path(source))
        return
    paths = sockets_of(source)
    if not paths:
        raise ConfigError(f"{source!r} is neither a checkpoint nor a job on this machine. See: refound status")
    with contextlib.ExitStack() as stack:
        yield LiveSource(_pin(paths, stack))


def _pin(paths: list[Path], stack: contextlib.ExitStack) -> list[_Pinned]:
    """Pin the same committed snapshot on all nodes: a commit reaches them one after another."""
    for _ in range(_TRIES):
        with contextlib.ExitStack() as attempt:
            pinned = []
            for path in paths:
                with contextlib.suppress(OSError):  # nobody answers: that process has died
                    client = Client(path)
                    attempt.callback(client.close)
                    pinned.append(_Pinned(client, client.call({"op": "keep"})[0]))
            if pinned and len({(p.facts["step"], p.facts["generation"]) for p in pinned}) == 1:
                stack.enter_context(attempt.pop_all())
                return pinned
        time.sleep(_PAUSE.total_seconds())
    raise SnapshotError("the nodes of the job hold no committed snapshot in common")
