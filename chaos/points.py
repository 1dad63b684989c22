# SPDX-License-Identifier: Apache-2.0
"""The points of a snapshot's life and of a recovery at which a fault may fall, as calls inside a snapshot process.

A snapshot process of the campaign is a real one whose functions named here first ask `Traps` whether somebody waits for
them. A thread that reaches an armed point says so and stays there until the fault has fallen.
"""

import functools
import os
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..ckpt import checkpoints, wire
from ..ckpt.exchange import Exchange
from ..ckpt.keeper import Keeper
from ..ckpt.lead import Control
from ..ckpt.peers import Peers
from ..ckpt.rebuild import Rebuilder
from ..ckpt.recovery import Recovery
from ..ckpt.restore import Restore
from ..ckpt.writer import CheckpointWriter

_RELEASE = timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A moment that can be waited for; without an owner it is one that the campaign itself brings about."""

    stage: str
    """"step", "disk" or "rendezvous"."""
    what: str
    owner: Any = None
    function: str = ""
    after: bool = False
    lead: bool = False
    """Only the lead reaches it."""
    others: bool = False
    """Only nodes that are not the lead reach it."""
    when: Callable[..., bool] = lambda *_, **__: True
    """Whether a call with these arguments is one of those meant."""


def _is_commit(_: Any, position: int, message: dict[str, Any], *__: Any) -> bool:
    return message.get("op") == "commit"


def _step(what: str, owner: Any = None, function: str = "", **more: Any) -> Point:
    return Point(stage="step", what=what, owner=owner, function=function, **more)


def _disk(what: str, owner: Any, function: str, **more: Any) -> Point:
    return Point(stage="disk", what=what, owner=owner, function=function, **more)


def _back(what: str, owner: Any = None, function: str = "", **more: Any) -> Point:
    return Point(stage="rendezvous", what=what, owner=owner, function=function, **more)


POINTS: dict[str, Point] = {
    "begun": _step("the worker has its slot and has written nothing"),
    "half": _step("the worker has written half of its slot"),
    "filled": _step("the worker has written its slot and has not said so"),
    "complete": _step("the worker says that its slot is complete", Keeper, "complete"),
    "offer": _step("the node's shards are complete and nobody knows", Exchange, "_protect"),
    "encode": _step("all checksums are known, nothing is coded", Exchange, "_encode"),
    "encoded": _step("the node has coded its stripe", Exchange, "_encode", after=True),
    "coded": _step("the node has all its parity, the lead does not know", Control, "prepared"),
    "prepared": _step("the lead hears of a node that it is ready", Keeper, "note_prepared", lead=True),
    "decided": _step("the lead has heard of all nodes and told none", Control, "everyone_prepared", lead=True),
    "telling": _step("the lead has committed and tells the nth node", Peers, "request", lead=True, when=_is_commit),
    "told": _step("a node hears of the commit", Control, "told_committed", others=True),
    "commit": _step("a node is about to drop the snapshot before", Keeper, "commit"),
    "committed": _step("a node has committed", Keeper, "commit", after=True),
    "part": _disk("a node begins to write its part", checkpoints, "write_part"),
    "fsync": _disk("the nth file is written beside its name, not synced", os, "fsync"),
    "named": _disk("the nth file has its name", checkpoints, "write_durably", after=True),
    "reported": _disk("the lead hears of a part", CheckpointWriter, "note_part", lead=True),
    "commit-file": _disk("all parts are durable, the commit file is not there", checkpoints, "write_commit", lead=True),
    "complete-file": _disk("the commit file is there", checkpoints, "write_commit", lead=True, after=True),
    "removing": _disk("the oldest checkpoint has lost its commit file", shutil, "rmtree", lead=True),
    "sealed": _back("all nodes have said what they hold, none has gone on"),
    "opened": _back("a node has begun the new generation", Keeper, "open", after=True),
    "records": _back("a node is about to learn the others' checksums", Recovery, "restore_records"),
    "data": _back("a node is about to rebuild its data", Recovery, "rebuild_data"),
    "proof": _back("a node has rebuilt its data and not proven it", Recovery, "_prove_data"),
    "helping": _back("a node computes what another one has lost", Rebuilder, "compute"),
    "shard": _back("a worker asks for its shard", Restore, "shard"),
    "parity": _back("a node has its data and is about to rebuild its parity", Recovery, "rebuild_parity"),
    "whole": _back("a node has all of the snapshot again", Recovery, "rebuild_parity", after=True),
}


class Traps:
    """Inside one snapshot process: which points somebody waits for. `sock` leads to the campaign."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._armed: dict[str, int] = {}
        self._release = threading.Event()

    def install(self) -> None:
        """Put a question in front of (or behind) every function that is a point, and listen."""
        for name, point in POINTS.items():
            if point.owner is not None:
                setattr(point.owner, point.function, self._asking(name, point, getattr(point.owner, point.function)))
        threading.Thread(target=self._listen, name="campaign", daemon=True).start()

    def _asking(self, name: str, point: Point, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def asking(*args: Any, **kwargs: Any) -> Any:
            meant = point.when(*args, **kwargs)
            if meant and not point.after:
                self.reach(name)
            found = real(*args, **kwargs)
            if meant and point.after:
                self.reach(name)
            return found

        return asking

    def reach(self, name: str) -> None:
        """Say so and wait, if somebody waits for this point."""
        with self._lock:
            left = self._armed.get(name)
            if left is None:
                return
            self._armed[name] = left - 1
            if left > 1:
                return
            del self._armed[name]
            self._release.clear()
            wire.send(self._sock, {"reached": name})
        self._release.wait(_RELEASE.total_seconds())

    def _listen(self) -> None:
        try:
            while True:
                message, _, _ = wire.receive(self._sock)
                with self._lock:
                    if "arm" in message:
                        self._armed = {str(name): int(nth) for name, nth in message["arm"].items()}
                        wire.send(self._sock, {"armed": sorted(self._armed)})
                    else:
                        self._release.set()
        except OSError:
            os._exit(0)  # the campaign is over, however it ended
