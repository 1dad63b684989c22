# SPDX-License-Identifier: Apache-2.0
"""Runs that never ran: directories and records as the workers would have left them."""

import json
from pathlib import Path
from types import SimpleNamespace

from refound.demo.records import StartRecord, StepRecord, append_record, starts_file, steps_file
from refound.demo.supervise import RunOutcome

STEPS, WORLD = 4, 2
TENSORS = ("weight a", "weight b", "optimizer exp_avg a", "rng torch")


def step_record(step: int, *, time_s: float | None = None, loss: float | None = None, grad: float = 1.5) -> StepRecord:
    loss = 4.0 - step / 10 if loss is None else loss
    return StepRecord(
        time_s=float(step) if time_s is None else time_s,
        step=step,
        loss=loss,
        loss_hex=loss.hex(),
        grad_norm=grad,
        grad_norm_hex=grad.hex(),
        stall_ms=2.0,
        step_s=1.0,
        pid=7,
    )


def start_record(rank: int, step: int, source: str | None, time_s: float, restore_s: float = 0.1) -> StartRecord:
    return StartRecord(time_s=time_s, rank=rank, world=WORLD, pid=7, step=step, source=source, restore_s=restore_s)


def digests(rank: int) -> dict[str, str]:
    return {tensor: f"{tensor} of rank {rank}" for tensor in TENSORS}


def write_run(directory: Path, steps: list[StepRecord] | None = None) -> Path:
    """A run of `STEPS` steps on `WORLD` ranks that ended well."""
    directory.mkdir()
    for record in [step_record(step) for step in range(1, STEPS + 1)] if steps is None else steps:
        append_record(steps_file(directory), record)
    for rank in range(WORLD):
        write_digests(directory, rank, digests(rank))
        append_record(starts_file(directory), start_record(rank, 0, None, 0.0))
    return directory


def write_digests(directory: Path, rank: int, found: dict[str, str], *, step: int = STEPS, world: int = WORLD) -> None:
    entry = {"step": step, "rank": rank, "world": world, "digests": found}
    (directory / f"digest-rank{rank}.json").write_text(json.dumps(entry))


def outcome(name: str, steps: list[StepRecord], began_s: float = 0.0) -> RunOutcome:
    return RunOutcome(
        name=name,
        directory=Path(name),
        began_s=began_s,
        seconds=9.0,
        steps=tuple(steps),
        starts=(),
        strikes=(),
        left_behind=0,
    )


def job(step: int, restored: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(step=step, stall_ms=0.5, restored=restored)
