# SPDX-License-Identifier: Apache-2.0
"""One snapshot as one node holds it: its ranks' shards, its parity chunks and everybody's checksums."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..erasure import checksum
from .agreement import HeldView, SnapshotId
from .errors import ProtocolError
from .slots import Segment
from .stripes import BUCKET_BYTES, Group, choose_groups, chunk_buckets
from .wire import Message


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Length and checksums of one rank's shard: what proves it."""

    size_bytes: int
    """A multiple of BUCKET_BYTES."""
    checksums: np.ndarray
    """uint32 (size_bytes / BUCKET_BYTES,): CRC32C of each bucket, taken as it was copied."""


Record = dict[int, ShardRecord]
"""The shards of one position: rank → record."""

Spot = tuple[int, int]
"""(-1, bucket of the node's vector) or (parity chunk 0..m-1, bucket of the chunk)."""


def pack_record(record: Record) -> tuple[list[list[int]], bytes]:
    """A record as message parts: [[rank, bytes], …] and the checksums."""
    ranks = sorted(record)
    return (
        [[rank, record[rank].size_bytes] for rank in ranks],
        b"".join(record[rank].checksums.astype("<u4").tobytes() for rank in ranks),
    )


def unpack_record(ranks: object, body: bytes | memoryview) -> Record:
    """The inverse of `pack_record`. Raises ProtocolError if the lengths do not agree."""
    record: Record = {}
    if not isinstance(ranks, list) or len(body) % 4:
        raise ProtocolError("malformed record of shards")
    checksums = np.frombuffer(bytes(body), dtype="<u4").astype(np.uint32)
    at = 0
    for entry in ranks:
        rank, size_bytes = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(rank, int) or not isinstance(size_bytes, int) or size_bytes < 0 or size_bytes % BUCKET_BYTES:
            raise ProtocolError("malformed record of shards")
        count = size_bytes // BUCKET_BYTES
        record[rank] = ShardRecord(size_bytes=size_bytes, checksums=checksums[at : at + count])
        at += count
    if at != len(checksums):
        raise ProtocolError("a record of shards has more or fewer checksums than buckets")
    return record


def record_buckets(record: Record) -> int:
    """Length of the position's vector."""
    return sum(shard.size_bytes for shard in record.values()) // BUCKET_BYTES


def record_checksums(record: Record) -> np.ndarray:
    """Checksums along the position's vector: ranks in rising order."""
    return np.concatenate([np.empty(0, np.uint32), *(record[rank].checksums for rank in sorted(record))])


class Held:
    """A snapshot in this node's memory. Not thread-safe: the keeper's lock guards it.

    A shard is written by a worker through its mapping and counts from the moment it is complete; nothing here looks
    at the bytes of an incomplete one.
    """

    def __init__(self, snapshot: SnapshotId, *, position: int, nodes: int, world_size: int, k: int, m: int) -> None:
        self.id = snapshot
        self.position = position
        self.nodes = nodes
        self.world_size = world_size
        self.wish = (k, m)
        self.groups = choose_groups(nodes, k, m)
        self.group: Group = next(group for group in self.groups if position in group.members)
        self.index = position - self.group.first
        self.shards: dict[int, Segment] = {}
        self.records: dict[int, Record] = {}
        self.parity: list[Segment] = []
        self.parity_checksums: list[np.ndarray] = []
        self.data_complete = False
        self.parity_complete = not self.group.m
        self.handed_on: list[Segment] = []
        """Parity rows 1..m-1 of the stripe that this node encodes, for the nodes that keep them."""
        self.handed_on_checksums: list[np.ndarray] = []
        self.handed_on_buckets = 0
        """How much of each of them is ready."""
        self.committed = False
        self.damaged_data: set[int] = set()
        self.damaged_parity: set[tuple[int, int]] = set()
        self.replica_checks: dict[str, int] = {}
        self.objection = ""
        """Why a rank of this node does not want it committed (NaN in its state, say); empty if none objects."""
        self.pins = 0

    @property
    def own(self) -> Record:
        return self.records.setdefault(self.position, {})

    @property
    def records_complete(self) -> bool:
        """Every member of the group has said what its shards are."""
        return all(self.records.get(position) for position in self.group.members)

    @property
    def chunk(self) -> int:
        """Buckets in a chunk; needs `records_complete`."""
        return chunk_buckets([record_buckets(self.records[p]) for p in self.group.members], self.group.k)

    def data_views(self, start: int, count: int) -> Iterator[tuple[Segment, int, int]]:
        """Where buckets [start, start+count) of the vector lie: (segment, first byte, bytes), in order.

        Buckets beyond the end of the vector are left out: they count as zeros.
        """
        first = 0
        for rank in sorted(self.own):
            buckets = self.own[rank].size_bytes // BUCKET_BYTES
            low, high = max(start, first), min(start + count, first + buckets)
            if low < high:
                yield self.shards[rank], (low - first) * BUCKET_BYTES, (high - low) * BUCKET_BYTES
            first += buckets

    def parity_view(self, index: int, start: int, count: int) -> np.ndarray:
        """Buckets of this node's parity chunk `index` (0..m-1)."""
        return self.parity[index].array[start * BUCKET_BYTES : (start + count) * BUCKET_BYTES]

    def verify(self) -> None:
        """Check every byte against its checksum and note the buckets that fail."""
        self.damaged_data, self.damaged_parity = self.failing()

    def failing(self) -> tuple[set[int], set[tuple[int, int]]]:
        """Buckets of the vector, and (chunk, bucket) of the parity, that fail their checksum."""
        bad = [spot for spot, data, expected in self.spots() if checksum(data) != expected]
        return {bucket for index, bucket in bad if index < 0}, {spot for spot in bad if spot[0] >= 0}

    def spots(self) -> Iterator[tuple[Spot, np.ndarray, int]]:
        """All buckets that are here: which, the bytes themselves, and their checksum."""
        first = 0
        for rank in sorted(self.own) if self.data_complete else ():
            array, sums = self.shards[rank].array, self.own[rank].checksums
            for bucket, expected in enumerate(sums):
                yield (-1, first + bucket), array[bucket * BUCKET_BYTES : (bucket + 1) * BUCKET_BYTES], int(expected)
            first += len(sums)
        for index, segment in enumerate(self.parity if self.parity_complete else ()):
            for bucket, expected in enumerate(self.parity_checksums[index]):
                low = bucket * BUCKET_BYTES
                yield (index, bucket), segment.array[low : low + BUCKET_BYTES], int(expected)

    def view(self) -> HeldView:
        """What this node tells the others."""
        sizes = {
            p: {r: shard.size_bytes for r, shard in record.items()} for p, record in self.records.items() if record
        }
        return HeldView(
            id=self.id,
            position=self.position,
            nodes=self.nodes,
            world_size=self.world_size,
            k=self.wish[0],
            m=self.wish[1],
            data=self.data_complete,
            parity=self.parity_complete,
            sizes=sizes,
            damaged_data=tuple(sorted(self.damaged_data)),
            damaged_parity=tuple(sorted(self.damaged_parity)),
        )

    def offer(self) -> tuple[Message, bytes]:
        """The announcement of this position's record to the rest of its group."""
        ranks, body = pack_record(self.own)
        message = {
            "generation": self.id.generation,
            "step": self.id.step,
            "position": self.position,
            "ranks": ranks,
        }
        return message, body


def failing_buckets(array: np.ndarray, checksums: np.ndarray, among: Iterable[int] | None = None) -> list[int]:
    """Buckets of `array` (uint8) whose CRC32C is not the one given; only those `among` are looked at, if given."""
    chosen = range(len(checksums)) if among is None else [bucket for bucket in among if bucket < len(checksums)]
    return [
        bucket
        for bucket in chosen
        if checksum(array[bucket * BUCKET_BYTES : (bucket + 1) * BUCKET_BYTES]) != int(checksums[bucket])
    ]


def bucket_checksums(array: np.ndarray) -> np.ndarray:
    """uint32 CRC32C of each bucket of `array`."""
    count = len(array) // BUCKET_BYTES
    values = [checksum(array[i * BUCKET_BYTES : (i + 1) * BUCKET_BYTES]) for i in range(count)]
    return np.array(values, dtype=np.uint32)
