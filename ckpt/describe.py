# SPDX-License-Identifier: Apache-2.0
"""What a snapshot process says of itself: all that `refound status`, the metrics and the demo's progress show."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .keeper import Keeper


def describe(keeper: "Keeper") -> dict[str, Any]:
    """Plain data. For holders of the keeper's lock."""
    decision = keeper.decision
    group = next((g for g in decision.groups if keeper.position in g.members), None) if decision else None
    last = keeper.tuning.last
    return {
        "job": keeper.job,
        "node": keeper.node,
        "position": keeper.position,
        "generation": keeper.generation,
        "nodes": [node.name for node in decision.nodes] if decision else [],
        "world_size": next((w.world_size for w in keeper.workers.values()), None),
        "code": {"k": group.k, "m": group.m} if group else None,
        "workers": [{"rank": w.rank, "pid": w.pid} for w in keeper.workers.values() if w.alive],
        "committed": _committed(keeper),
        "phase": _phase(keeper),
        "slot_bytes": sum(s.size_bytes for pool in keeper.pools.values() for s in pool),
        "parity_bytes": _parity_bytes(keeper),
        "snapshots": keeper.snapshots,
        "last_commit_ms": round(keeper.last_commit_ms, 1),
        "every": keeper.tuning.every,
        "stall_ms": last.stall_ms if last else None,
        "step_ms": last.step_ms if last else None,
        "checkpoint": keeper.checkpoint,
        "restored": keeper.restored,
        "over": keeper.is_over,
        "scrub": dict(keeper.scrub),
        "lease_s": keeper.conf.lease_s,
        "trouble": str(keeper.trouble) if keeper.trouble else None,
        "events": list(keeper.events),
    }


def _parity_bytes(keeper: "Keeper") -> int:
    """All memory of parity: of every snapshot, handed on to others, and kept for the next."""
    in_use = [s for held in keeper.in_memory() for s in held.parity + held.handed_on]
    return sum(s.size_bytes for s in (*in_use, *keeper.spare_parity))


def _committed(keeper: "Keeper") -> dict[str, Any] | None:
    if keeper.committed is None:
        return None
    age_s = round(time.time() - keeper.committed_at, 3)
    return {"step": keeper.committed.step, "generation": keeper.committed.generation, "age_s": age_s}


def _phase(keeper: "Keeper") -> str:
    if not keeper.is_open:
        return "rendezvous" if keeper.generation else "waiting"
    if any(held.committed and not (held.data_complete and held.parity_complete) for held in keeper.held.values()):
        return "recovering"
    under_way = [held for held in keeper.held.values() if not held.committed]
    # What another node has announced is held here too, before this node's own workers have begun to copy.
    if keeper.writing or any(not held.data_complete for held in under_way):
        return "copying"
    return "parity" if under_way else "idle"
