# SPDX-License-Identifier: Apache-2.0
"""DDP's gradient buckets, laid out after a restart as they were: three forked ranks on gloo, last bits compared."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from refound.ckpt.buckets import Buckets
from torch.nn.parallel import DistributedDataParallel

WORLD = 3


def on_ranks(work: Callable[[int], None], store: Path) -> None:
    """Run `work(rank)` in forked processes that form a gloo group; fails if one does."""

    def rank_main(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
        work(rank)
        dist.barrier()
        os._exit(0)  # gloo's threads may outlive the group, and crash an interpreter that ends in order

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * WORLD


def make_model(**options: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    return DistributedDataParallel(net, bucket_cap_mb=0.03, **options)


def step(model: DistributedDataParallel, number: int) -> None:
    draw = torch.Generator().manual_seed(100 * number + dist.get_rank())
    model(torch.randn(8, 64, generator=draw)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.zero_grad()


def equal(model: DistributedDataParallel, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def copy_of(model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_a_restart_sums_in_the_order_of_the_undisturbed_run(options: dict[str, Any], tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = make_model(**options)
        buckets = Buckets({"model": model})
        assert not buckets.learn()
        number = 0
        while not buckets.learn():
            number += 1
            assert number < 6, "the layout is known after a few steps"
            step(model, number)
        saved, layouts = copy_of(model), buckets.state()
        step(model, number + 1)
        expected = copy_of(model)
        # Without the layout the same step gives other bits: what is tested is there to be seen.
        for restored in (False, True):
            again = make_model(**options)
            again.load_state_dict(saved)
            fresh = Buckets({"model": again})
            if restored:
                assert fresh.restore(layouts) == [] and fresh.learn() and fresh.state() == layouts
            step(again, number + 1)
            assert equal(again, expected) == restored
        for later in range(number + 2, number + 5):
            step(model, later), step(again, later)
            assert equal(again, copy_of(model)), later

    on_ranks(work, tmp_path / "store")


def test_communication_hooks_stay_registered(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        seen: list[int] = []

        def halve(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            seen.append(bucket.index())
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer() / 2)
            return future

        model = make_model()
        model.register_comm_hook(None, halve)
        assert Buckets({"model": model}).restore({"model": [[11, 10, 9], list(range(9))]}) == []
        step(model, 1)
        assert seen == [0, 1]

    on_ranks(work, tmp_path / "store")


def test_what_cannot_be_kept_is_said_and_nothing_is_changed(tmp_path: Path) -> None:
    layout = [[11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]]

    def work(rank: int) -> None:
        model = make_model()
        buckets, reducer = Buckets({"model": model}), model.reducer
        for wrong in (layout[:2], [[*layout[0], 12], *layout[1:]], [layout[0], *layout]):
            assert "other parameters" in buckets.restore({"model": wrong})[0]
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        assert "built-in communication hook" in buckets.restore({"model": layout})[0]
        assert model.reducer is reducer
        assert buckets.restore(None) == [] and buckets.restore({}) == []

    on_ranks(work, tmp_path / "store")


def test_models_whose_buckets_stay_are_left_alone(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        pair = dist.new_group([0, 1])  # the sum of two has one order
        models = {"unused": make_model(find_unused_parameters=True), "plain": torch.nn.Linear(2, 2)}
        if rank < 2:
            models["pair"] = make_model(process_group=pair)
        assert Buckets(models).learn() and Buckets(models).state() == {}

    on_ranks(work, tmp_path / "store")
