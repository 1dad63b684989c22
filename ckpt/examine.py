# SPDX-License-Identifier: Apache-2.0
"""Looking at every byte of a checkpoint: which files are damaged, and whether parity covers it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import directory_of, facts_of, snapshot_of
from .errors import ConfigError, DamageError
from .folder import COMMIT, DAMAGED, Folder, manifest_name, parity_name, shard_name
from .manifest import vector_of
from .slots import format_bytes
from .stripes import BUCKET_BYTES, Group

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class FileDamage:
    """One file that is not what it should be."""

    name: str
    problem: str
    buckets: tuple[int, ...] = ()
    """Those of BUCKET_BYTES that fail, in files of shards and parity."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a look at every byte has found."""

    path: Path
    step: int
    generation: int
    state: str
    """"committed" or "set aside" (it was committed, found damaged and is passed over by restarts)."""
    files: int
    size_bytes: int
    """Bytes of shards and parity, which all were read."""
    damage: tuple[FileDamage, ...]
    not_covered: str
    """Why the damage cannot be repaired; empty if it can, or if there is none."""
    code: tuple[int, int] | None
    """(k, m) of the parity; None if there is none."""

    @property
    def is_sound(self) -> bool:
        return not self.damage and self.state == "committed"

    @property
    def can_be_repaired(self) -> bool:
        return not self.is_sound and not self.not_covered


@dataclass
class Findings:
    """Damage as the repair needs it: by file, bucket by bucket."""

    files: list[FileDamage] = field(default_factory=list)
    shards: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Rank → buckets to rebuild; an empty tuple if the file only has bytes to spare."""
    parity: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(position, chunk 0..m-1) → buckets to rebuild."""
    manifests: list[int] = field(default_factory=list)
    """Positions whose manifest is to be written anew."""
    commit: bool = False
    """Whether the commit file is to be written anew."""
    checked: int = 0
    checked_bytes: int = 0


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that `path` names: itself, or those in it, oldest first.

    Raises ConfigError if it names none, saying what is there instead.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; name the checkpoint's directory (step-…), or the one that holds them")
    try:
        if snapshot_of(path.resolve()):
            if not _state(path):
                raise ConfigError(f"{path} was never completed: it has no {COMMIT}, so it is not a checkpoint")
            return [path]
        found = [entry for entry in path.iterdir() if entry.is_dir() and snapshot_of(entry) and _state(entry)]
    except OSError as error:
        raise ConfigError(f"{error.filename or path} could not be read: {error.strerror}") from error
    if not found:
        raise ConfigError(f"{path} is no checkpoint and holds none: there is no step-…/{COMMIT} in it")
    return sorted(found, key=lambda entry: snapshot_of(entry) or 0)  # pyright: ignore[reportArgumentType]


def _state(path: Path) -> str:
    if (path / COMMIT).exists():
        return "committed"
    return "set aside" if (path / DAMAGED).exists() else ""


def examine(path: Path) -> Examination:
    """Check every file and every bucket of the checkpoint at `path`. Nothing is changed."""
    path = path.resolve()
    snapshot, folder = snapshot_of(path), Folder(path)
    assert snapshot is not None
    found = look(folder)
    group = next(iter(folder.groups), None)
    return Examination(
        path=path,
        step=snapshot.step,
        generation=snapshot.generation,
        state=_state(path),
        files=found.checked,
        size_bytes=found.checked_bytes,
        damage=tuple(found.files),
        not_covered=_not_covered(folder, found),
        code=(group.k, group.m) if group else None,
    )


def look(folder: Folder) -> Findings:
    """Read everything that the manifests speak of."""
    found = Findings()
    for rank, place in sorted(folder.places.items()):
        bad = _look_at(folder.path / shard_name(rank), place.record.checksums, found)
        if bad is not None:
            found.shards[rank] = bad
    for group in folder.groups:
        for position in group.members:
            _look_at_parity(folder, group, position, found)
    facts = folder.facts or {}
    _look_at_commit(folder, found)
    for position in range(facts.get("nodes", 0)):
        found.checked += 1
        if position not in folder.manifests:
            name = manifest_name(position)
            found.files.append(FileDamage(name=name, problem=folder.unreadable.get(name, "missing")))
            found.manifests.append(position)
    if not facts:  # of an earlier version: nobody says how many there should be
        found.checked += len(folder.manifests) + len(folder.unreadable)
        found.files += [FileDamage(name=name, problem=problem) for name, problem in folder.unreadable.items()]
    return found


def _look_at_parity(folder: Folder, group: Group, position: int, found: Findings) -> None:
    sums = folder.manifests[position].parity if position in folder.manifests else ()
    for index in range(group.m):
        name = parity_name(position, index)
        if index < len(sums):
            bad = _look_at(folder.path / name, sums[index], found)
        else:
            found.checked += 1
            bad = tuple(range(folder.chunk(group)))
            found.files.append(FileDamage(name=name, problem="nothing proves it: its manifest is lost", buckets=bad))
        if bad is not None:
            found.parity[position, index] = bad


def _look_at(path: Path, sums: np.ndarray, found: Findings) -> tuple[int, ...] | None:
    """Check one file; None if it is sound."""
    from ..erasure import checksum

    found.checked += 1
    found.checked_bytes += len(sums) * BUCKET_BYTES
    bad: list[int] = []
    buffer = np.empty(BUCKET_BYTES, np.uint8)
    problem = ""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for bucket, expected in enumerate(sums):
                if not _read_bucket(file, bucket, buffer) or checksum(buffer) != int(expected):
                    bad.append(bucket)
        if size != len(sums) * BUCKET_BYTES:
            problem = f"{format_bytes(size)} of {format_bytes(len(sums) * BUCKET_BYTES)}"
        elif bad:
            shown = ", ".join(map(str, bad[:_SHOWN])) + (", …" if len(bad) > _SHOWN else "")
            problem = f"{len(bad)} of {len(sums)} buckets fail their checksum ({shown})"
    except OSError as error:
        bad, problem = (
            list(range(len(sums))),
            "missing" if isinstance(error, FileNotFoundError) else str(error.strerror),
        )
    if not problem:
        return None
    found.files.append(FileDamage(name=path.name, problem=problem, buckets=tuple(bad)))
    return tuple(bad)


def _read_bucket(file: Any, bucket: int, buffer: np.ndarray) -> bool:
    try:
        file.seek(bucket * BUCKET_BYTES)
        done = 0
        while done < BUCKET_BYTES and (count := file.readinto(buffer.data[done:])):
            done += count
        return done == BUCKET_BYTES
    except OSError:
        return False  # a bad sector


def _look_at_commit(folder: Folder, found: Findings) -> None:
    snapshot = snapshot_of(folder.path)
    assert snapshot is not None
    found.checked += 1
    problem = ""
    try:
        facts = facts_of(folder.path.parent, snapshot)
        for name in ("world_size", "nodes", "generation"):
            if folder.facts is not None and facts.get(name) != folder.facts[name]:
                problem = f"it says {name} {facts.get(name)} where the manifests say {folder.facts[name]}"
    except DamageError as error:
        problem = str(error).removeprefix(f"{directory_of(folder.path.parent, snapshot) / COMMIT} is ")
    if not (folder.path / COMMIT).exists():
        problem = f"taken away when the checkpoint was set aside{_reason(folder.path)}"
    if problem:
        found.files.append(FileDamage(name=COMMIT, problem=problem))
        found.commit = True


def _reason(path: Path) -> str:
    try:
        return f" ({json.loads((path / DAMAGED).read_bytes())['reason']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _not_covered(folder: Folder, found: Findings) -> str:
    """Why this damage cannot be repaired; empty if it can."""
    if not found.files:
        return ""
    facts = folder.facts
    if facts is None:
        return "no readable manifest says what the files should be, or an earlier version wrote them, without parity"
    if disagreeing := _disagreement(folder):
        return disagreeing
    unknown = sorted(set(range(facts["world_size"])) - set(folder.places))
    if unknown:
        return f"no manifest that is left knows the checksums of rank {unknown[0]}"
    for position in found.manifests:
        if facts["nodes"] > 1 and folder.group(position) is None:
            return f"no manifest that is left knows the parity of node {position}"
    for rank, bad in found.shards.items():
        if bad and folder.group(folder.places[rank].position) is None:
            return f"{shard_name(rank)} has no parity: it was written by a job without (one node, or m = 0)"
    return next((reason for group in folder.groups if (reason := hopeless(folder, group, found))), "")


def _disagreement(folder: Folder) -> str:
    manifests = list(folder.manifests.values())
    if any(manifest.facts != folder.facts for manifest in manifests):
        return "its manifests are of different checkpoints"
    for manifest in manifests:
        for position, record in manifest.others.items():
            if not _same(record, folder.records[position]):
                return f"its manifests disagree about the shards of node {position}"
    return ""


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[r].checksums, other[r].checksums) for r in one)


def hopeless(folder: Folder, group: Group, found: Findings) -> str:
    """The first place in which a group lacks more symbols than its parity covers, in words; empty if none does."""
    chunk = folder.chunk(group)
    data = np.zeros((group.n, group.k * chunk), bool)
    parity = np.zeros((group.n, group.m, chunk), bool)
    for index, position in enumerate(group.members):
        for rank, _, first in vector_of(folder.records[position]):
            data[index, [first + bucket for bucket in found.shards.get(rank, ())]] = True
        for number in range(group.m):
            parity[index, number, list(found.parity.get((position, number), ()))] = True
    for stripe in group.stripes:
        erased = [_symbols(group, stripe.data, data, stripe, chunk), _symbols_of_parity(group, parity, stripe)]
        counts = np.concatenate(erased).sum(axis=0)
        if (worst := int(np.argmax(counts > group.m))) or counts[0] > group.m:
            return (
                f"{int(counts[worst])} files lack the same place (bucket {worst} of stripe {stripe.number}) and "
                f"(k={group.k}, m={group.m}) covers {group.m}"
            )
    return ""


def _symbols(group: Group, members: Sequence[int], data: np.ndarray, stripe: Any, chunk: int) -> np.ndarray:
    rows = []
    for member in members:
        at = group.data_stripes(member).index(stripe) * chunk
        rows.append(data[member, at : at + chunk])
    return np.array(rows)


def _symbols_of_parity(group: Group, parity: np.ndarray, stripe: Any) -> np.ndarray:
    return np.array([parity[member, group.parity_stripes(member).index(stripe)] for member in stripe.parity])
