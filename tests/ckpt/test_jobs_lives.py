# SPDX-License-Identifier: Apache-2.0
"""Jobs that end, fail, come back and are told no: whole lives, each with real torchrun."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from refound.ckpt.client import find_nodes, stop_job

from .harness import PATIENCE_S, SCRIPT, STEPS, Job, eventually, read_records, send


def plain_words(job: Job, node: int) -> str:
    """What an agent said, which must not be a traceback."""
    log = job.log(node)
    assert "Traceback" not in log, log
    return log


def test_one_node_without_a_rendezvous_backend(tmp_path: Path) -> None:
    """--standalone --logs-specs=refound: both workers lose their lives, and nothing is left at the end."""
    with Job(tmp_path, nodes=1, workers=2, standalone=True) as job:
        job.environment = {"REFOUND_JOB": job.name}
        job.start()
        job.train_to(3)
        generation = job.strike(job.worker_pids())
        assert job.wait_back(generation) == 3
        assert job.sources() == ["memory"] * 2
        job.finish()


@pytest.mark.campaign
def test_ddp_as_it_comes_goes_on_with_the_same_last_bits(tmp_path: Path) -> None:
    """Three ranks sum gradients in the order of DDP's buckets, which a new process lays out otherwise at first."""
    with Job(tmp_path, kind="ddp-buckets", steps=12) as job:
        job.start()
        job.allow(2)
        job.wait(
            lambda: all((read_records(job.out, rank) or [{}])[-1].get("step") == 2 for rank in range(3)),
            "two steps are done",
        )
        assert set(job.committed().values()) == {0}, "no snapshot before the buckets are laid out"
        job.train_to(4)
        generation = job.strike(job.worker_pids(1))
        assert job.wait_back(generation) == 4
        job.train_to(6)
        assert job.wait_back(job.lose_node(2)) == 6
        job.finish()


@pytest.mark.campaign
def test_a_job_that_chooses_its_interval_goes_on_from_what_it_has_taken(tmp_path: Path) -> None:
    """every="auto" under torchrun: all ranks take snapshots after the same steps, before a fault and after it."""
    with Job(tmp_path, steps=60, script=("--every", "auto")) as job:
        job.start()
        job.allow(30)
        job.wait(lambda: len(taken := set(job.committed().values())) == 1 and min(taken) > 0, "a snapshot is committed")
        job.wait(
            lambda: all((read_records(job.out, rank) or [{}])[-1].get("step") == 30 for rank in range(3)),
            "thirty steps are done",
        )
        generation = job.strike(job.worker_pids(1))
        assert 1 <= job.wait_back(generation) <= 30
        assert job.sources() == ["memory"] * 3
        job.finish()


def test_all_nodes_lost_at_once_go_on_from_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    conf = f"checkpoint_dir={disk},checkpoint_every_s=0,checkpoint_every_steps=2"
    with Job(tmp_path, nodes=3, conf=conf, max_restarts=8) as job:
        job.start()
        job.train_to(2)
        eventually(lambda: len(list(disk.glob("*/COMMIT.json"))) == 1, "step 2 is on disk")
        job.train_to(4)
        eventually(lambda: len(list(disk.glob("*/COMMIT.json"))) == 2, "step 4 is on disk")
        job.train_to(5)
        generation = job.generation
        # A byte of the newest checkpoint changes, and the memory of all nodes is lost.
        shard = sorted(disk.glob("*/rank-000001.shard"))[-1]
        data = bytearray(shard.read_bytes())
        data[1000] ^= 4
        shard.write_bytes(data)
        statuses = job.statuses()
        pids = [pid for s in statuses.values() for pid in (s["agent_pid"], s["pid"], *(w["pid"] for w in s["workers"]))]
        send(pids)
        for node in range(3):
            job.agent(node).wait()
            job.start_node(node)
        assert job.wait_back(generation) == 4  # its parity mends it as it is read
        assert job.sources() == ["disk"] * 3
        assert any("rebuilt from parity" in event["text"] for _, event in job.events("checkpoint rebuilt"))
        job.finish()


def test_a_job_that_failed_goes_on_when_launched_again(tmp_path: Path) -> None:
    """No restarts are left: the job fails, its snapshots stay, and the same command goes on from them."""
    with Job(tmp_path, nodes=1, max_restarts=0) as job:
        job.start()
        job.train_to(4)
        snapshots = job.status(0)["pid"]
        generation = job.strike(job.worker_pids())
        assert job.wait_agents() == {0: 1}
        assert "stay in memory for 600 s" in job.log(0)
        job.new_store()
        job.start_node(0)
        assert job.wait_back(generation) == 4
        assert job.status(0)["pid"] == snapshots
        # A model that has changed since is refused by name, and what is kept stays kept.
        job.strike(job.worker_pids())
        job.wait_agents()
        job.new_store()
        job.script = ("--width", "48")
        job.start_node(0)
        job.wait_agents()
        assert "the snapshot does not fit this job: model/module.embedding.weight was float32 [64, 32]" in job.log(0)
        assert job.status(0)["committed"]["step"] == 4
        assert stop_job(job.name) == 1
        eventually(lambda: not find_nodes(job.name), "refound stop frees the memory")


@pytest.mark.parametrize("comes", ["before the end", pytest.param("after it", marks=pytest.mark.campaign)])
def test_an_agent_lost_when_all_is_done_holds_nobody_up(comes: str, tmp_path: Path) -> None:
    """Neither the others, in torchrun's exit barrier (300 s), nor the agent in its place wait for anything.

    Whether that one waits at the rendezvous when the others close it, or comes when all is done: it ends well.
    """
    with Job(tmp_path) as job:
        job.start()
        job.train_to(STEPS - 1)
        send([job.agent(2).pid], signal.SIGSTOP)  # it does not see its worker end
        if comes == "before the end":
            send((job.agent(node).pid for node in (0, 1)), signal.SIGSTOP)  # nor do these see the new one wait
            send([job.agent(2).pid])
            job.agent(2).wait()
            job.start_node(2)
            job.wait(lambda: job.status(2)["agent_pid"] == job.agent(2).pid, "the new agent is there")
        job.allow(STEPS)
        job.wait(lambda: all(s["over"] for s in job.statuses().values()), "all ranks are done")
        if comes == "after it":
            send([job.agent(2).pid])
            job.agent(2).wait()
            job.start_node(2)
        send((job.agent(node).pid for node in (0, 1)), signal.SIGCONT)
        job.finish()


def test_more_lost_than_parity_covers_starts_anew_and_says_so(tmp_path: Path) -> None:
    with Job(tmp_path, nodes=2) as job:
        job.start()
        job.train_to(3)
        generation = job.generation
        statuses = job.statuses()
        send([pid for s in statuses.values() for pid in (s["agent_pid"], s["pid"], *(w["pid"] for w in s["workers"]))])
        for node in range(2):
            job.agent(node).wait()
            job.start_node(node)
        eventually(lambda: len(job.starts(0)) == 2 and len(job.starts(1)) == 2, "both train again")
        assert [job.starts(rank)[-1]["start"] for rank in range(2)] == [0, 0]
        assert generation == 1
        job.finish()


def test_another_number_of_ranks_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    with Job(tmp_path, nodes=1, workers=2, max_restarts=0) as job:
        job.start()
        job.train_to(2)
        job.strike(job.worker_pids())
        job.wait_agents()
        job.new_store()
        job.workers = 1
        job.start_node(0)
        job.wait_agents()
        assert "was taken by 2 ranks and this group has 1" in job.log(0)
        assert "'data' (Data) differs between ranks at 'data/random" in job.log(0)
        job.new_store()
        job.workers = 2
        generation = job.generation
        job.start_node(0)
        assert job.wait_back(generation) == 2
        job.finish()


@pytest.mark.parametrize(
    ("nodes", "conf", "words"),
    [
        (1, "k=2,m=1", "k=2,m=1 needs a multiple of 3 nodes and this job has 1"),
        (1, "kk=2", "unknown key 'kk'; did you mean 'k'?"),
        (1, "k=two,lease_s=-1", "k='two' is not a int; lease_s must not be negative"),
        (1, "checkpoint_dir=/proc/nowhere", "checkpoint_dir=/proc/nowhere"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(tmp_path: Path, nodes: int, conf: str, words: str) -> None:
    with Job(tmp_path, nodes=nodes, conf=conf) as job:
        job.start()
        assert job.wait_agents() == dict.fromkeys(range(nodes), 2)
        assert words in plain_words(job, 0)


def test_another_secret_is_found_before_anything_is_shared(tmp_path: Path) -> None:
    with Job(tmp_path, nodes=2) as job:
        job.start_node(0, environment={"REFOUND_SECRET": "one"})
        job.start_node(1, environment={"REFOUND_SECRET": "two"})
        assert job.wait_agents() == {0: 2, 1: 2}
        assert "has another REFOUND_SECRET than node" in plain_words(job, 0)


def test_state_changed_outside_the_optimizer_is_never_a_snapshot(tmp_path: Path) -> None:
    """It is copied beside the next step, so changing it then would tear it: found by autograd's count of changes."""
    with Job(tmp_path, nodes=1, max_restarts=0, script=("--meddle-at", "3", "--ballast-mb", "32")) as job:
        job.start()
        job.train_to(2)
        job.allow(STEPS)
        job.wait_agents()
        assert "was changed while the snapshot of step 3 copied it" in job.log(0)


def test_replicas_that_are_none_are_never_committed(tmp_path: Path) -> None:
    with Job(tmp_path, nodes=1, workers=2, max_restarts=0, script=("--differ",)) as job:
        job.start()
        job.allow(STEPS)
        job.wait_agents()
        assert "should hold the same parameters and optimizer state and do not" in job.log(0)
        assert job.committed() == {0: 0}


def test_without_an_agent_the_script_trains_and_says_that_it_is_not_protected(tmp_path: Path) -> None:
    code = (
        "import refound, torch; m = torch.nn.Linear(2, 2); job = refound.protect(model=m); job.end_step();"
        "print(job.step, job.restored, job.close())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S, cwd=SCRIPT.parent
    )
    assert done.stdout.split() == ["1", "None", "False"]
    assert "nothing is protected: start it with torchrun --rdzv-backend=refound" in done.stderr
