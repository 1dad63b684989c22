# SPDX-License-Identifier: Apache-2.0
"""`every="auto"`: how many steps between snapshots, from what they cost, agreed by all ranks.

All ranks must take their snapshots after the same steps, and no two of them measure the same. So each reports what
its last snapshot cost with the next one it completes; the nodes tell the lead when they are prepared; the lead
decides and sends the number of steps with the commit. A rank that has taken snapshot i and i + 1 goes by what the
commit of i says. It completes i + 1 only when it knows that, so that all ranks know it when it counts, and i + 1 is
not committed anywhere before.
"""

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

from .agreement import SnapshotId
from .errors import ProtocolError
from .wire import Message

STALL_BUDGET = 0.01
"""Default share of training time that snapshots may take."""
MOST_STEPS = 10_000
_LOOK_BACK = 5
_CALMER = 0.7
"""The interval shrinks only when this much of it would do: what is measured varies, and a change has to be worth it."""
_DECISIONS_KEPT = 8
_LONGEST_WHY = 500


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a snapshot cost, and a step without it."""

    stall_ms: float
    step_ms: float
    budget: float
    """Share of the time that may be stall; 0 where the interval is fixed and this is told for people only."""

    @classmethod
    def checked(cls, raw: object) -> "Costs | None":
        """From a message; None if it has none. Raises ProtocolError for nonsense."""
        if raw is None:
            return None
        names = ("stall_ms", "step_ms", "budget")
        if not isinstance(raw, dict) or not all(_is_amount(raw.get(name)) for name in names):
            raise ProtocolError("malformed message: costs")
        return cls(**{name: float(raw[name]) for name in names})

    def worst(self, other: "Costs | None") -> "Costs":
        """Ranks go in step, so the one that stalls longest holds up all; the tightest budget counts."""
        if other is None:
            return self
        return Costs(
            stall_ms=max(self.stall_ms, other.stall_ms),
            step_ms=max(self.step_ms, other.step_ms),
            budget=min(self.budget, other.budget),
        )


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Steps between snapshots, and why so many."""

    every: int
    why: str


class IntervalTuner:
    """The rule: the fewest steps that keep the stall within its budget, no sooner than the last one is committed.

    It goes by medians of the last few snapshots. It is a pure function of what it was told, in that order.
    """

    def __init__(self) -> None:
        self.every = 1
        self._costs: deque[Costs] = deque(maxlen=_LOOK_BACK)
        self._commits_ms: deque[float] = deque(maxlen=_LOOK_BACK)

    def choose(self, costs: Costs, commit_ms: float) -> Choice:
        """Take in what the last snapshot cost and how long it took until it was committed."""
        self._costs.append(costs)
        self._commits_ms.append(commit_ms)
        stall_ms = median(each.stall_ms for each in self._costs)
        step_ms = max(median(each.step_ms for each in self._costs), 1e-3)
        commit_ms = median(self._commits_ms)
        allowed_ms = costs.budget * step_ms
        for_stall = math.ceil(min(stall_ms / allowed_ms, MOST_STEPS))
        wanted = min(MOST_STEPS, max(1, for_stall, math.ceil(commit_ms / step_ms)))
        if wanted > self.every or wanted <= _CALMER * self.every:
            self.every = wanted
        decides = "the commit" if math.ceil(commit_ms / step_ms) > for_stall else "the stall"
        why = (
            f"a snapshot stalls training {stall_ms:.1f} ms and is committed after {commit_ms:.0f} ms, a step takes "
            f"{step_ms:.0f} ms, {costs.budget:.2%} of the time may be stall; {decides} decides"
        )
        return Choice(every=self.every, why=why)


class Tuning:
    """A snapshot process's part in one generation. Not thread-safe: the keeper's lock guards it."""

    def __init__(self) -> None:
        self._tuner = IntervalTuner()
        self._here: dict[SnapshotId, Costs] = {}
        self._everywhere: dict[SnapshotId, Costs] = {}
        self._decided: OrderedDict[SnapshotId, Choice] = OrderedDict()
        self.last: Costs | None = None
        """The newest that was reported here, the worst of this node's ranks."""

    @property
    def every(self) -> int | None:
        """Steps between snapshots now; None if the job does not leave it to us."""
        return next(reversed(self._decided.values())).every if self._decided else None

    def reported(self, snapshot: SnapshotId, raw: object) -> None:
        """A worker here has completed `snapshot` and says what the one before cost."""
        if costs := Costs.checked(raw):
            self.last = self._here[snapshot] = costs.worst(self._here.get(snapshot))

    def told(self, snapshot: SnapshotId) -> Message:
        """What to add to this node's word to the lead that it is prepared."""
        costs = self._here.pop(snapshot, None)
        self._here = {each: value for each, value in self._here.items() if each > snapshot}
        return {"costs": asdict(costs)} if costs and costs.budget else {}

    def heard(self, snapshot: SnapshotId, message: Message) -> None:
        """At the lead: a node is prepared."""
        if costs := Costs.checked(message.get("costs")):
            self._everywhere[snapshot] = costs.worst(self._everywhere.get(snapshot))

    def decide(self, snapshot: SnapshotId, commit_ms: float) -> Message:
        """At the lead: what to add to the commit of `snapshot`; nothing if no rank asks for it."""
        costs = self._everywhere.pop(snapshot, None)
        self._everywhere = {each: value for each, value in self._everywhere.items() if each > snapshot}
        return asdict(self._tuner.choose(costs, commit_ms)) if costs and costs.budget else {}

    def decided(self, snapshot: SnapshotId, message: Message) -> None:
        """The lead has committed `snapshot`, with this message. Raises ProtocolError for nonsense."""
        every, why = message.get("every"), message.get("why")
        if every is None:
            return
        if not isinstance(every, int) or isinstance(every, bool) or not 1 <= every <= MOST_STEPS:
            raise ProtocolError("malformed message: every is not a number of steps")
        if not isinstance(why, str) or len(why) > _LONGEST_WHY:
            raise ProtocolError("malformed message: why is no short text")
        self._decided[snapshot] = Choice(every=every, why=why)
        while len(self._decided) > _DECISIONS_KEPT:
            self._decided.popitem(last=False)

    def decision(self, snapshot: SnapshotId) -> Message:
        """What a worker is told that goes by the commit of `snapshot`."""
        choice = self._decided.get(snapshot)
        return asdict(choice) if choice else {}


class Asks(Protocol):
    """What the interval needs of a worker's link."""

    def interval(self, step: int) -> dict[str, Any]: ...


class _Meter:
    """Measures what a worker's snapshots cost, to be told with the next one."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._begun: tuple[int, float] | None = None
        self._count = 0
        self.costs: Costs | None = None

    def measured(self, step: int, now_s: float, stall_ms: float) -> None:
        """A snapshot of `step` begins; the last one stalled training `stall_ms` in all."""
        # The first snapshot makes the memory, which later ones find there.
        if self._begun and self._count > 1:
            begun_step, begun_s = self._begun
            step_ms = max(0.0, (now_s - begun_s) * 1000 - stall_ms) / (step - begun_step)
            self.costs = Costs(stall_ms=stall_ms, step_ms=step_ms, budget=self._budget)
        self._begun = (step, now_s)
        self._count += 1

    def report(self) -> Message | None:
        return asdict(self.costs) if self.costs else None


class FixedInterval(_Meter):
    """Every so many steps of the job."""

    def __init__(self, every: int) -> None:
        super().__init__(budget=0.0)
        self._every = every

    def is_due(self, step: int, settle: Callable[[], None]) -> bool:
        return step % self._every == 0

    def agreed(self, link: Asks, step: int) -> Message | None:
        return self.report()


class AutoInterval(_Meter):
    """A worker's part: measures, reports, asks, and goes by the answer. `say` gets a line when the interval changes."""

    def __init__(self, budget: float, say: Callable[[str], None]) -> None:
        super().__init__(budget)
        self._say = say
        self.every = 1
        self._due: int | None = None
        self._previous: int | None = None
        """Step of the last snapshot that was completed."""

    def is_due(self, step: int, settle: Callable[[], None]) -> bool:
        """Whether to take a snapshot after `step`. settle: waits until the last one is over, which decides it."""
        settle()
        return self._due is None or step >= self._due

    def agreed(self, link: Asks, step: int) -> Message | None:
        """Before the snapshot of `step` is completed: when the next one is due. Returns what to report with it."""
        answer = link.interval(self._previous) if self._previous is not None else {}
        every = int(answer.get("every", self.every))
        if every != self.every:
            count = "step" if every == 1 else f"{every} steps"
            self._say(f"refound: from step {step} on a snapshot every {count}: {answer['why']}")
            self.every = every
        self._previous, self._due = step, step + self.every
        return self.report()


def interval_problems(every: object, budget: float) -> list[str]:
    """What is wrong with `protect`'s arguments."""
    problems: list[str] = []
    if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        problems.append(f"every={every!r} must be at least 1, or 'auto'")
    if not 0 < budget < 1:
        problems.append(f"stall_budget={budget} must lie between 0 and 1: a share of training time")
    return problems


def make_interval(every: int | str, budget: float, rank: int) -> FixedInterval | AutoInterval:
    """Of `protect`'s arguments, which have been checked. Rank 0 tells of changes on stderr."""
    if isinstance(every, int):
        return FixedInterval(every)
    return AutoInterval(budget, _print if rank == 0 else lambda line: None)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
