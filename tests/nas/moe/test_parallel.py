# SPDX-License-Identifier: Apache-2.0
"""Experts over ranks: each rank with its own tokens, a step is that of one process with all of them."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from refound.export.architecture import FFN
from refound.nas.moe.errors import CarveUsageError
from refound.nas.moe.module import Mixture, MoeFFN
from refound.nas.moe.parallel import ParallelExperts, join_gradients
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

RANKS, HIDDEN, EXPERTS, WIDTH, SHARED = 2, 8, 4, 6, 4


def mixture(experts: int = EXPERTS) -> MoeFFN:
    draw = torch.Generator().manual_seed(3)
    rows = SHARED + experts * WIDTH

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / 3

    weights = Mixture(
        router=normal(experts, HIDDEN),
        gate=normal(rows, HIDDEN),
        up=normal(rows, HIDDEN),
        down=normal(HIDDEN, rows),
        shared_gate=normal(1, HIDDEN),
    )
    ffn = FFN(kind="moe", width=WIDTH, experts=experts, top_k=2, normalized=False, shared_width=SHARED)
    return MoeFFN(weights, ffn)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(RANKS * 3, 5, HIDDEN, generator=draw), torch.randn(RANKS * 3, 5, HIDDEN, generator=draw)


def train(body: torch.nn.Module, inputs: torch.Tensor, wanted: torch.Tensor, mesh: object = None) -> torch.Tensor:
    """Three steps of AdamW; the gradient of the inputs in the last one."""
    optimizer = torch.optim.AdamW(body.parameters(), lr=1e-2, foreach=False)
    seen = inputs.clone().requires_grad_()
    for _ in range(3):
        optimizer.zero_grad()
        seen.grad = None
        loss = (body(seen) - wanted).square().mean()
        loss.backward()
        if mesh is not None:
            join_gradients(body, mesh)  # type: ignore[arg-type]
        optimizer.step()
    assert seen.grad is not None
    return seen.grad


def rank_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (RANKS,))
    with pytest.raises(CarveUsageError, match=r"3 experts .* use one dimension of 1, 3 ranks"):
        ParallelExperts(mixture(experts=3), mesh)
    body = ParallelExperts(mixture(), mesh)
    held = body.gate
    assert isinstance(held, DTensor) and held.to_local().shape == (EXPERTS * WIDTH // RANKS, HIDDEN)
    inputs, wanted = (whole.chunk(RANKS)[rank] for whole in tokens())
    grad = train(body, inputs, wanted, mesh)
    found = body.mixture()
    told = {name: tensor.contiguous() for name, tensor in {"grad": grad, **vars(found)}.items()}
    save_file(told, folder / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_ranks_with_their_own_tokens_train_as_one_process_with_all(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_of_two, args=(rank, tmp_path)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * RANKS
    alone = mixture()
    grad = train(alone, *tokens())
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(RANKS)]
    begin = vars(mixture().mixture())
    for name, tensor in vars(alone.mixture()).items():
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:])
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-4, atol=1e-5)
        assert not torch.equal(tensor, begin[name])
    # each rank's loss is the mean over its own tokens
    torch.testing.assert_close(torch.cat([found["grad"] for found in ranks]) / RANKS, grad, rtol=1e-4, atol=1e-6)
