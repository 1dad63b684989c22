# SPDX-License-Identifier: Apache-2.0
"""Parity in live snapshot processes, beside moving the same bytes over the same sockets uncoded.

    python benchmarks/parity.py [--json] [--state-mb 1600] [--nodes 3] [--k 2 --m 1] [--rounds 5]

Starts one snapshot process a node on loopback, fills a slot on each, and times from the last shard's completion to
the commit on all nodes: announcing, pulling, checking, coding, checksumming the parity, agreeing. The uncoded
contender pulls the same data chunks from the same processes by the same requests, checks and codes nothing, and
throws them away (with m > 1 the coded one also hands m - 1 rows on). By turns in one run; the ratio is the median
over rounds.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from statistics import median
from typing import Any

import numpy as np
from _figures import figure, tell
from refound.ckpt.agreement import Decision, SnapshotId, decide
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.conf import PluginConfig
from refound.ckpt.exchange import PIECE_BUCKETS
from refound.ckpt.held import bucket_checksums
from refound.ckpt.link import Link, Place
from refound.ckpt.peers import Peers, read_message
from refound.ckpt.stripes import BUCKET_BYTES, chunk_buckets
from refound.ckpt.wire import generation_key

JOB = "benchmark-parity"
MAX_WAIT = timedelta(minutes=5)


class Nodes:
    """The snapshot processes of a job without agents or training: this process plays both."""

    def __init__(self, count: int, k: int, m: int) -> None:
        confs = [PluginConfig(node=f"node{i}", k=k, m=m, lease_s=10) for i in range(count)]
        self.attachments: list[Attachment] = [attach(JOB, "127.0.0.1", conf) for conf in confs]
        views = [attachment.inventory() for attachment in self.attachments]
        self.decision: Decision = decide(views)
        self.generation = max(attachment.open(views, "") for attachment in self.attachments)
        self.key = generation_key("", self.decision.nodes[0].nonce)
        self.links = [self._link(rank, attachment, count) for rank, attachment in enumerate(self.attachments)]

    def _link(self, rank: int, attachment: Attachment, count: int) -> Link:
        place = Place(
            socket=os.fspath(attachment.path),
            job=JOB,
            generation=self.generation,
            rank=rank,
            world_size=count,
            local_world_size=1,
        )
        return Link(place)

    def snapshot(self, step: int, size_bytes: int, rng: np.random.Generator) -> float:
        """Fill and complete a snapshot on all nodes; seconds from the last completion to the commit everywhere."""
        sums = []
        for link in self.links:
            slot = link.begin(step, size_bytes)
            slot.array.view(np.uint64)[:] = rng.integers(1 << 63, dtype=np.uint64)
            slot.array[::4096] += rng.integers(256, size=len(slot.array[::4096]), dtype=np.uint8)
            sums.append(bucket_checksums(slot.array))
        for link, checksums in zip(self.links[:-1], sums[:-1], strict=True):
            link.complete(step, checksums, {})
        started = time.perf_counter()
        self.links[-1].complete(step, sums[-1], {})
        for link in self.links:
            if not link.wait_committed(step, int(MAX_WAIT.total_seconds() * 1000)):
                sys.exit(f"step {step} was not committed within {MAX_WAIT}")
        return time.perf_counter() - started

    def close(self) -> None:
        for link in self.links:
            link.close()
        for attachment in self.attachments:
            attachment.leave(success=True)


class _NoKeeper:
    """The pullers belong to no snapshot process, so no generation ends for them."""

    def check_open(self, generation: int) -> None:
        return None


def pull(decision: Decision, key: bytes, position: int, buckets: int, steps: Any, done: Any) -> None:
    """Child process: for every step, pull what the parity of `position` is made of, and throw it away."""
    os.nice(5)  # as the snapshot processes are
    group = next(g for g in decision.groups if position in g.members)
    chunk = chunk_buckets([buckets], group.k)
    peers = Peers(_NoKeeper(), decision, key)  # type: ignore[arg-type]
    buffer = np.empty(PIECE_BUCKETS * BUCKET_BYTES, np.uint8)
    while (step := steps.get()) is not None:
        snapshot = SnapshotId(generation=decision.generation, step=step)
        for stripe in group.parity_stripes(position - group.first):
            if group.first + stripe.parity[0] != position:
                continue  # another node encodes it
            asks = []
            for start in range(0, chunk, PIECE_BUCKETS):
                for member in stripe.data:
                    first = group.data_stripes(member).index(stripe) * chunk + start
                    count = min(PIECE_BUCKETS, chunk - start)
                    asks.append((group.first + member, read_message(snapshot, "data", 0, first, count)))
            ahead = 2 * len(stripe.data)
            for ask in asks[:ahead]:
                peers.post(*ask)
            for number, (target, _) in enumerate(asks):
                peers.collect(target, buffer.data)
                if number + ahead < len(asks):
                    peers.post(*asks[number + ahead])
        done.put(position)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender, a figure a round."""
    size_bytes = int(options.state_mb * 1e6 / options.nodes) // BUCKET_BYTES * BUCKET_BYTES
    rng = np.random.default_rng(0)
    nodes = Nodes(options.nodes, options.k, options.m)
    context = multiprocessing.get_context("spawn")
    queues, done = [context.Queue() for _ in range(options.nodes)], context.Queue()
    arguments = (nodes.decision, nodes.key)
    pullers = [
        context.Process(target=pull, args=(*arguments, i, size_bytes // BUCKET_BYTES, queues[i], done), daemon=True)
        for i in range(options.nodes)
    ]
    for puller in pullers:
        puller.start()
    seconds: dict[str, list[float]] = {"coded": [], "uncoded": []}
    try:
        for step in range(1, options.rounds + 2):
            coded_s = nodes.snapshot(step, size_bytes, rng)
            started = time.perf_counter()
            for steps in queues:
                steps.put(step)
            for _ in pullers:
                done.get(timeout=MAX_WAIT.total_seconds())
            uncoded_s = time.perf_counter() - started
            if step > 1:  # the first touches new memory and makes the connections
                seconds["coded"].append(coded_s)
                seconds["uncoded"].append(uncoded_s)
                print(f"round {step - 1}: {coded_s:.3f} s coded, {uncoded_s:.3f} s uncoded", file=sys.stderr)
    finally:
        for steps in queues:
            steps.put(None)
        nodes.close()
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--state-mb", type=float, default=1600, help="of all nodes together, MB")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--m", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        os.environ["REFOUND_DIR"] = folder
        seconds = measure(options)
    ratio = median(c / u for c, u in zip(seconds["coded"], seconds["uncoded"], strict=True))
    name = f"parity of {options.state_mb:.0f} MB over {options.nodes} nodes (k={options.k}, m={options.m})"
    rows = [
        figure(name, median(seconds["coded"]), "s"),
        figure("the same bytes uncoded", median(seconds["uncoded"]), "s"),
        figure("coded / uncoded", ratio, "x", "< 1.5", ratio < 1.5),
    ]
    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
