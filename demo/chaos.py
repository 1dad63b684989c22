# SPDX-License-Identifier: Apache-2.0
"""A campaign: the demo's job through random fault schedules, run after run, each to end with the undisturbed bits.

Every schedule is drawn from a seed of its own and falls on workers, agents, snapshot processes and whole nodes, a
little after a step has ended, so that copy, parity exchange, commit and recovery are all met. The undisturbed run is
made once.
"""

import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ckpt.faults import Fault, random_schedule
from .compare import compare_runs
from .config import DemoConfig
from .errors import DemoError
from .machine import environment
from .progress import Progress
from .recovery import recoveries
from .run import run_once, stage
from .supervise import RunOutcome


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """What `refound chaos` may be told."""

    runs: int = 10
    seed: int = 0
    """Of the first run's schedule; those of the others follow."""
    most: int = 4
    """Faults in one run at most."""
    full: bool = False
    """SmolLM2-135M instead of a model of a million parameters."""
    out: Path = Path("runs/chaos")

    @property
    def job(self) -> DemoConfig:
        """What is trained, again and again."""
        return DemoConfig(tiny=not self.full, out=self.out, json=True)

    def plan(self) -> tuple["Schedule", ...]:
        """The campaign to be."""
        return tuple(Schedule.draw(self.seed + number, self.job, self.most) for number in range(self.runs))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One run to be; its seed says all about it."""

    seed: int
    faults: tuple[Fault, ...]
    tiny: bool

    @classmethod
    def draw(cls, seed: int, job: DemoConfig, most: int) -> "Schedule":
        """The schedule of a seed: 1 to `most` faults at different steps."""
        count = random.Random(f"count {seed}").randint(1, most)
        faults = random_schedule(seed, job.nodes, job.nodes, job.target_steps, count)
        return cls(seed=seed, faults=faults, tiny=job.tiny)

    def command(self) -> str:
        """What repeats it."""
        words = ["refound", "demo", *(["--tiny"] if self.tiny else [])]
        return shlex.join(words + [word for fault in self.faults for word in ("--fault", str(fault))])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run ended."""

    schedule: Schedule
    outcome: str
    """"identical", "differs" or "failed" (which a hang is too)."""
    seconds: float
    recovered_from: tuple[str, ...] = ()
    """For each fault: memory, parity, disk, start, or "not needed"."""
    steps_lost: int = 0
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.schedule.seed,
            "faults": [str(fault) for fault in self.schedule.faults],
            "outcome": self.outcome,
            "seconds": round(self.seconds, 3),
            "recovered_from": list(self.recovered_from),
            "steps_lost": self.steps_lost,
            "why": self.why,
            "command": self.schedule.command(),
        }


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What came of it."""

    verdicts: tuple[Verdict, ...]
    environment: dict[str, str]

    @property
    def identical(self) -> int:
        return sum(verdict.outcome == "identical" for verdict in self.verdicts)

    @property
    def failed(self) -> bool:
        """Whether a run did not come to its end."""
        return any(verdict.outcome == "failed" for verdict in self.verdicts)

    def summary(self) -> str:
        faults = [fault for verdict in self.verdicts for fault in verdict.schedule.faults]
        sources = Counter(source for verdict in self.verdicts for source in verdict.recovered_from)
        words = ", ".join(f"{count} from {source}" for source, count in sorted(sources.items()))
        return (
            f"{self.identical} of {len(self.verdicts)} runs ended bit-identical, through {len(faults)} faults "
            f"({words.replace('from not needed', 'without a restart') or 'none recovered'})"
        )

    def to_json(self) -> dict[str, Any]:
        """The object that `refound chaos --json` prints."""
        runs = [verdict.to_json() for verdict in self.verdicts]
        return {"runs": runs, "identical": self.identical, "environment": self.environment}


def run_campaign(config: ChaosConfig) -> Campaign:
    """Run all of it; progress goes to stderr.

    Raises:
        DemoError: if something is missing, or the undisturbed run fails. A faulted run that fails is a verdict.
    """
    progress, job, verdicts = Progress(sys.stderr), config.job, []
    with stage(job, progress):
        reference = run_once(job, "reference", (), progress)
        for schedule in config.plan():
            verdicts.append(_run(job, schedule, reference, progress))
            progress.say(describe(verdicts[-1], len(verdicts), config.runs))
        progress.close()
    return Campaign(verdicts=tuple(verdicts), environment=environment())


def _run(job: DemoConfig, schedule: Schedule, reference: RunOutcome, progress: Progress) -> Verdict:
    began_s = time.monotonic()
    progress.say(f"seed {schedule.seed}: {'; '.join(map(str, schedule.faults))}")
    try:
        outcome = run_once(job, f"seed-{schedule.seed}", schedule.faults, progress)
    except DemoError as error:
        return Verdict(schedule=schedule, outcome="failed", seconds=time.monotonic() - began_s, why=str(error))
    return judge(
        schedule, outcome, compare_runs(reference.directory, outcome.directory, steps=job.target_steps).differences
    )


def judge(schedule: Schedule, outcome: RunOutcome, differences: Sequence[str]) -> Verdict:
    """The verdict on a run that has ended by itself."""
    found = recoveries(outcome.strikes, outcome.steps, outcome.starts)
    verdict = Verdict(
        schedule=schedule,
        outcome="identical",
        seconds=outcome.seconds,
        recovered_from=tuple(recovery.recovered_from or "not needed" for recovery in found),
        steps_lost=sum(recovery.steps_lost for recovery in found),
    )
    if differences:
        return replace(verdict, outcome="differs", why="; ".join(differences))
    if outcome.left_behind:
        return replace(verdict, outcome="failed", why=f"{outcome.left_behind} processes were left behind")
    return verdict


def describe(verdict: Verdict, number: int, runs: int) -> str:
    """How a run ended, and what repeats it if it did not end well."""
    line = f"{number}/{runs}  seed {verdict.schedule.seed}  {verdict.outcome} in {verdict.seconds:.0f} s"
    if verdict.outcome != "identical":
        return f"{line}: {verdict.why}\n          again: {verdict.schedule.command()}"
    return f"{line}, from {', '.join(verdict.recovered_from)}; {verdict.steps_lost} steps lost"
