# SPDX-License-Identifier: Apache-2.0
"""Looking into a snapshot process from outside, while training goes on: is what it holds still what was put there?"""

from dataclasses import asdict
from typing import Any

from .errors import SnapshotError
from .held import Held
from .keeper import Keeper
from .wire import Message


class Inspection:
    """What a snapshot process lets its own user see of its memory. Nothing here changes anything."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def verify(self) -> Message:
        """Check every bucket of every complete snapshot against its checksum.

        The memory is pinned meanwhile, not locked: a snapshot that training replaces is checked to its end.
        """
        keeper = self._keeper
        with keeper.changed:
            ids = [held.id for held in keeper.held.values() if held.data_complete or held.parity]
        found = []
        for snapshot in sorted(ids):
            if held := keeper.pin(snapshot):
                try:
                    found.append(self._look(held))
                finally:
                    keeper.unpin(held)
        return {"job": keeper.job, "node": keeper.node, "snapshots": found}

    def keep(self) -> tuple[Held, Message]:
        """Pin the newest committed snapshot, until `let_go`, and say what it is. Raises SnapshotError without one."""
        keeper = self._keeper
        with keeper.changed:
            held = keeper.pin(keeper.committed) if keeper.committed else None
            if held is None or not held.data_complete or held.damaged_data:
                if held is not None:
                    keeper.unpin(held)
                raise SnapshotError(f"node {keeper.node!r} has no snapshot that is committed and whole")
            facts = {"step": held.id.step, "generation": held.id.generation, "world_size": held.world_size}
            return held, {**facts, "job": keeper.job, "node": keeper.node, "ranks": sorted(held.shards)}

    def let_go(self, held: Held) -> None:
        self._keeper.unpin(held)

    def _look(self, held: Held) -> dict[str, Any]:
        with self._keeper.changed:
            # What is known to be bad is being rebuilt in place and says nothing new.
            known = set(held.damaged_data), set(held.damaged_parity)
        data, parity = held.failing()
        with self._keeper.changed:
            data, parity = data - known[0], parity - known[1]
            view = asdict(held.view())
            view |= {"damaged_data": sorted(data), "damaged_parity": sorted(parity)}
            return {
                "step": held.id.step,
                "generation": held.id.generation,
                "committed": held.committed,
                "buckets": sum(len(record.checksums) for record in held.own.values()) if held.data_complete else 0,
                "parity_buckets": sum(map(len, held.parity_checksums)) if held.parity_complete else 0,
                "rebuilding": len(known[0]) + len(known[1]),
                "view": view,
            }
