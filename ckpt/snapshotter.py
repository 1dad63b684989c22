# SPDX-License-Identifier: Apache-2.0
"""One snapshot of one rank: what is taken of the state at once, how it is copied into a slot, and what keeps it out."""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..erasure import checksum
from .buckets import BUCKETS
from .collect import Collector, State
from .copier import Copier, flat_bytes
from .errors import NonFiniteStateError, SnapshotError
from .finite import first_nonfinite
from .frozen import FrozenSet
from .link import Link
from .shard import Plan, make_plan, signature
from .tuning import AutoInterval, FixedInterval
from .zero import ZeroState

MOST_REFUSALS = 10
"""Snapshots in a row that may be refused for NaN or Inf before training is stopped."""


@dataclass(frozen=True, kw_only=True)
class Job:
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


@dataclass(frozen=True)
class _Copy:
    """A leaf that could not wait: its bytes as they were."""

    tensor: torch.Tensor


class Snapshotter:
    """Takes a rank's snapshots, one at a time: `prepare` between two steps, `save` beside the next one."""

    def __init__(
        self, objects: dict[str, Any], *, rank: int, replicas: bool, frozen: FrozenSet | None, refuse_nonfinite: bool
    ) -> None:
        self._rank, self._frozen, self._refuse_nonfinite = rank, frozen, refuse_nonfinite
        self.collector = Collector(objects, rank=rank, replicas=replicas, frozen=frozen)
        self._copier = Copier(_device_of(objects))
        self._plan: Plan | None = None
        self._signature: tuple[Any, ...] = ()
        self._checked_replicas = False
        self._refusals = 0

    def prepare(self, step: int, layouts: Any) -> Job:
        """What must be taken before the state changes. layouts: of gradient buckets, if there are any."""
        state = self.collector.collect()
        if layouts:
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
        return Job(
            step=step,
            state=state,
            plan=self._plan,
            header=header,
            leaves=leaves,
            ready=self._copier.ready_event(),
            watched=_watch(state),
        )

    def save(self, link: Link, job: Job, interval: FixedInterval | AutoInterval) -> bool:
        """Copy it into a slot. False if it must not be committed, which the other ranks are told.

        Raises SnapshotError if the state was changed meanwhile, NonFiniteStateError if it has been bad for too long,
        and what the link raises.
        """
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
        link.complete(job.step, sums, checks, interval.agreed(link, job.step), objection)
        self._checked_replicas = self._checked_replicas or not objection
        return not objection

    def _with_thawed(self, job: Job, paths: list[str]) -> Job:
        """The same snapshot, with parameters that turn out to change although they require no gradients."""
        assert self._frozen is not None
        print(
            f"refound: {paths[0]} changes although it requires no gradients ({len(paths)} such), so it is saved from "
            f"step {job.step} on",
            file=sys.stderr,
            flush=True,
        )
        state = self.collector.thawed(job.state, paths)
        self._frozen.thaw(paths)
        self._plan = None  # that of the next step is another
        objects = json.dumps(state.objects, separators=(",", ":")).encode()
        plan = make_plan(state, self._rank, len(objects))
        header = plan.header(objects)
        assert header is not None
        leaves = [*job.leaves, *state.leaves[len(job.leaves) :]]
        return replace(job, state=state, plan=plan, header=header, leaves=leaves)

    def _objection(self, job: Job) -> str:
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


def _watch(state: State) -> list[tuple[str, torch.Tensor, int]]:
    return [(leaf.path, leaf.tensor, leaf.tensor._version) for leaf in state.leaves if leaf.constant]


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
