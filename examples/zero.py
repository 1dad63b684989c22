# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed ZeRO: protect the engine, which brings its optimizer, scheduler and loss scale along.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/zero.py --stage=3
"""

import argparse
from collections.abc import Sequence

import deepspeed
import deepspeed.ops
import refound
import torch
import torch.distributed as dist
from common import BATCH, Report, batch, device, loss_of, network, options

# On the CPU DeepSpeed would compile a C++ extension that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def config(stage: int, dtype: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},  # torch's own: nothing to compile
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
    }


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    zero, rest = parser.parse_known_args(arguments)
    args, where = options(rest), device()
    deepspeed.init_distributed(dist.get_default_backend_for_device(where))
    torch.manual_seed(0)
    engine, *_ = deepspeed.initialize(model=network(), config=config(zero.stage, zero.dtype))
    torch.manual_seed(1 + dist.get_rank())

    job = refound.protect(model=engine, every=args.every)
    while job.step < args.steps:
        loss = loss_of(engine, batch(where).to(next(engine.module.parameters()).dtype))
        engine.backward(loss)
        engine.step()
        job.end_step()
        report(job.step, loss.item())
    job.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
