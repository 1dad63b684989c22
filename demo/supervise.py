# SPDX-License-Identifier: Apache-2.0
"""Runs one job on a cluster to its end, lets the faults fall when their step has come, and watches that it moves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..ckpt.faults import Fault
from .cluster import Cluster
from .errors import RunFailedError
from .progress import Progress, describe_starts
from .records import StartRecord, StepRecord, read_starts, read_steps
from .recovery import Strike

_TICK_S = 0.05
_STATUS_EVERY_S = 0.5
_CLEAN_EXIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """One finished run."""

    name: str
    directory: Path
    began_s: float
    seconds: float
    steps: tuple[StepRecord, ...]
    starts: tuple[StartRecord, ...]
    strikes: tuple[Strike, ...]
    left_behind: int
    """Processes that were still there after the job had ended by itself; none should be."""

    @property
    def restarts(self) -> int:
        """How often the workers came back with the state of an earlier incarnation, or without it."""
        ranks = [start.rank for start in self.starts]
        return max((ranks.count(rank) for rank in set(ranks)), default=1) - 1


class Supervisor:
    """Watches one run. `directory` is where its workers write their records."""

    def __init__(
        self,
        cluster: Cluster,
        directory: Path,
        *,
        name: str,
        steps: int,
        faults: Sequence[Fault],
        progress: Progress,
        at_last_step: Callable[[], None] | None = None,
    ) -> None:
        """at_last_step: called once, when the last step is complete and the job has not ended."""
        self._cluster, self._directory, self._name = cluster, directory, name
        self._at_last_step = at_last_step
        self._target_steps, self._progress = steps, progress
        self._pending = list(faults)
        self._strikes: list[Strike] = []
        self._steps: list[StepRecord] = []
        self._announced = 0  # starts that have been told of
        self._starting: dict[int, StartRecord] = {}
        self._statuses: list[dict[str, Any]] = []
        self._statuses_s = 0.0

    def run(self, patience: timedelta) -> RunOutcome:
        """Starts the job and returns when it has ended well.

        Raises:
            RunFailedError: if an agent fails, if no step is completed for `patience`, or if a fault never falls.
        """
        began_s = moved_s = time.time()
        self._cluster.start()
        while self._cluster.running():
            time.sleep(_TICK_S)
            self._cluster.tick()
            done = len(self._steps)
            self._steps = read_steps(self._directory)
            if len(self._steps) > done:
                moved_s = time.time()
            self._tell_starts()
            self._strike()
            self._show()
            if self._at_last_step and self._steps and self._steps[-1].step >= self._target_steps:
                at_last_step, self._at_last_step = self._at_last_step, None
                at_last_step()
            if failed := self._cluster.failed():
                raise self._failure(
                    ", ".join(f"node {node} ended with status {status}" for node, status in failed.items())
                )
            if time.time() - moved_s > patience.total_seconds():
                raise self._failure(f"no step was completed for {patience.total_seconds():.0f} s")
        return self._ended(began_s)

    def _ended(self, began_s: float) -> RunOutcome:
        seconds = time.time() - began_s
        if failed := self._cluster.failed():
            raise self._failure(f"node {min(failed)} ended with status {failed[min(failed)]}")
        if self._pending:
            raise self._failure(f"the job ended before this could fall: {', '.join(map(str, self._pending))}")
        left = self._cluster.wait_until_empty(_CLEAN_EXIT_S)
        self._tell_starts()
        return RunOutcome(
            name=self._name,
            directory=self._directory,
            began_s=began_s,
            seconds=seconds,
            steps=tuple(read_steps(self._directory)),
            starts=tuple(read_starts(self._directory)),
            strikes=tuple(self._strikes),
            left_behind=len(left),
        )

    def _strike(self) -> None:
        for fault in tuple(self._pending):
            reached = [record.time_s for record in self._steps if record.step >= fault.step]
            if not reached or time.time() < min(reached) + fault.after_ms / 1000:
                continue
            try:
                now = time.time()
                pids = self._cluster.strike(fault)
            except LookupError:
                continue  # its target is being restarted; the next tick tries again
            self._pending.remove(fault)
            self._strikes.append(Strike(fault=fault, time_s=now, pids=pids))
            self._progress.say(f"{self._name:9s}  FAULT {fault}")

    def _tell_starts(self) -> None:
        starts = read_starts(self._directory)
        for start in starts[self._announced :]:
            self._starting[start.rank] = start
            if len(self._starting) == start.world:
                self._progress.say(f"{self._name:9s}  {describe_starts(list(self._starting.values()))}")
                self._starting = {}
        self._announced = len(starts)

    def _show(self) -> None:
        if time.monotonic() - self._statuses_s > _STATUS_EVERY_S:
            self._statuses, self._statuses_s = self._cluster.statuses(), time.monotonic()
        last = self._steps[-1] if self._steps else None
        names = list(self._cluster.names.values())
        self._progress.show(self._name, self._target_steps, last, self._statuses, names)

    def _failure(self, what: str) -> RunFailedError:
        last = self._steps[-1].step if self._steps else 0
        return RunFailedError(
            f"the {self._name} run failed after step {last} of {self._target_steps}: {what}. Everything it started has "
            f"been ended. What each node said is in {self._directory / 'logs'}"
        )
