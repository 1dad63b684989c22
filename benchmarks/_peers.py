# SPDX-License-Identifier: Apache-2.0
"""One rank of a job under torchft, or under NVRx's in-process restart, in an environment without refound.

    python benchmarks/_peers.py torchft|nvrx FOLDER WIDTH

It trains until ended and writes a line for every step that counts; `recovery.py` starts it.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(model: Any, optimizer: Any, width: int, log: Path, facts: Callable[[], dict[str, Any]]) -> None:
    """Train until ended, a line for each step."""
    import torch

    with log.open("a") as lines:
        while True:
            optimizer.zero_grad()
            model(torch.randn(8, width)).square().mean().backward()
            optimizer.step()
            lines.write(json.dumps({"time_s": time.time(), **facts()}) + "\n")
            lines.flush()


def layers(width: int) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)])


def torchft_worker(folder: Path, width: int) -> None:
    import torch
    import torchft  # pyright: ignore[reportMissingImports]

    rank = int(os.environ["RANK"])
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(RANK="0", WORLD_SIZE="1")  # of this replica's own group
    module = layers(width)
    inner = torch.optim.AdamW(module.parameters())

    def load(state: dict[str, Any]) -> None:
        module.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": module.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=2,
        replica_id=f"replica{rank}",
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        hostname="127.0.0.1",
        timeout=timedelta(seconds=10),
    )
    model = torchft.DistributedDataParallel(manager, module)
    optimizer = torchft.Optimizer(manager, inner)
    train(
        model,
        optimizer,
        width,
        folder / f"rank{rank}",
        lambda: {"step": manager.current_step(), "ranks": manager.num_participants()},
    )


def nvrx_worker(folder: Path, width: int) -> None:
    import nvidia_resiliency_ext.inprocess as inprocess  # pyright: ignore[reportMissingImports]
    import torch
    import torch.distributed as dist

    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    # Imported by the optimizer: an import that a restart interrupts cannot be done again in the same process.
    torch.optim.AdamW(layers(8).parameters()).step()

    @inprocess.Wrapper(
        store_kwargs={"port": port + 1, "timeout": timedelta(seconds=60)},
        initialize=inprocess.initialize.RetryController(min_world_size=2),
        abort=None,
        heartbeat_interval=timedelta(seconds=0.2),
        heartbeat_timeout=timedelta(seconds=2),
        monitor_process_interval=timedelta(seconds=0.2),
        monitor_thread_interval=timedelta(seconds=0.2),
        progress_watchdog_interval=timedelta(seconds=0.2),
        last_call_wait=timedelta(seconds=0.1),
    )
    def main(call: inprocess.CallWrapper = None) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.TCPStore("127.0.0.1", port + 2 + call.iteration, is_master=int(os.environ["RANK"]) == 0)
        ranks = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=ranks)
        model = torch.nn.parallel.DistributedDataParallel(layers(width))
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, width, folder / f"rank{rank}", lambda: {"step": call.iteration, "ranks": ranks})

    main()


if __name__ == "__main__":
    {"torchft": torchft_worker, "nvrx": nvrx_worker}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
