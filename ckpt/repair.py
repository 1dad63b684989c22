# SPDX-License-Identifier: Apache-2.0
"""Mending a checkpoint from its parity: all new files are made and proven beside the old ones, then take their names.

A crash or a full disk on the way leaves what was there, or some files mended; the same command goes on from there.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoints import snapshot_of, sync_directory, write_commit, write_durably
from .errors import DamageError
from .examine import Examination, Findings, examine, look
from .folder import COMMIT, DAMAGED, Folder, manifest_name, parity_name, shard_name
from .held import bucket_checksums
from .manifest import Manifest, pack_manifest
from .stripes import BUCKET_BYTES

Bucket = Callable[[int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What a repair has done."""

    before: Examination
    after: Examination
    written: tuple[str, ...]
    """Files that were made anew."""
    buckets: int
    """How many buckets were rebuilt from others."""


def repair(path: Path) -> Repair:
    """Rebuild what is damaged of the checkpoint at `path` and prove it all again.

    Raises DamageError if parity does not cover the damage (nothing is changed then), OSError if the new files cannot
    be written (a full disk).
    """
    path = path.resolve()
    before = examine(path)
    if before.is_sound:
        return Repair(before=before, after=before, written=(), buckets=0)
    if before.not_covered:
        raise DamageError(f"{path} cannot be repaired: {before.not_covered}")
    folder = Folder(path)
    found = look(folder)
    made: dict[str, Path] = {}
    try:
        _remake_files(folder, found, made)
        for name, beside in made.items():
            beside.replace(path / name)
    finally:
        for beside in made.values():
            beside.unlink(missing_ok=True)
    written = [*made, *_remake_manifests(folder, found)]
    sync_directory(path)
    if found.commit:
        _commit_again(folder)
        written.append(COMMIT)
    for stale in (path / DAMAGED, *path.glob(".*.partial")):  # and what an earlier attempt was cut off in
        stale.unlink(missing_ok=True)
    sync_directory(path)
    after = examine(path)
    if not after.is_sound:
        raise DamageError(f"{path} is still damaged after its repair ({after.damage[0]}): is its disk failing?")
    buckets = sum(map(len, found.shards.values())) + sum(map(len, found.parity.values()))
    return Repair(before=before, after=after, written=tuple(written), buckets=buckets)


def _remake_files(folder: Folder, found: Findings, made: dict[str, Path]) -> None:
    for rank in found.shards:
        count = len(folder.places[rank].record.checksums)
        _remake(folder, shard_name(rank), count, lambda bucket, r=rank: _shard_bucket(folder, r, bucket), made)
    for position, index in found.parity:
        group = folder.group(position)
        assert group is not None
        count, name = folder.chunk(group), parity_name(position, index)
        _remake(folder, name, count, lambda b, p=position, i=index: _parity_bucket(folder, p, i, b), made)


def _shard_bucket(folder: Folder, rank: int, bucket: int) -> np.ndarray:
    found = folder.shard_bucket(rank, bucket)
    return folder.rebuilt_shard_bucket(rank, bucket) if found is None else found


def _parity_bucket(folder: Folder, position: int, index: int, bucket: int) -> np.ndarray:
    found = folder.parity_bucket(position, index, bucket)
    return folder.rebuilt_parity_bucket(position, index, bucket) if found is None else found


def _remake(folder: Folder, name: str, count: int, bucket: Bucket, made: dict[str, Path]) -> None:
    """A whole new file beside the damaged one. Each bucket is proven as it is had."""
    beside = folder.path / f".{name}.{secrets.token_hex(4)}.partial"
    made[name] = beside
    with beside.open("wb") as file:
        for number in range(count):
            file.write(bucket(number).data)
        file.flush()
        os.fsync(file.fileno())


def _remake_manifests(folder: Folder, found: Findings) -> list[str]:
    """Manifests from what the others know. Parity's checksums are those of the chunks, which were just recomputed."""
    written = []
    for position in found.manifests:
        group = folder.group(position)
        own, others, parity = folder.records[position], {}, []
        if group is not None:
            others = {p: folder.records[p] for p in group.members if p != position}
            for index in range(group.m):
                chunk = np.fromfile(folder.path / parity_name(position, index), np.uint8)
                if len(chunk) != folder.chunk(group) * BUCKET_BYTES:
                    raise DamageError(f"{folder.path / parity_name(position, index)} changed during the repair")
                parity.append(bucket_checksums(chunk))
        manifest = Manifest(own=own, facts=folder.facts, others=others, parity=tuple(parity))
        write_durably(folder.path / manifest_name(position), np.frombuffer(pack_manifest(manifest), np.uint8))
        written.append(manifest_name(position))
    return written


def _commit_again(folder: Folder) -> None:
    snapshot, facts = snapshot_of(folder.path), folder.facts
    assert snapshot is not None and facts is not None
    write_commit(folder.path, snapshot, {name: facts[name] for name in ("world_size", "nodes", "job")})
