# SPDX-License-Identifier: Apache-2.0
"""Experts of every layer shared out over ranks, as DTensors, while each rank reads text of its own.

torch 2.13 has no public style for experts in `torch.distributed.tensor.parallel`, so a layer's expert weights, stacked
as `module.MoeFFN` has them, are DTensors sharded by expert. Hidden states and gate weights of all ranks' tokens are
gathered, each rank computes its experts for all of them, and what these add is summed and scattered back: DTensor's
`redistribute` does it, and its gradients. Gates, shared channels, norms and attention are whole on every rank, and
their gradients are averaged. A step is that of one process with all ranks' tokens in one batch, up to the order of
sums (`tests/nas/moe/test_parallel.py`).

What it saves is memory: weights, gradients and moments of experts are on one rank each. Every rank needs the same
number of tokens in a step. Tokens are gathered whole, not sent to the experts that they take, so with many ranks the
traffic is more than that of an all-to-all. DTensors are what `protect` takes snapshots of; `refound carve` does not
train so yet.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional

from .errors import CarveUsageError
from .gates import balance_loss, expert_weights
from .module import Mixture, MoeFFN


class ParallelExperts(nn.Module):
    """In the place of a `MoeFFN`; takes this rank's tokens, and gives what the whole mixture makes of them."""

    def __init__(self, whole: MoeFFN, mesh: DeviceMesh) -> None:
        """Collective over `mesh`, of one dimension. The weights are those of its first rank."""
        super().__init__()
        ranks = mesh.size()
        if mesh.ndim != 1 or whole.experts % ranks:
            near = [count for count in range(1, whole.experts + 1) if whole.experts % count == 0]
            raise CarveUsageError(
                f"{whole.experts} experts are not shared out over {ranks} ranks of a mesh of {mesh.ndim} dimensions; "
                f"use one dimension of {', '.join(map(str, near))} ranks"
            )
        self.mesh, self.top_k, self.normalized, self.experts = mesh, whole.top_k, whole.normalized, whole.experts
        self.width, self.shared = whole.width, whole.shared
        first, trained = whole.shared, whole.gate.requires_grad
        own = partial(nn.Parameter, requires_grad=trained)
        # contiguous: a slice by columns would keep the whole matrix alive
        self.gate = own(distribute_tensor(whole.gate.data[first:].contiguous(), mesh, [Shard(0)]))
        self.up = own(distribute_tensor(whole.up.data[first:].contiguous(), mesh, [Shard(0)]))
        self.down = own(distribute_tensor(whole.down.data[:, first:].contiguous(), mesh, [Shard(1)]))
        self.shared_rows_gate = own(whole.gate.data[:first].clone())
        self.shared_rows_up = own(whole.up.data[:first].clone())
        self.shared_rows_down = own(whole.down.data[:, :first].clone())
        self.router = nn.Parameter(whole.router.data.clone(), requires_grad=whole.router.requires_grad)
        gate = whole.shared_gate
        self.shared_gate = None if gate is None else nn.Parameter(gate.data.clone(), requires_grad=gate.requires_grad)
        self.balance: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (tokens or batch, …, hidden size), as many on every rank. Collective."""
        logits = hidden @ self.router.T
        weights, chosen = expert_weights(logits, self.top_k, normalized=self.normalized)
        if torch.is_grad_enabled():
            self.balance = balance_loss(torch.softmax(logits.float(), -1), chosen)
        tokens = self._everywhere(hidden.flatten(0, -2))
        each = self._everywhere(weights.to(hidden).repeat_interleave(self.width, -1).flatten(0, -2))
        inner = functional.silu(tokens @ self.gate.T) * (tokens @ self.up.T)
        added: Any = (inner * each) @ self.down.T
        assert isinstance(added.placements[0], Partial)
        found = added.redistribute(placements=[Shard(0)]).to_local().unflatten(0, hidden.shape[:-1])
        if self.shared and self.shared_gate is not None:
            always = torch.sigmoid(hidden @ self.shared_gate.T)
            own = functional.silu(hidden @ self.shared_rows_gate.T) * (hidden @ self.shared_rows_up.T)
            found = found + (own * always) @ self.shared_rows_down.T
        return found

    def _everywhere(self, local: torch.Tensor) -> DTensor:
        """The rows of all ranks, on each of them."""
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])

    def mixture(self) -> Mixture:
        """The whole mixture, on every rank. Collective."""
        gate, up, down = (getattr(self, name).data.full_tensor() for name in ("gate", "up", "down"))
        return Mixture(
            router=self.router.data,
            gate=torch.cat([self.shared_rows_gate.data, gate]),
            up=torch.cat([self.shared_rows_up.data, up]),
            down=torch.cat([self.shared_rows_down.data, down], 1),
            shared_gate=None if self.shared_gate is None else self.shared_gate.data,
        )


def share_out(model: Any, mesh: DeviceMesh) -> Any:
    """A carved model (`module.build_carved`) with the experts of each of its layers over the ranks of `mesh`.

    Raises:
        CarveUsageError: if the experts of a layer do not divide by the ranks.
    """
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoeFFN):
            layer.mlp = ParallelExperts(layer.mlp, mesh)
    return model


def join_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """After `backward` of each rank's mean loss: gradients of the mean over all ranks, in place. Collective.

    What an expert learns was summed already where its weights are; all else is averaged.
    """
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad, group=mesh.get_group())
        parameter.grad /= mesh.size()
