# SPDX-License-Identifier: Apache-2.0
"""A keeper and its workers: joining, fencing, and writers that would not die."""

import functools
import os
import signal
from datetime import timedelta

import pytest
from refound.ckpt import fence
from refound.ckpt.errors import (
    ProtocolError,
)
from refound.ckpt.fence import Worker
from refound.ckpt.keeper import Keeper

from .cluster import sleepers
from .keepers import opened, reopen, write_and_commit


def join(keeper: Keeper, rank: int, pid: int) -> Worker:
    worker = Worker(
        rank=rank,
        pid=pid,
        pidfd=os.pidfd_open(pid),
        generation=keeper.generation,
        local_world_size=2,
        world_size=2,
    )
    keeper.join(worker)
    return worker


def test_seal_ends_every_worker_even_a_stopped_one() -> None:
    keeper = opened()
    with sleepers(3) as processes:
        for rank, process in enumerate(processes[:2]):
            join(keeper, rank, process.pid)
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert [w["rank"] for w in keeper.status()["workers"]] == [0, 1]
        keeper.seal()
        assert [process.poll() for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, None]
        assert keeper.workers == {} and keeper.status()["workers"] == []


def test_seal_does_not_mind_workers_that_have_gone() -> None:
    keeper = opened()
    with sleepers() as processes:
        join(keeper, 0, processes[0].pid)
        processes[0].kill()
        processes[0].wait()
        assert keeper.status()["workers"] == []
        keeper.seal()


def test_a_rank_has_one_worker_and_a_dead_one_may_be_replaced() -> None:
    keeper = opened()
    with sleepers(2) as processes:
        first = join(keeper, 0, processes[0].pid)
        with pytest.raises(ProtocolError, match=f"rank 0 is already here as process {first.pid}"):
            join(keeper, 0, processes[1].pid)
        assert keeper.workers == {0: first}
        processes[0].kill()
        processes[0].wait()
        second = join(keeper, 0, processes[1].pid)
        assert keeper.workers == {0: second}
        keeper.seal()


def test_slots_of_a_writer_that_would_not_die_are_never_believed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = opened()
    write_and_commit(keeper, 1, ranks=2)
    distrusted = keeper.pools[0].copy()
    trusted = keeper.pools[1].copy()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    monkeypatch.setattr(fence, "end", functools.partial(fence.end, timeout=timedelta(milliseconds=20)))
    with sleepers() as processes:
        join(keeper, 0, processes[0].pid)
        assert keeper.seal() == []  # half of its data is suspect, so there is nothing to offer
        assert processes[0].poll() is None
    monkeypatch.undo()
    reopen(keeper)
    write_and_commit(keeper, 2, ranks=2)
    write_and_commit(keeper, 3, ranks=2)
    assert not {id(s) for s in distrusted} & {id(s) for s in keeper.pools[0]}
    assert {id(s) for s in trusted} & {id(s) for s in keeper.pools[1]}
