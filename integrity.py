# SPDX-License-Identifier: Apache-2.0
"""`refound verify` and `refound repair`: what was looked at, what is damaged, what comes next."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ckpt.agreement import HeldView, SnapshotId, why_not
from .ckpt.client import verify_nodes
from .ckpt.errors import ConfigError
from .ckpt.examine import Examination, FileDamage, examine, find_checkpoints
from .ckpt.repair import Repair
from .ckpt.slots import format_bytes
from .ckpt.stripes import BUCKET_BYTES

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One thing that was checked: a checkpoint, or one snapshot in one node's memory."""

    kind: str
    """"checkpoint" or "memory"."""
    name: str
    is_sound: bool
    summary: str
    damage: tuple[str, ...]
    can_be_repaired: bool
    next: str
    """What to do now; empty if nothing."""
    details: Mapping[str, Any]


def verify(target: str | None) -> list[Verdict]:
    """Check a checkpoint (or all in a directory), a job's memory on this machine, or without a target all memory.

    Raises ConfigError if `target` is neither.
    """
    if target is not None and (Path(target).exists() or "/" in target):
        return [_of_checkpoint(examine(path)) for path in find_checkpoints(Path(target))]
    nodes = verify_nodes(target)
    if target is not None and not nodes:
        raise ConfigError(
            f"{target!r} is neither a directory nor a job with snapshot processes on this machine. "
            "See: refound status, or give the path of a checkpoint"
        )
    return _of_memory(nodes)


def to_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What `refound verify --json` prints."""
    sound = all(verdict.is_sound for verdict in verdicts)
    return {"schema": 1, "sound": sound, "checked": [dataclasses.asdict(verdict) for verdict in verdicts]}


def to_text(verdicts: Sequence[Verdict]) -> str:
    """A line for each thing checked, and below it what is wrong and what comes next."""
    if not verdicts:
        return (
            "No snapshot process runs on this machine, so there is no memory to check. For a checkpoint, give its path."
        )
    lines = []
    for verdict in verdicts:
        lines.append(f"{'sound  ' if verdict.is_sound else 'DAMAGED'}  {verdict.name}: {verdict.summary}")
        lines += [f"    {line}" for line in verdict.damage[:_SHOWN]]
        if len(verdict.damage) > _SHOWN:
            lines.append(f"    and {len(verdict.damage) - _SHOWN} more")
        if verdict.next:
            lines.append(f"    {verdict.next}")
    return "\n".join(lines)


# --- checkpoints -----------------------------------------------------------------------------------------------


def _of_checkpoint(found: Examination) -> Verdict:
    parity = f"parity (k={found.code[0]}, m={found.code[1]})" if found.code else "no parity"
    summary = f"step {found.step}, {found.files} files, {format_bytes(found.size_bytes)} read, {parity}"
    following = ""
    if found.can_be_repaired:
        following = f"Parity covers it. Mend it: refound repair {found.path}"
    elif not found.is_sound:
        following = f"It cannot be repaired: {found.not_covered}. Restarts use the checkpoint before it"
    details = {
        "path": str(found.path),
        "step": found.step,
        "generation": found.generation,
        "state": found.state,
        "files": found.files,
        "bytes": found.size_bytes,
        "code": list(found.code) if found.code else None,
        "damaged": [dataclasses.asdict(damage) for damage in found.damage],
    }
    return Verdict(
        kind="checkpoint",
        name=str(found.path),
        is_sound=found.is_sound,
        summary=summary if found.state == "committed" else f"{summary}, set aside",
        damage=tuple(map(_damage_text, found.damage)),
        can_be_repaired=found.can_be_repaired,
        next=following,
        details=details,
    )


def _damage_text(damage: FileDamage) -> str:
    return f"{damage.name}: {damage.problem}"


def repair_json(done: Repair) -> dict[str, Any]:
    """What `refound repair --json` prints."""
    return {
        "schema": 1,
        "path": str(done.after.path),
        "sound": done.after.is_sound,
        "damaged": [dataclasses.asdict(damage) for damage in done.before.damage],
        "written": list(done.written),
        "rebuilt_buckets": done.buckets,
    }


def repair_text(done: Repair) -> str:
    """One line a file, and the proof."""
    if done.before.is_sound:
        return (
            f"{done.after.path} is sound: all {format_bytes(done.after.size_bytes)} of it were checked. Nothing to do"
        )
    lines = [f"repaired  {_damage_text(damage)}" for damage in done.before.damage]
    rebuilt, checked = format_bytes(done.buckets * BUCKET_BYTES), format_bytes(done.after.size_bytes)
    lines.append(f"{done.after.path} is sound: {rebuilt} rebuilt from parity, all {checked} checked afterwards")
    return "\n".join(lines)


# --- memory ----------------------------------------------------------------------------------------------------


def _of_memory(nodes: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for node in nodes:
        for snapshot in node["snapshots"]:
            views = [_view(s) for n in nodes if n["job"] == node["job"] for s in n["snapshots"]]
            verdicts.append(_of_snapshot(node, snapshot, [v for v in views if v.id == _view(snapshot).id]))
    return verdicts


def _of_snapshot(node: Mapping[str, Any], snapshot: Mapping[str, Any], views: Sequence[HeldView]) -> Verdict:
    view = _view(snapshot)
    bad = [f"buckets {_some(view.damaged_data)} of its data"] if view.damaged_data else []
    bad += [f"(chunk, bucket) {_some(view.damaged_parity)} of its parity"] if view.damaged_parity else []
    reason = why_not(_all_positions(view, views)) if bad else ""
    following = ""
    if bad and reason:
        following = (
            f"Parity does not cover it ({reason}): the next snapshot replaces it, a restart before goes back further"
        )
    elif bad:
        following = "Parity covers it: it is rebuilt from the other nodes, at the latest at a restart. Nothing to do"
    size = (snapshot["buckets"] + snapshot["parity_buckets"]) * BUCKET_BYTES
    summary = f"step {view.id.step}, {'committed' if snapshot['committed'] else 'not committed yet'}, "
    summary += f"{format_bytes(size)} of data and parity checked"
    if snapshot["replaced"]:
        summary += "; a newer one has replaced it meanwhile, so it is judged no more"
    if snapshot["rebuilding"]:
        summary += f", {snapshot['rebuilding']} buckets are just being rebuilt"
    return Verdict(
        kind="memory",
        name=f"job {node['job']}, {node['node']}",
        is_sound=not bad,
        summary=summary,
        damage=tuple(bad),
        can_be_repaired=bool(bad) and not reason,
        next=following,
        details={"job": node["job"], "node": node["node"], **{k: v for k, v in snapshot.items() if k != "view"}}
        | {"damaged_data": view.damaged_data, "damaged_parity": view.damaged_parity, "bytes": size},
    )


def _view(snapshot: Mapping[str, Any]) -> HeldView:
    raw = dict(snapshot["view"])
    sizes = {int(p): {int(r): size for r, size in ranks.items()} for p, ranks in raw["sizes"].items()}
    damaged = {"damaged_data": tuple(raw["damaged_data"]), "damaged_parity": tuple(map(tuple, raw["damaged_parity"]))}
    return HeldView(**{**raw, "id": SnapshotId(**raw["id"]), "sizes": sizes, **damaged})


def _all_positions(view: HeldView, here: Sequence[HeldView]) -> dict[int, HeldView]:
    """What is known of every node; those on other machines count as sound."""
    sound = dataclasses.replace(view, data=True, parity=True, damaged_data=(), damaged_parity=())
    views = {position: dataclasses.replace(sound, position=position) for position in range(view.nodes)}
    return views | {other.position: other for other in here}


def _some(numbers: Sequence[Any]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
