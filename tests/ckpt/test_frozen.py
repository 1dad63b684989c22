# SPDX-License-Identifier: Apache-2.0
"""Parameters that do not train: left out of snapshots, proven at a restore, and saved once they change after all."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.collect import Collector
from refound.ckpt.convert import convert
from refound.ckpt.copier import Copier, SlotMemory
from refound.ckpt.errors import DamageError, LayoutMismatchError
from refound.ckpt.frozen import FrozenSet, size_hint, word_sum
from refound.ckpt.loader import Loader
from refound.ckpt.shard import Shard, make_plan
from refound.ckpt.slots import Segment
from refound.ckpt.tree import absent_tensors, decode
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader


class Adapted(torch.nn.Module):
    """A large base, twice under its name, with a small adapter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = torch.nn.Linear(256, 256).requires_grad_(False)
        self.tied = self.base
        self.adapter = torch.nn.Linear(256, 4)
        self.register_buffer("seen", torch.zeros(1))


def training(seed: int = 0) -> dict[str, Any]:
    model = Adapted(seed)
    return {"model": model, "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])}


def train(objects: dict[str, Any]) -> None:
    model = objects["model"]
    model.adapter(model.base(torch.randn(2, 256))).sum().backward()
    objects["optimizer"].step()
    model.seen += 1


def shard_of(objects: dict[str, Any], frozen: FrozenSet | None) -> np.ndarray:
    """What a snapshot holds."""
    state = Collector(objects, rank=0, frozen=frozen).collect()
    text = json.dumps(state.objects).encode()
    plan = make_plan(state, 0, len(text))
    header = plan.header(text)
    assert header is not None
    segment = Segment("test", plan.size_bytes)
    slot = SlotMemory(segment.fd, plan.size_bytes)
    Copier(torch.device("cpu")).fill(plan, state.leaves, header, slot, None)
    return slot.array.copy()


def restore(objects: dict[str, Any], shard: np.ndarray, frozen: FrozenSet | None) -> None:
    Loader(lambda _: shard, 0).load(objects, Collector(objects, rank=0, frozen=frozen))
    if frozen is not None:
        frozen.thaw(frozen.changed())  # as Protection does


def saved(shard: np.ndarray) -> set[str]:
    return {slot.path for slot in Shard(shard).slots}


def test_only_what_trains_is_saved_and_it_comes_back() -> None:
    objects = training()
    frozen = FrozenSet(objects)
    train(objects)
    shard = shard_of(objects, frozen)
    assert not any("base" in path or "tied" in path for path in saved(shard))
    assert {"model/adapter.weight", "model/seen"} <= saved(shard)
    again = training()
    restore(again, shard, FrozenSet(again))
    for (name, a), b in zip(objects["model"].state_dict().items(), again["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_base_is_refused_by_name_and_nothing_is_changed() -> None:
    objects = training()
    shard = shard_of(objects, FrozenSet(objects))
    other = training(seed=1)
    before = {name: tensor.clone() for name, tensor in other["model"].state_dict().items()}
    with pytest.raises(LayoutMismatchError, match=r"model/base\.weight does not train.*is not what it was"):
        restore(other, shard, FrozenSet(other))
    assert all(torch.equal(before[name], tensor) for name, tensor in other["model"].state_dict().items())
    without = {"model": torch.nn.Linear(2, 2)}
    with pytest.raises(LayoutMismatchError, match=r"model/base\.weight is frozen in the snapshot and not in the job"):
        restore(without | {"optimizer": torch.optim.AdamW(without["model"].parameters())}, shard, None)


def test_the_choice_may_change_between_starts() -> None:
    """A snapshot without the base restores into a job that saves it, and one with it into a job that does not."""
    objects = training()
    again = training()
    restore(again, shard_of(objects, FrozenSet(objects)), None)
    objects["model"].base.bias.data.add_(1)  # which only a snapshot that holds it can bring back
    again = training()
    frozen = FrozenSet(again)
    restore(again, shard_of(objects, None), frozen)
    assert torch.equal(objects["model"].base.bias, again["model"].base.bias)
    assert {path for path in ("model/base.bias", "model/base.weight") if frozen.get(path)} == {"model/base.weight"}


def test_what_changes_without_gradients_is_noticed_and_saved() -> None:
    """As the moving average of a teacher does, through .data, which no version counter sees."""
    objects = training()
    frozen = FrozenSet(objects)
    assert frozen.changed() == []
    objects["model"].base.bias.data.mul_(0.5)
    assert frozen.changed() == ["model/base.bias", "model/tied.bias"]
    frozen.thaw(frozen.changed())
    assert frozen.changed() == []
    shard = shard_of(objects, frozen)
    assert "model/base.bias" in saved(shard)
    assert "model/base.weight" not in saved(shard)
    again = training()
    mine = FrozenSet(again)
    restore(again, shard, mine)
    assert torch.equal(again["model"].base.bias, objects["model"].base.bias)
    assert mine.get("model/base.bias") is None
    assert mine.get("model/base.weight") is not None


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.data())
def test_the_cheap_mark_sees_any_changed_byte(values: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(values, dtype=torch.uint8)
    changed = tensor.clone()
    at = data.draw(st.integers(0, len(values) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    assert word_sum(tensor) != word_sum(changed)


def test_a_reader_that_knows_nothing_of_it_is_not_led_astray() -> None:
    objects = training()
    facts = Collector(objects, rank=0, frozen=FrozenSet(objects)).collect().objects
    assert set(absent_tensors(facts)) == {
        f"model/{name}.{part}" for name in ("base", "tied") for part in ("weight", "bias")
    }
    with pytest.raises(DamageError, match="does not hold"):
        decode(facts["model"], lambda number: torch.zeros(number))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_conversion_holds_what_trains(tmp_path: Path) -> None:
    """As an adapter's own files do; the rest is named, with its checksum."""
    objects = training()
    train(objects)
    shard = shard_of(objects, FrozenSet(objects))
    facts = {"step": 1, "generation": 1, "world_size": 1, "job": "test"}
    source: Any = SimpleNamespace(shard=lambda _: shard, facts=facts)
    convert(source, tmp_path / "plain", "safetensors")
    held = {"adapter.weight", "adapter.bias", "seen"}
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) == held
    about = json.loads((tmp_path / "plain" / "refound.json").read_text())
    assert set(absent_tensors(about)) == {
        f"model/{name}.{part}" for name in ("base", "tied") for part in ("weight", "bias")
    }
    convert(source, tmp_path / "dcp", "dcp")
    saved = FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in held}


def test_a_large_frozen_part_is_pointed_out() -> None:
    assert size_hint(training()) == ""
    with torch.device("meta"):
        large = torch.nn.Sequential(torch.nn.Linear(16384, 8192).requires_grad_(False), torch.nn.Linear(8192, 4))
    assert "512 of the model's 512 MB do not train" in size_hint({"model": large})
