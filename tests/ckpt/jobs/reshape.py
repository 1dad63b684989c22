# SPDX-License-Identifier: Apache-2.0
"""A training job for any number of ranks, FSDP2 or DDP: the same global batches, so the same losses to rounding.

Each rank appends to `OUT/rank<r>.jsonl`: at its start what it went on from and a digest of all global parameters and
optimizer state; for each step the loss over the whole batch, this rank's samples, and the digest again.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import refound
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

SAMPLES, BATCH, WIDTH = 40, 12, 23  # the last batch of an epoch is of 4; 23 is cut unevenly by 2 and by 4


def dataset() -> torch.Tensor:
    return torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(2))


def make_net() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(8, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 8))


def make_optimizer(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 8))


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.flip(1).sin()).pow(2).mean()


def alone(steps: int) -> list[float]:
    """The losses of the undisturbed run: one process, no process group, no refound."""
    model, table, losses = make_net(), dataset(), []
    optimizer, scheduler = make_optimizer(model)
    position = refound.Position(SAMPLES, batch=BATCH, seed=5, rank=0, world_size=1)
    while len(losses) < steps:
        for samples in position.follow(position.batches):
            loss = loss_of(model, table[samples])
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses[:steps]


def wrap(net: torch.nn.Module, kind: str, world: int) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(net)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net, mesh=init_device_mesh("cpu", (world,)))


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """sha256 over all global values, whatever their layout."""
    found = hashlib.sha256()
    states = [optimizer.state.get(parameter, {}) for parameter in model.parameters()]
    for value in [*model.parameters(), *(value for state in states for value in state.values())]:
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def recorder(path: Path) -> Callable[[dict[str, Any]], None]:
    def append(record: dict[str, Any]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, (json.dumps(record) + "\n").encode())
        os.close(fd)

    return append


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=("ddp", "fsdp"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gate", type=Path, required=True)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, table = wrap(make_net(), options.kind, world), dataset()
    optimizer, scheduler = make_optimizer(model)
    position = refound.Position(SAMPLES, batch=BATCH, seed=5)
    job = refound.protect(model=model, optimizer=optimizer, scheduler=scheduler, position=position)
    record, restored = recorder(options.out / f"rank{rank}.jsonl"), job.restored
    start = {"start": job.step, "source": restored.source if restored else "start", "world": world}
    generation = int(os.environ.get("REFOUND_GENERATION", 0))
    record(start | {"generation": generation, "digest": digest(model, optimizer)})
    while job.step < options.steps:
        for samples in position.follow(position.batches):
            while int(options.gate.read_text()) < job.step + 1:
                time.sleep(0.005)
            loss = loss_of(model, table[samples]) * position.weight
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            job.end_step()
            whole = loss.detach().clone()
            dist.all_reduce(whole)
            step = {"step": job.step, "loss": whole.item() / world, "world": world, "samples": samples}
            record(step | {"epoch": position.epoch, "digest": digest(model, optimizer)})
            if job.step == options.steps:
                break
    assert job.close()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a mesh that outlives its process group can crash the exit of gloo


if __name__ == "__main__":
    main()
