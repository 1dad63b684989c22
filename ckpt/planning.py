# SPDX-License-Identifier: Apache-2.0
"""What each way to protect a job costs and saves, and which to take. Computes; starts and measures nothing.

The formulas and what they leave out are in docs/plan.md.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .costs import CodeCost, code_cost
from .errors import ConfigError
from .goodput import Faults, Goodput, Scheme, daly_interval_s, expected_goodput
from .stripes import Group, choose_groups
from .survival import run_survival, survival_probability

LOSSES = (1, 2, 3)
"""Numbers of nodes lost at once that a plan looks at."""
_MOST_NODES = 100_000
_GROUP_SIZES = (4, 8, 16)
"""Sizes of groups that are compared, or what comes close and tiles the nodes."""
_LARGEST_GROUP = 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, its machines, and what happens to them. Raises ConfigError for all that cannot be, at once."""

    nodes: int
    gpus_per_node: int
    state_bytes: float
    """Of the whole job, each byte once: replicas share the saving."""
    step_s: float
    run_s: float
    mtbf_s: float
    """Mean time between two interruptions of the job; may be infinite."""
    node_loss_share: float
    """Share of the interruptions that take a node."""
    stall_s: float
    """How long a snapshot holds training up."""
    copy_bytes_s: float
    """From one GPU to host memory."""
    network_bytes_s: float
    """That a snapshot process reaches, each direction."""
    storage_bytes_s: float
    """That the whole job reaches when it writes a checkpoint."""
    load_s: float
    """From a checkpoint on storage."""
    disk_every_s: float
    """Between two checkpoints on storage; may be infinite."""
    disk_stall_s: float
    restart_s: float
    """From an interruption until all workers are connected again."""
    replace_s: float
    """What a new node adds to that."""
    ram_bytes: float
    """Of one node, for snapshots."""
    target_survival: float
    k: int = 0
    """A code to compare beside the others; 0: none."""
    m: int = 0

    def __post_init__(self) -> None:
        problems = [*self._out_of_range(), *self._no_code()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _out_of_range(self) -> list[str]:
        whole = {"nodes": _MOST_NODES, "gpus_per_node": 1024}
        problems = [
            f"{name}={getattr(self, name)} is not between 1 and {most:,}"
            for name, most in whole.items()
            if not 1 <= getattr(self, name) <= most
        ]
        infinite = {"mtbf_s", "disk_every_s", "copy_bytes_s", "network_bytes_s", "storage_bytes_s", "ram_bytes"}
        may_be_zero = {"stall_s", "disk_stall_s", "load_s", "restart_s", "replace_s"}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is not float or name in ("node_loss_share", "target_survival"):
                continue
            if value < 0 or (value == 0 and name not in may_be_zero):
                problems.append(f"{name}={value:g} must be {'at least' if name in may_be_zero else 'more than'} 0")
            elif math.isinf(value) and name not in infinite:
                problems.append(f"{name} must be finite")
        problems += [
            f"{name}={getattr(self, name):g} is not between 0 and 1"
            for name in ("node_loss_share", "target_survival")
            if not 0 <= getattr(self, name) <= 1
        ]
        return problems

    def _no_code(self) -> list[str]:
        if not self.k and not self.m:
            return []
        if self.k < 1 or self.m < 0:
            return [f"k={self.k}, m={self.m}: k must be at least 1 and m at least 0"]
        try:
            choose_groups(max(1, min(self.nodes, _MOST_NODES)), self.k, self.m)
        except ConfigError as error:
            return [str(error)]
        return []

    @property
    def node_bytes(self) -> float:
        """D: one node's part of the state."""
        return self.state_bytes / self.nodes

    @property
    def copy_s(self) -> float:
        """To copy a GPU's part of the state to host memory."""
        return self.node_bytes / self.gpus_per_node / self.copy_bytes_s

    @property
    def save_s(self) -> float:
        """From the start of a checkpoint on storage until it is complete."""
        return self.copy_s + self.state_bytes / self.storage_bytes_s

    @property
    def faults(self) -> Faults:
        return Faults(nodes=self.nodes, mtbf_s=self.mtbf_s, node_loss_share=self.node_loss_share)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One way to protect the job and what comes of it."""

    scheme: Scheme
    cost: CodeCost
    every_steps: int
    """Between two snapshots, or two checkpoints."""
    survival: dict[int, float]
    """Nodes lost at once → probability that memory still restores the job. Empty without snapshots in memory."""
    falls_per_s: float
    run_survival: float
    """Probability that the whole run never falls to storage."""
    goodput: Goodput
    is_chosen: bool = False
    """Whether refound takes this code by itself."""
    is_yours: bool = False

    @property
    def name(self) -> str:
        return self.scheme.name

    @property
    def peak_bytes(self) -> float:
        """The most memory that a node takes; without checkpoints on storage there is nothing to add."""
        return self.cost.peak_bytes if self.scheme.disk_every_s < math.inf else self.cost.memory_bytes

    @property
    def in_memory(self) -> bool:
        return bool(self.scheme.groups)

    @property
    def code(self) -> tuple[int, int] | None:
        """(k, m) where all groups have the same."""
        shapes = {(group.k, group.m) for group in self.scheme.groups}
        return shapes.pop() if len(shapes) == 1 else None


@dataclass(frozen=True, kw_only=True)
class CostPlan:
    """All ways, and which to take."""

    job: Job
    schemes: tuple[Planned, ...]
    """Snapshots in memory first, the cheapest first; then storage alone."""
    recommended: Planned | None
    why: str
    notes: tuple[str, ...]

    @property
    def baseline(self) -> Planned:
        """The job without refound, as its checkpoints are now."""
        return next(planned for planned in self.schemes if not planned.in_memory)


def make_cost_plan(job: Job) -> CostPlan:
    """Compare the codes that suit the job's number of nodes, and storage alone."""
    chosen, yours = choose_groups(job.nodes), choose_groups(job.nodes, job.k, job.m) if job.k else ()
    ways: list[tuple[Group, ...]] = [*_candidates(job.nodes), chosen, *([yours] if yours else [])]
    in_memory = [
        _in_memory(job, groups, is_chosen=groups == chosen, is_yours=groups == yours)
        for index, groups in enumerate(ways)
        if groups not in ways[:index]
    ]
    in_memory.sort(key=lambda planned: (planned.cost.memory_bytes, planned.cost.network_bytes))
    on_disk = _storage_alone(job)
    recommended, why = _recommend(job, in_memory)
    return CostPlan(
        job=job,
        schemes=(*in_memory, *on_disk),
        recommended=recommended,
        why=why,
        notes=tuple(_notes(job, recommended, in_memory, on_disk)),
    )


def _candidates(nodes: int) -> list[tuple[Group, ...]]:
    """No parity, mirrors, and codes of a few sizes of groups that tile the nodes."""
    sizes = [n for n in range(2, _LARGEST_GROUP + 1) if nodes % n == 0]
    near = {min(sizes, key=lambda n: abs(math.log(n / wish))) for wish in _GROUP_SIZES} if sizes else set()
    codes = [(1, 0), (1, 1), (1, 2)]
    codes += [(n - m, m) for n in sorted(near) for m in (1, 2, 3) if n - m >= max(1, m)]
    return [choose_groups(nodes, k, m) for k, m in dict.fromkeys(codes) if nodes % (k + m) == 0]


def _in_memory(job: Job, groups: tuple[Group, ...], *, is_chosen: bool, is_yours: bool) -> Planned:
    cost = code_cost(groups, job.node_bytes)
    commit_s = job.copy_s + cost.network_bytes / job.network_bytes_s
    every_steps = _steps(job, job.stall_s, commit_s)
    node_restart_s = job.restart_s + job.replace_s
    scheme = Scheme(
        name=_name(groups),
        interval_s=every_steps * job.step_s,
        stall_s=job.stall_s,
        commit_s=commit_s,
        process_restart_s=job.restart_s + job.copy_s,
        # Training goes on when the newcomer has its data; its parity follows behind.
        node_restart_s=node_restart_s + job.node_bytes / job.network_bytes_s + job.copy_s,
        groups=groups,
        repair_s=node_restart_s + cost.newcomer_bytes / job.network_bytes_s,
        fall_restart_s=node_restart_s + job.load_s,
        disk_every_s=job.disk_every_s,
        disk_commit_s=job.save_s,
    )
    falls_per_s = scheme.falls_per_s(job.faults)
    return Planned(
        scheme=scheme,
        cost=cost,
        every_steps=every_steps,
        survival={f: float(survival_probability(groups, f)) for f in LOSSES if f <= job.nodes},
        falls_per_s=falls_per_s,
        run_survival=run_survival(falls_per_s, job.run_s),
        goodput=expected_goodput(scheme, job.faults),
        is_chosen=is_chosen,
        is_yours=is_yours,
    )


def _steps(job: Job, stall_s: float, commit_s: float) -> int:
    """Steps between two snapshots: Daly's optimum, no sooner than the last one is committed, no longer than the run."""
    best_s = min(daly_interval_s(stall_s, job.mtbf_s), job.run_s)
    return max(1, round(best_s / job.step_s), math.ceil(commit_s / job.step_s))


def _storage_alone(job: Job) -> list[Planned]:
    """Checkpoints as the job has them, and as often as suits."""
    best = _steps(job, job.disk_stall_s, job.save_s)
    wishes = [("storage, as often as is best", best)]
    if job.disk_every_s < math.inf:
        # A checkpoint that takes longer than that comes as soon as the last one is written.
        now = max(1, round(job.disk_every_s / job.step_s), math.ceil(job.save_s / job.step_s))
        wishes.insert(0, ("storage, as you have it", now))
    planned = []
    for name, every_steps in wishes:
        scheme = Scheme(
            name=name,
            interval_s=every_steps * job.step_s,
            stall_s=job.disk_stall_s,
            commit_s=job.save_s,
            process_restart_s=job.restart_s + job.load_s,
            node_restart_s=job.restart_s + job.replace_s + job.load_s,
        )
        planned.append(
            Planned(
                scheme=scheme,
                cost=code_cost((), 0.0),
                every_steps=every_steps,
                survival={},
                falls_per_s=0.0,
                run_survival=0.0,
                goodput=expected_goodput(scheme, job.faults),
            )
        )
    return planned


def _name(groups: Sequence[Group]) -> str:
    """'(6, 2)', or '12 x (6, 2) + 4 x (5, 2)' where the groups are not all alike."""
    shapes = Counter((group.k, group.m) for group in groups)
    if len(shapes) == 1:
        (shape,) = shapes
        return str(shape)
    return " + ".join(f"{count} x {shape}" for shape, count in sorted(shapes.items(), reverse=True))


def _recommend(job: Job, in_memory: list[Planned]) -> tuple[Planned | None, str]:
    """Of those that fit and survive well enough, the one with the least memory, then the least network."""
    fitting = [planned for planned in in_memory if planned.peak_bytes <= job.ram_bytes]
    if not fitting:
        least = min(planned.peak_bytes for planned in in_memory)
        return None, (
            f"none fits into {job.ram_bytes / 1e9:,.1f} GB a node: the smallest takes {least / 1e9:,.1f} GB at "
            "most. More nodes, or more memory (--ram-gb), would do"
        )
    if good := [planned for planned in fitting if planned.run_survival >= job.target_survival]:
        return good[0], "the least memory of those that fit and reach --target-survival"
    best = max(fitting, key=lambda planned: planned.run_survival)
    return best, (
        "none that fits reaches --target-survival; this one comes nearest. Shorter --replace-s (spare nodes) helps most"
    )


def _notes(job: Job, recommended: Planned | None, in_memory: list[Planned], on_disk: list[Planned]) -> list[str]:
    notes: list[str] = []
    if job.nodes > 1 and not any(planned.code and planned.code[1] for planned in in_memory):
        notes.append(
            f"{job.nodes} nodes cannot be cut into equal groups of at most {_LARGEST_GROUP}: beside no parity, only "
            "what refound chooses is compared"
        )
    best = on_disk[-1]
    if recommended and recommended.goodput.useful - best.goodput.useful < 0.01:
        notes.append(
            f"storage alone comes within a point of it, with a checkpoint every {best.scheme.interval_s:,.0f} s: if "
            f"storage takes {job.storage_bytes_s / 1e9:,.1f} GB/s of yours all the time, memory gains little"
        )
    if job.save_s > job.disk_every_s:
        notes.append(
            f"a checkpoint takes {job.save_s:,.0f} s to write, longer than --disk-every-min: it comes as often as it "
            "can"
        )
    if job.copy_s > job.step_s:
        notes.append(f"the copy of a snapshot takes {job.copy_s:.1f} s, longer than a step: the rest of it is a stall")
    return notes
