# SPDX-License-Identifier: Apache-2.0
"""Units of work whose results are named by what decides them: done once, whole or not there, and never twice.

A job is a kind and a key (plain values: fingerprints, settings, which layer). Its file is named by the SHA-256 of both
and proves itself (`distill.proven`): a process killed at any moment leaves only a scrap, and what is damaged is made
anew, and said.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..distill.errors import DamagedFileError
from ..distill.proven import read_proven, write_proven
from ..text import duration_text
from .errors import StoreError

Progress = Callable[[str], None]
Result = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]
"""(tensors, facts); the facts are plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class Job:
    kind: str
    key: Mapping[str, Any] = field(hash=False)

    @property
    def canonical(self) -> str:
        return json.dumps({"kind": self.kind, **self.key}, sort_keys=True, separators=(",", ":"))

    @property
    def id(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:32]


class Store:
    """Results in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, job: Job) -> Path:
        return self.root / job.kind / f"{job.id}.safetensors"

    def is_done(self, job: Job) -> bool:
        return self.path(job).is_file()

    def facts(self, job: Job) -> dict[str, Any]:
        """Raises KeyError if the job is not done, or its result is damaged (see `read`)."""
        return self.read(job)[1]

    def read(self, job: Job) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The result, its bytes proven.

        Raises:
            KeyError: if it is not there; a damaged one is set aside first, and said, so that it is made anew.
        """
        path = self.path(job)
        try:
            tensors, told = read_proven(path)
            if told.get("job") != json.loads(job.canonical):
                raise DamagedFileError(f"{path} is damaged: it is of another job")
        except FileNotFoundError as error:
            raise KeyError(job.id) from error
        except DamagedFileError as error:
            path.rename(path.with_suffix(".damaged"))
            print(f"refound: {error}. It was set aside and is made anew", file=sys.stderr, flush=True)
            raise KeyError(job.id) from error
        return tensors, told["facts"]

    def put(self, job: Job, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Raises StoreError if it cannot be written: what was there before stays."""
        path = self.path(job)
        try:
            write_proven(path, tensors, {"job": json.loads(job.canonical), "facts": dict(facts)})
        except OSError as error:
            size_mb = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
            raise StoreError(
                f"cannot write {path} ({size_mb:.1f} MB): {error.strerror}. All that was done before is kept: "
                "make room and run the same command again, it goes on from here"
            ) from error

    def sweep(self) -> None:
        """Removes the scraps of processes that were killed; only while no other process writes here."""
        for scrap in self.root.glob("*/.*.part"):
            scrap.unlink()


def run_jobs(
    stage: str,
    jobs: Sequence[Job],
    store: Store,
    compute: Callable[[Job], Result],
    progress: Progress,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Do what is not done. `jobs` are dealt out by turns of their position over the ranks.

    A job that runs out of memory is recorded as infeasible, with the reason, and the others go on.

    Raises:
        StoreError: if a result cannot be written.
    """
    mine = [job for index, job in enumerate(jobs) if index % world_size == rank]
    waiting = [job for job in mine if not store.is_done(job)]
    if len(waiting) < len(mine):
        progress(f"{stage}: {len(mine) - len(waiting)} of {len(mine)} jobs are done already")
    began, said = time.monotonic(), 0.0
    for number, job in enumerate(waiting, start=1):
        store.put(job, *attempt(compute, job))
        now = time.monotonic()
        if now - said > 5 or number == len(waiting):
            left = (now - began) / number * (len(waiting) - number)
            rest = f", {duration_text(left)} left" if number < len(waiting) else f" in {duration_text(now - began)}"
            progress(f"{stage}: {number} of {len(waiting)}{rest}")
            said = now


def attempt(compute: Callable[[Job], Result], job: Job) -> Result:
    """The job's result; if memory runs out, none but the fact `infeasible`."""
    try:
        return compute(job)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return {}, {"infeasible": f"out of memory: {str(error).splitlines()[0]}"}


def out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )
