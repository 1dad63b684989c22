# SPDX-License-Identifier: Apache-2.0
"""The exit barrier of torchrun's agents, with torch's own store and torch's own barrier."""

from datetime import timedelta

import pytest
from refound.ckpt.ending import RoundStore
from torch.distributed import DistStoreError, TCPStore
from torch.distributed.elastic.utils import store as store_util

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
