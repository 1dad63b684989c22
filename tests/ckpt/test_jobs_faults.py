# SPDX-License-Identifier: Apache-2.0
"""One job of three nodes, struck again and again; after each fault every loss is that of the undisturbed run.

The tests share a running job (a job costs ten seconds to start), in any order: each lets it train a little, strikes,
and looks at what came of it. The last one lets it end.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import STEPS, Job, eventually


class Shared:
    """The running job, or a new one if a test before has broken it."""

    def __init__(self, folder_factory: pytest.TempPathFactory) -> None:
        self._folders = folder_factory
        self._job: Job | None = None
        self.step = 0

    def take(self) -> Job:
        if self._job is None:
            # No scrubber: these tests make memory bad and want a restart to find it.
            self._job = Job(self._folders.mktemp("shared"), kind="fsdp", conf="scrub_mb_s=0").start()
            self.step = 0
        return self._job

    def drop(self) -> None:
        if self._job is not None:
            self._job.close()
            self._job = None


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    found = Shared(tmp_path_factory)
    yield found
    found.drop()


@pytest.fixture
def job(shared: Shared, request: pytest.FixtureRequest) -> Iterator[Job]:
    """The shared job, resting at a new step that all nodes hold."""
    job = shared.take()
    before = request.session.testsfailed
    step = max(job.committed().values(), default=0)
    job.train_to(step + 3)
    yield job
    if request.session.testsfailed > before:
        shared.drop()


def resting(job: Job) -> int:
    return max(job.committed().values())


def goes_on(job: Job, generation: int, *, least: int) -> int:
    """The job comes back from step `least` at least, trains on, and computes what it would have undisturbed."""
    step = job.wait_back(generation)
    assert step >= least
    job.train_to(step + 3)
    job.check_losses(step + 3)
    return step


def test_one_worker_killed(job: Job) -> None:
    step = resting(job)
    generation = job.strike(job.worker_pids(1))
    assert goes_on(job, generation, least=step) == step
    assert job.sources() == ["memory"] * 3


def test_workers_of_two_nodes_killed_at_once(job: Job) -> None:
    step = resting(job)
    generation = job.strike(job.worker_pids(0, 2))
    assert goes_on(job, generation, least=step) == step


@pytest.mark.campaign
def test_several_kills_in_sequence_while_it_trains(job: Job) -> None:
    """The second falls while the job comes back from the first, the third as soon as it trains again."""
    job.allow(STEPS - 20)
    step = resting(job)
    generation = job.strike(job.worker_pids(0))
    eventually(lambda: job.generation > generation and job.worker_pids(1), "node 1 has a worker again")
    generation = job.strike(job.worker_pids(1))
    back = job.wait_back(generation)
    assert back >= step
    eventually(lambda: resting(job) > back, "a snapshot has been committed since")
    generation = job.strike(job.worker_pids())
    job.allow(0)
    back = job.wait_back(generation)
    assert back > step
    job.train_to(back)
    job.check_losses(back)


def test_agent_killed_and_launched_again(job: Job) -> None:
    """Its worker is an orphan: it is fenced and ended. The snapshot process is the same one, memory and all."""
    step, orphans, snapshots = resting(job), job.worker_pids(1), job.status(1)["pid"]
    generation = job.strike([job.agent(1).pid])
    job.agent(1).wait()
    assert orphans[0] in job.processes(), "an agent that is killed leaves its worker behind"
    job.start_node(1)
    assert goes_on(job, generation, least=step) == step
    assert job.status(1)["pid"] == snapshots
    assert orphans[0] not in job.processes()
    assert job.sources() == ["memory"] * 3


def test_agent_terminated_and_launched_again(job: Job) -> None:
    step, snapshots = resting(job), job.status(2)["pid"]
    generation = job.strike([job.agent(2).pid], signal.SIGTERM)
    assert job.agent(2).wait() != 0
    assert job.status(2)["pid"] == snapshots
    job.start_node(2)
    assert goes_on(job, generation, least=step) == step
    assert job.status(2)["pid"] == snapshots
    assert job.sources() == ["memory"] * 3


def test_snapshot_process_killed(job: Job) -> None:
    """Its agent starts an empty one, and its data comes back from the other nodes."""
    step, snapshots = resting(job), job.status(0)["pid"]
    generation = job.strike([snapshots])
    assert goes_on(job, generation, least=step) == step
    assert job.status(0)["pid"] != snapshots
    assert job.sources() == ["parity", "memory", "memory"]
    assert "snapshot process has died; starting an empty one" in job.log(0)


def test_whole_node_lost(job: Job) -> None:
    step = resting(job)
    generation = job.lose_node(1)
    assert goes_on(job, generation, least=step) == step
    assert job.sources() == ["memory", "parity", "memory"]


@pytest.mark.campaign
def test_a_node_that_was_rebuilt_protects_the_others(job: Job) -> None:
    """What node 2 rebuilds must be whole, data and parity: right after, another node is lost."""
    step = resting(job)
    generation = job.lose_node(2)
    assert job.wait_back(generation) == step
    job.train_to(step)  # until it is idle: parity is rebuilt too
    generation = job.lose_node(0)
    assert goes_on(job, generation, least=step) == step
    assert job.sources() == ["parity", "memory", "memory"]


def corrupt(job: Job, node: int, name: str, offset: int) -> None:
    """Flip a bit in every memfd of this name of the node's snapshot process, as bad memory would."""
    found: dict[int, Path] = {}
    for path in Path(f"/proc/{job.status(node)['pid']}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a connection that is just closed
            if f"/memfd:{name}" in str(path.readlink()):
                found[path.stat().st_ino] = path  # by inode, since a mapping has a descriptor of its own
    assert found
    for path in found.values():
        with path.open("r+b") as memory:
            memory.seek(offset)
            byte = memory.read(1)[0]
            memory.seek(offset)
            memory.write(bytes([byte ^ 16]))


def test_corrupt_slot_is_rebuilt(job: Job) -> None:
    step = resting(job)
    corrupt(job, 1, "refound-rank1", 70_000)
    generation = job.strike(job.worker_pids(0))
    assert goes_on(job, generation, least=step) == step
    assert job.sources() == ["memory", "parity", "memory"]
    node, event = job.events("damage")[-1]
    assert node == 1
    assert event["buckets"] == [0]


@pytest.mark.campaign
def test_corrupt_parity_is_rebuilt(job: Job) -> None:
    step = resting(job)
    corrupt(job, 2, "refound-parity", 12_345)
    generation = job.strike(job.worker_pids(0))
    assert job.wait_back(generation) == step
    node, event = job.events("damage")[-1]
    assert node == 2
    assert event["parity"] == [[0, 0]]
    job.train_to(step)  # until it is idle
    generation = job.strike(job.worker_pids(0))
    assert job.wait_back(generation) == step
    assert len([e for n, e in job.events("damage") if n == 2 and e["parity"]]) == 1, "it was healed, not kept"
    generation = job.lose_node(0)  # which takes that parity
    assert goes_on(job, generation, least=step) == step


def test_no_orphan_is_left_after_all_this(job: Job) -> None:
    assert len(job.worker_pids()) == 3
    assert len(job.processes()) == 9, job.processes()


def test_the_job_ends_as_if_undisturbed(job: Job) -> None:
    """Losses, parameters, optimizer, scheduler, data position and every random generator, on every rank."""
    job.finish()
