# SPDX-License-Identifier: Apache-2.0
"""Torchrun jobs whose snapshot processes or whole nodes hang, and whose rendezvous store goes away."""

import signal
from pathlib import Path

from .harness import Job, eventually, send


def test_a_stopped_snapshot_process_and_then_a_stopped_node(tmp_path: Path) -> None:
    """Neither holds the job up for ever, and neither uses up a restart where it could be helped.

    The processes are stopped, not killed: no connection breaks, so heartbeats are all there is to notice it by.
    """
    with Job(tmp_path, nodes=3, kind="fsdp", conf="heartbeat_s=1") as job:
        job.start()
        job.train_to(3)
        stopped = job.status(1)["pid"]
        generation = job.strike([stopped], signal.SIGSTOP)
        eventually(lambda: "ending it; the other nodes have what it held" in job.log(1), "it is found and ended")
        assert job.wait_back(generation) == 3
        assert job.status(1)["pid"] != stopped
        assert job.sources() == ["memory", "parity", "memory"]
        job.train_to(5)

        pids = job.node_pids(2)
        generation = job.strike(pids, signal.SIGSTOP)
        for node in (0, 1):
            eventually(lambda n=node: f"leaving generation {generation}" in job.log(n), f"node {node} goes on without")
        send(pids, signal.SIGCONT)
        assert job.wait_back(generation) == 5
        job.train_to(7)
        job.finish()


def test_the_node_that_hosts_the_store_is_lost_whole_and_replaced(tmp_path: Path) -> None:
    """Agent, workers, snapshot process and rendezvous store at once; the empty node comes back at the same address."""
    with Job(tmp_path, nodes=3, kind="fsdp", hosts_store=True) as job:
        job.start()
        job.train_to(3)
        generation = job.lose_node(0)
        assert job.wait_back(generation) == 3
        assert sorted(job.sources()) == ["memory", "memory", "parity"]
        for node in (1, 2):
            assert "the rendezvous store at" in job.log(node)
            assert "RendezvousConnectionError" not in job.log(node)
        assert [job.starts(rank)[-1]["restarts"] for rank in range(3)] == [0, 0, 0], "a lost node uses up no restart"
        job.train_to(5)
        job.finish()
