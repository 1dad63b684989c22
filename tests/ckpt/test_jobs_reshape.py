# SPDX-License-Identifier: Apache-2.0
"""Jobs that come back in another shape, with real torchrun: bits at the moment of restore, losses, and every sample."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from .harness import Job, eventually, read_records

SCRIPT = Path(__file__).parent / "jobs" / "reshape.py"
TOLERANCE = 1e-4
"""Relative difference of losses from the undisturbed run: other ranks add up the same numbers in another order."""
EPOCH = {"samples": 40, "steps": 4}


def all_records(job: Job, ranks: int) -> list[dict[str, Any]]:
    return [record for rank in range(ranks) for record in read_records(job.out, rank)]


def recorded(job: Job, step: int, ranks: int) -> bool:
    """Whether all ranks have written down that they did this step."""
    return all(any(r.get("step") == step for r in read_records(job.out, rank)) for rank in range(ranks))


def train_to(job: Job, step: int, ranks: int) -> None:
    job.train_to(step)
    eventually(lambda: recorded(job, step, ranks), f"all ranks have written step {step}")


def check(job: Job, ranks: int, steps: int) -> None:
    """Bit-identical at each restore, losses as undisturbed, and each sample once in every epoch that is over."""
    records = all_records(job, ranks)
    trained = [record for record in records if "step" in record]
    digests: dict[int, set[str]] = {}
    for record in trained:
        digests.setdefault(record["step"], set()).add(record["digest"])
    for start in records:
        if start.get("start"):
            assert digests[start["start"]] == {start["digest"]}, f"not the bits of step {start['start']}: {start}"
    losses = runpy.run_path(str(SCRIPT))["alone"](steps)
    for record in trained:
        assert record["loss"] == pytest.approx(losses[record["step"] - 1], rel=TOLERANCE)
    assert {record["step"] for record in trained} == set(range(1, steps + 1))
    for epoch in range(steps // EPOCH["steps"]):
        of_epoch = [n for record in trained if record["epoch"] == epoch for n in record["samples"]]
        assert sorted(of_epoch) == list(range(EPOCH["samples"])), f"epoch {epoch}"


@pytest.mark.campaign
def test_a_job_comes_back_with_other_ranks_and_other_layouts(tmp_path: Path) -> None:
    """FSDP2 on 4 ranks, DDP on 2, FSDP2 on 4 again: no step is lost and none is done twice."""
    with Job(tmp_path, nodes=1, workers=4, kind="fsdp", steps=8, max_restarts=0, program=SCRIPT) as job:
        job.start()
        for step, workers, kind in ((3, 2, "ddp"), (6, 4, "fsdp")):
            train_to(job, step, ranks=job.workers)
            generation = job.strike(job.worker_pids())
            job.wait_agents()
            job.new_store()
            job.workers, job.kind = workers, kind
            job.start_node(0)
            assert job.wait_back(generation) == step
            assert job.sources() == ["memory"] * workers
        job.allow(8)
        assert job.wait_agents() == {0: 0}, job.logs()
        check(job, ranks=4, steps=8)
        job.check_nothing_left()


ELASTIC = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


def test_a_node_is_lost_and_two_go_on_and_three_again(tmp_path: Path) -> None:
    """--nnodes=2:3: a node dies and nobody takes its place; what it held comes from parity. Later one joins."""
    with Job(tmp_path, nodes=3, least=2, kind="fsdp", steps=8, conf=ELASTIC, program=SCRIPT) as job:
        job.start()
        job.wait_back_as(3, 0)  # a node that is late starts the others anew
        train_to(job, 3, ranks=3)
        generation = job.lose_node(1, restart=False)
        job.allow(5)  # the others notice when they next wait for the lost one
        assert job.wait_back_as(2, generation) == 3
        eventually(lambda: list(job.committed().values()) == [5, 5] and recorded(job, 5, ranks=2), "step 5 is held")
        generation = job.generation
        job.start_node(1)
        assert job.wait_back_as(3, generation) == 5
        assert job.sources() == ["memory"] * 3
        job.allow(8)
        assert job.wait_agents() == {0: 0, 1: 0, 2: 0}, job.logs()
        check(job, ranks=3, steps=8)
        job.check_nothing_left()
