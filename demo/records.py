# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a line for each step, a line for each start of a worker, digests at the end.

The files are JSON lines, appended to by every incarnation of the job. Losses are also written as hexadecimal floats,
which keep every bit.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from .errors import RecordError

MAX_LINE_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One completed step, as rank 0 saw it. `time_s` is Unix time, `step_s` how long it took."""

    time_s: float
    step: int
    loss: float
    loss_hex: str
    grad_norm: float
    grad_norm_hex: str
    stall_ms: float
    step_s: float
    pid: int

    @classmethod
    def of(cls, job: Any, *, loss: float, grad_norm: float, step_s: float) -> Self:
        """The record of the step that `job` has just ended."""
        return cls(
            time_s=time.time(),
            step=job.step,
            loss=loss,
            loss_hex=loss.hex(),
            grad_norm=grad_norm,
            grad_norm_hex=grad_norm.hex(),
            stall_ms=job.stall_ms,
            step_s=step_s,
            pid=os.getpid(),
        )


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """One worker that is ready to train from `step` on: restored from `source`, or with None from the start."""

    time_s: float
    rank: int
    world: int
    pid: int
    step: int
    source: str | None
    restore_s: float

    @classmethod
    def of(cls, job: Any, rank: int, world: int) -> Self:
        """The record of this worker, just after `job` was protected."""
        restored = job.restored
        return cls(
            time_s=time.time(),
            rank=rank,
            world=world,
            pid=os.getpid(),
            step=job.step,
            source=restored.source if restored else None,
            restore_s=restored.seconds if restored else 0.0,
        )


_Record = TypeVar("_Record", StepRecord, StartRecord)


def steps_file(run: Path) -> Path:
    """Where rank 0 appends a `StepRecord` for each step."""
    return run / "steps.jsonl"


def starts_file(run: Path) -> Path:
    """Where each worker appends a `StartRecord`."""
    return run / "starts.jsonl"


def digest_file(run: Path, rank: int) -> Path:
    """Where `rank` writes its digests at the end."""
    return run / f"digest-rank{rank}.json"


def append_record(path: Path, record: StepRecord | StartRecord) -> None:
    """Appends one line in one write, so that lines of several processes, or of a killed one, do not mix."""
    line = json.dumps(asdict(record)).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_steps(run: Path) -> list[StepRecord]:
    """All steps in the order they were completed, those that were run twice twice.

    Raises:
        RecordError: for a line that is no such record.
    """
    return list(_read(steps_file(run), StepRecord))


def read_starts(run: Path) -> list[StartRecord]:
    """All starts of workers, in order.

    Raises:
        RecordError: for a line that is no such record.
    """
    return list(_read(starts_file(run), StartRecord))


def read_digests(run: Path) -> dict[int, dict[str, Any]]:
    """Rank to what that rank wrote at the end: `step`, `rank`, `world`, `digests`.

    Raises:
        RecordError: if there is none, or one rank is missing, or a file is damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(run.glob("digest-rank*.json")):
        try:
            entry = json.loads(path.read_bytes())
            found[int(entry["rank"])] = entry
            complete = isinstance(entry["step"], int) and isinstance(entry["digests"], dict)
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} holds no digests ({error}); the run that wrote it did not end well") from error
        if not complete:
            raise RecordError(f"{path} holds no digests; the run that wrote it did not end well")
    worlds = {entry["world"] for entry in found.values()}
    if not found or worlds != {len(found)}:
        raise RecordError(f"{run} has digests of ranks {sorted(found)}, but its world has {worlds or 'not ended'}")
    return found


def _read(path: Path, kind: type[_Record]) -> Iterator[_Record]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # what has no newline is not done
        try:
            if len(line) > MAX_LINE_BYTES:
                raise RecordError(f"{len(line)} bytes")
            entry = json.loads(line)
            yield kind(**{field.name: entry[field.name] for field in fields(kind)})
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}:{number} is no {kind.__name__}: {error!r}") from error
