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
import contextlib
import json
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..erasure import checksum
from . import last_words, preload
from .buckets import BUCKETS, Buckets
from .collect import Collector, State
from .copier import Copier, flat_bytes
from .errors import (
    ConfigError,
    DamageError,
    LayoutMismatchError,
    NonFiniteStateError,
    SnapshotError,
    StaleWriterError,
)
from .finite import first_nonfinite
from .frozen import FrozenSet, size_hint
from .hang import Progress
from .link import Link, Place
from .loader import Loader
from .preload import WARM_ENV
from .reshape import Reshaper
from .shard import Plan, make_plan, signature
from .tuning import STALL_BUDGET, interval_problems, make_interval
from .wrappers import optimizers_of, unlike_asked, unwrap
from .zero import ZeroState

_IMPORTED_AFTER = 3
_EXIT_WAIT = timedelta(seconds=30)
_UNSETTLED_SNAPSHOTS = 10  # skipped at most, while gradient buckets are not laid out for good
MOST_REFUSALS = 10
"""Snapshots in a row that may be refused for NaN or Inf before training is stopped."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a job went on from."""

    step: int
    source: str
    """"memory", "parity" (rebuilt from other nodes) or "disk"."""
    seconds: float
    notes: tuple[str, ...]
    """Why not from something newer."""
    world_size: int
    """Ranks that took the snapshot."""


def protect(
    *,
    every: int | str = 1,
    stall_budget: float = STALL_BUDGET,
    replicas: bool = True,
    save_frozen: bool = True,
    refuse_nonfinite: bool = False,
    **objects: Any,
) -> "Protection":
    """Protect named objects: models, optimizers, schedulers, samplers, anything with (load_)state_dict.

    Models may be plain, DDP, made of DTensors (FSDP2, HSDP, tensor parallel), or a DeepSpeed engine, which brings its
    optimizer along. What accelerate has prepared is taken as it is.

    every: steps between snapshots; "auto": as few as keep their stall within the budget, agreed by all ranks.
    stall_budget: share of training time that snapshots may hold up, for "auto".
    replicas: ranks that hold the same by construction (DDP, replicated DTensor dimensions) save a part each.
    save_frozen: False leaves parameters without gradients out (see frozen.py): the script makes them the same in
    every start, which is proven before anything is restored.

    refuse_nonfinite: a snapshot with NaN or Inf in a parameter or in optimizer state is not committed on any node, and
    the last good one stays; training goes on. After MOST_REFUSALS in a row NonFiniteStateError ends it, and a restart
    goes back to the last good snapshot. Costs one read of the state for each snapshot, beside the copy.

    Restores their state if the job has been running before, on as many ranks or others (docs/reshape.md).
    Without a refound agent (plain `python train.py`) it warns once and protects nothing.

    Raises ConfigError (not protectable), LayoutMismatchError (the snapshot is of other tensors), WorldSizeError
    (some state differs by rank and the number of ranks has changed), DamageError (it could not be proven).
    """
    problems = [
        f"{name!r} ({type(value).__name__}) has no state_dict and load_state_dict"
        for name, value in objects.items()
        if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)))
    ]
    problems += interval_problems(every, stall_budget)
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
    return Protection(
        objects,
        every=every,
        stall_budget=stall_budget,
        replicas=replicas,
        save_frozen=save_frozen,
        refuse_nonfinite=refuse_nonfinite,
        place=place,
    )


class Protection:
    """A job's protection, made by `protect`."""

    def __init__(
        self,
        objects: dict[str, Any],
        *,
        every: int | str,
        replicas: bool,
        place: Place | None,
        stall_budget: float = STALL_BUDGET,
        save_frozen: bool = True,
        refuse_nonfinite: bool = False,
    ) -> None:
        self.step = 0
        """Completed steps."""
        self.restored: Restored | None = None
        """What this process went on from; None at a job's start."""
        self.stall_ms = 0.0
        """How long the last snapshot held training up, its preparation included."""
        if place is not None:
            objects = unwrap(objects)
        self._objects = objects
        self._plan: Plan | None = None
        self._signature: tuple[Any, ...] = ()
        self._checked_replicas = False
        self._refuse_nonfinite, self._refusals = refuse_nonfinite, 0
        self._idle = threading.Event()
        self._idle.set()
        self._failure: Exception | None = None
        self._last_snapshot = self._skipped = 0
        self._link: Link | None = None
        self._progress: Progress | None = None
        self._steps_to_imports = _IMPORTED_AFTER if place is not None and WARM_ENV in os.environ else 0
        self._rank = place.rank if place else 0
        self._interval = make_interval(every, stall_budget, self._rank)
        self._frozen = None if save_frozen or place is None else FrozenSet(objects)
        self._collector = Collector(objects, rank=self._rank, replicas=replicas, frozen=self._frozen)
        self._copier = Copier(_device_of(objects))
        if place is not None:
            self._link = Link(place)
            self._buckets = Buckets(objects)
            self._progress = Progress.from_environment(place.socket, place.rank, place.generation)
            last_words.install(Path(place.socket), place.rank, place.generation)
            self._restore(self._link)
            if place.rank == 0:
                for words in [*unlike_asked(objects, place.world_size), size_hint(objects) if save_frozen else ""]:
                    if words:
                        print(f"refound: {words}", file=sys.stderr, flush=True)
            hooked = optimizers_of(objects)
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
        try:
            self._load(link, facts["world_size"])
        except DamageError as error:
            link.reject(str(error))  # else every restart would fail at this same step
            raise
        if self._frozen is not None:
            self._frozen.thaw(self._frozen.changed())  # what the script cannot make is in the snapshots
        self.step = self._last_snapshot = facts["step"]
        self.restored = Restored(
            step=self.step,
            source=facts["source"],
            seconds=round(time.monotonic() - started, 3),
            notes=tuple(facts["notes"]),
            world_size=facts["world_size"],
        )

    def _load(self, link: Link, saved_world_size: int) -> None:
        """From this rank's own shard where it fits as it is; else from the parts of all that this rank now needs."""
        place, misfit = link.place, None
        if saved_world_size == place.world_size:
            try:
                loader = Loader(link.shard, place.rank)
                loader.load(self._objects, self._collector)
                for problem in self._buckets.restore(loader.described(BUCKETS)):
                    self._say_of_buckets(problem)
                return
            except LayoutMismatchError as error:
                misfit = error  # only the layout may have changed
        reshaper = Reshaper(
            link.ranges, rank=place.rank, world_size=place.world_size, saved_world_size=saved_world_size
        )
        try:
            reshaper.load(self._objects)
        except LayoutMismatchError as error:
            raise misfit or error from None

    # --- saving ------------------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Count a step as done and, every N steps, begin its snapshot. Call it after `optimizer.step()`.

        Returns before the copy is finished: it goes on beside the next forward and backward. Until the next
        `optimizer.step()` the parameters and optimizer state must not be changed by anything else. The first two or
        three steps of a job on DDP have no snapshot (see `buckets.py`).

        Raises SnapshotMemoryError, UnsupportedStateError or DamageError when protection is not possible.
        """
        self.step += 1
        if self._progress is not None:
            self._progress.step()
        if self._link is None:
            return
        if self._steps_to_imports:
            self._tell_imports(self._link)
        if not self._is_due():
            return
        started = time.monotonic()
        self._wait()
        if self._link is None:
            return  # it has gone while the last snapshot was copied
        self._interval.measured(self.step, started, self.stall_ms)
        self.stall_ms = 0.0
        self._begin(self._link)
        if not self._overlaps:
            self._wait()  # without an optimizer to hook into, nobody could say when the state changes
        self.stall_ms += (time.monotonic() - started) * 1000

    def _tell_imports(self, link: Link) -> None:
        """By the third step all is imported that training needs, which torch does lazily: warm spares do it before."""
        self._steps_to_imports -= 1
        if not self._steps_to_imports:
            with contextlib.suppress(OSError):  # the snapshot process has gone, and the next start tells its successor
                link.loaded(preload.loaded())

    def _is_due(self) -> bool:
        settled = self._buckets.learn() or self._skipped >= _UNSETTLED_SNAPSHOTS  # torch logs by iteration: look at all
        due = self._interval.is_due(self.step, self._wait)
        if settled or not due:
            return due
        self._skipped += 1
        if self._skipped == _UNSETTLED_SNAPSHOTS:
            self._say_of_buckets("torch did not say how the buckets lie")
        return False

    def _say_of_buckets(self, problem: str) -> None:
        if self._rank == 0:
            print(
                f"refound: {problem}, so the first step after a restart may sum gradients in another order and differ "
                "in last bits; DistributedDataParallel(find_unused_parameters=True) never lays them out anew",
                file=sys.stderr,
                flush=True,
            )

    def _begin(self, link: Link) -> None:
        state = self._collector.collect()
        if layouts := self._buckets.state():
            state.objects[BUCKETS] = layouts
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
        job = _Job(
            step=self.step,
            state=state,
            plan=self._plan,
            header=header,
            leaves=leaves,
            ready=ready,
            watched=_watch(state),
        )
        threading.Thread(target=self._copy, args=(link, job), name="snapshot", daemon=True).start()

    def _copy(self, link: Link, job: "_Job") -> None:
        try:
            if self._frozen is not None and (thawed := self._frozen.changed()):
                job = self._with_thawed(job, thawed)
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
            objection = self._objection(job)
            link.complete(job.step, sums, checks, self._interval.agreed(link, job.step), objection)
            if not objection:
                self._checked_replicas, self._last_snapshot = True, job.step
        except Exception as error:
            self._failure = error
        finally:
            self._idle.set()

    def _with_thawed(self, job: "_Job", paths: list[str]) -> "_Job":
        """The same snapshot, with parameters that turn out to change although they require no gradients."""
        assert self._frozen is not None
        print(
            f"refound: {paths[0]} changes although it requires no gradients ({len(paths)} such), so it is saved from "
            f"step {job.step} on",
            file=sys.stderr,
            flush=True,
        )
        state = self._collector.thawed(job.state, paths)
        self._frozen.thaw(paths)
        self._plan = None  # that of the next step is another
        objects = json.dumps(state.objects, separators=(",", ":")).encode()
        plan = make_plan(state, self._rank, len(objects))
        header = plan.header(objects)
        assert header is not None
        leaves = [*job.leaves, *state.leaves[len(job.leaves) :]]
        return replace(job, state=state, plan=plan, header=header, leaves=leaves)

    def _objection(self, job: "_Job") -> str:
        """Why this snapshot must not be committed. Raises NonFiniteStateError when that has been so for too long."""
        bad = first_nonfinite(job.plan, job.leaves) if self._refuse_nonfinite else None
        if bad is None:
            self._refusals = 0
            return ""
        self._refusals += 1
        words = f"{bad} of rank {self._rank} holds NaN or Inf at step {job.step}"
        if self._refusals > MOST_REFUSALS:
            raise NonFiniteStateError(
                f"{words}, as in the {MOST_REFUSALS} snapshots before, none of which was taken. A restart goes back to "
                "the last good one; look at the learning rate, the data, or the loss scale"
            )
        print(f"refound: {words}: no snapshot is taken of it, the last good one stays", file=sys.stderr, flush=True)
        return words

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

    def close(self, timeout: timedelta = timedelta(seconds=60), *, done: bool = True) -> bool:
        """The job is done: wait until all nodes hold the last snapshot. True if they do.

        Call it last. When all ranks have, a node that is lost has nothing left to lose and is not waited for.
        done: False if the script has more to do than train, so that a node which is lost then is still waited for.
        """
        if self._progress is not None:
            self._progress.close()
        self._wait()
        link, self._link = self._link, None
        atexit.unregister(self._at_exit)  # it would keep the model, and a mesh with its process groups, to the very end
        if link is None or not self._last_snapshot:
            return False
        try:
            committed = self._is_committed(link, timeout)
            if committed and done:
                link.finish()
            return committed
        except (OSError, StaleWriterError):
            return False
        finally:
            link.close()

    def _is_committed(self, link: Link, timeout: timedelta) -> bool:
        if self.restored is not None and self._last_snapshot == self.restored.step:
            # None was taken in this life: all nodes hold it already, or would not have agreed on it.
            return self.restored.source != "disk"
        return link.wait_committed(self._last_snapshot, int(timeout.total_seconds() * 1000))

    def _at_exit(self) -> None:
        # A thread that is still copying when the interpreter goes away would crash it.
        if self._link is not None and not self._idle.wait(_EXIT_WAIT.total_seconds()):
            self._link.close()
            self._idle.wait(_EXIT_WAIT.total_seconds())


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One snapshot on its way into a slot."""

    step: int
    state: State
    plan: Plan
    header: bytes
    leaves: list[Any]
    """Those of the state, or copies of them."""
    ready: Any
    watched: list[tuple[str, torch.Tensor, int]]
    """Leaves that are copied while training runs, with autograd's count of in-place changes to each."""


def _watch(state: State) -> list[tuple[str, torch.Tensor, int]]:
    return [(leaf.path, leaf.tensor, leaf.tensor._version) for leaf in state.leaves if leaf.constant]


@dataclass(frozen=True)
class _Copy:
    """A leaf that could not wait: its bytes as they were."""

    tensor: torch.Tensor


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
        if isinstance(value, ZeroState):
            return value.device
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters():
                return parameter.device
    return torch.device("cpu")
