# SPDX-License-Identifier: Apache-2.0
"""Heartbeats between snapshot processes, in one process over loopback, and an agent's look at a stopped one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt import attach as attach_module
from refound.ckpt import pulse
from refound.ckpt.attach import attach
from refound.ckpt.client import find_nodes, stop_job
from refound.ckpt.conf import PluginConfig
from refound.ckpt.keeper import Keeper
from refound.ckpt.paths import socket_path
from refound.ckpt.watch import Watch

from .cluster import Cluster, wait_for
from .harness import eventually

HEARTBEAT_S = 60.0
"""Long, for this is one process: what is tested does not come from silence, which a busy machine brings as well."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty beats a second, however long a silence is allowed."""
    monkeypatch.setattr(pulse, "_BEATS", HEARTBEAT_S * 20)


def beats(keeper: Keeper) -> pulse.Pulse:
    """The heartbeats of the generation that is open."""
    assert keeper.pulse is not None
    return keeper.pulse


@contextlib.contextmanager
def cluster(nodes: int, heartbeat_s: float) -> Iterator[Cluster]:
    made = Cluster(1, 0, [[1]] * nodes, heartbeat_s=heartbeat_s)
    try:
        yield made
    finally:
        made.end()


@given(st.integers(2, 300))
def test_every_node_hears_of_a_loss_within_log2_beats(nodes: int) -> None:
    """Word of a missing node travels from who is asked to who asks; nobody is left without."""
    knows, beats = {0}, 0
    while len(knows) < nodes:
        knows |= {p for p in range(nodes) if knows.intersection(pulse.watched(p, nodes))}
        beats += 1
    assert beats <= nodes.bit_length()
    assert len(pulse.watched(0, nodes)) <= nodes.bit_length()
    assert all(p not in pulse.watched(p, nodes) for p in range(nodes))


def test_a_node_whose_port_refuses_is_missed_by_all() -> None:
    """Long before the silence that is allowed: its process is gone."""
    with cluster(5, heartbeat_s=HEARTBEAT_S) as nodes:
        views, gate = nodes.gated(3, 1 << 40)
        nodes.open(views)
        lost = next(p for p, node in enumerate(nodes.nodes) if node.name == "n3")
        for position, node in enumerate(nodes.nodes):
            if lost in pulse.watched(position, 5):
                wait_for(node.keeper, lambda: gate._sockets)
        gate.cut()
        gate._listener.close()
        for node in nodes.nodes:
            if node.name != "n3":
                wait_for(node.keeper, lambda k=node.keeper: beats(k).missing)
                assert set(beats(node.keeper).missing) == {lost}
                assert pulse.report(node.keeper)["missing"].keys() == {"n3"}


def test_who_leaves_for_a_rendezvous_ends_the_generation_and_the_next_begins_clean() -> None:
    with cluster(3, heartbeat_s=HEARTBEAT_S) as nodes:
        nodes.open()
        nodes.nodes[1].process._do_for_agent({"op": "rendezvous"})
        for position in (0, 2):
            keeper = nodes.nodes[position].keeper
            wait_for(keeper, lambda k=keeper: beats(k).is_over)
            assert not beats(keeper).missing
        nodes.open()
        assert [pulse.report(node.keeper)["over"] for node in nodes.nodes] == [False] * 3
        assert pulse.answer(nodes.nodes[0].keeper, nodes.generation - 1)["over"]


def test_a_node_that_is_still_opening_a_generation_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the new key already, so those who were quicker can ask; all else of its state is still the old one's."""
    with cluster(3, heartbeat_s=HEARTBEAT_S) as nodes:
        nodes.open()
        slow, held_up, go_on = nodes.nodes[2].keeper, threading.Event(), threading.Event()
        views = nodes.views()
        event = slow.event

        def hold(kind: str, **details: Any) -> None:  # the last thing of opening, but for saying that it is done
            if kind == "generation":
                held_up.set()
                go_on.wait(60)
            event(kind, **details)

        monkeypatch.setattr(slow, "event", hold)
        opening = threading.Thread(target=nodes.nodes[2].open, args=(views, ""))
        opening.start()
        assert held_up.wait(60)
        try:
            for node in nodes.nodes[:2]:
                node.open(views, "")
            for keeper in (node.keeper for node in nodes.nodes[:2]):
                wait_for(keeper, lambda k=keeper: 2 in beats(k)._met)
                heard_at = beats(keeper)._heard_at[2]
                wait_for(keeper, lambda k=keeper, t=heard_at: beats(k)._heard_at[2] > t or beats(k).is_over)
                assert not beats(keeper).is_over
        finally:
            go_on.set()
            opening.join()


def test_who_is_missed_by_the_others_and_comes_back_learns_that_its_generation_is_over() -> None:
    with cluster(3, heartbeat_s=HEARTBEAT_S) as nodes:
        nodes.open()
        beats(nodes.nodes[0].keeper).missing[2] = "not heard"
        wait_for(nodes.nodes[2].keeper, lambda: beats(nodes.nodes[2].keeper).is_over)
        wait_for(nodes.nodes[1].keeper, lambda: 2 in beats(nodes.nodes[1].keeper).missing)


def test_heartbeats_can_be_turned_off() -> None:
    with cluster(2, heartbeat_s=0) as nodes:
        nodes.open()
        assert not beats(nodes.nodes[0].keeper)._heard_at, "nobody is asked"
        assert Watch(socket_path(nodes.job, "n0"), 0, 600).reasons(0) == []


@pytest.mark.parametrize(("spare", "lease_s"), [(True, 600), (False, 600), (False, 1)])
def test_a_stopped_snapshot_process_is_ended_at_once_only_if_others_hold_what_it_held(
    spare: bool, lease_s: float, capfd: pytest.CaptureFixture[str]
) -> None:
    """Else when the lease is over: no wait is without end."""
    job = f"watch-{spare}-{lease_s}-{os.getpid()}"
    attachment = attach(job, "127.0.0.1", PluginConfig(node="n0"))
    process = attach_module._started.pop()
    watch = Watch(attachment.path, 0.2, lease_s)
    said: list[str] = []

    def heard() -> str:
        watch._spare = spare
        said.append(capfd.readouterr().err)
        return "".join(said)

    try:
        attachment.open([attachment.inventory()], "")
        eventually(lambda: watch._generation == 1, "the watch has heard the snapshot process")
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: ("ending it" if spare else "left alone for") in heard(), "it is found to be stopped")
        ended = spare or lease_s == 1
        if ended:
            eventually(lambda: not attachment.alive(), "it is ended")
        assert spare or not ended or "what it held is lost" in heard()
        process.send_signal(signal.SIGCONT)
        assert (find_nodes(job) == []) == ended
    finally:
        process.send_signal(signal.SIGCONT)
        watch.stop()
        attachment._client.close()
        stop_job(job)
        process.wait()


def test_the_end_of_a_generation_reaches_all_who_wait_for_it() -> None:
    """Heartbeats take themselves off the list that is gone through then: who comes after them is not passed over."""
    with cluster(2, heartbeat_s=HEARTBEAT_S) as nodes:
        nodes.open()
        keeper, told = nodes.nodes[0].keeper, []
        with keeper.changed:
            keeper.on_seal.append(lambda: told.append(True))
        keeper.seal()
        assert told == [True]
        assert keeper.pulse is not None
        assert keeper.pulse.close not in keeper.on_seal
