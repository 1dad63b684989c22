# SPDX-License-Identifier: Apache-2.0
"""Code that is written for torch's distributed checkpoints: one object is swapped. --asynchronous uses async_save.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/dcp_memory.py
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import refound
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Report, batch, loss_of, network, options, start
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Training:
    """All that a restart needs, the way DCP's own examples have it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--asynchronous", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    args, device = options(rest), start()
    aside = dist.new_group(backend="gloo")  # async_save coordinates in a thread, while training uses the other group
    model = network().to(device)
    fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    memory = refound.DcpMemory()  # instead of a directory
    if memory.saved:
        dcp.load({"training": training}, storage_reader=memory.reader)
    saving: Future | None = None
    while training.step < args.steps:
        torch.manual_seed(1000 * training.step + dist.get_rank())  # DCP saves no random generators
        loss = loss_of(model, batch(device))
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.step += 1
        report(training.step, loss.item())
        if training.step % args.every == 0:
            if saving is not None:
                saving.result()
            save: dict[str, Any] = {"storage_writer": memory.writer, "process_group": aside}
            if chosen.asynchronous:
                saving = dcp.async_save({"training": training}, **save)  # type: ignore[assignment]
            else:
                dcp.save({"training": training}, **save)
    if saving is not None:
        saving.result()
    memory.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
