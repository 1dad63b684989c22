# SPDX-License-Identifier: Apache-2.0
"""What the examples share: their options, the start of a worker, a small network and its noise to learn from."""

import argparse
import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

WIDTH, BATCH = 32, 8
Report = Callable[[int, float], None]
"""Gets every step and its loss; `print` is one."""


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """--steps and --every; from the command line if `arguments` is None."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="steps between snapshots")
    return parser.parse_args(arguments)


def device() -> torch.device:
    """This worker's accelerator, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return found


def start() -> torch.device:
    """Join the process group; every rank makes the same model next."""
    found = device()
    dist.init_process_group(dist.get_default_backend_for_device(found))
    torch.manual_seed(0)
    return found


class Block(torch.nn.Module):
    """A residual layer of two."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(Block(), Block())


def batch(where: torch.device) -> torch.Tensor:
    """The next batch, from the random generator, which is protected like all others. A real job has a data loader:
    protect it too, if it has a state_dict, as in protect(…, data=loader)."""
    return torch.randn(BATCH, WIDTH).to(where)


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.roll(1, -1)).pow(2).mean()
