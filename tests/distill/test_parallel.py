# SPDX-License-Identifier: Apache-2.0
"""Distillation over several ranks, whole and in shards: one rank's losses, a whole child, a state to go on from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from refound.distill.config import DistillConfig, Training
from refound.distill.errors import DistillUsageError, StateMismatchError
from refound.distill.loop import Distilled, distill
from refound.distill.models import load, open_blocks, positions_of, states_of
from refound.distill.parallel import Replicated
from refound.distill.resume import state_folder
from refound.distill.sharded import Sharded
from refound.export.architecture import FFN, Attention
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from ..ckpt.ranks import run_ranks
from ..export.models import decoder, with_layer, write_model
from . import launched

# Shares of a batch are uneven over 2 ranks, and hidden sizes over 3; quality is looked at after every step.
TRAINING = Training(tokens=10 * 16 * 5, length=16, batch=5, lr=3e-3, save_every=3, quality_every=1)
FEW_LOOKS = replace(TRAINING, quality_every=1000)
CLOSE = {"rel": 1e-4, "abs": 1e-7}
"""Losses in shards and on one rank, over 10 steps: sums in float32 in another order."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(teacher, child): tied, and the child has a layer without weights and a linear one."""
    folder = tmp_path_factory.mktemp("models")
    base = decoder(layers=3, tied=True)
    child = with_layer(base, 1, attention=Attention(kind="none"), ffn=FFN(kind="none"))
    child = with_layer(child, 2, ffn=FFN(kind="linear"))
    return write_model(folder / "teacher", base), write_model(folder / "child", child)


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Distilled, Path]:
    out = tmp_path_factory.mktemp("alone") / "out"
    return distill(config(models, out), lambda _: None), out


def config(models: tuple[Path, Path], out: Path, parallel: str = "ddp", training: Training = TRAINING) -> DistillConfig:
    return DistillConfig(child=models[1], teacher=models[0], out=out, training=training, held_out=2, parallel=parallel)


def curve(found: Distilled) -> list[float]:
    return [number for _, quality in found.curve for number in (quality.kl, quality.lm, quality.cosine)]


@pytest.mark.parametrize(("parallel", "world"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
def test_several_ranks_follow_the_losses_of_one_and_write_the_whole_child(
    parallel: str, world: int, models: tuple[Path, Path], alone: tuple[Distilled, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = run_ranks(tmp_path / "ranks", world, lambda _: distill(config(models, out, parallel), lambda _: None))
    assert len(found[0].curve) == 11 and found[0].after.kl < 0.9 * found[0].before.kl
    for one in found:
        assert curve(one) == pytest.approx(curve(alone[0]), **CLOSE)
    assert open_blocks(out).decoder == open_blocks(models[1]).decoder
    before, wanted, got = (load_file(where / "model.safetensors") for where in (models[1], alone[1], out))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        moved = (tensor - before[name]).norm()
        assert (got[name] - tensor).norm() < 1e-3 * moved, name
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        ids = torch.arange(24).reshape(2, 12)
        assert torch.equal(model(input_ids=ids).logits, load(open_blocks(out))(input_ids=ids).logits)
    assert not state_folder(out).exists()


def test_a_model_in_shards_is_held_in_parts_and_says_the_same_bits(models: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_blocks(models[0])
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        whole = load(source)
        wanted = states_of(whole, ids, positions_of(whole, 12))

    def work(rank: int) -> list[bool | int]:
        parallel = Sharded()
        model = parallel.load(source, trained=False)
        cut = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        with torch.no_grad():
            found = states_of(model, ids, positions_of(model, 12))
        same = all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        parallel.settle(model)
        again = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        gathered = parallel.gather(model, source.decoder.tensors(), torch.float32)
        stored = dict(source.weights(list(source.decoder.tensors())))
        equal = all(torch.equal(gathered[name], stored[name]) for name in gathered)
        return [cut, held, same, again, len(gathered), equal]

    first, second = run_ranks(tmp_path / "ranks", 2, work)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert first == [True, total // 2, True, True, len(source.decoder.tensors()), True]
    assert second == [True, total // 2, True, True, 0, True]


def test_gradients_are_clipped_by_their_norm_over_all_shards(models: tuple[Path, Path], tmp_path: Path) -> None:
    source, ids = open_blocks(models[1]), torch.arange(24).reshape(2, 12)

    def norm(parallel: Any) -> float:
        model = parallel.load(source, trained=True)
        states = states_of(model, ids, positions_of(model, 12))
        (100 * model.model.norm(states[-1])).square().mean().backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return (found.full_tensor() if isinstance(found, DTensor) else found).item()

    wanted = norm(Replicated())
    assert wanted > 10
    for found in run_ranks(tmp_path / "ranks", 2, lambda _: norm(Sharded())):
        assert found == pytest.approx(wanted, rel=1e-5)


class _Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[str], None]:
    def stop(line: str) -> None:
        if line.startswith(f"step {step} "):
            raise _Stopped

    return stop


def test_shards_on_disk_go_on_with_the_same_bits_from_a_step_that_all_have(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "stopped"

    def work(rank: int) -> str:
        distill(config(models, whole, "fsdp2", FEW_LOOKS), lambda _: None)
        with pytest.raises(_Stopped):
            distill(config(models, out, "fsdp2", FEW_LOOKS), stop_at(8))  # there are states of steps 3 and 6
        if rank == 1:  # as if it had been killed before it wrote its second one
            (state_folder(out) / "rank-1-of-2" / "state-0.safetensors").unlink()
        dist.barrier()
        said: list[str] = []
        distill(config(models, out, "fsdp2", FEW_LOOKS), said.append)
        return said[0]

    assert run_ranks(tmp_path / "ranks", 2, work) == ["going on from step 3 of 10"] * 2
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not state_folder(out).exists()


def test_a_child_in_shards_learns_from_stored_logits(models: tuple[Path, Path], tmp_path: Path) -> None:
    training = replace(TRAINING, cosine=0.0, tokens=4 * 16 * 5)

    def work(rank: int) -> list[list[float]]:
        found = []
        for parallel in ("ddp", "fsdp2"):
            settings = replace(config(models, tmp_path / parallel, parallel), training=training)
            found.append(curve(distill(replace(settings, logits=tmp_path / "logits", stored=32), lambda _: None)))
        return found

    for whole, sharded in run_ranks(tmp_path / "ranks", 2, work):
        assert sharded == pytest.approx(whole, **CLOSE)


def test_shards_of_another_number_of_ranks_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    def stopped(rank: int) -> None:
        with pytest.raises(_Stopped):
            distill(config(models, tmp_path / "out", "fsdp2", FEW_LOOKS), stop_at(5))

    def other(rank: int) -> str:
        with pytest.raises(StateMismatchError) as told:
            distill(config(models, tmp_path / "out", "fsdp2", FEW_LOOKS), lambda _: None)
        return str(told.value)

    run_ranks(tmp_path / "two", 2, stopped)
    for told in run_ranks(tmp_path / "three", 3, other):
        assert "another number of ranks" in told and "this one has 3" in told


def test_another_way_to_share_is_told(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DistillUsageError, match=r"parallel is 'fsdp', none of ddp, fsdp2; did you mean 'fsdp2'"):
        replace(config(models, tmp_path / "out"), parallel="fsdp")


@pytest.mark.campaign
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_rank_killed_under_torchrun_costs_no_bit(parallel: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, child = models
    settings = [f"--set={one}" for one in ("tokens=9600", "length=16", "batch=4", "lr=1e-3", "quality_every=3200")]
    told = {}
    for name, kill_after in (("whole", 0), ("killed", 7)):
        arguments = ["distill", str(child), "--teacher", str(teacher), "--out", str(tmp_path / name), *settings]
        told[name] = launched.run([*arguments, f"--parallel={parallel}"], tmp_path, kill_after=kill_after)
    went_on = [line for line in told["killed"] if line.startswith("going on from step ")]
    assert len(went_on) == 1 and int(went_on[0].split()[4]) >= 1, told["killed"]
    assert not any(line.startswith("going on") for line in told["whole"])
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
