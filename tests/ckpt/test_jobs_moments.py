# SPDX-License-Identifier: Apache-2.0
"""Losses at the worst moments: while a snapshot is copied, while parity is exchanged, while a recovery is under way.

The moments are not met by chance. A process is stopped (SIGSTOP) when the status of a snapshot process says that the
moment is there, the status is read again to see that it still is, and only then is the fault let fall.
"""

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from .harness import STEPS, Job, Status, send

_SLICE_S = 0.002


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Three nodes with 24 MB of state each, so that copies and rebuilds take a while."""
    folder = tmp_path_factory.mktemp("moments")
    with Job(folder, kind="fsdp", script=("--ballast-mb", "24"), conf="parity_rate_mb_s=30") as job:
        yield job.start()


def rest(job: Job) -> int:
    """Train a little and wait until all nodes hold it."""
    step = max(job.committed().values(), default=0) + 2
    job.train_to(step)
    return step


def catch(job: Job, pids: Callable[[], list[int]], there: Callable[[dict[int, Status]], bool], until: int) -> bool:
    """Let processes run in slices of milliseconds until the moment is there; they are left stopped, in the moment.

    False, and they run on, if the job comes to hold step `until` without having been caught.
    """
    while True:
        stopped = pids()
        send(stopped, signal.SIGSTOP)
        statuses = job.statuses()
        if there(statuses):
            return True
        send(stopped, signal.SIGCONT)
        if len(statuses) == job.nodes and all(
            (s["committed"] or {}).get("step", 0) >= until for s in statuses.values()
        ):
            return False
        time.sleep(_SLICE_S)


def test_worker_killed_while_its_snapshot_is_copied(job: Job) -> None:
    """The torn copy is dropped and the step before it restored."""
    step = rest(job)
    while True:
        job.allow(step + 1)
        workers = job.worker_pids(1)
        if catch(job, lambda: workers, lambda statuses: statuses[1]["phase"] == "copying", until=step + 1):
            break
        step += 1
    generation = job.strike(workers)
    assert job.wait_back(generation) == step
    job.train_to(step + 2)
    job.check_losses(step + 2)


def test_worker_killed_while_parity_is_exchanged(job: Job) -> None:
    """All data is there, if not all parity: the newest step serves, and what parity was lacking is made."""
    step = rest(job) + 1
    job.allow(step)
    job.wait(lambda: all(s["phase"] == "parity" for s in job.statuses().values()), "parity is exchanged")
    assert job.committed() == {0: step - 1, 1: step - 1, 2: step - 1}
    generation = job.strike(job.worker_pids(2))
    assert job.wait_back(generation) == step
    job.train_to(step + 2)
    job.check_losses(step + 2)


def test_node_lost_while_parity_is_exchanged(job: Job) -> None:
    """The newest step cannot be rebuilt without its parity: the committed one before it is."""
    step = rest(job)
    job.allow(step + 1)
    job.wait(lambda: all(s["phase"] == "parity" for s in job.statuses().values()), "parity is exchanged")
    generation = job.lose_node(1)
    assert job.wait_back(generation) == step
    assert job.sources() == ["memory", "parity", "memory"]
    job.train_to(step + 2)
    job.check_losses(step + 2)


def recovering(job: Job, node: int, helper: int) -> int:
    """Lose a node and hold its recovery half-way, by stopping the snapshot process of a helper. Returns the step."""
    while True:
        step = rest(job)
        generation = job.lose_node(node)
        job.wait(lambda g=generation: job.generation > g and 1 in job.statuses(), "the node is back")
        processes = [job.status(helper)["pid"]]
        send(processes, signal.SIGSTOP)
        if job.status(node)["phase"] == "recovering":
            return step
        send(processes, signal.SIGCONT)
        job.wait_back(generation)


def test_dummy() -> None:
    assert STEPS
