# SPDX-License-Identifier: Apache-2.0
"""Two ranks train a model with DeepSpeed, stages 2 and 3, its embedding frozen: checkpoints, snapshots, and the truth.

torchrun --standalone --nproc-per-node=2 zero_checkpoint.py MODEL OUT
"""

import contextlib
import os
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from refound.ckpt.wrappers import unwrap
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ckpt"))
from shards import shard_of

# On the CPU DeepSpeed would compile a C++ extension that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(stage: int, model_directory: str, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model.model.embed_tokens.weight.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, 300, (1, 16))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(out / f"stage{stage}"))
    shard = shard_of(unwrap({"model": engine}), dist.get_rank())
    np.save(out / f"stage{stage}-{dist.get_rank()}.npy", shard)
    parameters = dict(engine.module.named_parameters())
    whole = deepspeed.zero.GatheredParameters(list(parameters.values())) if stage == 3 else contextlib.nullcontext()
    with whole:
        if dist.get_rank() == 0:
            tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            save_file(tensors, out / f"stage{stage}.safetensors")
    dist.barrier()


def main() -> None:
    deepspeed.init_distributed("gloo")
    for stage in (2, 3):
        train(stage, sys.argv[1], Path(sys.argv[2]))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may crash an interpreter that takes its time to go


if __name__ == "__main__":
    main()
