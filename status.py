# SPDX-License-Identifier: Apache-2.0
"""What the snapshot processes on this machine hold, as text and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from .ckpt.slots import format_bytes
from .text import columns, duration_text

Node = Mapping[str, Any]
"""One snapshot process, as `refound.ckpt.client.find_nodes` describes it."""

NOTHING_RUNS = (
    "No snapshot process runs on this machine.\n"
    "Start a protected job:  torchrun --standalone --logs-specs=refound --nproc-per-node=2 train.py\n"
    "or see one at work:     refound demo --tiny"
)

_HEAD = (
    "node",
    "pid",
    "workers",
    "phase",
    "snapshot",
    "age",
    "snapshots",
    "memory",
    "last commit",
    "stall",
    "checkpoint",
)


def to_json(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return what `refound status --json` prints."""
    return {"schema": 1, "nodes": [dict(node) for node in nodes]}


def to_text(nodes: Sequence[Node]) -> str:
    """Return a block for each job: a headline, a row for each of its nodes here, and what was restored."""
    if not nodes:
        return NOTHING_RUNS
    jobs: dict[str, list[Node]] = {}
    for node in nodes:
        jobs.setdefault(node["job"], []).append(node)
    return "\n\n".join(_job_text(job, jobs[job]) for job in sorted(jobs))


def _job_text(job: str, nodes: list[Node]) -> str:
    # A node that has just been replaced still tells an older generation; the newest knows the world.
    newest = max(nodes, key=lambda node: node["generation"])
    names = newest["nodes"]
    here = {node["node"] for node in nodes}
    lines = [_headline(job, newest)]
    ordered = sorted(nodes, key=lambda node: str(node["node"]))
    lines += ["  " + line for line in columns([_HEAD, *(_row(node) for node in ordered)])]
    lines += [f"  {note}" for node in ordered for note in _notes(node)]
    elsewhere = [str(name) for name in names if name not in here]
    if elsewhere:
        lines.append(f"  not on this machine: {', '.join(elsewhere)}")
    return "\n".join(lines)


def _headline(job: str, node: Node) -> str:
    if not node["nodes"]:
        return f"job {job}, waiting for its first rendezvous"
    parts = [f"job {job}", f"generation {node['generation']}", _count(len(node["nodes"]), "node")]
    if node["world_size"] is not None:
        parts.append(_count(node["world_size"], "worker"))
    if node["code"]:
        parts.append(f"code ({node['code']['k']}, {node['code']['m']})")
    return ", ".join(parts)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _row(node: Node) -> tuple[str, ...]:
    committed, checkpoint = node["committed"], node["checkpoint"]
    return (
        str(node["node"]),
        str(node["pid"]),
        str(len(node["workers"])),
        str(node["phase"]),
        f"step {committed['step']}" if committed else "none yet",
        duration_text(committed["age_s"]) if committed else "-",
        str(node["snapshots"]),
        format_bytes(node["slot_bytes"] + node["parity_bytes"]),
        f"{node['last_commit_ms']:.0f} ms" if committed else "-",
        _stall(node),
        f"step {checkpoint['step']}" if checkpoint else "none yet",
    )


def _stall(node: Node) -> str:
    """What a snapshot holds training up, and how often one is taken where the job leaves that to us."""
    stall_ms, every = node["stall_ms"], node["every"]
    if stall_ms is None:
        return "-"
    return f"{stall_ms:.1f} ms" + (f", every {every}" if every else "")


def _notes(node: Node) -> list[str]:
    notes = []
    if node["trouble"]:
        notes.append(f"{node['node']}: {node['trouble']}")
    if node["agent_pid"] is None:
        lease = duration_text(node["lease_s"])
        notes.append(
            f"{node['node']}: its torchrun is gone; without one the snapshot stays for {lease}. "
            f"Start the job again, or free the memory: refound stop {node['job']}"
        )
    restored = node["restored"]
    if restored and restored["source"] != "start":
        # Without a time: straight from this node's memory, or not done yet.
        took = f" in {duration_text(restored['seconds'])}" if "seconds" in restored else ""
        notes.append(
            f"{node['node']}: this generation began at step {restored['step']}, from {restored['source']}{took}"
        )
    return notes
