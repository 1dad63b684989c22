# SPDX-License-Identifier: Apache-2.0
"""Workers that stop making steps are found and killed; those that make them, or have made them all, are not."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from refound.ckpt import attach as attach_module
from refound.ckpt import hang
from refound.ckpt.attach import attach
from refound.ckpt.client import Client, find_nodes, stop_job
from refound.ckpt.conf import PluginConfig
from refound.ckpt.hang import Hangs, Progress
from refound.ckpt.keeper import Keeper

from .cluster import Cluster, sleepers
from .harness import eventually


class Clock:
    """What `hang.py` takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(hang, "time", made)
    return made


@contextlib.contextmanager
def two_workers() -> Iterator[tuple[Keeper, list[subprocess.Popen[bytes]]]]:
    cluster = Cluster(1, 0, [[1, 1]], hang_s=10.0)
    with sleepers(2) as processes:
        cluster.open()
        keeper = cluster.nodes[0].keeper
        for rank, process in enumerate(processes):
            worker = cluster.writer(0, rank).worker()
            worker.pid, worker.pidfd = process.pid, os.pidfd_open(process.pid)
            keeper.join(worker)
        try:
            yield keeper, processes
        finally:
            cluster.end()


def test_who_makes_no_step_is_killed_and_who_does_is_not(clock: Clock) -> None:
    with two_workers() as (keeper, processes):
        hangs = Hangs(keeper)
        for rank in (0, 1):
            hangs.step(rank, keeper.generation, done=False)
        for second in range(12):
            clock.now += 1
            hangs.step(1, keeper.generation, done=False)
            assert processes[0].poll() is None, f"after {second} s"
            hangs.look()
        assert processes[0].wait() == -signal.SIGKILL
        assert processes[1].poll() is None
        (event,) = [event for event in keeper.events if event["kind"] == "worker hangs"]
        assert (event["rank"], event["pid"]) == (0, processes[0].pid)


@pytest.mark.parametrize("why", ["no step yet", "all steps made", "an older generation", "everything was stopped"])
def test_who_does_not_hang_is_left_alone(clock: Clock, why: str) -> None:
    with two_workers() as (keeper, processes):
        hangs = Hangs(keeper)
        if why == "all steps made":
            hangs.step(0, keeper.generation, done=False)
            hangs.step(0, keeper.generation, done=True)
        if why == "an older generation":
            hangs.step(0, keeper.generation - 1, done=False)
        if why == "everything was stopped":
            hangs.step(0, keeper.generation, done=False)
            clock.now += 100
            hangs.look()
            clock.now += 4
            hangs.look()
        else:
            for _ in range(40):
                clock.now += 1
                hangs.look()
        assert [process.poll() for process in processes] == [None, None]


def test_a_worker_that_stops_is_killed_by_its_snapshot_process(tmp_path: Path) -> None:
    """Over the real socket: it says hello, makes a step, and is stopped."""
    job = f"hang-{os.getpid()}"
    attachment = attach(job, "127.0.0.1", PluginConfig(node="n", hang_s=1.0, heartbeat_s=0))
    process = attach_module._started.pop()
    try:
        generation = attachment.open([attachment.inventory()], "")
        pid = os.fork()
        if pid == 0:
            client = Client(attachment.path)
            hello = {"op": "hello", "job": job, "generation": generation, "rank": 0}
            client.call({**hello, "world_size": 1, "local_world_size": 1})
            progress = Progress(attachment.path, 0, generation, 1.0)
            while True:
                progress.step()
                (tmp_path / "made").touch()
                time.sleep(0.01)
        eventually((tmp_path / "made").exists, "it makes steps")
        os.kill(pid, signal.SIGSTOP)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert any(event["kind"] == "worker hangs" for event in find_nodes(job)[0]["events"])
    finally:
        attachment._client.close()
        stop_job(job)
        process.wait()
