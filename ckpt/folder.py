# SPDX-License-Identifier: Apache-2.0
"""The files of one checkpoint, read bucket by bucket: every bucket is proven, and one that is not is rebuilt.

The files of a sharding group are its code words, as they were in memory: the vector of a position is its ranks' files
one after another, and `parity-<position>-<i>.shard` are its parity chunks. So any m files of a group may be lost, or
more of them damaged in different places, and every byte can still be had.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..erasure import Code, apply, checksum
from .errors import DamageError
from .held import Record, ShardRecord, record_buckets
from .manifest import Manifest, group_of, unpack_manifest, vector_of
from .stripes import BUCKET_BYTES, Group, Stripe, chunk_buckets

COMMIT, DAMAGED = "COMMIT.json", "DAMAGED.json"


def shard_name(rank: int) -> str:
    return f"rank-{rank:06d}.shard"


def parity_name(position: int, index: int) -> str:
    return f"parity-{position:06d}-{index:02d}.shard"


def manifest_name(position: int) -> str:
    return f"position-{position:06d}.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank's shard lies: the position, and its first bucket in that position's vector."""

    position: int
    first: int
    record: ShardRecord


class Folder:
    """A checkpoint's directory, as its manifests describe it. Opening it reads the manifests and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable: dict[str, str] = {}
        """Manifest → what is wrong with it."""
        self.manifests: dict[int, Manifest] = {}
        for file in sorted(path.glob("position-*.json")):
            try:
                self.manifests[int(file.stem.removeprefix("position-"))] = unpack_manifest(file.read_bytes())
            except OSError as error:
                self.unreadable[file.name] = str(error.strerror)
            except ValueError as error:
                self.unreadable[file.name] = str(error)
        self.facts = next((m.facts for m in self.manifests.values() if m.facts is not None), None)
        """What the manifests say of the checkpoint; None for one of an earlier version."""
        self.records = self._records()
        """Position → what its shards should be, from whichever manifest knows."""
        self.places = {
            rank: Place(position=position, first=first, record=shard)
            for position, record in self.records.items()
            for rank, shard, first in vector_of(record)
        }

    def _records(self) -> dict[int, Record]:
        found: dict[int, Record] = {}
        for manifest in self.manifests.values():
            for position, record in manifest.others.items():
                found.setdefault(position, record)
        return found | {position: manifest.own for position, manifest in self.manifests.items()}

    def place(self, rank: int) -> Place:
        """Raises DamageError if no manifest knows the rank."""
        if rank in self.places:
            return self.places[rank]
        for name, problem in self.unreadable.items():
            raise DamageError(f"{self.path / name} is unreadable: {problem}")
        raise DamageError(f"{self.path} has no record of rank {rank}")

    # --- geometry ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """The sharding groups that are known and have parity."""
        if self.facts is None:
            return ()
        found = {group_of(self.facts, position) for position in range(self.facts["nodes"])}
        return tuple(sorted((g for g in found if g.m and self._is_known(g)), key=lambda group: group.first))

    def _is_known(self, group: Group) -> bool:
        written = any(self.manifests[p].parity for p in group.members if p in self.manifests)
        return written and all(position in self.records for position in group.members)

    def group(self, position: int) -> Group | None:
        """The group that protects a position; None if nothing does."""
        return next((group for group in self.groups if position in group.members), None)

    def chunk(self, group: Group) -> int:
        """Buckets in a chunk."""
        return chunk_buckets([record_buckets(self.records[p]) for p in group.members], group.k)

    # --- reading -----------------------------------------------------------------------------------------------

    def shard_bucket(self, rank: int, bucket: int) -> np.ndarray | None:
        """uint8 (BUCKET_BYTES,), proven; None if it is not there or not what it should be."""
        return self._proven(shard_name(rank), bucket, self.places[rank].record.checksums)

    def parity_bucket(self, position: int, index: int, bucket: int) -> np.ndarray | None:
        """The same of a parity chunk. Without its manifest nothing proves it."""
        sums = self.manifests[position].parity if position in self.manifests else ()
        return self._proven(parity_name(position, index), bucket, sums[index]) if index < len(sums) else None

    def _proven(self, name: str, bucket: int, sums: np.ndarray) -> np.ndarray | None:
        if bucket >= len(sums):
            return None
        try:
            with (self.path / name).open("rb", buffering=0) as file:
                file.seek(bucket * BUCKET_BYTES)
                data = np.frombuffer(file.read(BUCKET_BYTES), np.uint8)
        except OSError:
            return None  # a missing file or a bad sector: lost, like any other damage
        return data if len(data) == BUCKET_BYTES and checksum(data) == int(sums[bucket]) else None

    def _symbol(self, group: Group, stripe: Stripe, symbol: int, bucket: int) -> np.ndarray | None:
        """A symbol of a stripe at one bucket of the chunk. Empty (zeros) beyond the end of a vector."""
        member = stripe.holders[symbol]
        position = group.first + member
        if symbol >= group.k:
            return self.parity_bucket(position, group.parity_stripes(member).index(stripe), bucket)
        at = group.data_stripes(member).index(stripe) * self.chunk(group) + bucket
        for rank, shard, first in vector_of(self.records[position]):
            if first <= at < first + len(shard.checksums):
                return self.shard_bucket(rank, at - first)
        return np.empty(0, np.uint8)

    # --- rebuilding --------------------------------------------------------------------------------------------

    def rebuilt_symbol(self, group: Group, stripe: Stripe, symbol: int, bucket: int) -> np.ndarray:
        """A lost symbol, from k others that are proven. Raises DamageError if there are not so many."""
        have: dict[int, np.ndarray] = {}
        for other in range(group.n):
            if other != symbol and len(have) < group.k:
                found = self._symbol(group, stripe, other, bucket)
                if found is not None:
                    have[other] = found
        if len(have) < group.k:
            raise DamageError(
                f"{self.path}: bucket {bucket} of stripe {stripe.number} is lost or damaged in more than {group.m} of "
                f"the files of nodes {group.first} to {group.first + group.n - 1}, and (k={group.k}, m={group.m}) "
                f"covers {group.m}"
            )
        out = np.empty(BUCKET_BYTES, np.uint8)
        apply(Code(group.k, group.m).rebuild_matrix(list(have), [symbol]), list(have.values()), [out])
        return out

    def rebuilt_shard_bucket(self, rank: int, bucket: int) -> np.ndarray:
        """A lost bucket of a rank's shard, proven by its own checksum. Raises DamageError if it cannot be had."""
        place = self.place(rank)
        group = self.group(place.position)
        if group is None:
            raise DamageError(f"{self.path / shard_name(rank)}: bucket {bucket} is damaged, and there is no parity")
        chunk_index, offset = divmod(place.first + bucket, self.chunk(group))
        stripe = group.data_stripes(place.position - group.first)[chunk_index]
        symbol = stripe.data.index(place.position - group.first)
        found = self.rebuilt_symbol(group, stripe, symbol, offset)
        if checksum(found) != int(place.record.checksums[bucket]):
            raise DamageError(f"{self.path / shard_name(rank)}: bucket {bucket}, rebuilt, fails its checksum")
        return found

    def rebuilt_parity_bucket(self, position: int, index: int, bucket: int) -> np.ndarray:
        """The same of a parity chunk, whose checksum is that of what it is made from where its manifest is lost."""
        group = self.group(position)
        if group is None:
            raise DamageError(f"{self.path}: nothing is known of the parity of node {position}")
        stripe = group.parity_stripes(position - group.first)[index]
        found = self.rebuilt_symbol(group, stripe, group.k + stripe.parity.index(position - group.first), bucket)
        sums = self.manifests[position].parity if position in self.manifests else ()
        if index < len(sums) and checksum(found) != int(sums[index][bucket]):
            raise DamageError(f"{self.path / parity_name(position, index)}: bucket {bucket}, rebuilt, fails")
        return found

    def fill(self, rank: int, array: np.ndarray) -> int:
        """Read a rank's whole shard into `array`, rebuilding what is damaged; returns how many buckets were.

        Raises DamageError if a bucket can be neither proven nor rebuilt.
        """
        rebuilt = 0
        for bucket in range(len(self.place(rank).record.checksums)):
            data = self.shard_bucket(rank, bucket)
            if data is None:
                data = self.rebuilt_shard_bucket(rank, bucket)
                rebuilt += 1
            array[bucket * BUCKET_BYTES : (bucket + 1) * BUCKET_BYTES] = data
        return rebuilt
