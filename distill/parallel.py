# SPDX-License-Identifier: Apache-2.0
"""How the ranks of one training share its models and its steps. Imports nothing heavy.

`ddp`: each rank holds teacher and child whole, and gradients are averaged. `fsdp2`: each holds its part of both, see
`sharded`. A training says which by name; on one rank there is nothing to share.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .errors import DistillUsageError

if TYPE_CHECKING:
    import torch

    from ..export.directory import ModelDirectory

PARALLELS = ("ddp", "fsdp2")
CLIP = 1.0
"""The norm of all gradients together is at most this."""


def parallel_problem(name: str, known: Sequence[str] = PARALLELS) -> str:
    """Why there is nothing of that name; empty if there is."""
    if name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"parallel is {name!r}, none of {', '.join(known)}{hint}"


class Parallel(Protocol):
    """What differs between the ways. One is made for each training."""

    cut: bool
    """Whether a rank's state is a part of the whole."""

    def load(self, source: "ModelDirectory", *, trained: bool) -> Any:
        """The model in `source`, as `models.load` has it, or this rank's part of it; with gradients if trained."""
        ...

    def begin(
        self, child: Any, optimizer: "torch.optim.Optimizer"
    ) -> "tuple[torch.nn.Module, torch.optim.Optimizer | None]":
        """What snapshots are to hold of both."""
        ...

    def loss(self, compute: "Callable[[], torch.Tensor]") -> "torch.Tensor":
        """What `compute` says of this rank's share of a batch."""
        ...

    def step(
        self, loss: "torch.Tensor", optimizer: "torch.optim.Optimizer", trained: "list[torch.nn.Parameter]"
    ) -> None:
        """One step down the mean of all ranks' losses, its gradient clipped; afterwards there are no gradients."""
        ...

    def settle(self, model: Any) -> None:
        """After a pass without gradients: its parameters are again what the optimizer and snapshots know."""
        ...

    def gather(self, model: Any, names: Iterable[str], dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
        """These weights, whole, on the first rank; nothing on the others. All ranks call it."""
        ...


class Replicated:
    """Whole models on every rank, which averages all gradients."""

    cut = False

    def load(self, source: "ModelDirectory", *, trained: bool) -> Any:
        from .models import load

        return load(source).requires_grad_(trained)

    def begin(
        self, child: Any, optimizer: "torch.optim.Optimizer"
    ) -> "tuple[torch.nn.Module, torch.optim.Optimizer | None]":
        return child, optimizer

    def loss(self, compute: "Callable[[], torch.Tensor]") -> "torch.Tensor":
        return compute()

    def step(
        self, loss: "torch.Tensor", optimizer: "torch.optim.Optimizer", trained: "list[torch.nn.Parameter]"
    ) -> None:
        import torch

        loss.backward()
        self._average(trained)
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def _average(self, trained: "list[torch.nn.Parameter]") -> None:
        from .ranks import average_gradients

        average_gradients(trained)

    def settle(self, model: Any) -> None:
        pass

    def gather(self, model: Any, names: Iterable[str], dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
        from .ranks import is_first

        state = model.state_dict()
        return {name: state[name].to(dtype) for name in names} if is_first() else {}


def find_parallel(name: str) -> Parallel:
    """The way called `name`, for the ranks that there are.

    Raises:
        DistillUsageError: there is none of that name, or it needs what is not here.
    """
    if problem := parallel_problem(name):
        raise DistillUsageError(problem)
    from .ranks import world_size

    if name == "ddp" or world_size() == 1:
        return Replicated()
    from .sharded import Sharded

    return Sharded()
