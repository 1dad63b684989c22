# SPDX-License-Identifier: Apache-2.0
"""The disk tier: committed snapshots written to storage by the snapshot processes, beside training.

A checkpoint is a directory `step-<step>-g<generation>` with one file of raw bytes a rank, one record of checksums a
node, and `COMMIT.json`. Every file is written beside its name, fsynced and renamed; the commit file comes last, by
the lead, once every node has reported its part durable. Without it a directory is not a checkpoint, whatever it
holds. A checkpoint found damaged is set aside (`DAMAGED.json`), so that it is never tried twice.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..erasure import checksum
from .agreement import SnapshotId
from .errors import DamageError
from .held import Held, Record, ShardRecord, failing_buckets, pack_record, unpack_record
from .slots import Segment, format_bytes

_NAME = re.compile(r"step-(\d{12})-g(\d{6})")
_COMMIT, _DAMAGED = "COMMIT.json", "DAMAGED.json"
_FORMAT = 1
_WRITE_BYTES = 64 << 20


def directory_of(root: Path, snapshot: SnapshotId) -> Path:
    return root / f"step-{snapshot.step:012d}-g{snapshot.generation:06d}"


def complete_checkpoints(root: Path) -> list[SnapshotId]:
    """Committed checkpoints under `root`, oldest first. Half-written and damaged ones do not count."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in root.iterdir():
            if (match := _NAME.fullmatch(entry.name)) and (entry / _COMMIT).is_file():
                found.append(SnapshotId(step=int(match[1]), generation=int(match[2])))
    return sorted(found)


def write_part(root: Path, held: Held) -> None:
    """Write this node's shards of a committed snapshot, durably. Raises OSError (a full disk, say)."""
    folder = directory_of(root, held.id)
    folder.mkdir(parents=True, exist_ok=True)
    for rank, segment in held.shards.items():
        _write_durably(folder / f"rank-{rank:06d}.shard", segment.array)
    ranks, checksums = pack_record(held.own)
    text = json.dumps({"format": _FORMAT, "ranks": ranks, "crc32c": checksums.hex()}).encode()
    _write_durably(folder / f"position-{held.position:06d}.json", np.frombuffer(text, np.uint8))
    _sync_directory(folder)
    _sync_directory(root)


def commit(root: Path, snapshot: SnapshotId, facts: dict[str, Any], keep: int) -> Path:
    """At the lead, when all parts are durable: make it a checkpoint, then remove all but the newest `keep`."""
    folder = directory_of(root, snapshot)
    facts = {"format": _FORMAT, "step": snapshot.step, "generation": snapshot.generation, **facts}
    text = json.dumps({**facts, "crc32c": _facts_checksum(facts)}).encode()
    _write_durably(folder / _COMMIT, np.frombuffer(text, np.uint8))
    _sync_directory(folder)
    _remove_old(root, keep)
    return folder


def _facts_checksum(facts: dict[str, Any]) -> int:
    return checksum(json.dumps(facts, sort_keys=True).encode())


def discard(root: Path, snapshot: SnapshotId) -> None:
    """Remove what was written of a checkpoint that failed."""
    folder = directory_of(root, snapshot)
    if not (folder / _COMMIT).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _remove_old(root: Path, keep: int) -> None:
    complete = complete_checkpoints(root)
    if not complete:
        return
    for snapshot in complete[:-keep]:
        folder = directory_of(root, snapshot)
        # The commit file goes first: a removal cut short leaves no checkpoint, rather than part of one.
        (folder / _COMMIT).unlink()
        _sync_directory(folder)
        shutil.rmtree(folder)
    newest = complete[-1]
    for entry in root.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match and SnapshotId(step=int(match[1]), generation=int(match[2])) < newest and not _is_kept(entry):
            shutil.rmtree(entry)


def _is_kept(folder: Path) -> bool:
    return (folder / _COMMIT).exists() or (folder / _DAMAGED).exists()


def facts_of(root: Path, snapshot: SnapshotId) -> dict[str, Any]:
    """What the commit file says: step, generation, world_size, nodes. Raises DamageError if it is unreadable."""
    try:
        facts = json.loads((directory_of(root, snapshot) / _COMMIT).read_bytes())
        if facts.pop("crc32c") != _facts_checksum(facts):
            raise ValueError("its checksum fails")
        if facts["format"] != _FORMAT or facts["step"] != snapshot.step or not isinstance(facts["world_size"], int):
            raise ValueError("it is of another format or another step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{directory_of(root, snapshot) / _COMMIT} is unreadable: {error}") from error
    return facts


def read_shard(root: Path, snapshot: SnapshotId, rank: int) -> tuple[Segment, ShardRecord]:
    """One rank's shard, proven. Raises DamageError saying what is wrong with which file."""
    folder = directory_of(root, snapshot)
    record = _record_with(folder, rank)[rank]
    path = folder / f"rank-{rank:06d}.shard"
    segment = Segment(f"rank{rank}-disk", record.size_bytes)
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != record.size_bytes:
                raise DamageError(
                    f"{path} has {format_bytes(found)} of {format_bytes(record.size_bytes)}: it was cut short"
                )
            view, done = segment.array.data, 0
            while done < found:
                count = file.readinto(view[done : done + _WRITE_BYTES])
                if not count:
                    raise DamageError(f"{path} ends after {format_bytes(done)} of {format_bytes(found)}")
                done += count
        if bad := failing_buckets(segment.array, record.checksums):
            raise DamageError(
                f"{path}: {len(bad)} of {len(record.checksums)} buckets fail their checksum ({bad[:4]} …)"
            )
    except BaseException as error:
        segment.free()
        if isinstance(error, OSError):
            raise DamageError(f"{path} could not be read: {error.strerror}") from error
        raise
    return segment, record


def _record_with(folder: Path, rank: int) -> Record:
    for path in sorted(folder.glob("position-*.json")):
        try:
            raw = json.loads(path.read_bytes())
            record = unpack_record(raw["ranks"], bytes.fromhex(raw["crc32c"]))
        except (OSError, ValueError, KeyError, TypeError, ConnectionError) as error:
            raise DamageError(f"{path} is unreadable: {error}") from error
        if rank in record:
            return record
    raise DamageError(f"{folder} has no record of rank {rank}")


def set_aside(root: Path, snapshot: SnapshotId, reason: str) -> None:
    """Mark a checkpoint damaged: it no longer counts, and its files stay for a look. Many may do so at once."""
    folder = directory_of(root, snapshot)
    if not (folder / _DAMAGED).exists():  # what was found first is the reason; what follows from it is not
        text = json.dumps({"reason": reason}).encode()
        _write_durably(folder / _DAMAGED, np.frombuffer(text, np.uint8))
    (folder / _COMMIT).unlink(missing_ok=True)
    _sync_directory(folder)


def _write_durably(path: Path, data: np.ndarray) -> None:
    """Write beside `path`, fsync, rename: under its own name a file is whole or absent."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    view = data.data
    with beside.open("wb") as file:
        for start in range(0, len(view), _WRITE_BYTES):
            file.write(view[start : start + _WRITE_BYTES])
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
