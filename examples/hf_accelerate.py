# SPDX-License-Identifier: Apache-2.0
"""Hugging Face accelerate: protect what it has prepared. DDP, or FSDP2 by --fsdp, or its DeepSpeed plugin by --zero=2.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/hf_accelerate.py

A real job has data: protect a loader that has a state_dict (use_stateful_dataloader), or go on within an epoch with
accelerate's skip_first_batches, by job.step.

Do not launch it with `accelerate launch --cpu`: that runs one process.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import refound
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from common import BATCH, Report, batch, device, loss_of, network, options


def accelerator(*, fsdp: bool, zero: int) -> Accelerator:
    on_cpu = device().type == "cpu"
    # Without the backend's name, or cpu=True, accelerate runs every process alone on the CPU.
    group = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        made = Accelerator(fsdp_plugin=plugin, kwargs_handlers=group)
        if on_cpu:  # where accelerate does no FSDP whatever it is told, and refound says so; by force it does
            AcceleratorState._shared_state.update({"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin})
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        return made
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
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=group)


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0)
    parser.add_argument("--fsdp", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    args, runner = options(rest), accelerator(fsdp=chosen.fsdp, zero=chosen.zero)
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
