# SPDX-License-Identifier: Apache-2.0
"""The disk tier: committed snapshots written to storage by the snapshot processes, beside training.

A checkpoint is a directory `step-<step>-g<generation>` with one file of raw bytes a rank, the parity chunks that each
node keeps of its group, one manifest of checksums a node (manifest.py), and `COMMIT.json`. Every file is written beside
its name, fsynced and renamed; the commit file comes last, by the lead, once every node has reported its part durable.
Without it a directory is not a checkpoint, whatever it holds. What is damaged is rebuilt from parity as it is read
(folder.py); a checkpoint that cannot be is set aside (`DAMAGED.json`), so that it is never tried twice.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..erasure import checksum
from .agreement import SnapshotId
from .errors import DamageError
from .folder import COMMIT, DAMAGED, Folder, manifest_name, parity_name, shard_name
from .held import Held, ShardRecord, failing_buckets
from .manifest import FORMAT, manifest_of, pack_manifest
from .slots import Segment, format_bytes

_NAME = re.compile(r"step-(\d{12})-g(\d{6})")
_WRITE_BYTES = 64 << 20


def directory_of(root: Path, snapshot: SnapshotId) -> Path:
    return root / f"step-{snapshot.step:012d}-g{snapshot.generation:06d}"


def complete_checkpoints(root: Path) -> list[SnapshotId]:
    """Committed checkpoints under `root`, oldest first. Half-written and damaged ones do not count."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in root.iterdir():
            if (match := _NAME.fullmatch(entry.name)) and (entry / COMMIT).is_file():
                found.append(SnapshotId(step=int(match[1]), generation=int(match[2])))
    return sorted(found)


def write_part(root: Path, held: Held, job: str = "") -> None:
    """Write this node's shards and parity of a committed snapshot, durably. Raises OSError (a full disk, say)."""
    folder = directory_of(root, held.id)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = manifest_of(held, job)
    for rank, segment in held.shards.items():
        write_durably(folder / shard_name(rank), segment.array)
    for index, segment in enumerate(held.parity if manifest.parity else []):
        write_durably(folder / parity_name(held.position, index), segment.array)
    write_durably(folder / manifest_name(held.position), np.frombuffer(pack_manifest(manifest), np.uint8))
    sync_directory(folder)
    sync_directory(root)


def commit(root: Path, snapshot: SnapshotId, facts: dict[str, Any], keep: int) -> Path:
    """At the lead, when all parts are durable: make it a checkpoint, then remove all but the newest `keep`."""
    folder = directory_of(root, snapshot)
    write_commit(folder, snapshot, facts)
    _remove_old(root, keep)
    return folder


def write_commit(folder: Path, snapshot: SnapshotId, facts: dict[str, Any]) -> None:
    """The file that makes a directory a checkpoint."""
    facts = {"format": FORMAT, "step": snapshot.step, "generation": snapshot.generation, **facts}
    text = json.dumps({**facts, "crc32c": _facts_checksum(facts)}).encode()
    write_durably(folder / COMMIT, np.frombuffer(text, np.uint8))
    sync_directory(folder)


def _facts_checksum(facts: dict[str, Any]) -> int:
    return checksum(json.dumps(facts, sort_keys=True).encode())


def discard(root: Path, snapshot: SnapshotId) -> None:
    """Remove what was written of a checkpoint that failed."""
    folder = directory_of(root, snapshot)
    if not (folder / COMMIT).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _remove_old(root: Path, keep: int) -> None:
    complete = complete_checkpoints(root)
    if not complete:
        return
    for snapshot in complete[:-keep]:
        folder = directory_of(root, snapshot)
        # The commit file goes first: a removal cut short leaves no checkpoint, rather than part of one.
        (folder / COMMIT).unlink()
        sync_directory(folder)
        shutil.rmtree(folder)
    newest = complete[-1]
    for entry in root.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match and SnapshotId(step=int(match[1]), generation=int(match[2])) < newest and not _is_kept(entry):
            shutil.rmtree(entry)


def _is_kept(folder: Path) -> bool:
    return (folder / COMMIT).exists() or (folder / DAMAGED).exists()


def facts_of(root: Path, snapshot: SnapshotId) -> dict[str, Any]:
    """What the commit file says: step, generation, world_size, nodes. Raises DamageError if it is unreadable."""
    try:
        facts = json.loads((directory_of(root, snapshot) / COMMIT).read_bytes())
        if facts.pop("crc32c") != _facts_checksum(facts):
            raise ValueError("its checksum fails")
        if facts["format"] != FORMAT or facts["step"] != snapshot.step or not isinstance(facts["world_size"], int):
            raise ValueError("it is of another format or another step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{directory_of(root, snapshot) / COMMIT} is unreadable: {error}") from error
    return facts


def snapshot_of(folder: Path) -> SnapshotId | None:
    """Which snapshot a directory is named after; None if it is not named as checkpoints are."""
    match = _NAME.fullmatch(folder.name)
    return SnapshotId(step=int(match[1]), generation=int(match[2])) if match else None


def read_shard(
    root: Path, snapshot: SnapshotId, rank: int, on_rebuilt: Callable[[str], None] | None = None
) -> tuple[Segment, ShardRecord]:
    """One rank's shard, proven; what is damaged is rebuilt from the parity, and `on_rebuilt` is told what that was.

    Raises DamageError saying what is wrong with which file.
    """
    folder = Folder(directory_of(root, snapshot))
    place = folder.place(rank)
    segment = Segment(f"rank{rank}-disk", place.record.size_bytes)
    try:
        try:
            _read_plainly(folder.path / shard_name(rank), segment, place.record)
        except DamageError as error:
            if folder.group(place.position) is None:
                raise
            count = folder.fill(rank, segment.array)
            if on_rebuilt:
                on_rebuilt(f"{error}; {count} buckets were rebuilt from parity. Mend it: refound repair {folder.path}")
    except BaseException:
        segment.free()
        raise
    return segment, place.record


def _read_plainly(path: Path, segment: Segment, record: ShardRecord) -> None:
    """The whole file at once, checked as a whole. Raises DamageError."""
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
    except OSError as error:
        raise DamageError(f"{path} could not be read: {error.strerror}") from error
    if bad := failing_buckets(segment.array, record.checksums):
        raise DamageError(f"{path}: {len(bad)} of {len(record.checksums)} buckets fail their checksum ({bad[:4]} …)")


def set_aside(root: Path, snapshot: SnapshotId, reason: str) -> None:
    """Mark a checkpoint damaged: it no longer counts, and its files stay for a look. Many may do so at once."""
    folder = directory_of(root, snapshot)
    if not (folder / DAMAGED).exists():  # what was found first is the reason; what follows from it is not
        text = json.dumps({"reason": reason}).encode()
        write_durably(folder / DAMAGED, np.frombuffer(text, np.uint8))
    (folder / COMMIT).unlink(missing_ok=True)
    sync_directory(folder)


def write_durably(path: Path, data: np.ndarray) -> None:
    """Write beside `path`, fsync, rename: under its own name a file is whole or absent."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    view = data.data
    with beside.open("wb") as file:
        for start in range(0, len(view), _WRITE_BYTES):
            file.write(view[start : start + _WRITE_BYTES])
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
