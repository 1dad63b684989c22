# SPDX-License-Identifier: Apache-2.0
"""A worker without a model: it writes snapshots piece by piece when told to, and compares what is restored."""

import socket
from typing import Any

import numpy as np

from ..ckpt import wire
from ..ckpt.copier import SlotMemory
from ..ckpt.errors import SnapshotError
from ..ckpt.held import bucket_checksums
from ..ckpt.link import Link, Place
from ..ckpt.stripes import BUCKET_BYTES

_BUCKETS = (2, 1, 3, 2)
"""Of rank 0, 1, …: uneven, so that some chunks end in the middle of a vector."""


def size_bytes(rank: int) -> int:
    return _BUCKETS[rank % len(_BUCKETS)] * BUCKET_BYTES


def state_of(seed: int, generation: int, step: int, rank: int) -> np.ndarray:
    """What a rank's state is after a step: uint8 (size_bytes(rank),), the same for whoever asks."""
    rng = np.random.default_rng([seed, generation, step, rank])
    return np.frombuffer(rng.bytes(size_bytes(rank)), np.uint8)


class Worker:
    """One rank of one generation."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._seed = 0
        self._slot: SlotMemory | None = None
        self._data = np.empty(0, np.uint8)

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what the campaign asks. Raises SnapshotError or OSError as the link does."""
        op = message["op"]
        if op == "join":
            self._seed = message["seed"]
            self._link = Link(Place(**message["place"]))
            return {}
        link = self._link
        if link is None:
            raise SnapshotError(f"{op} before join")
        if op == "restore":
            return self._restore(link)
        step, place = message["step"], link.place
        if op == "begin":
            self._data = state_of(self._seed, place.generation, step, place.rank)
            self._slot = link.begin(step, len(self._data))
            return {}
        slot = self._slot
        if slot is None:
            raise SnapshotError(f"{op} before begin")
        middle = len(self._data) // 2 + 4096
        if op == "half":
            slot.array[:middle] = self._data[:middle]
        elif op == "fill":
            slot.array[middle:] = self._data[middle:]
        elif op == "complete":
            link.complete(step, bucket_checksums(self._data), {})
        else:
            link.interval(step)  # waits for the commit, and raises what keeps it from coming
        return {}

    def _restore(self, link: Link) -> dict[str, Any]:
        """The facts, and how many bytes are not what they should be."""
        facts = link.restore_facts()
        if facts["source"] == "start":
            return {"facts": facts, "wrong_bytes": 0}
        found = link.shard(link.place.rank)
        expected = state_of(self._seed, facts["generation"], facts["step"], link.place.rank)
        if len(found) != len(expected):
            return {"facts": facts, "wrong_bytes": max(len(found), len(expected))}
        return {"facts": facts, "wrong_bytes": int(np.count_nonzero(found != expected))}


def serve(sock: socket.socket) -> None:
    """Do as told until the campaign closes its end."""
    worker = Worker()
    while True:
        try:
            message, _, _ = wire.receive(sock)
        except OSError:
            return
        try:
            reply = worker.handle(message)
        except (SnapshotError, OSError, ValueError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        wire.send(sock, {**reply, "to": message["op"], "step": message.get("step", 0)})
