# SPDX-License-Identifier: Apache-2.0
"""A run through random interruptions, event by event: what the closed form of `goodput` approximates.

Interruptions arrive as a Poisson process, while the job is down too; a share of them takes a node, every node as
likely as another. Nothing is averaged: snapshots count when they are committed, a group that lacks more than m nodes
at once falls back to the last complete checkpoint on storage, and one recovery may run into the next.
"""

import math
import random
import statistics
from dataclasses import dataclass, field

from .goodput import Faults, Goodput, Scheme


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What became of `runs` runs of the same length."""

    scheme: str
    runs: int
    goodput: Goodput
    """Means over the runs."""
    goodput_standard_error: float
    """Of the mean of the useful share."""
    goodput_p5: float
    goodput_p95: float
    """Between these lie nine runs of ten."""
    interruptions: float
    node_losses: float
    falls: float
    """Means a run: interruptions, those that took a node, and those that memory did not survive."""


def simulate(scheme: Scheme, faults: Faults, run_s: float, *, runs: int, seed: int) -> Simulated:
    """Put `runs` runs of `run_s` seconds through interruptions. The same seed gives all schemes the same ones.

    Raises ValueError for no runs or a run without an end.
    """
    if runs < 1 or not 0 < run_s < math.inf:
        raise ValueError(f"cannot simulate {runs} runs of {run_s} s")
    done = [_Run(scheme, faults, run_s).through(random.Random(f"{seed}/{run}")) for run in range(runs)]
    useful = sorted(run.shares.useful for run in done)
    return Simulated(
        scheme=scheme.name,
        runs=runs,
        goodput=Goodput(
            useful=statistics.fmean(useful),
            stall=statistics.fmean(run.shares.stall for run in done),
            rework=statistics.fmean(run.shares.rework for run in done),
            down=statistics.fmean(run.shares.down for run in done),
        ),
        goodput_standard_error=statistics.stdev(useful) / math.sqrt(runs) if runs > 1 else math.inf,
        goodput_p5=useful[round(0.05 * (runs - 1))],
        goodput_p95=useful[round(0.95 * (runs - 1))],
        interruptions=statistics.fmean(run.interruptions for run in done),
        node_losses=statistics.fmean(run.node_losses for run in done),
        falls=statistics.fmean(run.falls for run in done),
    )


@dataclass
class _Run:
    """One run on its way. Times are seconds since its start, work is seconds of training."""

    scheme: Scheme
    faults: Faults
    run_s: float
    interruptions: int = 0
    node_losses: int = 0
    falls: int = 0
    _ready_s: float = 0.0
    """When training goes on, or went on last."""
    _up_s: float = 0.0
    _kept_s: float = 0.0
    """Work that a restart from memory (or storage, where there is no memory) goes on from."""
    _durable_s: float = 0.0
    """Work that the newest complete checkpoint on storage holds, beneath a memory tier."""
    _checkpoint_due_s: float = 0.0
    _lost_at_s: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._checkpoint_due_s = self.scheme.disk_every_s
        self._group_of = [group for group in self.scheme.groups for _ in group.members]

    def through(self, draw: random.Random) -> "_Run":
        """Run to the end."""
        at_s = 0.0
        while True:
            at_s += draw.expovariate(1 / self.faults.mtbf_s) if self.faults.mtbf_s < math.inf else math.inf
            # Drawn for every interruption, needed or not: then all schemes meet the same ones.
            node = draw.randrange(self.faults.nodes) if draw.random() < self.faults.node_loss_share else None
            if at_s >= self.run_s:
                break
            self._train(until_s=at_s)
            self._interrupt(at_s, node)
        trained_s = max(0.0, self.run_s - self._ready_s)
        self._up_s += trained_s
        self._kept_s += trained_s * self._working
        return self

    @property
    def shares(self) -> Goodput:
        up, useful = self._up_s / self.run_s, self._kept_s / self.run_s
        stall = up * (1 - self._working)
        return Goodput(useful=useful, stall=stall, rework=up - stall - useful, down=1 - up)

    @property
    def _period_s(self) -> float:
        return self.scheme.interval_s + self.scheme.stall_s

    @property
    def _working(self) -> float:
        return self.scheme.interval_s / self._period_s

    def _train(self, until_s: float) -> None:
        """From the last restart until an interruption; nothing if that comes before the restart is done."""
        if until_s <= self._ready_s:
            return
        while (start_s := max(self._checkpoint_due_s, self._ready_s)) < until_s:
            self._checkpoint_due_s = start_s + self.scheme.disk_every_s
            # Nodes that are interrupted while they write never complete that checkpoint.
            if start_s + self.scheme.disk_commit_s <= until_s:
                self._durable_s = self._kept_at(start_s)
        self._kept_s = self._kept_at(until_s)
        self._up_s += until_s - self._ready_s

    def _kept_at(self, at_s: float) -> float:
        """Work of this uptime and before that has been committed by then."""
        snapshots = math.floor((at_s - self._ready_s - self.scheme.commit_s) / self._period_s)
        return self._kept_s + max(0, snapshots) * self.scheme.interval_s

    def _interrupt(self, at_s: float, node: int | None) -> None:
        self.interruptions += 1
        if node is None:
            restart_s = self.scheme.process_restart_s
        else:
            self.node_losses += 1
            if self._survives(at_s, node):
                restart_s = self.scheme.node_restart_s
            else:
                self.falls += 1
                self._kept_s = self._durable_s
                self._lost_at_s = {}
                restart_s = self.scheme.fall_restart_s
        self._ready_s = max(self._ready_s, at_s + restart_s)

    def _survives(self, at_s: float, node: int) -> bool:
        if not self._group_of:
            return True
        group, since_s = self._group_of[node], at_s - self.scheme.repair_s
        others = [self._lost_at_s.get(other, -math.inf) for other in group.members if other != node]
        self._lost_at_s[node] = at_s
        return 1 + sum(lost_at_s > since_s for lost_at_s in others) <= group.m
