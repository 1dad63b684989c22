# SPDX-License-Identifier: Apache-2.0
"""Hugging Face accelerate, with DDP, or with its DeepSpeed plugin by --zero=2 or 3: protect what it has prepared.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/accelerate_ddp.py

A real job has data: protect a loader that has a state_dict (use_stateful_dataloader), or go on within an epoch with
accelerate's skip_first_batches, by job.step.

Do not launch it with `accelerate launch --cpu`: that runs one process. For FSDP2 on the CPU see fsdp2.py; accelerate
runs DDP there whatever it is told, and refound says so.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import refound
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from common import BATCH, Report, batch, device, loss_of, network, options


def accelerator(zero: int) -> Accelerator:
    on_cpu = device().type == "cpu"
    if not zero:
        return Accelerator(cpu=on_cpu)
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing to compile on the CPU
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # Without the backend's name, accelerate runs every process alone on the CPU.
    group = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=group)


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0)
    plugin, rest = parser.parse_known_args(arguments)
    args, runner = options(rest), accelerator(plugin.zero)
    torch.manual_seed(0)
    bare = network()
    first = torch.optim.AdamW(bare.parameters(), lr=1e-2)
    model, optimizer, scheduler = runner.prepare(bare, first, torch.optim.lr_scheduler.StepLR(first, step_size=4))
    torch.manual_seed(1 + runner.process_index)

    job = refound.protect(model=model, optimizer=optimizer, scheduler=scheduler, every=args.every)
    while job.step < args.steps:
        loss = loss_of(model, batch(runner.device))
        runner.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        job.end_step()
        report(job.step, loss.item())
    job.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
