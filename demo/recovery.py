# SPDX-License-Identifier: Apache-2.0
"""What each fault cost, read from the records of the run: where the state came from, steps and seconds lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ckpt.faults import Fault
from .records import StartRecord, StepRecord

# From the cheapest to the dearest. A recovery is named by the dearest source that any rank needed.
SOURCES = ("memory", "parity", "disk", "start")


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A fault that has fallen, at Unix time `time_s`, on these processes."""

    fault: Fault
    time_s: float
    pids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What one fault cost.

    `seconds_lost` counts from the strike to the end of the first step beyond the last one completed before it, so it
    holds one step of useful work. `steps_lost` are completed steps that had to be run again.
    """

    fault: Fault
    time_s: float
    step: int
    """The last step completed before the strike."""
    recovered_from: str | None
    """memory, parity, disk or start; None if no worker had to be restarted."""
    steps_lost: int
    seconds_lost: float
    restore_s: float
    """The longest that a rank took to get its state back."""

    def to_json(self) -> dict[str, Any]:
        """As in `refound demo --json`."""
        return {
            "fault": str(self.fault),
            "step": self.step,
            "recovered_from": self.recovered_from,
            "steps_lost": self.steps_lost,
            "seconds_lost": round(self.seconds_lost, 3),
            "restore_seconds": round(self.restore_s, 3),
        }


def recoveries(strikes: Sequence[Strike], steps: Sequence[StepRecord], starts: Sequence[StartRecord]) -> list[Recovery]:
    """One `Recovery` for each strike that a later step has followed."""
    found = []
    for strike in strikes:
        before = max((record.step for record in steps if record.time_s <= strike.time_s), default=0)
        beyond = [record.time_s for record in steps if record.time_s > strike.time_s and record.step > before]
        if not beyond:
            continue
        restarted = [start for start in starts if strike.time_s < start.time_s <= min(beyond)]
        sources = [start.source or "start" for start in restarted]
        found.append(
            Recovery(
                fault=strike.fault,
                time_s=strike.time_s,
                step=before,
                recovered_from=max(sources, key=SOURCES.index) if sources else None,
                steps_lost=max((before - start.step for start in restarted), default=0),
                seconds_lost=min(beyond) - strike.time_s,
                restore_s=max((start.restore_s for start in restarted), default=0.0),
            )
        )
    return found
