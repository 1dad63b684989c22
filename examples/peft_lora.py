# SPDX-License-Identifier: Apache-2.0
"""PEFT: only the adapters train, and only they are saved; the base is proven to be the same at every restore.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/peft_lora.py
"""

from collections.abc import Sequence

import refound
import torch
import torch.distributed as dist
from common import Report, batch, loss_of, network, options, start
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    args, device = options(arguments), start()
    base = network().to(device)  # in a real job from_pretrained(…): the same bits in every start
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["up", "down"], lora_dropout=0.1))  # type: ignore[arg-type]
    model = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())

    job = refound.protect(model=model, optimizer=optimizer, every=args.every, save_frozen=False)
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
