# SPDX-License-Identifier: Apache-2.0
"""HSDP: sharded within a group, replicated between groups. The replicas of a shard save a part of it each.

torchrun --standalone --logs-specs=refound --nproc-per-node=4 --max-restarts=10 examples/hsdp.py
"""

from collections.abc import Sequence

import refound
import torch
import torch.distributed as dist
from common import Report, batch, loss_of, network, options, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    args, device = options(arguments), start()
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    model = network().to(device)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())

    job = refound.protect(model=model, optimizer=optimizer, every=args.every)
    while job.step < args.steps:
        loss = loss_of(model, batch(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        job.end_step()
        report(job.step, loss.item())
    job.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
