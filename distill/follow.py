# SPDX-License-Identifier: Apache-2.0
"""A loss followed down over numbered samples: the loop of everything that trains a part of a model.

What is trained is a module that holds nothing else, so its state, with that of its optimizer and the place in the data,
is all that a snapshot has. Killed, the same run goes on from the last state, bit for bit; see `resume`. Under torchrun
each rank takes its share of every batch, and gradients are averaged.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ..ckpt.position import Position
from .config import digest
from .errors import DivergedError
from .loop import learning_rate
from .ranks import average_gradients
from .resume import guard, state_folder

Loss = Callable[[list[int]], torch.Tensor]
"""The mean loss of the samples of these numbers, or what they add to that of all ranks' samples: see `Follower`."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a loss is followed down."""

    steps: int
    batch: int
    """Samples a step, over all ranks together."""
    lr: float
    warmup: float = 0.1
    """Share of the steps over which the rate rises; then it falls by a cosine to a tenth, or a line to zero."""
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    save_every: int = 20
    """Steps between two states on disk, where torchrun keeps none in memory."""
    seed: int = 0


class TrainedPart(torch.nn.Module):
    """The trained parameters of a bigger model, and the tensors that change with them, under their own names."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], buffers: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in (buffers or {}).items():
            self.register_buffer(name.replace(".", "/"), buffer)


class Follower:
    """One run of the loop.

    run: says which run it is; a state on disk of another one is refused.
    samples: how many there are; they come in a new order every epoch.
    alone: state on disk, though torchrun may be there.
    adds_up: the losses of all ranks sum to that of the batch; else each is a mean of the rank's own samples.

    Raises:
        StateMismatchError: the state there is of another run, or is damaged.
    """

    def __init__(
        self,
        part: TrainedPart,
        loss: Loss,
        course: Course,
        *,
        samples: int,
        out: Path,
        run: str,
        alone: bool = False,
        adds_up: bool = False,
    ) -> None:
        self._part, self._loss, self._course, self._adds_up = part, loss, course, adds_up
        self._optimizer = torch.optim.AdamW(
            part.parameters(), lr=course.lr, betas=course.betas, weight_decay=course.weight_decay
        )
        self._data = Position(samples, batch=course.batch, seed=course.seed)
        self._guard = guard(
            state_folder(out),
            run=digest([run, course]),
            every=course.save_every,
            model=part,
            optimizer=self._optimizer,
            data=self._data,
            alone=alone,
        )

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._guard.step

    def close(self) -> None:
        """The result is written, and nothing is left to be restored."""
        self._guard.close()

    def run(self) -> Iterable[tuple[int, float]]:
        """Yield (steps done, loss) after each one that is left, before its state is taken.

        Raises:
            DivergedError: the loss is no number; the last good state is kept.
        """
        while self.step < self._course.steps:
            for numbers in self._data.follow(self._data.batches):
                loss = self._step(numbers)
                yield self.step + 1, loss
                self._guard.end_step()
                if self.step >= self._course.steps:
                    break

    def _step(self, numbers: list[int]) -> float:
        course = self._course
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(course, self.step, course.steps)
        # Dropout of a step is the same whatever was run before it.
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed((course.seed * 1_000_003 + self.step) * 4096 + rank)
        loss, weight = self._loss(numbers), self._data.weight
        told = loss.detach().clone()
        if self._adds_up and dist.is_initialized():
            dist.all_reduce(told)
            weight = float(dist.get_world_size())  # gradients are averaged below, and these are to be summed
        if not torch.isfinite(told):
            raise DivergedError(
                f"the loss is {told.item()} at step {self.step + 1}; the state before it is kept. Lower lr (it is "
                f"{course.lr})"
            )
        (loss * weight).backward()
        average_gradients(self._part.parameters())
        torch.nn.utils.clip_grad_norm_(self._part.parameters(), course.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return told.item()
