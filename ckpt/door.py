# SPDX-License-Identifier: Apache-2.0
"""The Unix socket of a snapshot process: its node's agent, workers and `refound status` come in here.

Every caller must be the same user (the kernel says who it is) and name the same job. Descriptors of the slots go
out through this socket and nowhere else.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from . import fence, last_words, pulse, wire
from .agreement import SnapshotId
from .errors import ProtocolError, SnapshotError
from .hang import Hangs
from .held import Held, pack_record
from .inspection import Inspection
from .keeper import Keeper
from .listening import accept_forever
from .preload import MOST_NAMES
from .restore import Restore
from .server import checked_replicas
from .slots import Segment
from .wire import MAX_COUNT, Message

Reply = tuple[Message, bytes, list[int]]
_LONGEST_REASON = 2000
_LONGEST_WAIT_MS = 24 * 3600 * 1000
_LOOK_AGAIN = timedelta(seconds=1)


class Door:
    """Accepts local callers. One thread a connection; the agent's and each worker's last as long as they do."""

    def __init__(
        self,
        keeper: Keeper,
        path: Path,
        *,
        agent: Callable[[Message], Message],
        stop: Callable[[], None],
        restore: Callable[[], Restore],
        finished: Callable[[SnapshotId], None],
        hangs: Hangs,
    ) -> None:
        self._keeper, self._agent, self._stop, self._restore = keeper, agent, stop, restore
        self._finished, self._hangs = finished, hangs
        self._inspection = Inspection(keeper)
        self._imported: list[str] = []
        """What a worker of this node had imported by its third step, for the next ones to find it done."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        beside = path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        self._listener.bind(os.fspath(beside))
        beside.chmod(0o600)
        self._listener.listen(64)
        beside.replace(path)  # under its own name it accepts from the first moment
        self.agent_pid: int | None = None
        self.connections = 0

    def start(self) -> None:
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are there go on."""
        with contextlib.suppress(OSError):  # nobody may be waiting for any
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        accept_forever(self._listener, self._serve)

    def _serve(self, sock: socket.socket, _: object = None) -> None:
        caller = _Caller()
        with sock:
            try:
                uid, caller.pid = wire.peer_uid_pid(sock)
                if uid != os.getuid():
                    wire.send(
                        sock,
                        {"error": f"this snapshot process belongs to uid {os.getuid()}, not to uid {uid}"},
                    )
                    return
                while True:
                    message, body, fds = wire.receive(sock)
                    for fd in fds:
                        os.close(fd)  # nobody is asked for descriptors
                    reply, data, out_fds = self._reply(caller, message, body)
                    try:
                        wire.send(sock, reply, data, out_fds)
                    finally:
                        for fd in out_fds:
                            os.close(fd)
                    if caller.stop:
                        self._stop()
            except ProtocolError as error:
                self._keeper.refused(pid=caller.pid, error=str(error))
            except OSError:
                return  # the caller has gone
            finally:
                self._let_go(caller)
                if caller.is_agent:
                    self._keeper.event("agent gone", pid=caller.pid)
                    self.agent_pid = None

    def _reply(self, caller: "_Caller", message: Message, body: memoryview) -> Reply:
        try:
            job = message.get("job")
            if job != self._keeper.job and (job is not None or message.get("op") in ("attach", "hello")):
                raise ProtocolError(f"this is the snapshot process of job {self._keeper.job!r}, not of {job!r}")
            return self._handle(caller, message, body)
        except (SnapshotError, MemoryError, OSError) as error:
            return {"error": str(error), "kind": type(error).__name__}, b"", []

    def _handle(self, caller: "_Caller", message: Message, body: memoryview) -> Reply:
        op = message.get("op")
        if op == "status":
            return self.status(), b"", []
        if op in ("verify", "keep", "look"):
            return self._handle_look(caller, message)
        if op == "step":
            rank, generation = _count(message, "rank"), _count(message, "generation")
            self._hangs.step(rank, generation, done=message.get("done") is True)
            return {}, b"", []
        if op == "failed":
            rank, generation = _count(message, "rank"), _count(message, "generation")
            error, lost = str(message.get("error")), message.get("lost") is True
            return last_words.note(self._keeper, rank, generation, error, lost=lost), b"", []
        if op == "modules":
            return self._modules(message), b"", []
        if op == "pulse":
            return pulse.report(self._keeper), b"", []
        if op == "stop":
            caller.stop = True
            return {}, b"", []
        if op == "attach":
            return self._attach(caller), b"", []
        if op == "hello":
            return self._hello(caller, message), b"", []
        if caller.is_agent:
            reply = self._agent(message)
            caller.stop = bool(reply.pop("stop", False))
            return reply, b"", []
        if caller.worker is None:
            raise ProtocolError(f"{op!r} before hello")
        return self._handle_worker(caller, caller.worker, message, body)

    def _handle_look(self, caller: "_Caller", message: Message) -> Reply:
        """Reading only: anyone who may come in at all may look."""
        op = message["op"]
        if op == "verify":
            return self._inspection.verify(), b"", []
        if op == "keep":
            self._let_go(caller)
            caller.kept, facts = self._inspection.keep()
            return facts, b"", []
        rank, kept = _count(message, "rank"), caller.kept
        if kept is None or rank not in kept.shards:
            raise ProtocolError(f"rank {rank} is not kept here")
        ranks, checksums = pack_record({rank: kept.own[rank]})
        return {"ranks": ranks}, checksums, [kept.shards[rank].read_only_fd()]

    def _modules(self, message: Message) -> Message:
        """A worker says what it has imported, or an agent asks."""
        names = message.get("names")
        if names is None:
            return {"modules": self._imported}
        if not isinstance(names, list) or len(names) > MOST_NAMES or not all(isinstance(name, str) for name in names):
            raise ProtocolError("malformed message: names of modules")
        self._imported = names
        return {}

    def _let_go(self, caller: "_Caller") -> None:
        """What a caller has kept lasts as long as its connection."""
        kept, caller.kept = caller.kept, None
        if kept is not None:
            self._inspection.let_go(kept)

    def status(self) -> Message:
        """Everything `refound status` shows of this process."""
        return {**self._keeper.status(), "pid": os.getpid(), "agent_pid": self.agent_pid}

    def _attach(self, caller: "_Caller") -> Message:
        with self._keeper.changed:
            if self.agent_pid is not None:
                return {"busy": self.agent_pid}
            self.agent_pid, caller.is_agent = caller.pid, True
        self._keeper.event("agent", pid=caller.pid)
        return {"pid": os.getpid()}

    def _hello(self, caller: "_Caller", message: Message) -> Message:
        if caller.worker is not None:
            raise ProtocolError(f"this connection is rank {caller.worker.rank}'s already")
        worker = fence.Worker(
            rank=_count(message, "rank"),
            pid=caller.pid,
            pidfd=os.pidfd_open(caller.pid),
            generation=_count(message, "generation"),
            local_world_size=_count(message, "local_world_size"),
            world_size=_count(message, "world_size"),
        )
        try:
            self._keeper.join(worker)
        except SnapshotError:
            worker.close()
            raise
        caller.worker = worker
        return {}

    def _handle_worker(self, caller: "_Caller", worker: fence.Worker, message: Message, body: memoryview) -> Reply:
        keeper, op = self._keeper, message.get("op")
        if op == "restore":
            keeper.check_open(worker.generation)
            return self._restore().facts(), b"", []
        if op == "shard":
            segment, record = self._restore().shard(_count(message, "rank"), _spans(message))
            ranks, checksums = pack_record({_count(message, "rank"): record})
            return {"ranks": ranks}, checksums, [segment.read_only_fd()]
        if op == "reject":
            keeper.check_open(worker.generation)
            self._restore().reject(str(message.get("reason"))[:_LONGEST_REASON])
            return {}, b"", []
        if op == "begin":
            segment = keeper.begin(worker, _count(message, "step"), _count(message, "size_bytes"))
            return self._slot(caller, segment)
        if op == "complete":
            if len(body) % 4:
                raise ProtocolError("malformed checksums")
            checksums = np.frombuffer(bytes(body), dtype="<u4").astype(np.uint32)
            objection = str(message.get("objection") or "")[:_LONGEST_REASON]
            with keeper.changed:
                keeper.check_open(worker.generation)
                keeper.tuning.reported(_snapshot(worker, message), message.get("costs"))
            keeper.complete(worker, _count(message, "step"), checksums, checked_replicas(message), objection)
        elif op == "abort":
            keeper.abort(worker)
        elif op == "finish":
            if snapshot := keeper.finish(worker):
                self._finished(snapshot)
        elif op == "interval":
            return self._interval(worker, message), b"", []
        elif op == "wait":
            wait = timedelta(milliseconds=min(_count(message, "timeout_ms"), _LONGEST_WAIT_MS))
            return {"committed": keeper.wait_committed(worker, _count(message, "step"), wait)}, b"", []
        else:
            raise ProtocolError(f"unknown request {op!r}")
        return {}, b"", []

    def _interval(self, worker: fence.Worker, message: Message) -> Message:
        """What the commit of a step says of the next ones, once there is one; nothing if the step was dropped.

        Raises what keeps it from coming.
        """
        keeper, step = self._keeper, _count(message, "step")
        while not (keeper.wait_committed(worker, step, _LOOK_AGAIN) or keeper.is_skipped(step)):
            with keeper.changed:
                keeper.check_open(worker.generation)
                if keeper.trouble:
                    raise keeper.trouble
        with keeper.changed:
            keeper.check_open(worker.generation)
            return keeper.tuning.decision(_snapshot(worker, message))

    def _slot(self, caller: "_Caller", segment: Segment) -> Reply:
        """Name the slot, with its descriptor the first time this worker gets it, and the slots that are no more."""
        gone = [number for number, known in caller.slots.items() if known.fd < 0]
        for number in gone:
            del caller.slots[number]
        for number, known in caller.slots.items():
            if known is segment:
                return {"slot": number, "gone": gone}, b"", []
        number = caller.next_slot
        caller.next_slot += 1
        caller.slots[number] = segment
        return {"slot": number, "gone": gone}, b"", [os.dup(segment.fd)]


class _Caller:
    """What this process knows of one connection."""

    def __init__(self) -> None:
        self.pid = 0
        self.is_agent = False
        self.worker: fence.Worker | None = None
        self.slots: dict[int, Segment] = {}
        self.next_slot = 0
        self.stop = False
        self.kept: Held | None = None


def _snapshot(worker: fence.Worker, message: Message) -> SnapshotId:
    return SnapshotId(generation=worker.generation, step=_count(message, "step"))


def _spans(message: dict[str, Any]) -> list[range] | None:
    """Which buckets of a shard are asked for; None for all."""
    spans = message.get("spans")
    if spans is None:
        return None
    good = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(end) is int and 0 <= end < 1 << 40 for end in span)
        for span in spans
    )
    if not good:
        raise ProtocolError("malformed message: spans are not pairs of counts")
    return [range(low, high) for low, high in spans]


def _count(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_COUNT:
        raise ProtocolError(f"malformed message: {name} is not a count")
    return value
