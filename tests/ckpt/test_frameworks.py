# SPDX-License-Identifier: Apache-2.0
"""Every way to train: an example runs under torchrun, loses a worker or a node, comes back, and has the same bits.

The job goes past its last snapshot before it is struck, so the steps after that run twice: undisturbed, and after the
recovery. Both times every rank must compute the same loss, and hold the same state, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .harness import Job, read_records

RUNNER = Path(__file__).parent / "jobs" / "frameworks.py"
SNAPSHOT, STRUCK, STEPS = 3, 5, 6
"""The step of the snapshot, the last step before the fault, and the job's length."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    example: str
    workers: int = 2
    nodes: int = 1
    """With several, the last one is lost; with one, the last worker is killed."""
    arguments: tuple[str, ...] = ()
    snapshot: int = SNAPSHOT
    """The number of the snapshot after step SNAPSHOT."""
    said: str = ""
    """What refound must say in every start."""


WAYS = {
    "ddp": Way(example="ddp"),
    "fsdp2": Way(example="fsdp2"),
    "zero3": Way(example="zero", arguments=("--stage=3",)),
    "accelerate": Way(example="hf_accelerate"),
    "trainer": Way(example="hf_trainer"),
    "peft": Way(example="peft_lora"),
    "dcp": Way(example="dcp_memory", snapshot=1),
}
# The rest, for `make chaos`.
MORE_WAYS = {
    "hsdp-node-lost": Way(example="hsdp", workers=2, nodes=2),
    "tp-fsdp2": Way(example="tp", workers=4),
    "tp": Way(example="tp"),
    "zero0": Way(example="zero", arguments=("--stage=0",)),
    "zero1": Way(example="zero", arguments=("--stage=1",)),
    "zero2-bf16": Way(example="zero", arguments=("--stage=2", "--dtype=bf16")),
    "zero3-bf16-node-lost": Way(example="zero", nodes=2, arguments=("--stage=3", "--dtype=bf16")),
    "accelerate-fsdp2": Way(example="hf_accelerate", arguments=("--fsdp",)),
    "accelerate-zero2": Way(example="hf_accelerate", arguments=("--zero=2",)),
    "accelerate-zero3": Way(example="hf_accelerate", arguments=("--zero=3",)),
    "trainer-told-fsdp": Way(
        example="hf_trainer",
        arguments=("--fsdp",),
        said="refound: accelerate was told to use FSDP and does not (it runs MULTI_CPU)",
    ),
    "trainer-zero2": Way(example="hf_trainer", arguments=("--zero=2",)),
    "dcp-async-node-lost": Way(example="dcp_memory", nodes=2, arguments=("--asynchronous",), snapshot=1),
}


def run(way: Way, folder: Path) -> Job:
    job = Job(
        folder,
        nodes=way.nodes,
        workers=way.workers,
        kind=way.example,
        steps=STEPS,
        standalone=way.nodes == 1,
        program=RUNNER,
        script=(f"--every={SNAPSHOT}", *(("--", *way.arguments) if way.arguments else ())),
    )
    job.environment = {"REFOUND_JOB": job.name, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return job


def seen_twice(job: Job, rank: int) -> dict[tuple[str, int], list[str]]:
    """What a rank wrote down of the steps it ran twice: (what, step) → each time."""
    found: dict[tuple[str, int], list[Any]] = {}
    for record in read_records(job.out, rank):
        if "step" in record:
            found.setdefault(("state", record["step"]), []).append(record["digest"])
        elif "loss_of" in record:
            found.setdefault(("loss", record["loss_of"]), []).append(record["loss"])
    return {what: times for what, times in found.items() if len(times) > 1}


@pytest.mark.parametrize("name", [*WAYS, *(pytest.param(name, marks=pytest.mark.campaign) for name in MORE_WAYS)])
def test_it_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    way = (WAYS | MORE_WAYS)[name]
    with run(way, tmp_path) as job:
        job.start().allow(STRUCK)
        job.wait(lambda: all(has_reached(job, rank, STRUCK) for rank in range(job.world)), f"step {STRUCK}")
        job.wait(lambda: job.rests_at(way.snapshot), f"step {SNAPSHOT} is held by all")
        generation = job.lose_node(way.nodes - 1) if way.nodes > 1 else job.strike(job.worker_pids()[-1:])
        assert job.wait_back(generation) == way.snapshot
        job.allow(STEPS)
        assert set(job.wait_agents().values()) == {0}, job.logs()
        for rank in range(job.world):
            check(job, rank)
            if way.example != "dcp_memory":  # which is not told where its checkpoint came from
                lost = way.nodes > 1 and rank >= job.world - way.workers
                assert job.starts(rank)[-1]["source"] == ("parity" if lost else "memory")
        assert not way.said or job.logs().count(way.said) == 2, job.logs()
        job.check_nothing_left()


def check(job: Job, rank: int) -> None:
    """A rank has ended, and computed and held the same both times."""
    assert has_reached(job, rank, STEPS)
    twice = seen_twice(job, rank)
    assert {("state", step) for step in range(SNAPSHOT + 1, STRUCK + 1)} <= set(twice)
    assert ("loss", SNAPSHOT + 1) in twice
    wrong = {what: times for what, times in twice.items() if len(set(times)) != 1}
    assert not wrong, f"rank {rank} went on otherwise: {wrong}\n{job.logs()}"


def has_reached(job: Job, rank: int, step: int) -> bool:
    return any(record.get("step") == step for record in read_records(job.out, rank))
