# SPDX-License-Identifier: Apache-2.0
"""Several nodes' snapshot processes inside one process, over real loopback TCP, for tests that need their insides.

A `Node` is a `Process` without its agent; a `Cluster` plays the agents' part: it collects every node's view, and opens
the next generation from them. Ranks belong to positions, as torchrun deals them out.
"""

import contextlib
import itertools
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from refound.ckpt.agreement import Decision, NodeView, SnapshotId, decide
from refound.ckpt.conf import PluginConfig
from refound.ckpt.fence import Worker
from refound.ckpt.held import Held, bucket_checksums
from refound.ckpt.keeper import Keeper
from refound.ckpt.paths import private_dir, runtime_dir, socket_path
from refound.ckpt.smp import Process
from refound.ckpt.stripes import BUCKET_BYTES

PATIENCE_S = 60.0
"""A test that waits longer for something has failed."""
_jobs = itertools.count()


@contextmanager
def sleepers(count: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that do nothing, to stand for workers: fencing kills them for real."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(keeper: Keeper, condition: Callable[[], Any]) -> None:
    """Wait until something holds of a keeper. Looks again now and then: not all that changes is announced."""
    deadline = time.monotonic() + PATIENCE_S
    with keeper.changed:
        while not keeper.changed.wait_for(condition, timeout=0.05):
            assert time.monotonic() < deadline, "it did not come to pass"


def snapshot_memory() -> int:
    """Pieces of snapshot memory that this process holds descriptors of."""
    links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return len({fd.stat().st_ino for fd in links if "memfd:refound-" in str(fd.readlink())})


@dataclass(frozen=True)
class Writer:
    """What the keeper needs to know of a worker that only lives in the test."""

    rank: int
    generation: int
    local_world_size: int = 1
    world_size: int = 1

    def worker(self) -> Worker:
        """Never joins the keeper, so that nothing is killed at the next seal."""
        return Worker(pid=0, pidfd=-1, **self.__dict__)


def write(keeper: Keeper, writer: Writer, step: int, data: np.ndarray, **checks: int) -> None:
    """A worker's part in a snapshot: take a slot, fill it, say so."""
    worker = writer.worker()
    segment = keeper.begin(worker, step, len(data))
    segment.array[:] = data
    keeper.complete(worker, step, bucket_checksums(data), checks)


class Node:
    """One node: its keeper, its server and whatever threads its generations start."""

    def __init__(self, job: str, name: str, conf: PluginConfig) -> None:
        self.name = name
        private_dir(runtime_dir())
        private_dir(socket_path(job, name).parent)
        self.process = Process(job=job, node=name, address="127.0.0.1", conf=conf)
        socket_path(job, name).unlink()  # nobody comes in by this door, and `refound status` must not try to
        socket_path(job, name).parent.rmdir()
        self.process._server.start()
        self.keeper = self.process.keeper

    def view(self) -> NodeView:
        """What its agent would publish, having sealed it."""
        return self.process._inventory()

    def open(self, views: Sequence[NodeView], secret: str) -> None:
        self.process._open(list(views), secret)

    def held(self, snapshot: SnapshotId) -> Held:
        with self.keeper.changed:
            return self.keeper.held[snapshot]

    def shard(self, rank: int) -> np.ndarray:
        """A rank's bytes, as its worker would get them."""
        segment, _ = self.process._current_restore().shard(rank)
        return segment.array

    def die(self) -> None:
        """Everything it held is gone, and nobody listens."""
        keeper = self.keeper
        keeper.seal()
        self.process._server.close()
        self.process._door.close()
        with keeper.changed:
            held = keeper.in_memory()
            segments = [s for h in held for s in (*h.shards.values(), *h.parity, *h.handed_on)]
            segments += [s for pool in keeper.pools.values() for s in pool]
            keeper.held.clear()
            keeper.pools.clear()
            for segment in (*segments, *keeper.spare_parity, *keeper.fetched.values()):
                segment.free()
            keeper.spare_parity, keeper.fetched = [], {}


class Gate:
    """A port in front of a node, through which the others reach it until it has said `limit_bytes`: then it is gone."""

    def __init__(self, target_port: int, limit_bytes: int, on_cut: Callable[[], None]) -> None:
        self._target, self._left, self._on_cut = target_port, limit_bytes, on_cut
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with self._listener, contextlib.suppress(OSError):  # how a cut ends this thread
            while True:
                near, _ = self._listener.accept()
                if (far := self._connect(near)) is None:
                    continue
                for source, sink, counted in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._forward, args=(source, sink, counted), daemon=True).start()

    def _connect(self, near: socket.socket) -> socket.socket | None:
        """The node's end of a connection; none, and this end closed, if there is a cut meanwhile."""
        with contextlib.ExitStack() as until_kept:
            until_kept.enter_context(near)
            far = until_kept.enter_context(socket.create_connection(("127.0.0.1", self._target)))
            with self._lock:
                if self.is_cut:
                    return None
                self._sockets += [near, far]
                until_kept.pop_all()
        return far

    def _forward(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):  # either side has gone, or both by the cut
            while data := source.recv(1 << 16):
                with self._lock:
                    passes = min(len(data), self._left) if counted else len(data)
                    self._left -= passes if counted else 0
                sink.sendall(data[:passes])
                if passes < len(data):
                    self.cut()
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End all connections and take no more."""
        with self._lock:
            self.is_cut = True
            sockets, self._sockets = self._sockets, []
        for sock in (self._listener, *sockets):
            with contextlib.suppress(OSError):  # the other side may have closed it first
                sock.shutdown(socket.SHUT_RDWR)
        for sock in sockets:
            sock.close()
        self._on_cut()


class Cluster:
    """Nodes that protect each other, and the bytes their ranks should hold of each step."""

    def __init__(self, k: int, m: int, shards: Sequence[Sequence[int]], seed: int = 0, **conf: Any) -> None:
        """shards: for each position, the buckets of each of its ranks."""
        self.job = f"cluster-{next(_jobs)}"
        conf = {"scrub_mb_s": 0.0, **conf}  # tests that make memory bad want to be the ones to find it
        self.conf = PluginConfig(**{"k": k, "m": m, **conf}) if m else PluginConfig(**conf)
        self.shards = [list(ranks) for ranks in shards]
        firsts = [0, *itertools.accumulate(map(len, self.shards))]
        self.ranks = [range(first, last) for first, last in itertools.pairwise(firsts)]
        self.rng = np.random.default_rng(seed)
        self.nodes = [Node(self.job, f"n{i}", self.conf) for i in range(len(self.shards))]
        self.named = len(self.nodes)
        self.written: dict[SnapshotId, dict[int, np.ndarray]] = {}
        self.decision: Decision | None = None

    def open(self, views: Sequence[NodeView] | None = None, secret: str = "") -> Decision:
        """A rendezvous: seal all, agree, open. Afterwards `nodes` are in the order of their positions."""
        views = views or self.views()
        self.decision = decide(views)
        by_name = {node.name: node for node in self.nodes}
        self.nodes = [by_name[view.name] for view in self.decision.nodes]
        for node in self.nodes:
            node.open(views, secret)
        return self.decision

    def views(self) -> list[NodeView]:
        return [node.view() for node in self.nodes]

    @property
    def generation(self) -> int:
        assert self.decision is not None
        return self.decision.generation

    def writer(self, position: int, rank: int) -> Writer:
        count = sum(map(len, self.shards))
        return Writer(rank, self.generation, len(self.shards[position]), count)

    def snapshot(self, step: int, positions: Sequence[int] | None = None) -> SnapshotId:
        """All ranks write random bytes (those of `positions` only, if given)."""
        snapshot = SnapshotId(generation=self.generation, step=step)
        data = self.written.setdefault(snapshot, {})
        for position in positions if positions is not None else range(len(self.nodes)):
            for rank, buckets in zip(self.ranks[position], self.shards[position], strict=True):
                data[rank] = self.rng.integers(0, 256, buckets * BUCKET_BYTES, dtype=np.uint8)
                write(self.nodes[position].keeper, self.writer(position, rank), step, data[rank])
        return snapshot

    def committed(self, snapshot: SnapshotId) -> None:
        """Wait until all nodes have it committed."""
        for node in self.nodes:
            keeper = node.keeper
            wait_for(keeper, lambda k=keeper: k.trouble or (k.committed is not None and k.committed >= snapshot))
            assert keeper.trouble is None, keeper.trouble

    def replace(self, *positions: int) -> None:
        """These nodes are lost; empty ones come in their stead, under new names."""
        for position in positions:
            self.nodes[position].die()
            self.nodes[position] = Node(self.job, f"n{self.named}", self.conf)
            self.named += 1

    def whole(self, snapshot: SnapshotId) -> None:
        """Wait until every node has all its data and parity of `snapshot`, proven."""
        for node in self.nodes:
            held, keeper = node.held(snapshot), node.keeper
            wait_for(
                keeper,
                lambda h=held, k=keeper: (
                    k.trouble or (h.data_complete and h.parity_complete and not h.damaged_data and not h.damaged_parity)
                ),
            )
            assert keeper.trouble is None, keeper.trouble

    def check_data(self, snapshot: SnapshotId) -> None:
        """Every rank can be restored on its own node, as it was written."""
        for position, ranks in enumerate(self.ranks):
            for rank in ranks:
                assert np.array_equal(self.nodes[position].shard(rank), self.written[snapshot][rank]), rank

    def parity(self, snapshot: SnapshotId) -> list[list[np.ndarray]]:
        """Copies of each position's parity chunks."""
        return [[segment.array.copy() for segment in node.held(snapshot).parity] for node in self.nodes]

    def end(self) -> None:
        for node in self.nodes:
            node.die()

    def gated(self, position: int, limit_bytes: int) -> tuple[list[NodeView], Gate]:
        """Views in which the others reach one node through a gate."""
        views = self.views()
        name = self.nodes[position].name
        gate = Gate(next(view.port for view in views if view.name == name), limit_bytes, self.notify)
        return [replace(view, port=gate.port) if view.name == name else view for view in views], gate

    def notify(self) -> None:
        """Let everybody who waits for something look again."""
        for node in self.nodes:
            with node.keeper.changed:
                node.keeper.changed.notify_all()
