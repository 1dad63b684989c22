# SPDX-License-Identifier: Apache-2.0
"""Torchrun jobs whose workers, snapshot processes or nodes hang, whose store goes away, or that just fail."""

import signal
from pathlib import Path

import pytest

from .harness import STEPS, Job, eventually, send


def test_a_worker_that_loops_and_one_that_is_stopped_are_found_and_started_again(tmp_path: Path) -> None:
    """Neither of them dies by itself, and nobody else fails: all the others wait for it."""
    with Job(tmp_path, nodes=1, workers=2, conf="hang_s=2", script=("--loop-at", "3")) as job:
        job.start()
        job.allow(6)  # it loops after step 3
        assert job.wait_back(1) in (2, 3)
        job.train_to(6)
        (stopped,) = [w["pid"] for w in job.status(0)["workers"] if w["rank"] == 0]
        generation = job.strike([stopped], signal.SIGSTOP)
        assert job.wait_back(generation) == 6
        job.finish()


def test_the_first_traceback_of_a_job_is_printed_and_the_others_point_to_it(tmp_path: Path) -> None:
    """Without `@record` in the script, on two nodes."""
    with Job(tmp_path, nodes=2, max_restarts=0, script=("--raise-at", "3")) as job:
        job.start()
        job.allow(STEPS)
        assert job.wait_agents() == {0: 1, 1: 1}
        guilty = next(node for node in range(2) if "ValueError: this rank went wrong" in job.log(node))
        ours, theirs = job.log(guilty), job.log(1 - guilty)
        summary = ours[ours.index("Root Cause") :]
        assert summary.count("ValueError: this rank went wrong") == 1
        assert "train.py" in summary
        failed = ours[: ours.index("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")]
        assert failed.count("ValueError: this rank went wrong") == 1
        assert f"after a rank of node node{guilty} had failed, see there" in theirs
        assert "in backward" not in theirs


@pytest.mark.campaign
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
