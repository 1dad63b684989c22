# SPDX-License-Identifier: Apache-2.0
"""How a schedule ended, and what all of a campaign came to."""

import shlex
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .schedule import Schedule

GOOD = ("recovered", "refused", "unmet")
BAD = ("wrong", "lost", "hung", "failed")
OUTCOMES: dict[str, str] = {
    "recovered": "went on from every step that was promised, to the bit",
    "refused": "more was lost than the code covers: it went on from something older, or anew, and said why",
    "unmet": "no fault found its moment",
    "wrong": "other bits were restored than were saved",
    "lost": "something was not restored that the code covers, or nothing was said about it",
    "hung": "something did not come within its time",
    "failed": "a thread of a snapshot process died of an error that nobody had foreseen, or the campaign did",
}


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What one rendezvous went on from."""

    source: str
    """"memory", "parity", "disk" or "start"."""
    step: int
    expected_step: int | None
    """The step that had to come back; None where more was lost than the code covers, or nothing was saved."""
    gave_up: bool = False
    """Whether something that was committed did not come back."""
    why: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Verdict:
    """The end of one schedule."""

    schedule: Schedule
    number: int = -1
    outcome: str = "unmet"
    why: str = ""
    seconds: float = 0.0
    fallen: int = 0
    """Faults that found their moment."""
    restarts: list[Restart] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    """What workers were told when a snapshot could not be taken."""

    @property
    def is_good(self) -> bool:
        return self.outcome in GOOD

    def command(self) -> str:
        """What repeats it."""
        return shlex.join(["refound", "chaos", "--tier", "smp", "--reproduce", str(self.schedule)])

    def line(self) -> str:
        """How it ended, and what repeats it if it did not end well."""
        sources = ", ".join(f"{restart.source} {restart.step}" for restart in self.restarts[1:]) or "nothing"
        text = f"{self.number}  {self.outcome} in {self.seconds:.1f} s, from {sources}"
        return text if self.is_good else f"{text}: {self.why}\n    again: {self.command()}"

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "schedule": str(self.schedule),
            "outcome": self.outcome,
            "why": self.why,
            "seconds": round(self.seconds, 3),
            "fallen": self.fallen,
            "restarts": [vars(restart) for restart in self.restarts],
            "troubles": self.troubles,
        }


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """Counts: of outcomes, of outcomes by what fell, and of where restarts went on from."""
    by_fault: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        for action in {fault.action for fault in verdict.schedule.faults}:
            by_fault.setdefault(action, Counter())[verdict.outcome] += 1
    restarts = [restart for verdict in verdicts for restart in verdict.restarts[1:]]
    return {
        "schedules": len(verdicts),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts)),
        "faults_fallen": sum(verdict.fallen for verdict in verdicts),
        "restarts": len(restarts),
        "sources": dict(Counter(restart.source for restart in restarts)),
        "by_fault": {action: dict(counts) for action, counts in sorted(by_fault.items())},
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 1),
    }
