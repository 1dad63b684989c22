# SPDX-License-Identifier: Apache-2.0
"""The exit barrier of torchrun's agents, with torch's own store and torch's own barrier."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from refound.ckpt import plugin
from refound.ckpt.agent import NO_SHARED_STORE_ENV
from refound.ckpt.attach import Attachment
from refound.ckpt.ending import RoundStore
from refound.ckpt.plugin import RefoundRendezvous
from refound.ckpt.stripes import BUCKET_BYTES
from torch.distributed import DistStoreError, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousInfo
from torch.distributed.elastic.utils import store as store_util

from .alone import alone
from .harness import eventually

KEY = "torchelastic/agent/terminal_state"
SHORT = timedelta(milliseconds=300)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_the_barrier_ends_without_the_lost_when_the_job_is_over(store: TCPStore) -> None:
    looks: list[bool] = [False, False, True]
    ending = RoundStore(store, lambda: looks.pop(0) if len(looks) > 1 else looks[0], grace=SHORT)
    store_util.barrier(ending, world_size=2, key_prefix=KEY, barrier_timeout=60)
    assert looks == [True], "it has asked until the answer was yes"
    assert store.timeout == ending.timeout


def test_it_does_not_while_the_job_may_go_on(store: TCPStore) -> None:
    with pytest.raises(DistStoreError):
        store_util.barrier(RoundStore(store, lambda: False, grace=SHORT), 2, key_prefix=KEY, barrier_timeout=1)


def test_it_ends_at_once_when_all_have_come(store: TCPStore) -> None:
    asked: list[int] = []
    store.add(f"{KEY}/num_members", 1)
    store_util.barrier(RoundStore(store, lambda: bool(asked.append(1))), 2, key_prefix=KEY, barrier_timeout=60)
    assert not asked


def test_other_waits_are_torchs_own(store: TCPStore) -> None:
    ending = RoundStore(store, lambda: True, grace=SHORT)
    with pytest.raises(DistStoreError):
        ending.wait(["something else"], timedelta(milliseconds=50))
    ending.set("something else", "here")
    ending.wait(["something else"])
    assert store.get("something else") == b"here"


class Closed:
    """torch's rendezvous as an agent finds it after the others have ended: closed, a late node still in its list."""

    def __init__(self, attachment: Attachment) -> None:
        self.settings = SimpleNamespace(timeout=SimpleNamespace(join=timedelta(minutes=1)))
        self.settings.keep_alive_interval, self.settings.keep_alive_max_attempt = timedelta(minutes=1), 3
        self.asked = 0

    def num_nodes_waiting(self) -> int:
        return 1

    def next_rendezvous(self) -> RendezvousInfo:
        self.asked += 1
        raise RendezvousClosedError

    def shutdown(self) -> bool:
        return True


@pytest.mark.parametrize("over", [False, True])
def test_nobody_leaves_workers_that_are_done_for_one_that_comes_too_late(
    over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an agent that has left them already, or has come in the place of a lost one, ends well; if all are done."""
    monkeypatch.setattr(plugin, "is_active", False)  # what an agent sets for its whole life
    monkeypatch.setenv(NO_SHARED_STORE_ENV, "1")
    with alone() as job:
        inner = Closed(job.agents[0])
        handler = RefoundRendezvous(cast(Any, inner), job.agents[0], "127.0.0.1", None)
        try:
            assert handler.num_nodes_waiting() == 1, "it would leave its workers now"
            if over:
                job.snapshot(1, np.zeros(BUCKET_BYTES, np.uint8))
                for link in job.links:
                    link.finish()
                eventually(job.agents[0].is_over, "the job is over")
                assert handler.num_nodes_waiting() == 0
                handler._is_excused = True  # as it was a moment before
                with pytest.raises(SystemExit) as ended:
                    handler.next_rendezvous()
                assert ended.value.code == 0 and inner.asked == 0
                # A worker that fails after close() is a failure all the same.
                handler._is_excused = False
            with pytest.raises(RendezvousClosedError):
                handler.next_rendezvous()
        finally:
            handler._left = True  # the agent's farewell is not of this test
            handler._watch.stop()
