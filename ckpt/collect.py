# SPDX-License-Identifier: Apache-2.0
"""Which bytes make up a rank's state: the leaves of everything that is protected, and who else holds the same ones.

A leaf is one dense local tensor. Parameters and optimizer state are *constant* between two optimizer steps and may be
copied beside the next forward and backward; everything else (buffers, RNG, positions) is copied at once. A leaf's
*replicas* are the ranks that hold the same bytes by construction (DDP's process group; the replicated dimensions of a
DTensor's mesh): they share the work, a part each.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UnsupportedStateError
from .tree import Json, encode

RNG = "$rng"
Role = Callable[[str], tuple[bool, torch.nn.Parameter | None]]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One local tensor of the state."""

    path: str
    tensor: torch.Tensor
    """Dense, this rank's part."""
    constant: bool
    replicas: tuple[int, ...]
    """Global ranks that hold the same bytes, this one included."""
    spec: dict[str, Any] | None
    """For a DTensor: global shape, stride, placements and mesh, as data."""

    @property
    def size_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(kw_only=True)
class State:
    """Everything of this rank at one moment: a description and its leaves."""

    objects: dict[str, Json] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)


class Collector:
    """Collects the state of named objects. Made once; `collect` is cheap enough to run at every snapshot."""

    def __init__(self, objects: dict[str, Any], *, rank: int, replicas: bool = True) -> None:
        self._objects, self._rank, self._use_replicas = objects, rank, replicas
        self._replicas_of: dict[int, tuple[int, ...]] = {}
        # Remembered here and not by functools: a mesh that outlives its process group can crash the exit of gloo.
        self._layouts: dict[tuple[Any, ...], tuple[dict[str, Any], tuple[int, ...]]] = {}
        for value in objects.values():
            if isinstance(value, DistributedDataParallel) and replicas:
                ranks = tuple(sorted(dist.get_process_group_ranks(value.process_group)))
                self._replicas_of |= {id(parameter): ranks for parameter in value.parameters()}

    def collect(self) -> State:
        """The state now. Raises UnsupportedStateError for what has no form as data."""
        state = State()
        known: dict[tuple[Any, ...], int] = {}
        for name, value in self._objects.items():
            role = _roles(value, name)
            state.objects[name] = encode(
                value.state_dict(), name, lambda path, t, r=role: self._leaf(state, known, r, path, t)
            )
        state.objects[RNG] = encode(random_state(), RNG, lambda path, t: self._leaf(state, known, _no_role, path, t))
        return state

    def _leaf(
        self, state: State, known: dict[tuple[Any, ...], int], role: Role, path: str, tensor: torch.Tensor
    ) -> int:
        local = _local(tensor)
        _check_dense(path, local)
        lazily = (local.is_conj(), local.is_neg())  # such a view differs from its base in nothing else
        key = (local.data_ptr(), local.dtype, local.shape, local.stride(), local.device, lazily)
        if local.numel() and key in known:
            return known[key]  # tied weights are one leaf
        constant, parameter = role(path)
        if isinstance(tensor, DTensor):
            spec, replicas = self._layout(tensor)
        else:
            spec, replicas = None, self._replicas_of.get(id(parameter), (self._rank,))
        state.leaves.append(Leaf(path=path, tensor=local, constant=constant, replicas=replicas, spec=spec))
        known[key] = len(state.leaves) - 1
        return known[key]


    def _layout(self, tensor: DTensor) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The spec of a DTensor, one object for all that share it, and the ranks that hold the same bytes of it."""
        key = (tensor.shape, tensor.stride(), tuple(tensor.placements), tensor.device_mesh)
        if key not in self._layouts:
            replicas = _mesh_replicas(tensor, self._rank) if self._use_replicas else (self._rank,)
            self._layouts[key] = spec_of(tensor), replicas
        return self._layouts[key]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def _check_dense(path: str, tensor: torch.Tensor) -> None:
    """Raises UnsupportedStateError for tensors that are more, or less, than one block of plain numbers."""
    kind = None
    if tensor.is_meta:
        kind = "meta"
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    elif tensor.is_quantized:
        kind = "quantized"
    elif is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__qualname__
    if kind:
        raise UnsupportedStateError(
            f"{path} is a {kind} tensor, which is not one dense block of numbers. Leave it out of state_dict(), or "
            "put the dense tensors it is made of there"
        )


def spec_of(tensor: DTensor) -> dict[str, Any]:
    """What makes this tensor a part of a larger one, as data."""
    placements, mesh = [str(placement) for placement in tensor.placements], tensor.device_mesh.mesh.tolist()
    return {"shape": list(tensor.shape), "stride": list(tensor.stride()), "placements": placements, "mesh": mesh}


def _roles(owner: Any, name: str) -> Role:
    """A function that says of a path of `owner` whether its tensor is constant, and whose parameter's it is."""
    if isinstance(owner, torch.nn.Module):
        by_path = {f"{name}/{key}": parameter for key, parameter in owner.named_parameters(remove_duplicate=False)}
        return lambda path: (path in by_path, by_path.get(path))
    if isinstance(owner, torch.optim.Optimizer):
        ordered = [parameter for group in owner.param_groups for parameter in group["params"]]
        of_number = {str(number): parameter for number, parameter in enumerate(ordered)}
        start = f"{name}/state/"

        def role(path: str) -> tuple[bool, torch.nn.Parameter | None]:
            if not path.startswith(start):
                return False, None
            return True, of_number.get(path[len(start) :].split("/")[0])

        return role
    return _no_role


def _no_role(path: str) -> tuple[bool, torch.nn.Parameter | None]:
    return False, None


def _mesh_replicas(tensor: DTensor, rank: int) -> tuple[int, ...]:
    """The ranks of the tensor's mesh that differ from this one in replicated dimensions only."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return (rank,)
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else coordinate[dim]
        for dim, placement in enumerate(tensor.placements)
    )
    return tuple(sorted(int(r) for r in tensor.device_mesh.mesh[index].flatten()))


def random_state() -> dict[str, Any]:
    """State of the random generators of python, numpy, torch and the current device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["device"] = torch.get_device_module().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the random generators back to `random_state()`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "device" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["device"])
