# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel over pairs of ranks; with four ranks or more also FSDP2 over the pairs, on a 2-D mesh.

torchrun --standalone --logs-specs=refound --nproc-per-node=4 --max-restarts=10 examples/tp.py
"""

from collections.abc import Sequence

import refound
import torch
import torch.distributed as dist
from common import Report, batch, loss_of, network, options, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    args, device = options(arguments), start()
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    model = network().to(device)
    for block in model:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if mesh["data"].size() > 1:
            fully_shard(block, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + mesh["data"].get_local_rank())  # the ranks of a pair work on the same batch

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
