# SPDX-License-Identifier: Apache-2.0
"""Snapshots and checkpoints as safetensors and DCP checkpoints: whole tensors from sharded ones, bit for bit."""

import json
import multiprocessing
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from refound.ckpt.convert import convert
from refound.ckpt.errors import ConfigError
from refound.cli import main
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .alone import alone
from .shards import shard_of, write_checkpoint


class Source:
    """A snapshot that only lives in the test."""

    def __init__(self, shards: dict[int, np.ndarray], step: int = 3) -> None:
        self.facts = {"step": step, "generation": 1, "world_size": len(shards), "job": "test"}
        self._shards = shards

    def shard(self, rank: int) -> np.ndarray:
        return self._shards[rank]


# --- four ranks ------------------------------------------------------------------------------------------------


def on_four_ranks(act: Callable[[int, Path], None], folder: Path) -> None:
    """Run `act(rank, folder)` in four forked processes of one gloo group."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(act, rank, folder)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def _rank(act: Callable[[int, Path], None], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views, which nothing here changes in place
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=120))
    act(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def train_sharded(rank: int, folder: Path) -> None:
    """FSDP2 over tensor parallelism, some dimensions uneven, one step of AdamW; each rank leaves its shard."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7), torch.nn.Linear(7, 3))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model[3]):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    torch.manual_seed(rank)  # a random state of its own
    np.save(folder / f"shard-{rank}.npy", shard_of({"model": model, "optimizer": optimizer}, rank))
    whole = {key: _full(value) for key, value in model.state_dict().items()}
    momenta = {
        f"state/{i}/{key}": _full(value)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    if rank == 0:
        torch.save((whole, momenta), folder / "whole.pt")


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_four_ranks(train_sharded, folder)
    whole, momenta = torch.load(folder / "whole.pt", weights_only=True)
    return Source({rank: np.load(folder / f"shard-{rank}.npy") for rank in range(4)}), whole, momenta


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def test_sharded_tensors_become_whole_safetensors(sharded: Any, tmp_path: Path) -> None:
    source, whole, momenta = sharded
    names = convert(source, tmp_path / "out", "safetensors")
    assert names == [
        "model.safetensors",
        "optimizer.safetensors",
        "ranks.safetensors",
        "refound.json",
        "rng.safetensors",
    ]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), whole)
    assert same(load_file(tmp_path / "out" / "optimizer.safetensors"), momenta)
    about = json.loads((tmp_path / "out" / "refound.json").read_text())
    assert about["step"] == 3 and sorted(about["ranks"]) == ["1", "2", "3"]
    # Each rank drew random numbers of its own, and optimizer state is common to all.
    assert [sorted(about["ranks"][rank]) for rank in "123"] == [["$rng"]] * 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_tensors_become_a_dcp_checkpoint(sharded: Any, tmp_path: Path) -> None:
    source, whole, momenta = sharded
    convert(source, tmp_path / "out", "dcp")
    model = {key: torch.zeros_like(value) for key, value in whole.items()}
    state: dict[str, Any] = {}
    for path, value in momenta.items():
        _, number, key = path.split("/")
        state.setdefault(int(number), {})[key] = torch.zeros_like(value)
    wanted = {"model": model, "optimizer": {"state": state}, "refound": {"step": 0}}
    load(wanted, checkpoint_id=tmp_path / "out", no_dist=True)
    assert same(model, whole) and wanted["refound"]["step"] == 3
    assert same({f"state/{i}/{key}": value for i, s in state.items() for key, value in s.items()}, momenta)


def test_large_files_are_split_with_an_index(sharded: Any, tmp_path: Path) -> None:
    source, whole, _ = sharded
    names = convert(source, tmp_path / "out", "safetensors", largest_bytes=200)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and set(files) <= set(names)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(tmp_path / "out" / file)
    assert same(found, whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


# --- one rank, through the command line ------------------------------------------------------------------------


def objects() -> dict[str, Any]:
    torch.manual_seed(1)
    tied = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.ModuleDict({"in": tied, "out": torch.nn.Linear(4, 4, bias=False), "norm": torch.nn.BatchNorm1d(4)})
    model["out"].weight = tied.weight
    model["low"] = torch.nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return {"net": model, "optimizer": optimizer, "scheduler": scheduler}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    protected = objects()
    return write_checkpoint(tmp_path / "job", [shard_of(protected, 0)]), protected


def refound(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_checkpoint_is_converted(checkpoint: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, protected = checkpoint
    done = refound("convert", path.parent, tmp_path / "out", "--to", "safetensors", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["step"] == 9 and "model.safetensors" in said["files"] and "net.safetensors" not in said["files"]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), dict(protected["net"].state_dict()))
    about = json.loads((tmp_path / "out" / "refound.json").read_text())
    assert about["objects"]["scheduler"]["step_size"] == 10
    fresh = objects()
    fresh["net"].load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)


def test_nothing_is_overwritten_unless_told(checkpoint: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = checkpoint
    out = tmp_path / "out"
    assert refound("convert", path, out, "--to", "dcp").exit_code == 0
    done = refound("convert", path, out, "--to", "safetensors")
    assert done.exit_code == 2 and "--overwrite" in done.output and (out / ".metadata").exists()
    assert refound("convert", path, out, "--to", "safetensors", "--overwrite").exit_code == 0
    assert not (out / ".metadata").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = refound("convert", path, tmp_path / "mine", "--to", "dcp", "--overwrite")
    assert done.exit_code == 2 and (tmp_path / "mine" / "thesis.tex").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["job", "mine", "out"]


def test_damage_and_wrong_sources_are_one_line(checkpoint: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = checkpoint
    for source, code in ((tmp_path / "none", 2), ("no-such-job", 2), (tmp_path, 2)):
        done = refound("convert", source, tmp_path / "out", "--to", "dcp")
        assert (done.exit_code, len(done.output.strip().splitlines())) == (code, 1), done.output
    os.truncate(path / "rank-000000.shard", 100)
    done = refound("convert", path, tmp_path / "out", "--to", "dcp")
    assert (done.exit_code, len(done.output.strip().splitlines())) == (3, 1), done.output
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing(checkpoint: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = checkpoint
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        done = refound("convert", path, tmp_path / "out", "--to", "safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1 and "File too large" in done.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["job"]


def test_a_live_job_is_converted_from_memory(tmp_path: Path) -> None:
    protected = objects()
    with alone() as job:
        done = refound("convert", job.job, tmp_path / "out", "--to", "safetensors")
        assert done.exit_code == 1 and "no snapshot that is committed" in done.output
        job.snapshot(1, shard_of(protected, 0))
        done = refound("convert", job.job, tmp_path / "out", "--to", "safetensors")
        assert done.exit_code == 0 and done.output.startswith("step 1 written"), done.output
        assert same(load_file(tmp_path / "out" / "model.safetensors"), dict(protected["net"].state_dict()))
        for step in range(2, 7):  # what was kept for the conversion has been let go
            job.snapshot(step, shard_of(protected, 0))


def test_a_source_that_fails_leaves_what_was_there(sharded: Any, tmp_path: Path) -> None:
    source, *_ = sharded
    convert(source, tmp_path / "out", "safetensors")
    before = sorted((tmp_path / "out").iterdir())
    broken = Source({rank: source.shard(rank) for rank in range(4)})
    broken.facts["world_size"] = 5
    with pytest.raises(KeyError):
        convert(broken, tmp_path / "out", "dcp", overwrite=True)
    assert sorted((tmp_path / "out").iterdir()) == before and len(list(tmp_path.iterdir())) == 1
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="not an earlier conversion"):
        convert(source, tmp_path / "out", "dcp", overwrite=True)
