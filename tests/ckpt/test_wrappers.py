# SPDX-License-Identifier: Apache-2.0
"""What frameworks wrap is taken off, what they silently do not do is said, and what cannot be protected is refused."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from refound.ckpt.errors import ConfigError
from refound.ckpt.wrappers import optimizers_of, unlike_asked, unwrap
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its choices in the environment and in one state for the process."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_an_optimizer_of_accelerate_is_the_torch_optimizer_in_it() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    objects = unwrap({"model": model, "optimizer": wrapped})
    assert objects == {"model": model, "optimizer": optimizer}
    assert optimizers_of(objects) == [optimizer]


def test_fsdp1_is_refused_with_what_to_use() -> None:
    class FullyShardedDataParallel(torch.nn.Module):
        """By its name: the real one needs a device."""

    with pytest.raises(ConfigError, match=r"'model' is wrapped in FullyShardedDataParallel.*fully_shard\(\)"):
        unwrap({"model": torch.nn.Sequential(FullyShardedDataParallel())})


def said(world_size: int, model: torch.nn.Module | None = None) -> str:
    return " ".join(unlike_asked({"model": model or torch.nn.Linear(2, 2)}, world_size))


def test_workers_that_are_in_no_process_group_are_noticed() -> None:
    assert "torchrun started 4 workers, but this process is in no process group" in said(4)
    assert said(1) == ""


def test_accelerate_that_runs_alone_is_noticed(two_ranks: None) -> None:
    assert said(2) == ""
    Accelerator(cpu=True)
    assert "accelerate believes that it runs alone (DistributedType.NO) although torchrun started 2 workers" in said(2)


def test_accelerate_that_was_told_fsdp_and_runs_something_else_is_noticed() -> None:
    Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert "accelerate was told to use FSDP and does not (it runs NO)" in said(1)


ENGINE = """
import json, os, sys, numpy, torch, torch.distributed as dist, deepspeed, deepspeed.ops
from refound.ckpt.collect import Collector
from refound.ckpt.copier import Copier
from refound.ckpt.errors import ConfigError
from refound.ckpt.frozen import FrozenSet
from refound.ckpt.loader import Loader
from refound.ckpt.shard import make_plan, signature
from refound.ckpt.wrappers import unwrap
class Slot:
    def __init__(self, size):
        self.array = numpy.zeros(size, numpy.uint8)
def saved(state):
    text = json.dumps(state.objects).encode()
    plan = make_plan(state, 0, len(text))
    slot = Slot(plan.size_bytes)
    Copier(torch.device("cpu")).fill(plan, state.leaves, plan.header(text), slot, None)
    return slot.array
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed("gloo")
found = {}
def refusal(what):
    try:
        what()
    except ConfigError as error:
        return str(error)
for stage in (2, 3):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6, affine=False), torch.nn.Linear(6, 2).requires_grad_(False)
    )
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    }
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=config)
    objects = unwrap({"model": engine, "optimizer": optimizer})
    collector = Collector(objects, rank=0)
    def step():
        loss = engine(torch.randn(2, 4)).pow(2).sum()
        engine.backward(loss)
        engine.step()
        return loss.item().hex()
    step()
    middle = refusal(collector.collect)
    step()
    state = collector.collect()
    frozen = FrozenSet(objects)
    small = Collector(objects, rank=0, frozen=frozen)
    for made in (collector, small):
        shard = saved(made.collect())
        after = [step() for _ in range(4)]
        Loader(lambda _: shard, 0).load(objects, made)
        assert [step() for _ in range(4)] == after, stage
    assert signature(collector.collect()) == signature(collector.collect())
    found[stage] = {
        "objects": sorted(objects), "middle": middle, "layout": state.objects["model"]["layout"],
        "alone": refusal(lambda: unwrap({"optimizer": optimizer})),
        "small": [leaf.path for leaf in small.collect().leaves],
        "constant": [leaf.path for leaf in state.leaves if leaf.constant],
        "leaves": {leaf.path: [list(leaf.tensor.shape), leaf.spec] for leaf in state.leaves},
        "groups": [len(o.param_groups) for o in objects["model"].optimizers],
    }
print("FOUND" + json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


def test_a_zero_engine_comes_back_and_is_described_for_any_number_of_ranks() -> None:
    """Every flat tensor with its length, and a table of which parameter lies where. Frozen ones may be left out."""
    quiet = {"PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment = os.environ | quiet | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(ENGINE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND")[2])
    flat = {"stride": [1], "placements": ["S(0)"], "mesh": [0]}
    for stage, facts in found.items():
        assert facts["objects"] == ["model"], "the optimizer goes with its engine"
        assert "in the middle of gradient accumulation" in facts["middle"]
        assert "belongs to its engine: protect(model=engine)" in facts["alone"]
        pieces = {"0.weight": 24, "0.bias": 6} if stage == "3" else {"group0": 30}
        for piece, count in pieces.items():
            shape, spec = facts["leaves"][f"model/masters/{piece}"]
            count = shape[0] if stage == "2" else count  # stage 2 may pad the end
            assert (shape, spec) == ([count], flat | {"shape": [count]})
            assert facts["leaves"][f"model/state/{piece}/parts/exp_avg"] == [[count], flat | {"shape": [count]}]
        named = [[name, name, shape] for name, shape in (("0.weight", [6, 4]), ("0.bias", [6]))]
        if stage == "2":
            named = [["group0", name, shape] for _, name, shape in named]
        assert facts["layout"] == named
        frozen = {"model/rest/2.weight", "model/rest/2.bias"}
        rest = {path for path in facts["leaves"] if path.startswith("model/rest/")}
        assert rest == frozen | {
            f"model/rest/1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }
        assert rest & set(facts["constant"]) == frozen, "buffers change in a forward pass"
        assert set(facts["leaves"]) - set(facts["small"]) == frozen
