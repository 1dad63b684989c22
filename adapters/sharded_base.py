# SPDX-License-Identifier: Apache-2.0
"""A base in shards while something is trained on it (FSDP2), for bases that do not fit on each rank.

Only what is frozen is cut; what is trained is whole on every rank, is averaged and goes into snapshots as without
shards. A layer comes together as it was, so a run in shards ends with the very bits of one that is not.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .method import Attached
from .sites import blocks_of


def shard_base(attached: Attached) -> None:
    """Cut the base below `attached` over all ranks, a decoder layer a unit. It stays so: `recast` cannot be had after.

    Not promised: less memory while it is loaded, which every rank does whole.
    """
    mesh, trained = init_device_mesh("cpu", (dist.get_world_size(),)), set(attached.trained().values())
    model: Any = attached.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.get_submodule(blocks_of(base).layers):
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)


def copy_trained(source: Attached, to: Attached) -> None:
    """What was trained on the one, into the other of the same method and base."""
    with torch.no_grad():
        for old, new in ((source.trained(), to.trained()), (source.changing(), to.changing())):
            for name, tensor in new.items():
                tensor.copy_(old[name])
