# SPDX-License-Identifier: Apache-2.0
"""How costs grow: stall, commit, work and memory of live snapshot processes, with state and with nodes.

    python benchmarks/growth.py [--json] [--quick] [--sizes-mb 50 100 …] [--ranks 1 2 4 8] [--rounds 4]

One rank a node, nodes on loopback, mirrored in pairs (k = 1, m = 1; one rank alone has no parity). First the state of
a rank grows on two nodes, then the number of nodes at the largest state for which all have room. What would not fit
into half of the memory that is available is left out, and told. Figures are the best of the rounds; exponents are
least squares of the logarithms: 1 is linear, 0 is flat.

stall: what a rank does for a snapshot, from asking for a slot to saying that it is full, as if nothing of it were
hidden behind training. commit: from the last rank's word until all nodes hold it. work: processor time of one
snapshot process for one snapshot. memory: of one snapshot process, snapshots, parity and all else. Here all nodes
share one machine's cores and loopback, so commit grows with nodes as it does not where each brings its own; work is
what tells whether more nodes mean more to do for each.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _figures import figure, tell
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.client import find_nodes
from refound.ckpt.collect import Collector
from refound.ckpt.conf import PluginConfig
from refound.ckpt.copier import Copier
from refound.ckpt.costs import code_cost
from refound.ckpt.link import Link, Place
from refound.ckpt.shard import make_plan
from refound.ckpt.slots import available_bytes
from refound.ckpt.stripes import choose_groups

MAX_WAIT_MS = 300_000
SIZES_MB = (50, 100, 200, 400, 800, 1600, 4000)
QUICK_SIZES_MB = (25, 50, 100)
RANKS = (1, 2, 4, 8)
NODES_FOR_SIZES = 2
SHARE_OF_MEMORY = 0.5


class State:
    """As much state as a rank of a job would have."""

    def __init__(self, size_mb: float) -> None:
        self.tensors = {"weights": torch.randn(int(size_mb * 1e6 / 4))}

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One size of state on one number of nodes."""

    size_bytes: int
    ranks: int
    stall_s: float
    commit_s: float
    work_s: float
    memory_bytes: float
    """Of one snapshot process, the largest."""
    planned_bytes: float
    """What `refound plan` says of snapshots and parity."""


class Nodes:
    """The snapshot processes of a job without agents or training: this process plays both."""

    def __init__(self, job: str, count: int) -> None:
        k, m = (1, 1) if count > 1 else (1, 0)
        confs = [PluginConfig(node=f"node{i}", k=k, m=m, lease_s=10) for i in range(count)]
        self.job, self.groups = job, choose_groups(count, k, m)
        self.attachments: list[Attachment] = [attach(job, "127.0.0.1", conf) for conf in confs]
        views = [attachment.inventory() for attachment in self.attachments]
        generation = max(attachment.open(views, "") for attachment in self.attachments)
        self.pids = [status["pid"] for status in find_nodes(job)]
        self.links = [
            Link(
                Place(
                    socket=os.fspath(attachment.path),
                    job=job,
                    generation=generation,
                    rank=rank,
                    world_size=count,
                    local_world_size=1,
                )
            )
            for rank, attachment in enumerate(self.attachments)
        ]

    def snapshot(self, step: int, state: State) -> tuple[float, float]:
        """All ranks save `state`, one after another. Seconds: the median rank's stall, and the commit."""
        # Laid out before the clock runs: a job does that once, not every time.
        collected = Collector({"state": state}, rank=0).collect()
        plan, copier = make_plan(collected, 0, 1 << 16), Copier(torch.device("cpu"))
        stalls_s, sums = [], []
        for link in self.links:
            started = time.perf_counter()
            slot = link.begin(step, plan.size_bytes)
            sums.append(copier.fill(plan, collected.leaves, b"", slot, None))
            stalls_s.append(time.perf_counter() - started)
        # Said when all are full: parity, which then begins, would take the cores from those that still copy.
        last_s = 0.0
        for rank, link in enumerate(self.links):
            last_s = time.perf_counter()
            link.complete(step, sums[rank], {})
            stalls_s[rank] += time.perf_counter() - last_s
        for link in self.links:
            if not link.wait_committed(step, MAX_WAIT_MS):
                sys.exit(f"step {step} was not committed within {MAX_WAIT_MS / 1000:.0f} s")
        return median(stalls_s), time.perf_counter() - last_s

    def work_s(self) -> float:
        """Processor time of all snapshot processes so far, ended threads included."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.pids)

    def memory_bytes(self) -> float:
        """Of the largest snapshot process: memfds, and what it has for itself."""
        held = {node["pid"]: node["slot_bytes"] + node["parity_bytes"] for node in find_nodes(self.job)}
        return max(held[pid] + _anonymous_bytes(pid) for pid in self.pids)

    def close(self) -> None:
        for link in self.links:
            link.close()
        for attachment in self.attachments:
            attachment.leave(success=True)


def _anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(size_mb: float, ranks: int, rounds: int) -> Measured:
    """The best of some rounds; the first, which makes the memory, does not count."""
    nodes, state = Nodes(f"benchmark-growth-{size_mb:g}-{ranks}", ranks), State(size_mb)
    stalls_s, commits_s, works_s = [], [], []
    try:
        for step in range(1, rounds + 2):
            before_s = nodes.work_s()
            stall_s, commit_s = nodes.snapshot(step, state)
            if step > 1:
                stalls_s.append(stall_s)
                commits_s.append(commit_s)
                works_s.append((nodes.work_s() - before_s) / ranks)
        size_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        measured = Measured(
            size_bytes=size_bytes,
            ranks=ranks,
            stall_s=min(stalls_s),
            commit_s=min(commits_s),
            work_s=min(works_s),
            memory_bytes=nodes.memory_bytes(),
            planned_bytes=code_cost(nodes.groups, size_bytes).memory_bytes,
        )
    finally:
        nodes.close()
    print(
        f"{size_mb:g} MB a rank, {ranks} rank(s): stall {measured.stall_s:.4f} s, commit {measured.commit_s:.4f} s, "
        f"work {measured.work_s:.4f} s, memory {measured.memory_bytes / 1e6:.0f} MB",
        file=sys.stderr,
        flush=True,
    )
    return measured


def fits(size_mb: float, ranks: int, *, quiet: bool = False) -> bool:
    """Whether a measurement stays within the share of memory that this may take: the state, and two mirrored slots."""
    need_bytes = size_mb * 1e6 * (2 + (4 if ranks > 1 else 2) * ranks)
    if need_bytes <= SHARE_OF_MEMORY * available_bytes():
        return True
    if not quiet:
        takes = f"{size_mb:g} MB on {ranks} rank(s) takes {need_bytes / 1e9:.1f} GB"
        print(f"left out: {takes}", file=sys.stderr, flush=True)
    return False


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares slope of log y over log x. Needs two different x."""
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(log_x) / len(log_x), sum(log_y) / len(log_y)
    across = sum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return across / sum((x - mean_x) ** 2 for x in log_x)


def figures(by_size: list[Measured], by_ranks: list[Measured]) -> list[dict[str, Any]]:
    """Exponents in bytes and in nodes, and memory beside the plan's."""
    rows: list[dict[str, Any]] = []
    if len(by_size) > 1:
        sizes = [each.size_bytes for each in by_size]
        span = f"{sizes[0] / 1e6:.0f} to {sizes[-1] / 1e6:.0f} MB a rank"
        for name in ("stall_s", "commit_s", "work_s", "memory_bytes"):
            value = exponent(sizes, [getattr(each, name) for each in by_size])
            rows.append(figure(f"{_word(name)}: exponent in bytes, {span}", value, "", "<= 1.1", value <= 1.1))
    mirrored = [each for each in by_ranks if each.ranks > 1]
    for name in ("stall_s", "commit_s", "work_s", "memory_bytes"):
        # One rank alone has no parity: only what a rank does itself can be compared with it.
        compared = by_ranks if name == "stall_s" else mirrored
        if len(compared) < 2:
            continue
        ranks = [each.ranks for each in compared]
        value = exponent(ranks, [getattr(each, name) for each in compared])
        shared = name == "commit_s"  # all nodes take turns on this machine's cores
        name_of = f"{_word(name)}: exponent in nodes, {ranks[0]} to {ranks[-1]}"
        rows.append(figure(name_of, value, "", "" if shared else "<= 0.1", None if shared else value <= 0.1))
    largest = by_size[-1] if by_size else by_ranks[-1]
    ratio = largest.memory_bytes / largest.planned_bytes
    rows.append(
        figure(f"memory / refound plan's, {largest.size_bytes / 1e6:.0f} MB", ratio, "x", "<= 1.1", ratio <= 1.1)
    )
    for each in (*by_size, *by_ranks):
        label = f"{each.size_bytes / 1e6:.0f} MB, {each.ranks} node{'s' if each.ranks > 1 else ''}"
        rows += [
            figure(f"{label}: stall", each.stall_s, "s"),
            figure(f"{label}: commit", each.commit_s, "s"),
            figure(f"{label}: work a node", each.work_s, "s"),
            figure(f"{label}: memory a node", each.memory_bytes / 1e6, "MB"),
        ]
    return rows


def _word(name: str) -> str:
    return {"stall_s": "stall", "commit_s": "commit", "work_s": "work a node", "memory_bytes": "memory a node"}[name]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="small states and two rounds, to see that it runs")
    parser.add_argument("--sizes-mb", type=float, nargs="+", help="of a rank's state")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, choices=(1, 2, 4, 6, 8), help="one a node")
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args(arguments)
    sizes_mb = sorted(options.sizes_mb or (QUICK_SIZES_MB if options.quick else SIZES_MB))
    rounds = options.rounds or (2 if options.quick else 4)

    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        os.environ["REFOUND_DIR"] = folder
        by_size = [measure(mb, NODES_FOR_SIZES, rounds) for mb in sizes_mb if fits(mb, NODES_FOR_SIZES)]
        # As large as all ranks together have room for: small states of one rank would stay in the processor's cache.
        ranks = sorted(options.ranks)
        common_mb = [mb for mb in sizes_mb if fits(mb, ranks[-1], quiet=True)][-1:]
        by_ranks = [measure(mb, count, rounds) for mb in common_mb for count in ranks]
    if not by_ranks:
        sys.exit(f"not even {sizes_mb[0]:g} MB a rank fit into {SHARE_OF_MEMORY:.0%} of the available memory")
    rows = figures(by_size, by_ranks)
    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
