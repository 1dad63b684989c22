# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the conversation with its node's snapshot process."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .client import Client
from .copier import SlotMemory
from .errors import DamageError, ProtocolError
from .held import ShardRecord, failing_buckets, unpack_record
from .stripes import BUCKET_BYTES, runs


@dataclass(frozen=True, kw_only=True)
class Place:
    """This worker's place in its job, from torchrun's environment."""

    socket: str
    job: str
    generation: int
    rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Place | None":
        """None outside a refound agent."""
        env = os.environ
        if "REFOUND_SOCKET" not in env:
            return None
        return cls(
            socket=env["REFOUND_SOCKET"],
            job=env["REFOUND_JOB"],
            generation=int(env["REFOUND_GENERATION"]),
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE"]),
        )


class Link:
    """One worker's connection. Calls may block: `begin` while both slots are needed, `shard` while it is rebuilt."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._client = Client(Path(place.socket))
        self._slots: dict[int, SlotMemory] = {}
        self._client.call(
            {
                "op": "hello",
                "job": place.job,
                "generation": place.generation,
                "rank": place.rank,
                "world_size": place.world_size,
                "local_world_size": place.local_world_size,
            }
        )

    def restore_facts(self) -> dict[str, Any]:
        """What to go on from: source, step, world_size, notes."""
        return self._client.call({"op": "restore"})[0]

    def shard(self, rank: int) -> np.ndarray:
        """A rank's shard, read-only and checked once more here. Raises DamageError if it is not what was saved."""
        return self._shard(rank, None)

    def ranges(self, rank: int, ranges: list[tuple[int, int]]) -> np.ndarray:
        """The same, of which only these byte ranges [low, high) are fetched and checked; the rest may be anything."""
        return self._shard(
            rank, sorted({b for low, high in ranges for b in range(low // BUCKET_BYTES, -(-high // BUCKET_BYTES))})
        )

    def _shard(self, rank: int, buckets: list[int] | None) -> np.ndarray:
        message: dict[str, Any] = {"op": "shard", "rank": rank}
        if buckets is not None:
            message["spans"] = [[first, first + count] for first, count in runs(buckets, len(buckets))]
        reply, body, fds = self._client.call(message)
        try:
            record: ShardRecord | None = unpack_record(reply.get("ranks"), body).get(rank)
            if record is None or len(fds) != 1:
                raise ProtocolError("the snapshot process sent no shard")
            array = SlotMemory(fds[0], record.size_bytes, writable=False).array
        finally:
            for fd in fds:
                os.close(fd)
        if bad := failing_buckets(array, record.checksums, buckets):
            raise DamageError(f"rank {rank}'s shard changed in memory after it was verified (buckets {bad[:4]})")
        return array

    def reject(self, reason: str) -> None:
        """What was restored is damaged in a way that no checksum shows: the next restart must not try it again."""
        self._client.call({"op": "reject", "reason": reason})

    def begin(self, step: int, size_bytes: int) -> SlotMemory:
        """A slot for the snapshot of `step`."""
        reply, _, fds = self._client.call({"op": "begin", "step": step, "size_bytes": size_bytes})
        try:
            for number in reply["gone"]:
                self._slots.pop(number).close()
            if fds:
                self._slots[reply["slot"]] = SlotMemory(fds[0], size_bytes)
        finally:
            for fd in fds:
                os.close(fd)
        return self._slots[reply["slot"]]

    def complete(
        self,
        step: int,
        checksums: np.ndarray,
        replica_checks: dict[str, int],
        costs: dict[str, float] | None = None,
        objection: str = "",
    ) -> None:
        """The slot holds all of `step`. With an objection it is never committed, on any node.

        costs: of the snapshot before it (`tuning.Costs`).
        """
        facts = {"replica_checks": replica_checks, "costs": costs, "objection": objection}
        message = {"op": "complete", "step": step, **facts}
        self._client.call(message, checksums.astype("<u4").tobytes())

    def interval(self, step: int) -> dict[str, Any]:
        """Wait until `step` is committed; {"every", "why"} if its commit says how often to take a snapshot."""
        return self._client.call({"op": "interval", "step": step})[0]

    def loaded(self, names: list[str]) -> None:
        """What this worker has imported (`preload.py`)."""
        self._client.call({"op": "modules", "names": names})

    def abort(self) -> None:
        """Give the slot back unwritten."""
        self._client.call({"op": "abort"})

    def wait_committed(self, step: int, timeout_ms: int) -> bool:
        """Wait until all nodes hold `step`."""
        return bool(self._client.call({"op": "wait", "step": step, "timeout_ms": timeout_ms})[0]["committed"])

    def finish(self) -> None:
        """This rank is done for good."""
        self._client.call({"op": "finish"})

    def close(self) -> None:
        """End the conversation; a call that waits in another thread gets a ConnectionError."""
        self._client.shutdown()
