# SPDX-License-Identifier: Apache-2.0
"""`protect`: what a training script calls. Restores on the spot, then takes a snapshot every N steps.

    job = refound.protect(model=model, optimizer=optimizer, scheduler=scheduler, data=loader, every=1)
    for step in range(job.step, total_steps):
        ...
        optimizer.step()
        job.end_step()

Promised: after a restart every protected object, and the random generators of python, numpy, torch and the device,
are bit for bit what they were when `end_step` returned for the step that all nodes can restore. Not promised: state
that is not protected, and random numbers drawn between `protect` and the loop, so call it last before the loop.
"""

import atexit
import json
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..erasure import checksum
from . import last_words
from .collect import Collector, State
from .copier import Copier, flat_bytes
from .errors import ConfigError, SnapshotError, WorldSizeError
from .hang import Progress
from .link import Link, Place
from .loader import Loader
from .shard import Plan, make_plan, signature

_EXIT_WAIT = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a job went on from."""

    step: int
    source: str
    """"memory", "parity" (rebuilt from other nodes) or "disk"."""
    seconds: float
    notes: tuple[str, ...]
    """Why not from something newer."""


def protect(*, every: int = 1, replicas: bool = True, **objects: Any) -> "Protection":
    """Protect named objects: models, optimizers, schedulers, samplers, anything with (load_)state_dict.

    every: steps between snapshots.
    replicas: ranks that hold the same by construction (DDP, replicated DTensor dimensions) save a part each.

    Restores their state if the job has been running before. Without a refound agent (plain `python train.py`) it
    warns once and protects nothing.

    Raises ConfigError (not protectable), LayoutMismatchError (the snapshot is of other tensors), WorldSizeError
    (of another number of ranks), DamageError (it could not be proven).
    """
    problems = [
        f"{name!r} ({type(value).__name__}) has no state_dict and load_state_dict"
        for name, value in objects.items()
        if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)))
    ]
    if every < 1:
        problems.append(f"every={every} must be at least 1")
    if not objects:
        problems.append("nothing to protect: name at least a model, as in protect(model=model)")
    if problems:
        raise ConfigError("; ".join(problems))
    place = Place.from_environment()
    if place is None:
        warnings.warn(
            "this process has no refound agent, so nothing is protected: start it with torchrun "
            "--rdzv-backend=refound, or torchrun --standalone --logs-specs=refound",
            stacklevel=2,
        )
    return Protection(objects, every=every, replicas=replicas, place=place)


class Protection:
    """A job's protection, made by `protect`."""

    def __init__(self, objects: dict[str, Any], *, every: int, replicas: bool, place: Place | None) -> None:
        self.step = 0
        """Completed steps."""
        self.restored: Restored | None = None
        """What this process went on from; None at a job's start."""
        self.stall_ms = 0.0
        """How long the last snapshot held training up, its preparation included."""
        self._objects, self._every = objects, every
        self._plan: Plan | None = None
        self._signature: tuple[Any, ...] = ()
        self._checked_replicas = False
        self._idle = threading.Event()
        self._idle.set()
        self._failure: Exception | None = None
        self._last_snapshot = 0
        self._link: Link | None = None
        self._progress: Progress | None = None
        self._rank = place.rank if place else 0
        self._collector = Collector(objects, rank=self._rank, replicas=replicas)
        self._copier = Copier(_device_of(objects))
        if place is not None:
            self._link = Link(place)
            self._progress = Progress.from_environment(place.socket, place.rank, place.generation)
            last_words.install(Path(place.socket), place.rank, place.generation)
            self._restore(self._link)
            if place.rank == 0:
                _say_what_ddp_does(objects, place.world_size)
            hooked = [o for o in objects.values() if isinstance(o, torch.optim.Optimizer)]
            for optimizer in hooked:
                optimizer.register_step_pre_hook(self._before_optimizer_step)
            self._overlaps = bool(hooked)
            atexit.register(self._at_exit)

    # --- restoring ---------------------------------------------------------------------------------------------

    def _restore(self, link: Link) -> None:
        started = time.monotonic()
        facts = link.restore_facts()
        if facts["source"] == "start":
            return
        if facts["world_size"] != link.place.world_size:
            raise WorldSizeError(
                f"the snapshot of step {facts['step']} was taken by {facts['world_size']} ranks and this group has "
                f"{link.place.world_size}. It is kept: bring the job back with {facts['world_size']} ranks, or start "
                "anew with another --rdzv-id"
            )
        Loader(link.shard, self._rank).load(self._objects, self._collector)
        self.step = self._last_snapshot = facts["step"]
        self.restored = Restored(
            step=self.step,
            source=facts["source"],
            seconds=round(time.monotonic() - started, 3),
            notes=tuple(facts["notes"]),
        )

    # --- saving ------------------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Count a step as done and, every N steps, begin its snapshot. Call it after `optimizer.step()`.

        Returns before the copy is finished: it goes on beside the next forward and backward. Until the next
        `optimizer.step()` the parameters and optimizer state must not be changed by anything else.

        Raises SnapshotMemoryError, UnsupportedStateError or DamageError when protection is not possible.
        """
        self.step += 1
        if self._progress is not None:
            self._progress.step()
        if self._link is None or self.step % self._every:
            return
        started = time.monotonic()
        self._wait()
        self.stall_ms = 0.0
        self._begin(self._link)
        if not self._overlaps:
            self._wait()  # without an optimizer to hook into, nobody could say when the state changes
        self.stall_ms += (time.monotonic() - started) * 1000

    def _begin(self, link: Link) -> None:
        state = self._collector.collect()
        objects = json.dumps(state.objects, separators=(",", ":")).encode()
        seen = signature(state)
        header = self._plan.header(objects) if self._plan and seen == self._signature else None
        if self._plan is None or header is None:
            self._plan, self._signature = make_plan(state, self._rank, len(objects)), seen
            header = self._plan.header(objects)
            assert header is not None
        leaves = [
            leaf if leaf.constant else _Copy(leaf.tensor.detach().clone(memory_format=torch.contiguous_format))
            for leaf in state.leaves
        ]
        ready = self._copier.ready_event()
        self._idle.clear()
        job = _Job(step=self.step, plan=self._plan, header=header, leaves=leaves, ready=ready, watched=_watch(state))
        threading.Thread(target=self._copy, args=(link, job), name="snapshot", daemon=True).start()

    def _copy(self, link: Link, job: "_Job") -> None:
        try:
            slot = link.begin(job.step, job.plan.size_bytes)
            sums = self._copier.fill(job.plan, job.leaves, job.header, slot, job.ready)
            checks = {} if self._checked_replicas else _replica_checks(job.plan, job.leaves)
            changed = [path for path, tensor, version in job.watched if tensor._version != version]
            if changed:
                link.abort()
                raise SnapshotError(
                    f"{changed[0]} was changed while the snapshot of step {job.step} copied it. Change parameters only "
                    "in optimizer.step(), or before end_step()"
                )
            link.complete(job.step, sums, checks)
            self._checked_replicas, self._last_snapshot = True, job.step
        except Exception as error:
            self._failure = error
        finally:
            self._idle.set()

    def _before_optimizer_step(self, *_: Any) -> None:
        """The copy must be over before the state changes. This wait is the stall."""
        if not self._idle.is_set():
            started = time.monotonic()
            self._wait()
            self.stall_ms += (time.monotonic() - started) * 1000

    def _wait(self) -> None:
        self._idle.wait()
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            # The snapshot process has died. Its agent starts another and restarts the workers; until then training
            # may as well go on.
            print(f"refound: no snapshots until the restart: {failure}", file=sys.stderr, flush=True)
            self._link = None
            return
        raise failure

    # --- ending ------------------------------------------------------------------------------------------------

    def close(self, timeout: timedelta = timedelta(seconds=60)) -> bool:
        """The training loop is over: wait until all nodes hold the last snapshot. True if they do.

        A rank that is lost after this point has nothing left to lose but its exit code.
        """
        if self._progress is not None:
            self._progress.close()
        self._wait()
        link, self._link = self._link, None
        atexit.unregister(self._at_exit)  # it would keep the model, and a mesh with its process groups, to the very end
        if link is None or not self._last_snapshot:
            return False
        try:
            return link.wait_committed(self._last_snapshot, int(timeout.total_seconds() * 1000))
        except OSError:
            return False
        finally:
            link.close()

    def _at_exit(self) -> None:
        # A thread that is still copying when the interpreter goes away would crash it.
        if self._link is not None and not self._idle.wait(_EXIT_WAIT.total_seconds()):
            self._link.close()
            self._idle.wait(_EXIT_WAIT.total_seconds())


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One snapshot on its way into a slot."""

    step: int
    plan: Plan
    header: bytes
    leaves: list[Any]
    ready: Any
    watched: list[tuple[str, torch.Tensor, int]]
    """Leaves that are copied while training runs, with autograd's count of in-place changes to each."""


def _watch(state: State) -> list[tuple[str, torch.Tensor, int]]:
    return [(leaf.path, leaf.tensor, leaf.tensor._version) for leaf in state.leaves if leaf.constant]


@dataclass(frozen=True)
class _Copy:
    """A leaf that could not wait: its bytes as they were."""

    tensor: torch.Tensor


def _say_what_ddp_does(objects: dict[str, Any], world_size: int) -> None:
    """DDP lays its gradient buckets out anew after the first step of a process, so that step sums in another order."""
    wrapped = [value for value in objects.values() if isinstance(value, DistributedDataParallel)]
    if world_size > 2 and any(not module.find_unused_parameters for module in wrapped):
        print(
            "refound: DistributedDataParallel sums gradients in another order in the first step after a restart, which "
            "with 3 ranks or more changes last bits; for the very same bits give it find_unused_parameters=True",
            file=sys.stderr,
            flush=True,
        )


def _replica_checks(plan: Plan, leaves: list[Any]) -> dict[str, int]:
    """A checksum of all of every shared region, to be compared between the ranks that should hold the same."""
    checks: dict[str, int] = {}
    for slot, leaf in zip(plan.slots, leaves, strict=True):
        ranks = plan.regions[slot.region].ranks
        if len(ranks) > 1:
            name = ",".join(map(str, ranks))
            checks[name] = checksum(flat_bytes(leaf.tensor).cpu().numpy(), checks.get(name, 0))
    return checks


def _device_of(objects: dict[str, Any]) -> torch.device:
    for value in objects.values():
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters():
                return parameter.device
    return torch.device("cpu")
