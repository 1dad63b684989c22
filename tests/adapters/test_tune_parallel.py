# SPDX-License-Identifier: Apache-2.0
"""Tuning over two ranks, the base whole on each or in shards: the same bits, and only what trains in snapshots."""

from pathlib import Path
from typing import Any

import pytest
from refound.adapters.errors import TuneUsageError
from refound.adapters.recipe import TuneRecipe, read_tune
from refound.adapters.tune import tune
from refound.distill.proven import read_proven
from refound.distill.resume import STATE, state_folder
from torch.distributed.tensor import DTensor

from ..ckpt.ranks import run_ranks
from ..distill import launched
from ..export.models import decoder, write_model
from .test_tune import RECIPE

METHODS = {
    "lora": (),
    "dora": ("method.kind=dora",),
    "parallel": ('method={kind="parallel",width=8}',),
    "pruned-lora": ("method.kind=pruned-lora", "method.ffn=0.5"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", decoder(layers=2, tied=True))


@pytest.fixture
def file(base: Path, tmp_path: Path) -> Path:
    """The recipe."""
    found = tmp_path / "recipe.toml"
    found.write_text(RECIPE.format(base=base, out=tmp_path / "out"))
    return found


def recipe(file: Path, name: str, *settings: str) -> TuneRecipe:
    return read_tune(file, [f"out={file.with_name(name)}", *settings])


def files(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    "method",
    ["lora", "parallel", *(pytest.param(name, marks=pytest.mark.campaign) for name in ("dora", "pruned-lora"))],
)
def test_a_base_in_shards_changes_no_bit(method: str, file: Path, tmp_path: Path) -> None:
    def work(rank: int) -> list[float]:
        found = []
        for parallel in ("ddp", "fsdp2"):
            wanted = recipe(file, parallel, "engines=[]", f"train.parallel={parallel}", *METHODS[method])
            done = tune(wanted, lambda _: None)
            found += [done.before, done.after]
        return found

    for before, after, sharded_before, sharded_after in run_ranks(tmp_path / "ranks", 2, work):
        assert (before, after) == (sharded_before, sharded_after) and after < before
    whole, sharded = files(tmp_path / "ddp"), files(tmp_path / "fsdp2")
    assert whole and whole.keys() == sharded.keys()
    assert [name for name in whole if whole[name] != sharded[name]] == []


class _Stopped(Exception):
    pass


def test_a_base_in_shards_is_in_no_snapshot_and_a_run_goes_on_without_shards(file: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def work(rank: int) -> dict[str, Any]:
        from refound.adapters import sharded_base

        shard = sharded_base.shard_base

        def stop(line: str) -> None:
            if line.startswith("step 3 "):
                raise _Stopped

        def watched(attached: Any) -> None:
            shard(attached)
            seen["whole"] = [name for name, one in attached.model.named_parameters() if not isinstance(one, DTensor)]

        sharded_base.shard_base = watched  # in this process, which ends with the test
        wanted = recipe(file, "out", "engines=[]", "train.parallel=fsdp2")
        with pytest.raises(_Stopped):
            tune(wanted, stop)
        seen["state"] = list(read_proven(state_folder(tmp_path / "out") / STATE)[0])
        said: list[str] = []
        tune(recipe(file, "out", "engines=[]"), said.append)  # with the base whole
        assert said[0].startswith("going on from step 2 ")
        tune(recipe(file, "undisturbed", "engines=[]"), lambda _: None)
        return seen

    for found in run_ranks(tmp_path / "ranks", 2, work):
        assert found["whole"] and all("lora_" in name for name in found["whole"])
        names = [name for name in found["state"] if name.startswith("model.")]
        assert len(names) == len(found["whole"]) and all("lora_" in name for name in names)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_ways_to_share_that_cannot_be_are_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneUsageError, match=r"train\.parallel is 'zero3', none of ddp, fsdp2"):
        recipe(file, "out", "train.parallel=zero3")
    with pytest.raises(TuneUsageError, match=r"loss\.fait\.dynamic = false or train\.parallel"):
        recipe(file, "out", "train.parallel=fsdp2", "loss.fait.enabled=true", 'data.sources=["a.jsonl"]')


@pytest.mark.campaign
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_rank_killed_under_torchrun_costs_no_bit(parallel: str, file: Path, tmp_path: Path) -> None:
    told = {}
    for name, kill_after in (("whole", 0), ("killed", 7)):
        settings = (f"out={tmp_path / name}", "train.steps=150", f"train.parallel={parallel}")
        arguments = ["tune", str(file), *(f"--set={one}" for one in settings)]
        told[name] = launched.run(arguments, tmp_path, kill_after=kill_after)
    went_on = [line for line in told["killed"] if line.startswith("going on from step ")]
    assert len(went_on) == 1 and int(went_on[0].split()[4]) >= 1, told["killed"]
    assert not any(line.startswith("going on") for line in told["whole"])
    assert files(tmp_path / "whole") == files(tmp_path / "killed")
