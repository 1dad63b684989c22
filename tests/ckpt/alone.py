# SPDX-License-Identifier: Apache-2.0
"""Real snapshot processes, one or a few, with this process as the agent of each and as its one worker."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from refound.ckpt.agreement import NodeView
from refound.ckpt.attach import Attachment, _started, attach
from refound.ckpt.client import stop_job
from refound.ckpt.conf import PluginConfig
from refound.ckpt.copier import SlotMemory
from refound.ckpt.held import bucket_checksums
from refound.ckpt.link import Link, Place

_jobs = itertools.count()


def opened(job: str, agents: Sequence[Attachment], views: list[NodeView] | None = None) -> list[Place]:
    """Open a generation: the places of one rank on each node."""
    views = views or [agent.inventory() for agent in agents]
    generation = max(agent.open(views, "") for agent in agents)
    return [
        Place(
            socket=os.fspath(agent.path),
            job=job,
            generation=generation,
            rank=rank,
            world_size=len(agents),
            local_world_size=1,
        )
        for rank, agent in enumerate(agents)
    ]


class Alone:
    """A job of `nodes` nodes. `slot` is the memory in which the first of them has its newest snapshot."""

    def __init__(self, nodes: int = 1, **conf: Any) -> None:
        self.job = f"alone-{os.getpid()}-{next(_jobs)}"
        self.agents: list[Attachment] = [
            attach(self.job, "127.0.0.1", PluginConfig(node=f"n{i}", **conf)) for i in range(nodes)
        ]
        self.links: list[Link] = []
        self.views: list[NodeView] = []
        self.slot: SlotMemory
        self.path: Path = self.agents[0].path

    def open(self) -> None:
        """The one generation, with its workers: ending it would kill them, and they are this process."""
        self.views = [agent.inventory() for agent in self.agents]
        self.links += [Link(place) for place in opened(self.job, self.agents, self.views)]

    def snapshot(self, step: int, data: np.ndarray) -> None:
        """All ranks save the same bytes; waits until that is committed."""
        for rank, link in enumerate(self.links):
            slot = link.begin(step, len(data))
            slot.array[:] = data
            link.complete(step, bucket_checksums(data), {})
            self.slot = slot if rank == 0 else self.slot
        for link in self.links:
            assert link.wait_committed(step, int(timedelta(seconds=60).total_seconds() * 1000))

    def end(self) -> None:
        """Free all memory; returns when the processes have cleaned up."""
        for link in self.links:
            link.close()
        stop_job(self.job)
        for agent in self.agents:
            client = agent._client
            client.sock.settimeout(60)
            client.sock.recv(1)  # its end of the socket closes then
            client.close()
            for process in _started:
                if process.pid == client.pid:
                    process.wait(60)


@contextmanager
def alone(nodes: int = 1, **conf: Any) -> Iterator[Alone]:
    job = Alone(nodes, **conf)
    try:
        job.open()
        yield job
    finally:
        job.end()
