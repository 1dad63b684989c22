# SPDX-License-Identifier: Apache-2.0
"""Looking into a snapshot process from outside, while training goes on: is what it holds still what was put there?"""

from dataclasses import asdict
from typing import Any

from ..erasure import checksum
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

        Nothing is locked or pinned meanwhile, so training takes no more memory: what looks bad is looked at again
        under the lock, and a snapshot that is replaced before its end is said to be.
        """
        keeper = self._keeper
        with keeper.changed:
            found = [held for held in keeper.held.values() if held.data_complete or held.parity]
        looked = [self._look(held) for held in sorted(found, key=lambda held: held.id)]
        return {"job": keeper.job, "node": keeper.node, "snapshots": looked}

    def keep(self) -> tuple[Held, Message]:
        """Pin the newest committed snapshot, until `let_go`, and say what it is; training takes a third slot meanwhile.

        Raises SnapshotError without one.
        """
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
        keeper = self._keeper
        with keeper.changed:
            spots = list(held.spots()) if keeper.held.get(held.id) is held else []
            # What is known to be bad is being rebuilt in place and says nothing new.
            known = {(-1, bucket) for bucket in held.damaged_data} | held.damaged_parity
            view = asdict(held.view())
        bad = {s for s, data, expected in spots if s not in known and checksum(data) != expected}
        with keeper.changed:
            replaced = keeper.held.get(held.id) is not held
            bad = set() if replaced else {s for s, data, expected in spots if s in bad and checksum(data) != expected}
            view |= {"damaged_data": sorted(bucket for index, bucket in bad if index < 0)}
            view |= {"damaged_parity": sorted(spot for spot in bad if spot[0] >= 0)}
            return {
                "step": held.id.step,
                "generation": held.id.generation,
                "committed": held.committed,
                "replaced": replaced,
                "buckets": sum(index < 0 for (index, _), _, _ in spots),
                "parity_buckets": sum(index >= 0 for (index, _), _, _ in spots),
                "rebuilding": len(known),
                "view": view,
            }
