# SPDX-License-Identifier: Apache-2.0
"""The data's place in an epoch, counted over all ranks together, so that it means the same for any number of them.

    position = refound.Position(len(dataset), batch=48, seed=1)
    loader = DataLoader(dataset, batch_sampler=position.batches, num_workers=4)
    job = refound.protect(model=model, optimizer=optimizer, data=position)
    while position.epoch < epochs:
        for samples in position.follow(loader):
            loss = loss_of(model, samples) * position.weight
            ...
            job.end_step()

An epoch is one order of all samples, drawn from (seed, epoch). A step takes the next `batch` of them and deals them
over the present ranks in neighbouring shares. So each sample comes exactly once an epoch whatever the ranks were, and
steps are the same sets of samples for any number of ranks.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError

T = TypeVar("T")
_SAME = ("samples", "seed", "shuffle", "drop_last")


class Position:
    """Which samples have been trained on. Its state is the same on all ranks.

    samples: samples in the dataset.
    batch: samples that all ranks together take in a step; at least as many as there are ranks.
    drop_last: leave out what does not fill the last batch of an epoch, instead of a smaller last step.
    rank, world_size: of the process group, if not given.

    Raises ConfigError if these do not fit together.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        together = dist.is_available() and dist.is_initialized()
        self._rank = rank if rank is not None else dist.get_rank() if together else 0
        self._world_size = world_size if world_size is not None else dist.get_world_size() if together else 1
        self._samples, self._batch, self._seed = samples, batch, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self.epoch = 0
        """Epochs that are over."""
        self.done = 0
        """Samples of the present epoch that have been trained on, by all ranks together."""
        self.weight = 1.0
        """For the loss of the batch at hand, a mean over this rank's share: with it, gradients averaged over the ranks
        are those of the mean over the whole batch, though shares are uneven."""
        if not 0 <= self._rank < self._world_size:
            raise ConfigError(f"rank {self._rank} is none of {self._world_size} ranks")
        if batch < self._world_size:
            raise ConfigError(f"a batch of {batch} samples leaves some of {self._world_size} ranks without any")
        rest = self._usable % batch
        if samples < 1 or not self._usable or 0 < rest < self._world_size:
            raise ConfigError(
                f"{samples} samples in batches of {batch} leave a last batch of {rest}, which {self._world_size} ranks "
                "cannot share: choose another batch, or drop_last=True"
            )

    @property
    def _usable(self) -> int:
        return self._samples - self._samples % self._batch if self._drop_last else self._samples

    @property
    def batches(self) -> "Batches":
        """The batch sampler of a DataLoader: this rank's shares of what is left of the epoch. However far ahead the
        loader's workers read, only `follow` moves the position."""
        return Batches(self)

    def follow(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield a loader's batches (or `self.batches`) and move on with each: what is yielded counts as trained on
        when the step ends. Afterwards the next epoch begins."""
        for found in batches:
            size = min(self._batch, self._usable - self.done)
            self.done += size
            low, high = self._share(size)
            self.weight = (high - low) * self._world_size / size
            yield found
        self.epoch, self.done = self.epoch + 1, 0

    def _share(self, size: int) -> tuple[int, int]:
        return size * self._rank // self._world_size, size * (self._rank + 1) // self._world_size

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(self._samples))
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.epoch) % (1 << 63))
        return torch.randperm(self._samples, generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "done": self.done} | {name: getattr(self, f"_{name}") for name in _SAME}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError if the state is of other data or another order. The batch may be another."""
        for name in _SAME:
            if state[name] != getattr(self, f"_{name}"):
                raise ConfigError(
                    f"the position was one of {name}={state[name]} and now is {getattr(self, f'_{name}')}"
                )
        self.epoch, self.done = state["epoch"], state["done"]


class Batches:
    """This rank's shares of the batches that are left of the epoch, as lists of sample numbers."""

    def __init__(self, position: Position) -> None:
        self._position = position

    def __iter__(self) -> Iterator[list[int]]:
        position = self._position
        order, done = position._order(), position.done
        while done < position._usable:
            size = min(position._batch, position._usable - done)
            low, high = position._share(size)
            yield order[done + low : done + high]
            done += size

    def __len__(self) -> int:
        return -(-(self._position._usable - self._position.done) // self._position._batch)
