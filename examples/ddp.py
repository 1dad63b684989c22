# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: every rank holds the same, so each saves a part of it.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/ddp.py
"""

from collections.abc import Sequence

import refound
import torch
import torch.distributed as dist
from common import Report, batch, loss_of, network, options, start
from torch.nn.parallel import DistributedDataParallel


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    args, device = options(arguments), start()
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())  # from here on each rank draws batches of its own

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
