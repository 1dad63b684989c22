# SPDX-License-Identifier: Apache-2.0
"""Goodput: what part of a run's time is training that counts, in closed form, and how often to take a snapshot.

Interruptions of the job are a Poisson process that does not pause while the job is down. Training proceeds in periods
of `interval_s` of work and a stall of `stall_s`; the snapshot of a period counts `commit_s` after it, training going
on meanwhile. Work done since the last one that counts is lost with an interruption. One that comes during a recovery
starts the recovery anew. With commit_s = 0 and one kind of restart this is Daly's complete model (FGCS 22, 2006).
"""

import math
from dataclasses import dataclass

from .stripes import Group
from .survival import fall_rate


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to a job: interruptions of the whole job, and how many of them take a node."""

    nodes: int
    mtbf_s: float
    """Mean time between two interruptions of the job; may be infinite."""
    node_loss_share: float
    """Share of the interruptions after which a node has to be replaced; the others end processes only."""

    @property
    def node_losses_per_s(self) -> float:
        """Of one node."""
        return self.node_loss_share / self.mtbf_s / self.nodes


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to protect a job, as times. Without `groups` everything comes from storage, which is never lost."""

    name: str
    interval_s: float
    """Work between two snapshots (or checkpoints)."""
    stall_s: float
    """How long each of them holds training up."""
    commit_s: float
    """From its start until it can be restored."""
    process_restart_s: float
    """From the loss of processes until training goes on."""
    node_restart_s: float
    """From the loss of a node until training goes on."""
    groups: tuple[Group, ...] = ()
    repair_s: float = 0.0
    """From the loss of a node until its successor holds its data and parity."""
    fall_restart_s: float = 0.0
    """From a loss that memory does not survive until training goes on from storage."""
    disk_every_s: float = math.inf
    """Time between two checkpoints on storage, beneath the snapshots in memory."""
    disk_commit_s: float = 0.0
    """From the start of such a checkpoint until it is complete."""

    def falls_per_s(self, faults: Faults) -> float:
        """Expected rate of losses that memory does not survive."""
        return fall_rate(self.groups, faults.node_losses_per_s, self.repair_s)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Shares of a run's time; together 1."""

    useful: float
    """Training that counts: the goodput."""
    stall: float
    """Waiting for snapshots."""
    rework: float
    """Training that was lost and had to be repeated."""
    down: float
    """Not training: detection, restart, replacement, loading."""


def expected_goodput(scheme: Scheme, faults: Faults) -> Goodput:
    """What to expect in the long run.

    Work counts if no interruption comes before its snapshot does, and no fall to storage before its checkpoint does.
    Exact for interruptions of one kind; kinds that overlap in one recovery are approximated (`simulation` does not).
    """
    period_s, mtbf_s = scheme.interval_s + scheme.stall_s, faults.mtbf_s
    if math.isinf(mtbf_s):
        useful = scheme.interval_s / period_s
        return Goodput(useful=useful, stall=1 - useful, rework=0.0, down=0.0)
    falls_per_s = scheme.falls_per_s(faults)
    fall_share = min(faults.node_loss_share, falls_per_s * mtbf_s)
    kinds = (
        (1 - faults.node_loss_share, scheme.process_restart_s),
        (faults.node_loss_share - fall_share, scheme.node_restart_s),
        (fall_share, scheme.fall_restart_s),
    )
    # An attempt to come back succeeds with this probability, so that an uptime of mtbf_s follows on mtbf_s / up in all.
    up = sum(share * math.exp(-restart_s / mtbf_s) for share, restart_s in kinds)
    periods_per_s = math.exp(-(period_s + scheme.commit_s) / mtbf_s) / -math.expm1(-period_s / mtbf_s) / mtbf_s
    useful = up * periods_per_s * scheme.interval_s * _kept(scheme, falls_per_s)
    stall = useful * scheme.stall_s / scheme.interval_s
    return Goodput(useful=useful, stall=stall, rework=max(0.0, up - useful - stall), down=1 - up)


def _kept(scheme: Scheme, falls_per_s: float) -> float:
    """Share of the committed work that no fall takes back before a checkpoint on storage holds it."""
    if not falls_per_s:
        return 1.0
    every = falls_per_s * scheme.disk_every_s
    waiting = -math.expm1(-every) / every if every else 1.0
    return waiting * math.exp(-falls_per_s * scheme.disk_commit_s)


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum of work between two checkpoints: sqrt(2 stall mtbf) (CACM 17(9), 1974)."""
    return 0.0 if stall_s == 0 else math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum of work between two checkpoints (FGCS 22, 2006, eq. 37)."""
    if stall_s == 0 or math.isinf(mtbf_s):
        return young_interval_s(stall_s, mtbf_s)
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    root = math.sqrt(stall_s / (2 * mtbf_s))
    return young_interval_s(stall_s, mtbf_s) * (1 + root / 3 + root**2 / 9) - stall_s
