# SPDX-License-Identifier: Apache-2.0
"""The rendezvous store moves: real agents' rendezvous, forked, without workers; and the rules it moves by."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.chaos.network import Gate
from refound.ckpt.client import find_nodes, stop_job
from refound.ckpt.errors import ProtocolError
from refound.ckpt.membership import Member, Place, lacking
from refound.ckpt.moving import MovingStore, Sign, connect, in_time
from refound.ckpt.paths import job_dir
from torch.distributed import DistNetworkError, TCPStore

from . import namespaces
from .harness import eventually
from .namespaces import Network

HERE = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((HERE, 0)) as sock:
        return sock.getsockname()[1]


def run_agent(
    job: str,
    endpoint: str,
    name: str,
    is_host: bool,
    nodes: tuple[int, int],
    pipe: Connection,
    log: Path,
    network: Network | None,
) -> None:
    """An agent without workers: joins, says what it got, and joins again when it is told that somebody waits."""
    address = HERE
    if network is not None:
        node = int(name.removeprefix("node"))
        network.enter(node)
        address = network.address(node)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    from refound.ckpt.entry import create_handler
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    settings: dict[str, Any] = {"node": name, "is_host": int(is_host), "heartbeat_s": 2, "last_call_timeout": 1}
    handler = create_handler(RendezvousParameters("refound", endpoint, job, *nodes, address, **settings))
    while True:
        info = handler.next_rendezvous()
        fresh = not info.store.check([f"here/{info.rank}"])
        info.store.set(f"here/{info.rank}", name)  # as torchrun does when it deals out ranks
        assert info.store.get("here/0")
        port_of_rank_0 = info.bootstrap_store_info.master_port
        pipe.send((int(os.environ["REFOUND_GENERATION"]), info.world_size, fresh and port_of_rank_0))
        while not handler.num_nodes_waiting():
            if pipe.poll(0.1):
                handler.shutdown()
                os._exit(0)


class Agents:
    """Forked agents of one job, that of node 0 hosting the store."""

    def __init__(self, nodes: tuple[int, int], log: Path, network: Network | None = None) -> None:
        """Each writes what it says to `log`; with a network, to `log` and its number."""
        self.log, self._network = log, network
        self.job, self.port, self._nodes = f"moving-{uuid.uuid4().hex[:8]}", free_port(), nodes
        self._running: dict[int, tuple[Any, Connection]] = {}
        self._last: dict[int, tuple[int, int, int]] = {}
        self._ended: list[Any] = []

    def start(self, node: int, *, hosts: bool = True) -> None:
        """hosts: node 0 hosts the store; else somebody else does."""
        context = multiprocessing.get_context("fork")
        near, far = context.Pipe()
        endpoint = f"{self._network.address(0) if self._network else HERE}:{self.port}"
        log = self.log.with_suffix(f".{node}") if self._network else self.log
        is_host = hosts and node == 0
        arguments = (self.job, endpoint, f"node{node}", is_host, self._nodes, far, log, self._network)
        process = context.Process(target=run_agent, args=arguments, daemon=True)
        process.start()
        far.close()
        self._running[node] = process, near

    def lose(self, node: int) -> None:
        """Kill its agent and its snapshot process."""
        process, pipe = self._running.pop(node)
        pids = [status["pid"] for status in find_nodes(self.job) if status["node"] == f"node{node}"]
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGKILL)
        process.join()
        pipe.close()
        self._last.pop(node)
        process.close()

    def last(self) -> dict[int, tuple[int, int, int]]:
        """Node → the generation that it was last in, of how many nodes, and where its rank 0 is to listen."""
        for node, (process, pipe) in self._running.items():
            assert process.is_alive(), f"the agent of node {node} has ended"
            while pipe.poll():
                self._last[node] = pipe.recv()
        return dict(self._last)

    def together(self, generation: int, world: int) -> None:
        """Wait until all are in one generation, this or a later one."""

        def look() -> bool:
            last = self.last()
            assert all(port for _, _, port in last.values()), "a round began with what an older one had left behind"
            return len(last) == world and len(set(last.values())) == 1 and min(last.values())[:2] >= (generation, world)

        eventually(look, f"{world} agents are together in generation {generation}", timeout_s=60)

    def said(self, node: int) -> str:
        """What a node of a network has said."""
        return self.log.with_suffix(f".{node}").read_text()

    def end(self) -> None:
        for process, pipe in self._running.values():
            process.kill()
            process.join()
            pipe.close()
            process.close()
        stop_job(self.job)
        eventually(lambda: not find_nodes(self.job), "the snapshot processes have gone")
        for path in job_dir(self.job).glob("*"):
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            job_dir(self.job).rmdir()


@pytest.fixture
def agents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agents]:
    made = Agents(request.param, tmp_path / "log")
    for node in range(3):
        made.start(node)
    made.together(1, 3)
    yield made
    made.end()


@pytest.mark.parametrize("agents", [(3, 3)], indirect=True)
def test_the_node_that_hosts_the_store_is_lost_and_replaced_and_lost_again(agents: Agents) -> None:
    for _ in range(2):
        generation = agents.last()[1][0]
        agents.lose(0)
        agents.start(0)
        agents.together(generation + 1, 3)


@pytest.mark.parametrize("agents", [(1, 3)], indirect=True)
def test_a_job_with_a_range_of_nodes_goes_on_without_the_host_but_not_with_a_minority(agents: Agents) -> None:
    agents.lose(0)
    agents.together(2, 2)
    generation = agents.last()[1][0]
    agents.lose(1)  # which has hosted the store since
    words = "so these wait for 1 more"
    eventually(lambda: words in agents.log.read_text(), "the last node says that it waits", timeout_s=60)
    assert agents.last()[2][0] == generation
    agents.start(0)
    agents.together(generation + 1, 2)


@pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not())
@pytest.mark.campaign
@pytest.mark.parametrize("alone", [0, 2])
def test_only_the_larger_side_of_a_split_network_goes_on_and_both_meet_again(tmp_path: Path, alone: int) -> None:
    """alone: the node that is cut off; 0 hosts the store. Nothing is refused, all is silent: heartbeats notice."""
    with Network(3) as network:
        agents = Agents((1, 3), tmp_path / "log", network)
        others = sorted({0, 1, 2} - {alone})
        try:
            for node in range(3):
                agents.start(node)
            agents.together(1, 3)
            generation = agents.last()[alone][0]
            network.cut(alone)

            def gone_on() -> bool:
                last = agents.last()
                return all(last[node][0] > generation and last[node][1] == 2 for node in others)

            eventually(gone_on, "the larger side goes on", timeout_s=60)
            eventually(lambda: "so these wait for 1 more" in agents.said(alone), "the other one waits", timeout_s=60)
            assert agents.last()[alone][:2] == (generation, 3)
            for node in range(3):
                assert f"leaving generation {generation}: node 'node" in agents.said(node)
                assert "not heard for" in agents.said(node) or "another node misses it" in agents.said(node)
            network.mend(alone)
            agents.together(agents.last()[others[0]][0] + 1, 3)
        finally:
            agents.end()


def test_all_nodes_lost_at_once_begin_anew_in_a_store_that_outlives_them(tmp_path: Path) -> None:
    """Generation 1 again: nothing that the old one left in the store may be taken for the new one's."""
    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    made = Agents((2, 2), tmp_path / "log")
    made.port = store.port
    try:
        for _ in range(2):
            for node in range(2):
                made.start(node, hosts=False)
            made.together(1, 2)
            assert made.last()[0][0] == 1
            for node in range(2):
                made.lose(node)
    finally:
        made.end()


counts = st.integers(1, 40)
PLACES = [Place(host="a", port=1), Place(host="b", port=2, epoch=3)]


@given(total=counts, cut=st.integers(0, 40), fresh=st.integers(0, 3), store_side=st.booleans())
def test_no_two_sides_of_a_split_may_both_go_on(total: int, cut: int, fresh: int, store_side: bool) -> None:
    cut = min(cut, total)
    sides = [cut, total - cut]
    where = [PLACES[0], PLACES[1]] if store_side else [PLACES[1], PLACES[0]]
    going = []
    for count, place in zip(sides, where, strict=True):
        old = [
            Member(node=f"n{i}", round_id="", standby=PLACES[1], generation=5, nodes=total, met_at=PLACES[0])
            for i in range(count)
        ]
        if old:
            going.append(not lacking(old, place))
            more = lacking(old, place)
            new = [Member(node=f"f{i}", round_id="", standby=PLACES[1]) for i in range(more)]
            assert not lacking([*old, *new], place), "those asked for are enough"
    assert sum(going) <= 1
    launched = [Member(node="f", round_id="", standby=PLACES[0])] * max(1, fresh)
    assert not lacking(launched, PLACES[0]), "a launch is always allowed"


def test_what_is_published_is_checked() -> None:
    member = Member(node="n", round_id="r", standby=PLACES[0], generation=2, nodes=3, met_at=PLACES[1])
    assert Member.from_json(member.to_json()) == member
    for text in ("", "{}", "[]", '{"host": 1, "port": 2, "epoch": 3}', member.to_json().replace("2", '"x"')):
        with pytest.raises(ProtocolError):
            Member.from_json(text)
        with pytest.raises(ProtocolError):
            Place.from_json(text)


def test_work_that_never_returns_is_left_behind() -> None:
    never = threading.Event()
    with pytest.raises(DistNetworkError, match="has not answered for 0 s"):
        in_time(never.wait, timedelta(milliseconds=50))
    never.set()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_first_to_come_brings_the_state_and_a_round_does_not_move(how: signal.Signals) -> None:
    """The state outlives its store, be it gone or only silent; what belongs to a round fails, and is repeated."""
    context = multiprocessing.get_context("fork")
    near, far = context.Pipe()
    host = context.Process(target=_host, args=(far,), daemon=True)
    host.start()
    port = near.recv()
    stores = [MovingStore(TCPStore(HERE, port, wait_for_workers=False), "job", HERE) for _ in range(2)]
    try:
        key = "torch.rendezvous.job"
        assert stores[0].compare_set(key, "", "state") == stores[1].compare_set(key, "", "other") == b"state"
        standbys = [store.standby for store in stores]
        for store in stores:
            store.round_over(4, standbys)
        assert host.pid is not None
        os.kill(host.pid, how)
        with pytest.raises(RuntimeError):
            stores[1].wait(["of a round"], timedelta(seconds=1))
        assert stores[1].get(key) == b"state"
        assert stores[0].compare_set(key, "state", "newer") == b"newer"
        assert stores[1].get(key) == b"newer"
        moved = Place(host=HERE, port=standbys[0].port, epoch=4)
        assert [store.place for store in stores] == [moved, moved]
        if how == signal.SIGSTOP:
            assert stores[1].is_displaced, "it took so long that the state has forgotten this agent"
        assert b'\\"epoch\\": 4' in connect(standbys[1]).get("refound/at/job")
    finally:
        for store in stores:
            store.close()
        near.close()
        far.close()
        host.kill()
        host.join()
        host.close()


def test_who_was_cut_off_comes_back_to_those_who_went_on(tmp_path: Path) -> None:
    """It has moved, and they have not. They have met since, so it follows them: the other way would cost a round."""
    server = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    gate = Gate(HERE, server.port)
    here = MovingStore(TCPStore(HERE, server.port, wait_for_workers=False), "job", HERE)
    cut_off = MovingStore(TCPStore(HERE, gate.port, wait_for_workers=False), "job", HERE)
    try:
        key = "torch.rendezvous.job"
        assert cut_off.compare_set(key, "", "state") == here.get(key) == b"state"
        here.round_over(1, [here.standby])
        cut_off.round_over(1, [cut_off.standby])  # as it can reach no other
        gate.silence()
        assert cut_off.get(key) == b"state"
        assert cut_off.place == Place(host=HERE, port=cut_off.standby.port, epoch=1)
        here.compare_set(key, "state", "without it")
        here.round_over(2, [here.standby])
        at_first = here.place
        gate.heal()
        eventually(lambda: cut_off.place == at_first, "it follows")
        assert cut_off.is_displaced
        assert cut_off.get(key) == b"without it"
        assert here.place == at_first
        assert not here.is_displaced
    finally:
        here.close()
        cut_off.close()
        gate.close()


def test_one_name_of_the_endpoint_is_as_good_as_another() -> None:
    """As on its own host: who calls it otherwise has not moved."""
    server = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    stores = [
        MovingStore(TCPStore(name, server.port, wait_for_workers=False), "job", HERE)
        for name in (HERE, "::ffff:127.0.0.1")
    ]
    try:
        places = [store.place for store in stores]
        assert places[0] != places[1]
        for generation in (1, 2):
            stores[generation % 2].round_over(generation, [])
            eventually(lambda g=generation: all(store._met == g for store in stores), "all have read the signpost")
        assert [store.place for store in stores] == places
        assert not any(store.is_displaced for store in stores)
    finally:
        for store in stores:
            store.close()


def test_what_a_store_says_is_checked() -> None:
    sign = Sign(place=PLACES[1], generation=7)
    assert Sign.from_json(sign.to_json()) == sign
    for text in ("", "{}", "[]", '{"place": "{}", "generation": 1}', sign.to_json().replace("7", "-1")):
        with pytest.raises(ProtocolError):
            Sign.from_json(text)


def test_who_waits_in_a_round_still_keeps_alive(tmp_path: Path) -> None:
    """A node that died after it had joined is waited for; to the others that must not look like a lost store."""
    server = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    store = MovingStore(TCPStore(HERE, server.port, wait_for_workers=False), "job", HERE)
    try:
        key = "torch.rendezvous.job"
        store.compare_set(key, "", "state")
        store.round_over(1, [store.standby])
        waiting = threading.Thread(target=lambda: store.wait(["of the dead"], timedelta(seconds=30)))
        waiting.start()
        at_first = store.place
        for number in range(20):
            before = "state" if not number else str(number - 1)
            assert store.compare_set(key, before, str(number)) == str(number).encode()
        assert waiting.is_alive()
        assert store.place == at_first
        server.set("of the dead", "")
        waiting.join()
    finally:
        store.close()


def _host(pipe: Connection) -> None:
    server = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    pipe.send(server.port)
    signal.pause()
