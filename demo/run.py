# SPDX-License-Identifier: Apache-2.0
"""The demo: the same training twice, once undisturbed and once through faults, and are the bits the same?"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from ..ckpt.faults import Fault
from ..distill.corpus import corpus_directory
from ..distill.exclusive import only_one
from .cluster import Cluster
from .compare import compare_runs
from .config import DemoConfig
from .errors import RunFailedError
from .machine import available_bytes, environment
from .model import model_directory
from .progress import Progress
from .records import starts_file, steps_file
from .recovery import recoveries
from .report import render
from .result import DemoResult, report_of
from .supervise import RunOutcome, Supervisor

__all__ = ["DemoConfig", "DemoResult", "check_memory", "run_demo", "run_once", "stage"]

PATIENCE = timedelta(minutes=5)
_TAKEN = "taken"
# Measured: a worker holds 2.1 GB (tiny: 0.5) and its node's snapshot process 1.6 GB (0.2), agents included.
NODE_BYTES, TINY_NODE_BYTES = 4 * 10**9, 8 * 10**8


def run_demo(config: DemoConfig, take: Callable[[str], None] | None = None) -> DemoResult:
    """Runs the job undisturbed and then under the faults, compares both and writes `config.out/report.html`.

    take: given the name of the job that went through the faults when its last step is done, while it still runs.

    Progress goes to stderr, the closing table to stdout (unless `config.json`). Whatever ends it, nothing that it
    started is left running.

    Raises:
        FaultSyntaxError, FaultRangeError: before anything is started.
        DemoError: if something is missing, or a run fails or hangs; the message says where the logs are.
    """
    faults = config.schedule()
    progress = Progress(sys.stderr)
    with stage(config, progress):
        reference = run_once(config, "reference", (), progress)
        faulted = run_once(config, "faulted", faults, progress, take)
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


@contextmanager
def stage(config: DemoConfig, progress: Progress) -> Iterator[None]:
    """All that runs in `config.out` need; whatever ends them, nothing that they started is left running.

    Raises:
        DemoError: if memory, a package or the directory is missing, or another demo is running there.
    """
    check_memory(config, available_bytes())
    with _ending_in_order(), only_one(config.out, "demo", "--out", taken=RunFailedError, unwritable=RunFailedError):
        progress.say(f"preparing the model and the text ({'tiny' if config.tiny else 'SmolLM2-135M'})")
        corpus_directory(model_directory(tiny=config.tiny), tiny=config.tiny)
        yield


def check_memory(config: DemoConfig, available: int | None) -> None:
    """Refuses a demo that would fill the memory: the kernel would kill whatever it likes then.

    Raises:
        RunFailedError: saying how much is needed, how much there is, and what fits.
    """
    need = config.nodes * (TINY_NODE_BYTES if config.tiny else NODE_BYTES)
    if available is not None and available < need:
        raise RunFailedError(
            f"the demo needs about {need / 1e9:.1f} GB of free memory, and {available / 1e9:.1f} GB are free. "
            "Nothing was started; end what else needs memory" + ("" if config.tiny else ", or try: refound demo --tiny")
        )


def run_once(
    config: DemoConfig,
    name: str,
    faults: Sequence[Fault],
    progress: Progress,
    take: Callable[[str], None] | None = None,
) -> RunOutcome:
    """One run through `faults`, recorded in `config.out / name`. Raises RunFailedError if it fails or hangs.

    take: see `run_demo`.
    """
    directory = (config.out / name).absolute()
    _clear(directory, config.nodes)
    script = ["-m", "refound.demo.train", "--device=cpu", f"--out={directory}", f"--steps={config.target_steps}"]
    script += [f"--seed={config.seed}", *(["--tiny"] if config.tiny else [])]
    job = f"demo-{name}-{os.getpid()}"
    taken = directory / _TAKEN
    script += [f"--until={taken}"] if take else []

    def at_last_step() -> None:
        if take:
            progress.say(f"{name:9s}  reading the model out of the memory of {job}")
            take(job)
            taken.touch()

    with Cluster(job=job, nodes=config.nodes, script=script, logs=directory / "logs") as cluster:
        supervisor = Supervisor(
            cluster,
            directory,
            name=name,
            steps=config.target_steps,
            faults=faults,
            progress=progress,
            at_last_step=at_last_step,
        )
        outcome = supervisor.run(PATIENCE)
    progress.say(f"{name:9s}  {config.target_steps} steps in {outcome.seconds:.1f} s")
    return outcome


def _clear(directory: Path, nodes: int) -> None:
    # Only what a demo has written: the directory may be somebody's.
    old = [steps_file(directory), starts_file(directory), directory / _TAKEN, *directory.glob("digest-rank*.json")]
    old += [directory / "logs" / f"node{index}.log" for index in range(nodes)]
    for path in old:
        path.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)


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
