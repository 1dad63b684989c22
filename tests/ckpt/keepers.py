# SPDX-License-Identifier: Apache-2.0
"""A keeper of one node for tests of its rules, with what a worker does to it."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from refound.ckpt.agreement import Decision, NodeView, SnapshotId, decide
from refound.ckpt.conf import PluginConfig
from refound.ckpt.fence import Worker
from refound.ckpt.keeper import Keeper
from refound.ckpt.stripes import BUCKET_BYTES

from .cluster import PATIENCE_S, Writer, write

KEY = b"key"


def view_of(keeper: Keeper, **more: Any) -> NodeView:
    fields: dict[str, Any] = {"k": 0, "m": -1, "held": tuple(keeper.seal())} | more
    return NodeView(
        name=keeper.node,
        address="127.0.0.1",
        port=1,
        generation=keeper.generation,
        nonce=keeper.nonce,
        secret_check="",
        **fields,
    )


def others(count: int, **more: Any) -> list[NodeView]:
    """Views of nodes that hold nothing, named after the one under test."""
    fields: dict[str, Any] = {"k": 0, "m": -1} | more
    return [
        NodeView(name=f"z{i}", address="127.0.0.1", port=1, generation=0, nonce="00" * 16, secret_check="", **fields)
        for i in range(count)
    ]


def opened(nodes: int = 1) -> Keeper:
    keeper = Keeper(job="j", node="a", conf=PluginConfig())
    reopen(keeper, nodes)
    return keeper


def reopen(keeper: Keeper, nodes: int = 1) -> Decision:
    decision = decide([view_of(keeper), *others(nodes - 1)])
    keeper.open(decision, KEY)
    return decision


def data(buckets: int, fill: int) -> np.ndarray:
    return np.full(buckets * BUCKET_BYTES, fill, np.uint8)


def at(keeper: Keeper, step: int) -> SnapshotId:
    return SnapshotId(generation=keeper.generation, step=step)


def write_all(keeper: Keeper, step: int, ranks: int = 1, buckets: int = 1) -> SnapshotId:
    for rank in range(ranks):
        write(keeper, Writer(rank, keeper.generation, ranks, ranks), step, data(buckets, 16 * step + rank))
    return at(keeper, step)


def write_and_commit(keeper: Keeper, step: int, **more: int) -> SnapshotId:
    snapshot = write_all(keeper, step, **more)
    keeper.commit(snapshot)
    return snapshot


def one(keeper: Keeper, rank: int = 0) -> Worker:
    return Writer(rank, keeper.generation).worker()


class Waiting:
    """A call that is expected to wait, in a thread of its own."""

    def __init__(self, keeper: Keeper, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self._error: BaseException | None = None
        before = len(keeper.changed._waiters)  # pyright: ignore[reportAttributeAccessIssue]
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        while len(keeper.changed._waiters) == before:  # pyright: ignore[reportAttributeAccessIssue]
            assert self._thread.is_alive(), "it did not wait"

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except Exception as error:
            self._error = error

    def end(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it still waits"
        if self._error:
            raise self._error
        return self.result
