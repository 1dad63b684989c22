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
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import last_words, preload
from .buckets import BUCKETS, Buckets
from .errors import ConfigError, DamageError, LayoutMismatchError, StaleWriterError
from .frozen import FrozenSet, size_hint
from .hang import Progress
from .link import Link, Place
from .loader import Loader
from .preload import WARM_ENV
from .reshape import Reshaper
from .snapshotter import Job, Snapshotter
from .tuning import STALL_BUDGET, interval_problems, make_interval
from .wrappers import optimizers_of, unlike_asked, unwrap

_IMPORTED_AFTER = 3
_EXIT_WAIT = timedelta(seconds=30)
_UNSETTLED_SNAPSHOTS = 10  # skipped at most, while gradient buckets are not laid out for good


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
        self._snapshotter = Snapshotter(
            objects,
            rank=self._rank,
            replicas=replicas,
            frozen=self._frozen,
            refuse_nonfinite=refuse_nonfinite,
        )
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
                loader.load(self._objects, self._snapshotter.collector)
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
        job = self._snapshotter.prepare(self.step, self._buckets.state())
        self._idle.clear()
        threading.Thread(target=self._save, args=(link, job), name="snapshot", daemon=True).start()

    def _save(self, link: Link, job: Job) -> None:
        try:
            if self._snapshotter.save(link, job, self._interval):
                self._last_snapshot = job.step
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
