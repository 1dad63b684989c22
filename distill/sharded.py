# SPDX-License-Identifier: Apache-2.0
"""FSDP2: teacher and child in shards, a layer whole at a time, by torch's own `fully_shard`.

Each decoder layer is a unit; embeddings, last norm and output matrix are the root's, gathered from the beginning of a
pass to the end of its backward, so the chunked loss multiplies by a whole output matrix. The teacher is in shards too:
it is the larger of both, and whole on every rank it would be what memory is needed for. Its layers come together as
they were, so what it says is the same bits as of a whole teacher.

Not through accelerate, which runs plain DDP on the CPU when it is told to use FSDP, and says nothing.
"""

import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..export.directory import ModelDirectory
from .models import PASS, Positions, complete, skeleton
from .parallel import Replicated
from .ranks import is_first


class Sharded(Replicated):
    """Models in shards over all ranks."""

    cut = True

    def __init__(self) -> None:
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def load(self, source: ModelDirectory, *, trained: bool) -> Any:
        """Read layer by layer: beside its shards a rank never holds more than one layer whole, and the embeddings."""
        decoder = source.decoder
        model = skeleton(decoder, dtype=torch.float32).requires_grad_(trained)
        names = list(decoder.tensors())
        for number, layer in enumerate(model.model.layers):
            start = f"model.layers.{number}."
            own = [name for name in names if name.startswith(start)]
            _fill(layer, source, own, start)
            fully_shard(layer, mesh=self._mesh)
            names = [name for name in names if name not in own]
        weights = {name: tensor.float() for name, tensor in source.weights(names)}
        complete(model, decoder, weights)
        model.eval()
        setattr(model, PASS, types.MethodType(_pass, model))
        fully_shard(model, mesh=self._mesh)
        register_fsdp_forward_method(model, PASS)
        return model

    def _average(self, trained: list[torch.nn.Parameter]) -> None:
        """Done in the backward pass, which leaves each rank its part of the mean."""

    def settle(self, model: Any) -> None:
        model.reshard()

    def gather(self, model: Any, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """One after the other, so that beside what it keeps, in `dtype`, the first rank holds one whole at a time."""
        state, found = model.state_dict(), dict[str, torch.Tensor]()
        for name in names:
            whole = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
            if is_first():
                found[name] = whole.to(dtype)
        return found


def _fill(layer: torch.nn.Module, source: ModelDirectory, names: list[str], start: str) -> None:
    weights = {name.removeprefix(start): tensor.float() for name, tensor in source.weights(names)}
    layer.load_state_dict(weights, assign=True)


def _pass(model: Any, ids: torch.Tensor, positions: Positions) -> list[torch.Tensor]:
    """`states_of` by calls of whole layers, whose hooks gather them and let them go."""
    states = [model.model.embed_tokens(ids)]
    for layer in model.model.layers:
        states.append(layer(states[-1], attention_mask=None, position_embeddings=positions))
    return states
