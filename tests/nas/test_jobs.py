# SPDX-License-Identifier: Apache-2.0
"""Jobs: once, whole or not there, proven as they are read; memory and disks that run out."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refound.nas.errors import StoreError
from refound.nas.jobs import Job, Result, Store, attempt, out_of_memory, run_jobs

JOBS = [Job(kind="test", key={"number": number}) for number in range(5)]


def compute(job: Job) -> Result:
    return {"x": torch.full((3,), float(job.key["number"])), "y": torch.arange(4).bfloat16()}, {
        "half": job.key["number"] / 2
    }


def run(store: Store, jobs: list[Job] = JOBS, **ranks: int) -> list[str]:
    said: list[str] = []
    run_jobs("stage", jobs, store, compute, said.append, **ranks)
    return said


def test_what_is_done_comes_back_and_is_not_done_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store, JOBS[:2])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert "2 of 5 jobs are done already" in run(store)[0]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for job in JOBS:
        tensors, facts = store.read(job)
        assert (
            torch.equal(tensors["x"], torch.full((3,), float(job.key["number"])))
            and tensors["y"].dtype == torch.bfloat16
        )
        assert facts == {"half": job.key["number"] / 2}


def test_ranks_share_the_jobs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store, rank=1, world_size=2)
    assert [store.is_done(job) for job in JOBS] == [False, True, False, True, False]
    run(store, rank=0, world_size=2)
    assert all(map(store.is_done, JOBS))


def test_the_name_follows_from_the_key_alone() -> None:
    assert Job(kind="a", key={"x": 1, "y": 2}).id == Job(kind="a", key={"y": 2, "x": 1}).id
    assert len({Job(kind=kind, key={"x": x}).id for kind in "ab" for x in (1, 1.5, "1", [1])}) == 8


@pytest.mark.parametrize("place", [9, 200, -3])
def test_a_damaged_result_is_set_aside_and_made_anew(
    tmp_path: Path, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    run(store)
    path = store.path(JOBS[2])
    sound = path.read_bytes()
    body = bytearray(sound)
    body[place] ^= 0x11
    path.write_bytes(body)
    with pytest.raises(KeyError):
        store.read(JOBS[2])
    assert "is damaged" in capsys.readouterr().err
    assert not store.is_done(JOBS[2])
    run(store)
    assert path.read_bytes() == sound


def test_a_result_under_another_name_is_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store)
    store.path(JOBS[0]).replace(store.path(JOBS[1]))
    with pytest.raises(KeyError):
        store.read(JOBS[1])


def test_a_job_that_runs_out_of_memory_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    def greedy(job: Job) -> Result:
        if job.key["number"] == 1:
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has
        return compute(job)

    store = Store(tmp_path)
    run_jobs("stage", JOBS, store, greedy, lambda _: None)
    assert "out of memory" in store.facts(JOBS[1])["infeasible"]
    assert store.facts(JOBS[2]) == {"half": 1.0}


def test_other_errors_are_not_taken_for_memory() -> None:
    def wrong(_: Job) -> Result:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt(wrong, JOBS[0])
    assert out_of_memory(MemoryError()) and not out_of_memory(ValueError("not enough memory"))


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    """A real write that fails: a file may grow to 20 kB only."""
    script = """
import sys, resource, signal, torch
from pathlib import Path
from refound.nas.errors import StoreError
from refound.nas.jobs import Job, Store
store = Store(Path(sys.argv[1]))
store.put(Job(kind="test", key={"n": 1}), {"x": torch.zeros(10)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    store.put(Job(kind="test", key={"n": 2}), {"x": torch.zeros(100_000)}, {})
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "All that was done before is kept" in done.stdout and "run the same command again" in done.stdout
    store = Store(tmp_path)
    assert store.is_done(Job(kind="test", key={"n": 1})) and not store.is_done(Job(kind="test", key={"n": 2}))
    assert not list(tmp_path.rglob("*.part"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "test").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot write"):
        run(Store(tmp_path))


def test_scraps_of_killed_processes_are_swept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(store)
    scrap = tmp_path / "test" / ".abc.safetensors.17.part"
    scrap.write_bytes(b"half")
    store.sweep()
    assert not scrap.exists() and all(map(store.is_done, JOBS))
