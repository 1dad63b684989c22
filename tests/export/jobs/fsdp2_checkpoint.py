# SPDX-License-Identifier: Apache-2.0
"""Two ranks train a model with FSDP2 and save it with torch's DCP, numbers beside it, and the truth.

torchrun --standalone --nproc-per-node=2 fsdp2_checkpoint.py MODEL OUT
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM


def main() -> None:
    directory, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if dist.get_rank() == 0:
        save_file(dict(model.state_dict()), out / "whole.safetensors")
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    momenta = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    save({"app": {"model": model.state_dict(), "optimizer": momenta, "step": 3}}, checkpoint_id=out / "step-3")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may crash an interpreter that takes its time to go


if __name__ == "__main__":
    main()
