# SPDX-License-Identifier: Apache-2.0
"""Losses at the worst moments: while parity is exchanged, and while a recovery is under way.

The moments are not met by chance. A process is stopped (SIGSTOP) when the status of a snapshot process says that the
moment is there, the status is read again to see that it still is, and only then is the fault let fall. A worker that is
killed while it copies is in `test_door.py::test_a_snapshot_outlives_its_worker`, every byte of an exchange in
`test_cuts.py`.
"""

import signal
from collections.abc import Iterator

import pytest

from .harness import Job, send

# Two minutes: for `make chaos`. `tests/chaos/test_campaign.py` meets these moments without torch in every `make test`.
pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Three nodes with 24 MB of state each, so that exchanges and rebuilds take a while; no heartbeat ends a stop."""
    folder, conf = tmp_path_factory.mktemp("moments"), "parity_rate_mb_s=30,heartbeat_s=0"
    with Job(folder, kind="fsdp", steps=40, script=("--ballast-mb", "24"), conf=conf) as job:
        yield job.start()


def rest(job: Job) -> int:
    """Train a little and wait until all nodes hold it."""
    step = max(job.committed().values(), default=0) + 2
    job.train_to(step)
    return step


def reach_parity(job: Job) -> int:
    """Let it train until all nodes have a step's data and none has committed it; returns that step."""
    while True:
        step = rest(job) + 1
        job.allow(step)
        job.wait(lambda: all(s["phase"] == "parity" for s in job.statuses().values()), "parity is exchanged")
        if set(job.committed().values()) == {step - 1}:
            return step


def test_worker_killed_while_parity_is_exchanged(job: Job) -> None:
    """All data is there, if not all parity: the newest step serves, and what parity was lacking is made."""
    step = reach_parity(job)
    generation = job.strike(job.worker_pids(2))
    assert job.wait_back(generation) == step
    job.train_to(step + 2)
    job.check_losses(step + 2)


def test_node_lost_while_parity_is_exchanged(job: Job) -> None:
    """The newest step cannot be rebuilt without its parity: the committed one before it is."""
    for _ in range(10):
        step = reach_parity(job)
        back = job.wait_back(job.lose_node(1))
        assert back in (step - 1, step)
        assert job.sources() == ["memory", "parity", "memory"]
        job.train_to(step + 2)
        if back == step - 1:
            break  # if not, its parity was complete just before the blow fell
    else:
        pytest.fail("the node was never lost in time")
    job.check_losses(step + 2)


def hold_recovery(job: Job, node: int, helper: int) -> tuple[int, int]:
    """Lose a node, bring it back and hold its recovery half-way, by stopping the snapshot process of a helper.

    Returns the step that is being recovered and the process that is stopped.
    """
    while True:
        step = rest(job)
        generation, helping = job.lose_node(node), job.status(helper)["pid"]
        job.wait(lambda g=generation: job.status(helper)["generation"] > g, "a new generation")
        send([helping], signal.SIGSTOP)
        status = job.status(node)
        if status["phase"] == "recovering" and "seconds" not in status["restored"]:  # its data is not whole yet
            return step, helping
        send([helping], signal.SIGCONT)
        job.wait_back(generation)


def test_worker_killed_while_a_node_recovers(job: Job) -> None:
    """The recovery is given up in the middle and begun again in the next generation."""
    step, stopped = hold_recovery(job, node=1, helper=2)
    status = job.wait(lambda: (s := job.status(0))["workers"] and s, "node 0 has a worker")
    assert job.status(1)["phase"] == "recovering"
    send(worker["pid"] for worker in status["workers"])
    job.wait(lambda: job.status(1)["phase"] == "rendezvous", "node 1 gives its recovery up")
    send([stopped], signal.SIGCONT)
    assert job.wait_back(status["generation"]) == step
    assert job.sources()[1] == "parity"
    job.train_to(step + 2)
    job.check_losses(step + 2)


def test_node_lost_again_while_it_recovers(job: Job) -> None:
    step, stopped = hold_recovery(job, node=1, helper=0)
    generation = job.status(1)["generation"]
    send(job.node_pids(1))
    send([stopped], signal.SIGCONT)
    job.agent(1).wait()
    job.start_node(1)
    assert job.wait_back(generation) == step
    assert job.sources()[1] == "parity"
    job.train_to(step + 2)
    job.check_losses(step + 2)


def test_the_job_ends_as_if_undisturbed(job: Job) -> None:
    job.finish()
