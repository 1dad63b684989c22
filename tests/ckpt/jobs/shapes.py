# SPDX-License-Identifier: Apache-2.0
"""A job without torchrun that comes back with other ranks, from the memory of real snapshot processes.

    python tests/ckpt/jobs/shapes.py fsdp|zero1|zero2|zero3 8,6,8 FOLDER

One node a rank. Between two lives as many nodes are killed as the next has fewer, so that what they held comes from
parity, or empty ones join. Each life restores, says what every global value is, trains two steps, and says it again.
Prints a JSON list: of each life {"step", "restored", "trained"}, the latter two name → SHA-256.
"""

import hashlib
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.conf import PluginConfig
from refound.ckpt.link import Place
from refound.ckpt.protection import Protection
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from tests.ckpt.alone import opened
from tests.ckpt.ranks import run_ranks

STEPS = 2
PATIENCE = timedelta(seconds=120)


def network() -> torch.nn.Sequential:
    """Sizes that no number of ranks divides evenly."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))


def digest(value: torch.Tensor) -> str:
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


class Fsdp:
    """FSDP2 with AdamW."""

    def __init__(self, world: int) -> None:
        self.model = network()
        fully_shard(self.model, mesh=init_device_mesh("cpu", (world,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.objects: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def step(self, batch: torch.Tensor) -> None:
        self.model(batch).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, str]:
        found = dict(self.model.state_dict())
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}/{key}": value for key, value in state.items()}
        return {k: digest(v.full_tensor() if isinstance(v, DTensor) else v) for k, v in found.items()}


class Zero:
    """DeepSpeed ZeRO with torch's AdamW."""

    def __init__(self, stage: int) -> None:
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing to compile
        deepspeed.init_distributed("gloo")
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        }
        self.engine, *_ = deepspeed.initialize(model=network(), config=config)
        self.objects: dict[str, Any] = {"model": self.engine}

    def step(self, batch: torch.Tensor) -> None:
        self.engine.backward(self.engine(batch).pow(2).mean())
        self.engine.step()

    def values(self) -> dict[str, str]:
        """Weights as the model computes with them, and every flat tensor put together, without its padding."""
        from deepspeed import zero
        from refound.ckpt.zero import ZeroState

        found: dict[str, str] = {}
        parameters = list(self.engine.module.named_parameters())
        with zero.GatheredParameters(
            [parameter for _, parameter in parameters], enabled=hasattr(parameters[0][1], "ds_id")
        ):
            found |= {name: digest(parameter) for name, parameter in parameters}
        state = ZeroState(self.engine)
        data = state.state_dict()
        flat = {f"masters/{name}": value for name, value in data["masters"].items()}
        for name, both in data["state"].items():
            flat |= {f"state/{name}/parts/{key}": value for key, value in both["parts"].items()}
        for path, value in sorted(flat.items()):
            share = state.share_of(path)
            assert share is not None
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.contiguous())
            found[path] = digest(torch.cat(parts)[: share[2]])
        return found


def live(kind: str, place: Place, first: bool) -> dict[str, Any]:
    """One life of one rank."""
    os.environ |= {"RANK": str(place.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(place.world_size)}
    trained = Fsdp(place.world_size) if kind == "fsdp" else Zero(int(kind[-1]))
    protection = Protection(trained.objects, every=1, replicas=True, place=place)
    step, restored = protection.step, {} if first else trained.values()
    generator = torch.Generator().manual_seed(place.rank)
    for _ in range(STEPS):
        trained.step(torch.randn(2, 5, generator=generator))
        protection.end_step()
    assert protection.close(PATIENCE, done=False)
    return {"step": step, "restored": restored, "trained": trained.values()}


def lose(agent: Attachment) -> None:
    """The node is gone, with its memory."""
    os.kill(agent._client.pid, signal.SIGKILL)
    agent._client.close()


def main(kind: str, worlds: list[int], folder: Path) -> list[dict[str, Any]]:
    job, named, agents, lives = f"shapes-{os.getpid()}", 0, list[Attachment](), []
    for number, world in enumerate(worlds):
        while len(agents) > world:
            lose(agents.pop(len(agents) // 2))
        while len(agents) < world:
            agents.append(attach(job, "127.0.0.1", PluginConfig(node=f"n{named}")))
            named += 1
        places = opened(job, agents)
        results = run_ranks(folder / str(number), world, lambda rank, p=places, n=number: live(kind, p[rank], n == 0))
        assert all(result == results[0] for result in results), "ranks speak of different global values"
        lives.append(results[0])
    for agent in agents:
        agent.leave(success=True)
    return lives


if __name__ == "__main__":
    kind, worlds, folder = sys.argv[1:]
    if kind != "fsdp":
        import deepspeed  # noqa: F401  # once, before there are ranks
    print("FOUND" + json.dumps(main(kind, [int(world) for world in worlds.split(",")], Path(folder))))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may crash an interpreter that takes its time to go
