# SPDX-License-Identifier: Apache-2.0
"""A small training job whose every bit is on record, for the tests to start, strike and compare.

Each rank appends to `OUT/rank<r>.jsonl`: a line when it starts (what it went on from) and one for each step (its loss
as a hex float). At the end `OUT/final<r>.json` holds a digest of everything it ends with. With `--gate FILE` it waits
before each step until the number in FILE allows it, so that a fault can fall at an exact place.

The losses depend on all that has to be restored: parameters, buffers, optimizer, learning rate, data position, and the
random generators of python, numpy and torch.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import refound
import torch
import torch.distributed as dist

WIDTH, BATCH, VOCABULARY = 32, 8, 64


class Data:
    """Positions in an endless text, drawn by a generator of its own."""

    def __init__(self, rank: int) -> None:
        self._random = random.Random(1000 + rank)
        self.drawn = 0

    def next_batch(self) -> torch.Tensor:
        self.drawn += 1
        return torch.tensor([[self._random.randrange(VOCABULARY) for _ in range(4)] for _ in range(BATCH)])

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.getstate(), "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.setstate(state["random"])
        self.drawn = state["drawn"]


class Net(torch.nn.Module):
    """An embedding, layers with dropout and a running mean; `ballast_mb` MB of further parameters make it heavier."""

    def __init__(self, width: int, ballast_mb: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.dropout = torch.nn.Dropout(0.1)
        self.register_buffer("mean", torch.zeros(width))
        self.ballast = torch.nn.ParameterList(torch.randn(256, 1024) for _ in range(ballast_mb))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).mean(1)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        for layer in self.layers:
            x = x + torch.tanh(layer(self.dropout(x)))
        return x - self.mean + 1e-3 * sum(weight.mean() for weight in self.ballast)


def make_model(options: argparse.Namespace, world: int) -> torch.nn.Module:
    torch.manual_seed(7)
    net = Net(options.width, options.ballast_mb)
    if options.kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in net.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)
    # Each rank keeps its own buffer, as its batches are its own. Without `find_unused_parameters` DDP lays its gradient
    # buckets out anew after a process's first step, and with three ranks or more another layout sums in another order.
    keeps = {"find_unused_parameters": True} if options.kind == "ddp" else {"bucket_cap_mb": 0.01}
    return torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False, **keeps)


def digest(value: Any) -> str:
    """sha256 over nested state, tensors by their bytes."""
    found = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            local = item.to_local() if hasattr(item, "to_local") else item
            found.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            found.update(item.tobytes())
        elif isinstance(item, dict):
            for key in item:
                found.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for entry in item:
                add(entry)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()


def append(path: Path, record: dict[str, Any]) -> None:
    """One line in one write, so that a kill leaves all of it or nothing."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, (json.dumps(record) + "\n").encode())
    os.close(fd)


def gatekeeper(gate: Path | None) -> Callable[[int], None]:
    """A function that returns once the given step may be run."""

    def wait(step: int) -> None:
        while gate is not None and int(gate.read_text()) < step:
            time.sleep(0.005)

    return wait


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=("ddp", "ddp-buckets", "fsdp"), default="ddp")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--ballast-mb", type=int, default=0)
    parser.add_argument("--meddle-at", type=int, help="change a parameter right after this step")
    parser.add_argument("--raise-at", type=int, help="the last rank fails after this step")
    parser.add_argument("--loop-at", type=int, help="the last rank loops for ever after this step of generation 1")
    parser.add_argument("--every", default="1", help="steps between snapshots, or auto")
    parser.add_argument("--differ", action="store_true", help="ranks hold different parameters, against DDP's promise")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model(options, world)
    if options.differ:
        with torch.no_grad():
            next(model.parameters()).add_(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 8))
    data = Data(rank)
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    every = int(options.every) if options.every.isdigit() else options.every
    job = refound.protect(model=model, optimizer=optimizer, scheduler=scheduler, data=data, every=every)

    log, pass_gate = options.out / f"rank{rank}.jsonl", gatekeeper(options.gate)
    restored = job.restored
    append(
        log,
        {
            "start": job.step,
            "source": restored.source if restored else "start",
            "notes": list(restored.notes) if restored else [],
            "pid": os.getpid(),
            "generation": int(os.environ.get("REFOUND_GENERATION", 0)),
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        },
    )
    while job.step < options.steps:
        pass_gate(job.step + 1)
        tokens = data.next_batch()
        noise = random.random() + float(np.random.rand())
        loss = (model(tokens) - torch.randn(BATCH, options.width) * noise).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        job.end_step()
        append(log, {"step": job.step, "loss": loss.item().hex(), "pid": os.getpid()})
        is_last, generation = rank == world - 1, os.environ.get("REFOUND_GENERATION")
        if job.step == options.raise_at and is_last:
            raise ValueError("this rank went wrong")
        while job.step == options.loop_at and is_last and generation == "1":
            pass
        if job.step == options.meddle_at:
            with torch.no_grad():
                next(model.parameters()).add_(1)
    committed = job.close()
    final = {
        "parameters": digest(dict(model.named_parameters())),
        "buffers": digest(dict(model.named_buffers())),
        "optimizer": digest(optimizer.state_dict()),
        "scheduler": digest(scheduler.state_dict()),
        "data": digest(data.state_dict()),
        "python": digest(random.getstate()),
        "numpy": digest(np.random.get_state()),
        "torch": digest(torch.get_rng_state()),
    }
    (options.out / f"final{rank}.json").write_text(json.dumps({"committed": committed, "digests": final}))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # DDP outlives its process group, whose threads may then abort an interpreter that ends (pytorch #179291)


if __name__ == "__main__":
    main()
