# SPDX-License-Identifier: Apache-2.0
"""A real snapshot process of one node, with this process as its agent and as its one worker."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.client import stop_job
from refound.ckpt.conf import PluginConfig
from refound.ckpt.copier import SlotMemory
from refound.ckpt.held import bucket_checksums
from refound.ckpt.link import Link, Place

_jobs = itertools.count()


class Alone:
    """The job: `agent` is attached, `link` is the worker's connection of the newest generation."""

    def __init__(self, **conf: object) -> None:
        self.job = f"alone-{next(_jobs)}"
        self.agent: Attachment = attach(self.job, "127.0.0.1", PluginConfig(node="n0", **conf))  # pyright: ignore[reportArgumentType]
        self.link: Link
        self.slot: SlotMemory
        self.path: Path = self.agent.path

    def open(self) -> None:
        """A generation, and its worker. Ending one kills its workers, so this process may be in one only."""
        generation = self.agent.open([self.agent.inventory()], "")
        place = Place(
            socket=str(self.path), job=self.job, generation=generation, rank=0, world_size=1, local_world_size=1
        )
        self.link = Link(place)

    def snapshot(self, step: int, data: np.ndarray) -> None:
        """Take a snapshot and wait until it is committed."""
        self.slot = self.link.begin(step, len(data))
        self.slot.array[:] = data
        self.link.complete(step, bucket_checksums(data), {})
        assert self.link.wait_committed(step, int(timedelta(seconds=60).total_seconds() * 1000))


@contextmanager
def alone(**conf: object) -> Iterator[Alone]:
    job = Alone(**conf)
    try:
        job.open()
        yield job
    finally:
        job.link.close()
        stop_job(job.job)
        # Its end of the socket closes when it has cleaned up.
        job.agent._client.sock.settimeout(60)
        job.agent._client.sock.recv(1)
        job.agent._client.close()
