# SPDX-License-Identifier: Apache-2.0
"""What each fault cost, read from the records of the run: where the state came from, steps and seconds lost."""

import math
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

    `seconds_lost` is how long no new step was completed: from the strike (or from the last step that a part of the
    job still completed after it, as the orphans of a killed agent do) to the end of the first step beyond the last
    one completed. It holds one step of useful work. `steps_lost` are completed steps that had to be run again.
    """

    fault: Fault
    time_s: float
    step: int
    """The last step completed before training stopped."""
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
    """One `Recovery` for each strike that a later step has followed; `strikes` in the order they fell."""
    ends = [strike.time_s for strike in strikes[1:]] + [math.inf]
    found = (_recovery(strike, end, steps, starts) for strike, end in zip(strikes, ends, strict=True))
    return [recovery for recovery in found if recovery]


def _recovery(
    strike: Strike, next_strike_s: float, steps: Sequence[StepRecord], starts: Sequence[StartRecord]
) -> Recovery | None:
    before = _last_step(steps, strike.time_s)
    progress_s = _first_beyond(steps, before, strike.time_s)
    # Workers that start before the next fault are this one's; and later ones too, if it has stopped training till then.
    until_s = max(next_strike_s, progress_s)
    restarted = [start for start in starts if strike.time_s < start.time_s <= until_s]
    began_s = strike.time_s
    if restarted:
        first_s = min(start.time_s for start in restarted)
        before = _last_step(steps, first_s)
        began_s = max([began_s, *(record.time_s for record in steps if record.time_s < first_s)])
        progress_s = _first_beyond(steps, before, max(start.time_s for start in restarted))
    if not math.isfinite(progress_s):
        return None
    sources = [start.source or "start" for start in restarted]
    return Recovery(
        fault=strike.fault,
        time_s=strike.time_s,
        step=before,
        recovered_from=max(sources, key=SOURCES.index) if sources else None,
        steps_lost=max((before - start.step for start in restarted), default=0),
        seconds_lost=progress_s - began_s,
        restore_s=max((start.restore_s for start in restarted), default=0.0),
    )


def _last_step(steps: Sequence[StepRecord], until_s: float) -> int:
    return max((record.step for record in steps if record.time_s <= until_s), default=0)


def _first_beyond(steps: Sequence[StepRecord], step: int, after_s: float) -> float:
    return min((record.time_s for record in steps if record.time_s > after_s and record.step > step), default=math.inf)
