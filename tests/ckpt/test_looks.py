# SPDX-License-Identifier: Apache-2.0
"""How often agents look whether a round goes on, with torch's own rendezvous."""

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from refound.ckpt import looks
from refound.ckpt.looks import look_often, wait_between_looks_s
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, c10d_rendezvous_backend, dynamic_rendezvous

from .harness import eventually


def test_many_agents_look_seldom() -> None:
    assert wait_between_looks_s(1) == wait_between_looks_s(32) == 0.1
    assert wait_between_looks_s(64) == 0.2
    assert wait_between_looks_s(320) == wait_between_looks_s(10_000) == 1.0, "never longer than torch"


def test_other_waits_and_another_torch_are_left_alone() -> None:
    asked: list[Any] = []
    module = SimpleNamespace(_delay=asked.append)
    handler = SimpleNamespace(_state_holder=SimpleNamespace(_cache_duration=1))
    look_often(module, handler, 3)
    look_often(module, handler, 3)  # a second handler in one process
    module._delay((0, 0.3))
    module._delay(1)
    assert asked == [(0, 0.3)]
    for other in (SimpleNamespace(), SimpleNamespace(_delay=asked.append)):
        before = dict(vars(other))
        look_often(other, SimpleNamespace(), 3)
        assert vars(other) == before


def test_a_round_of_torchs_own_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three agents meet; counted are looks and not seconds. It waits as `look_often` says."""
    monkeypatch.setattr(dynamic_rendezvous, "_delay", dynamic_rendezvous._delay)
    slept: list[float] = []
    monkeypatch.setattr(looks, "sleep", lambda seconds: (slept.append(seconds), time.sleep(seconds)))
    store = HashStore()
    settings = RendezvousParameters("c10d", "", "job", 3, 3, local_addr="127.0.0.1", last_call_timeout=1)
    agents = [
        dynamic_rendezvous.create_handler(store, c10d_rendezvous_backend.C10dRendezvousBackend(store, "job"), settings)
        for _ in range(3)
    ]
    for agent in agents:
        look_often(dynamic_rendezvous, agent, 3)
    found: list[int] = []
    meeting = [threading.Thread(target=lambda a=a: found.append(a.next_rendezvous().rank)) for a in agents]
    for thread in meeting[:2]:
        thread.start()
    eventually(lambda: 0.1 in slept, "they look for the third")
    meeting[2].start()
    for thread in meeting:
        thread.join()
    assert sorted(found) == [0, 1, 2]
    assert set(slept) == {0.1}
    # torch's own second would show them the same state again
    assert all(cast(Any, agent)._state_holder._cache_duration == 0.1 for agent in agents)
    for agent in agents:
        agent.shutdown()
