# SPDX-License-Identifier: Apache-2.0
"""The processes of a search: one, or those that torchrun started, which deal the jobs out and wait for each other."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..distill.exclusive import only_one
from .errors import OtherSearchError, StoreError

_PATIENCE = timedelta(hours=12)
"""Of a rank for the slowest one in a stage; what dies is noticed by torchrun, not by this."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this process's torchrun, or this process alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=world_size)
    finally:
        dist.destroy_process_group()


def only_search(out: Path) -> contextlib.AbstractContextManager[None]:
    """Holds the output directory against another search, by a lock that the kernel drops with its holder.

    Raises:
        OtherSearchError: if another one writes there now.
        StoreError: if the directory cannot be written.
    """
    return only_one(out, "search", "--set out=DIRECTORY", taken=OtherSearchError, unwritable=StoreError)
