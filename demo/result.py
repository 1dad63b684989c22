# SPDX-License-Identifier: Apache-2.0
"""What came of a demo: as JSON, as a table for a terminal, and as what its report shows."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare import Comparison
from .config import DemoConfig
from .recovery import Recovery
from .report import Curve, Report
from .supervise import RunOutcome


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What came of it."""

    config: DemoConfig
    model: str
    reference: RunOutcome
    faulted: RunOutcome
    recoveries: tuple[Recovery, ...]
    comparison: Comparison
    environment: dict[str, str]
    report: Path

    @property
    def bit_identical(self) -> bool:
        return self.comparison.identical

    def to_json(self) -> dict[str, Any]:
        """The object that `refound demo --json` prints."""
        return {
            "bit_identical": self.bit_identical,
            "faults": [recovery.to_json() for recovery in self.recoveries],
            "model": self.model,
            "steps": self.config.target_steps,
            "nodes": self.config.nodes,
            "seed": self.config.seed,
            "compared": {
                "losses": self.comparison.losses,
                "losses_again": self.comparison.losses_again,
                "tensors": self.comparison.tensors,
            },
            "differences": list(self.comparison.differences),
            "runs": {run.name: _run_figures(run) for run in (self.reference, self.faulted)},
            "environment": self.environment,
            "report": str(self.report),
        }

    def table(self) -> str:
        """The closing table, for a terminal."""
        rows = [("fault", "recovered from", "steps lost", "seconds lost")]
        rows += [
            (str(r.fault), r.recovered_from or "not needed", str(r.steps_lost), f"{r.seconds_lost:.1f}")
            for r in self.recoveries
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        compared = self.comparison
        lines += [
            "",
            f"compared: {compared.losses} losses and {compared.losses_again} of steps run again, {compared.tensors} "
            f"tensors (weights, optimizer, RNG) on {self.config.nodes} ranks",
            *(f"  differs: {difference}" for difference in compared.differences),
            *self._notes(),
            f"report: {self.report}",
            f"bit-identical: {'yes' if self.bit_identical else 'no'}",
        ]
        return "\n".join(lines)

    def _notes(self) -> list[str]:
        found = []
        if self.reference.restarts:
            logs = self.reference.directory / "logs"
            found.append(f"note: the undisturbed run was restarted {self.reference.restarts} times; see {logs}")
        if left := self.reference.left_behind + self.faulted.left_behind:
            found.append(f"note: {left} processes did not go by themselves when their job had ended")
        return found


def report_of(result: DemoResult) -> Report:
    """What the HTML report shows of a result."""
    return Report(
        title=f"{result.model}: {result.config.target_steps} steps on {result.config.nodes} nodes",
        identical=result.bit_identical,
        differences=result.comparison.differences,
        compared=(result.comparison.losses, result.comparison.losses_again, result.comparison.tensors),
        curves=tuple(
            Curve(
                name=run.name,
                steps=tuple(record.step for record in run.steps),
                losses=tuple(record.loss for record in run.steps),
                seconds=tuple(record.time_s - run.began_s for record in run.steps),
            )
            for run in (result.reference, result.faulted)
        ),
        recoveries=result.recoveries,
        faults_began_s=result.faulted.began_s,
        environment=result.environment,
    )


def _run_figures(run: RunOutcome) -> dict[str, Any]:
    return {
        "seconds": round(run.seconds, 3),
        "step_seconds_median": round(statistics.median(record.step_s for record in run.steps), 4),
        "stall_ms_median": round(statistics.median(record.stall_ms for record in run.steps), 3),
        "final_loss": run.steps[-1].loss,
        "restarts": run.restarts,
        "left_behind": run.left_behind,
    }
