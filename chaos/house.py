# SPDX-License-Identifier: Apache-2.0
"""The nodes of one schedule's job, and what they stand on: a network that can be cut and storage that can fill up."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from ..ckpt.agreement import NodeView, SnapshotId
from ..ckpt.checkpoints import complete_checkpoints, directory_of
from ..ckpt.conf import PluginConfig
from ..ckpt.errors import SnapshotError
from ..ckpt.folder import shard_name
from ..ckpt.paths import job_dir
from .network import Namespaces
from .node import Node
from .schedule import PARTITIONS, WIRE_ACTIONS, Schedule
from .template import Template

PATIENCE = timedelta(seconds=75)
"""Longer than any time-out that a snapshot process has of its own."""
_DISK_BYTES = 48 << 20
_QUOTA_BYTES = 64 << 10


class House:
    """Makes and remakes nodes. A context manager: leaving it ends every process and frees what it took."""

    def __init__(self, schedule: Schedule, job: str, scratch: Path, template: Template, net: Namespaces | None) -> None:
        self._schedule, self._job, self._scratch, self._template = schedule, job, scratch, template
        partitioned = any(fault.action in PARTITIONS for fault in schedule.faults)
        wired = any(fault.action in WIRE_ACTIONS for fault in schedule.faults)
        self._net = net if partitioned and not wired else None  # a gate stands outside all namespaces
        self._gated = wired or (partitioned and net is None)
        self._named = 0
        self._torn: dict[SnapshotId, set[str]] = {}
        self.root = scratch / "checkpoints" if schedule.disk else None
        self._mounted = False
        self._conf = PluginConfig(
            k=schedule.k,
            m=schedule.m,
            checkpoint_dir=str(self.root or ""),
            checkpoint_every_steps=1 if schedule.disk else 0,
            checkpoint_every_s=0,
        )
        self.nodes: list[Node] = []
        self.strays: list[tuple[int, Node]] = []
        """Nodes that were given up without being dead, and the positions they had."""

    def __enter__(self) -> "House":
        self._scratch.mkdir(parents=True)
        if self.root:
            self.root.mkdir()
            self._mounted = os.geteuid() == 0 and _mount(self.root)
        for _ in range(self._schedule.nodes):
            self.nodes.append(self.new_node())  # one by one: each must see which namespaces are taken
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.everyone():
            node.lose()
        for i in range(len(self._net) if self._net else 0):
            self._net.heal(i) if self._net else None
        shutil.rmtree(job_dir(self._job), ignore_errors=True)
        if self._mounted and self.root:
            subprocess.run(["umount", "-l", str(self.root)], capture_output=True, check=False)

    def everyone(self) -> list[Node]:
        """All nodes whose processes may be there."""
        return [*self.nodes, *(node for _, node in self.strays)]

    def tell_where(self) -> None:
        """Have every snapshot process write into its log where its threads are."""
        for node in self.everyone():
            if node.smp is not None:
                node.smp.signal(signal.SIGUSR1)
        for node in self.everyone():
            with contextlib.suppress(OSError):  # it has died, or hangs itself
                node.status()  # answered after that

    def new_node(self) -> Node:
        """An empty node with a name of its own."""
        number, self._named = self._named, self._named + 1
        name = f"n{number}"
        node = Node(
            name=name,
            job=self._job,
            conf=replace(self._conf, node=name),
            template=self._template,
            logs=self._scratch,
            patience_s=PATIENCE.total_seconds(),
            gated=self._gated,
        )
        if self._net:
            used = {node.namespace_number for node in self.everyone()}
            free = [i for i in range(len(self._net)) if i not in used]
            if not free:
                raise SnapshotError("this schedule needs more network namespaces than there are")
            node.namespace_number, node.namespace = free[0], self._net.path(free[0])
            node.address = self._net.address(free[0])
        return node

    def views_as_seen(self, views: list[NodeView]) -> list[NodeView]:
        """The same with the ports of gates in place of the nodes' own."""
        by_name = {node.name: node for node in self.nodes}
        return [replace(view, port=by_name[view.name].seen_through_the_gate(view)) for view in views]

    # --- network -----------------------------------------------------------------------------------------------

    def cut_off(self, node: Node) -> None:
        """Nothing gets to the node, and nobody is told; with namespaces nothing gets away from it either."""
        if self._net:
            self._net.cut(node.namespace_number)
        elif node.gate:
            node.gate.silence()

    def reach_again(self, node: Node) -> None:
        if self._net:
            self._net.heal(node.namespace_number)
        elif node.gate:
            node.gate.heal()

    # --- storage -----------------------------------------------------------------------------------------------

    def fill_disk(self) -> None:
        """No room for another checkpoint: a full file system, or a quota where one cannot be mounted."""
        assert self.root is not None
        if not self._mounted:
            for node in self.nodes:
                node.limit(resource.RLIMIT_FSIZE, _QUOTA_BYTES)
            return
        with contextlib.suppress(OSError), (self.root / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(1 << 16))
                ballast.flush()

    def empty_disk(self) -> None:
        if self.root:
            (self.root / "ballast").unlink(missing_ok=True)

    def tear(self, rank: int) -> None:
        """The rank's file of the newest checkpoint loses its second half."""
        assert self.root is not None
        if complete := complete_checkpoints(self.root):
            file = directory_of(self.root, complete[-1]) / shard_name(rank)
            os.truncate(file, file.stat().st_size // 2)
            self._torn.setdefault(complete[-1], set()).add(file.name)

    def safe_checkpoint(self) -> SnapshotId | None:
        """The newest checkpoint that must be restorable: complete, and torn no more than its parity covers."""
        complete = complete_checkpoints(self.root) if self.root else []
        sound = [found for found in complete if len(self._torn.get(found, ())) <= self._schedule.m]
        return max(sound, default=None)


def _mount(folder: Path) -> bool:
    """A small file system of its own, so that it can be filled; false if that is not allowed here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES},mode=700", "refound-campaign", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
