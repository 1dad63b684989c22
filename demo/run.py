# SPDX-License-Identifier: Apache-2.0
"""The demo: the same training twice, once undisturbed and once through faults, and are the bits the same?"""

import fcntl
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..ckpt.faults import Fault, FaultRangeError, check_schedule, parse_fault
from .cluster import Cluster
from .compare import Comparison, compare_runs
from .corpus import corpus_directory
from .errors import CacheWriteError, RunFailedError
from .machine import environment
from .model import model_directory
from .progress import Progress
from .records import starts_file, steps_file
from .recovery import Recovery, recoveries
from .report import Curve, Report, render
from .supervise import RunOutcome, Supervisor

FULL_STEPS, TINY_STEPS = 12, 30
PATIENCE = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `refound demo` may be told. One rank a node."""

    tiny: bool = False
    """A Llama of a million random parameters instead of SmolLM2-135M."""
    faults: tuple[str, ...] = ()
    """As in `node=1 step=7 kill`. None: a worker after a third of the steps, a node after two thirds."""
    out: Path = Path("runs/demo")
    """Records, logs and report go here."""
    json: bool = False
    """Leave stdout to the caller's JSON: no closing table."""
    seed: int = 0
    """Of data order and noise."""
    steps: int | None = None
    """None: 12, or 30 with `tiny`."""
    nodes: int = 3

    @property
    def target_steps(self) -> int:
        return self.steps or (TINY_STEPS if self.tiny else FULL_STEPS)

    def schedule(self) -> tuple[Fault, ...]:
        """The faults, checked against the job.

        Raises:
            FaultSyntaxError: for one that cannot be read.
            FaultRangeError: for one that this job cannot meet.
        """
        steps = self.target_steps
        texts = self.faults
        if not texts:
            if steps < 3:
                raise FaultRangeError(f"{steps} steps have no room for a killed worker and a lost node; the least is 3")
            texts = (f"rank=1 step={steps // 3} kill", f"node=2 step={2 * steps // 3} kill")
        faults = tuple(parse_fault(text) for text in texts)
        check_schedule(faults, nodes=self.nodes, ranks=self.nodes, steps=steps)
        return faults


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
            f"report: {self.report}",
            f"bit-identical: {'yes' if self.bit_identical else 'no'}",
        ]
        return "\n".join(lines)


def run_demo(config: DemoConfig) -> DemoResult:
    """Runs the job undisturbed and then under the faults, compares both and writes `config.out/report.html`.

    Progress goes to stderr, the closing table to stdout (unless `config.json`). Whatever ends it, nothing that it
    started is left running.

    Raises:
        FaultSyntaxError, FaultRangeError: before anything is started.
        DemoError: if something is missing, or a run fails or hangs; the message says where the logs are.
    """
    faults = config.schedule()
    progress = Progress(sys.stderr)
    with _ending_in_order(), _only_one(config.out):
        progress.say(f"preparing the model and the text ({'tiny' if config.tiny else 'SmolLM2-135M'})")
        model = model_directory(tiny=config.tiny)
        corpus_directory(model, tiny=config.tiny)
        reference = _run(config, "reference", (), progress)
        faulted = _run(config, "faulted", faults, progress)
        progress.close()
    result = DemoResult(
        config=config,
        model="tiny Llama, 1M parameters" if config.tiny else "SmolLM2-135M-Instruct",
        reference=reference,
        faulted=faulted,
        recoveries=tuple(recoveries(faulted.strikes, faulted.steps, faulted.starts)),
        comparison=compare_runs(reference.directory, faulted.directory, steps=config.target_steps),
        environment=environment(),
        report=config.out / "report.html",
    )
    result.report.write_text(render(report_of(result)), encoding="utf-8")
    if not config.json:
        print(result.table())
    return result


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


def _run(config: DemoConfig, name: str, faults: Sequence[Fault], progress: Progress) -> RunOutcome:
    directory = (config.out / name).absolute()
    _clear(directory, config.nodes)
    script = ["-m", "refound.demo.train", "--device=cpu", f"--out={directory}", f"--steps={config.target_steps}"]
    script += [f"--seed={config.seed}", *(["--tiny"] if config.tiny else [])]
    job = f"demo-{name}-{os.getpid()}"
    with Cluster(job=job, nodes=config.nodes, script=script, logs=directory / "logs") as cluster:
        supervisor = Supervisor(
            cluster, directory, name=name, steps=config.target_steps, faults=faults, progress=progress
        )
        outcome = supervisor.run(PATIENCE)
    progress.say(f"{name:9s}  {config.target_steps} steps in {outcome.seconds:.1f} s")
    return outcome


def _clear(directory: Path, nodes: int) -> None:
    # Only what a demo has written: the directory may be somebody's.
    old = [steps_file(directory), starts_file(directory), *directory.glob("digest-rank*.json")]
    old += [directory / "logs" / f"node{index}.log" for index in range(nodes)]
    for path in old:
        path.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)


def _run_figures(run: RunOutcome) -> dict[str, Any]:
    return {
        "seconds": round(run.seconds, 3),
        "step_seconds_median": round(statistics.median(record.step_s for record in run.steps), 4),
        "stall_ms_median": round(statistics.median(record.stall_ms for record in run.steps), 3),
        "final_loss": run.steps[-1].loss,
        "left_behind": run.left_behind,
    }


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise CacheWriteError(f"cannot write {out}: {error.strerror}. Choose another directory with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFailedError(f"another demo is running in {out}; wait for it, or choose another --out") from error
        yield


@contextmanager
def _ending_in_order() -> Iterator[None]:
    # What Ctrl-C does by itself, so that the cluster is cleared away, SIGTERM and a closed terminal do too.
    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
