# SPDX-License-Identifier: Apache-2.0
"""The state of several ranks on disk, each rank its part: for trainings in shards, where torchrun keeps none in memory.

Two states of each rank are kept, of which the newer may be one that others have not written yet. A step needs all
ranks, so no rank is ever more than one state ahead, and there is always one that all have. Whoever starts agrees on it.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .errors import StateMismatchError
from .proven import read_facts
from .resume import STATE, DiskGuard


class ShardedDiskGuard(DiskGuard):
    """The state of this rank in `folder`/rank-R-of-N/."""

    def __init__(self, folder: Path, *, every: int, **rest: Any) -> None:
        """Raises StateMismatchError if a state is damaged, or of another run, or of another number of ranks."""
        self._folder = folder
        world = dist.get_world_size()
        others = [*folder.glob(STATE), *(one for one in folder.glob("rank-*") if not one.name.endswith(f"-of-{world}"))]
        if others:
            raise StateMismatchError(
                f"{others[0]} is the state of a run on another number of ranks, or that shares its models otherwise, "
                f"and this one has {world}. Start it as it was, or delete {folder} to start anew"
            )
        super().__init__(folder / f"rank-{dist.get_rank()}-of-{world}", every=every, **rest)

    def _place(self) -> Path:
        return self._slots[self.step // self._every % 2]

    @property
    def _slots(self) -> list[Path]:
        return [self._own / f"state-{number}.safetensors" for number in (0, 1)]

    def _newest(self) -> Path | None:
        """Of the newest step that all ranks have."""
        own = torch.tensor([read_facts(slot)["step"] if slot.is_file() else -1 for slot in self._slots])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        common = set.intersection(*(set(one.tolist()) for one in every)) - {-1}
        return self._slots[own.tolist().index(max(common))] if common else None

    def close(self) -> None:
        shutil.rmtree(self._own, ignore_errors=True)
        with contextlib.suppress(OSError):  # that of another rank is still there
            self._folder.rmdir()

    def _whole(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """A part of an optimizer's state, as what it is a part of."""
        parameter = [one for group in self._optimizer.param_groups for one in group["params"]][number]
        if not isinstance(parameter, DTensor) or value.shape != parameter.to_local().shape:
            return value
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(value, mesh, placements, shape=parameter.shape, stride=parameter.stride())
