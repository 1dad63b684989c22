# SPDX-License-Identifier: Apache-2.0
"""What one node writes beside its shards of a checkpoint: lengths and checksums, its own and its group's.

`position-<n>.json` proves the files of one node. Since it also repeats the records of the rest of the sharding group
and the facts of the commit file, any one of a group's manifests is enough to know what all its files should hold.
Checkpoints of earlier versions have only `ranks` and `crc32c`: they are read as before and cannot be repaired.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..erasure import checksum
from .held import Held, Record, ShardRecord, pack_record, unpack_record
from .stripes import Group, choose_groups

FORMAT = 1
_FACTS = ("step", "generation", "world_size", "nodes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One node's part of a checkpoint."""

    own: Record
    facts: dict[str, Any] | None = None
    """step, generation, world_size, nodes, job and code (the wish (k, m)); None in checkpoints without parity."""
    others: dict[int, Record]
    """Position → its record, for the rest of the sharding group."""
    parity: tuple[np.ndarray, ...] = ()
    """Checksums of this node's parity chunks, uint32 (chunk,) each."""


def manifest_of(held: Held, job: str) -> Manifest:
    """The manifest of this node's part of a committed snapshot."""
    facts: dict[str, Any] = {
        "step": held.id.step,
        "generation": held.id.generation,
        "world_size": held.world_size,
        "nodes": held.nodes,
        "job": job,
        "code": list(held.wish),
    }
    whole = held.group.m and held.parity_complete and held.records_complete
    return Manifest(
        own=held.own,
        facts=facts,
        others={p: held.records[p] for p in held.group.members if p != held.position} if whole else {},
        parity=tuple(held.parity_checksums) if whole else (),
    )


def pack_manifest(manifest: Manifest) -> bytes:
    """As it stands in the file. Its own checksum covers all the rest."""
    ranks, checksums = pack_record(manifest.own)
    content: dict[str, Any] = {"format": FORMAT, "ranks": ranks, "crc32c": checksums.hex()}
    if manifest.facts is not None:
        others = {}
        for position, record in manifest.others.items():
            ranks, checksums = pack_record(record)
            others[str(position)] = [ranks, checksums.hex()]
        content |= {"facts": manifest.facts, "others": others}
        content["parity"] = [sums.astype("<u4").tobytes().hex() for sums in manifest.parity]
        content["check"] = _check_of(content)
    return json.dumps(content).encode()


def unpack_manifest(text: bytes) -> Manifest:
    """The inverse of `pack_manifest`. Raises ValueError saying what is wrong with it."""
    try:
        content = json.loads(text)
        own = unpack_record(content["ranks"], bytes.fromhex(content["crc32c"]))
        if "check" not in content and "facts" not in content:
            return Manifest(own=own, others={})
        if content.pop("check") != _check_of(content):
            raise ValueError("its checksum fails")
        facts = content["facts"]
        if not all(isinstance(facts[name], int) and facts[name] >= 0 for name in _FACTS):
            raise ValueError("its facts are none")
        choose_groups(facts["nodes"], *facts["code"])
        others = {int(p): unpack_record(ranks, bytes.fromhex(sums)) for p, (ranks, sums) in content["others"].items()}
        parity = tuple(np.frombuffer(bytes.fromhex(sums), "<u4").astype(np.uint32) for sums in content["parity"])
    except (KeyError, TypeError, AttributeError, ConnectionError, RecursionError, ZeroDivisionError) as error:
        raise ValueError(f"it is not a manifest ({error!r})") from error
    return Manifest(own=own, facts=facts, others=others, parity=parity)


def group_of(facts: dict[str, Any], position: int) -> Group:
    """The sharding group of a position, from the facts of a manifest."""
    groups = choose_groups(facts["nodes"], *facts["code"])
    return next(group for group in groups if position in group.members)


def vector_of(record: Record) -> list[tuple[int, ShardRecord, int]]:
    """(rank, its record, first bucket in the position's vector) in the vector's order."""
    found, first = [], 0
    for rank in sorted(record):
        found.append((rank, record[rank], first))
        first += len(record[rank].checksums)
    return found


def _check_of(content: dict[str, Any]) -> int:
    return checksum(json.dumps(content, sort_keys=True).encode())
