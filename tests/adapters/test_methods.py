# SPDX-License-Identifier: Apache-2.0
"""The battery: every method on every family starts as the base, trains alone, comes back, is recast or says why not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refound.adapters.base import Base, check_recast, load_model, open_base, write_recast
from refound.adapters.bottleneck import Parallel, Series
from refound.adapters.errors import NotServableError, UnknownBlocksError
from refound.adapters.kinds import KINDS
from refound.adapters.peft_methods import Dora, Lora, Prefix, RsLora, Vera
from refound.adapters.prune import PrunedLora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .families import FAMILIES, write_family

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0}
METHODS: dict[str, Any] = {
    "lora": Lora(**LORA),
    "rslora": RsLora(**LORA),
    "dora": Dora(**LORA),
    "vera": Vera(rank=8),
    "prefix": Prefix(tokens=3),
    "pruned-lora": PrunedLora(**LORA, ffn=0.25),
    "pruned-lora, heads": PrunedLora(**LORA, ffn=0.3, kv_heads=1, multiple=8),
    "series": Series(width=8),
    "series, linear": Series(width=8, activation="linear"),
    "series, attention": Series(width=8, activation="linear", placement="both", scale=0.5),
    "parallel": Parallel(width=8),
    "parallel, linear": Parallel(width=8, activation="linear", scale=0.5),
    "parallel, relu": Parallel(width=8, activation="relu"),
    "parallel, attention": Parallel(width=8, activation="gelu", placement="both"),
}
_LORAS = ("lora", "rslora", "dora", "vera")
RECAST: dict[tuple[str, str], str] = {
    **{
        (method, family): "merged" for method in (*_LORAS, "series, linear", "series, attention") for family in FAMILIES
    },
    **{("pruned-lora", family): "sliced" for family in ("llama", "gpt_neox", "opt")},
    ("pruned-lora, heads", "llama"): "sliced",
    **{("parallel", family): "folded" for family in ("llama", "gpt_neox", "opt")},
    ("parallel, linear", "gpt_neox"): "folded",  # gelu(z) - gelu(-z) = z
    ("parallel, linear", "opt"): "folded",
    ("parallel, relu", "opt"): "folded",  # its own activation
}
"""What becomes of each; all others say why not."""
REFUSED = {("pruned-lora", "bloom"), *(("pruned-lora, heads", family) for family in ("gpt_neox", "opt", "bloom"))}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(48).reshape(4, 12) * 7 % 384


def cases() -> Iterator[Any]:
    """All of both; a variant of a method goes by itself where it says no more than another one of it."""
    for name in METHODS:
        for family in FAMILIES:
            more = "," in name and family != "llama" and (name, family) not in RECAST
            yield pytest.param(name, family, marks=pytest.mark.campaign if more else ())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: open_base(write_family(folder / family, family)) for family in FAMILIES}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loss(model: Any) -> torch.Tensor:
    found = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(found, IDS[:, 1:].flatten())


def train(attached: Any, steps: int = 12, lr: float = 1e-2) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(attached.trained().values(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        found = loss(attached.model)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        attached.after_step(step + 1, steps)
        losses.append(found.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize(("name", "family"), list(cases()))
def test_every_method_on_every_family(name: str, family: str, bases: dict[str, Base], tmp_path: Path) -> None:
    method, base = METHODS[name], bases[family]
    plain = load_model(base)
    held = plain.state_dict(keep_vars=True)
    before = {key: value.detach().clone() for key, value in held.items()}
    wanted = logits(plain)
    if (name, family) in REFUSED:
        with pytest.raises(UnknownBlocksError, match=r"narrower|Llama's kind"):
            method.attach(plain, seed=3)
        return
    attached = method.attach(plain, seed=3)
    started = logits(attached.model)
    if method.identity:
        assert not torch.allclose(started, wanted), "it says that it starts elsewhere"
    else:
        assert torch.equal(started, wanted)

    first, last = train(attached, lr=5e-2 if name in ("vera", "prefix") else 1e-2)
    assert last < 0.97 * first
    trained = attached.trained()
    assert sum(p.numel() for p in trained.values()) < 0.25 * sum(t.numel() for t in before.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in held.items())

    attached.save(tmp_path)
    after = logits(attached.model)
    again = method.attach(load_model(base), seed=4)
    again.load(tmp_path)
    assert torch.equal(logits(again.model), after)
    assert again.trained().keys() == trained.keys()

    if (name, family) not in RECAST:
        with pytest.raises(NotServableError, match="Nearest that is served"):
            attached.recast()
        return
    recast = attached.recast()
    assert recast.how == RECAST[name, family]
    assert torch.equal(logits(attached.model), after), "recasting changes nothing in place"
    out = tmp_path / "served"
    write_recast(base, recast, out, record={})
    served = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(served) - after).abs().max() < 2e-5 * after.abs().max()
    if recast.how == "folded":
        assert set(recast.widths.values()) == {128 if family == "llama" else 160}  # in steps of 32
    if recast.how == "sliced":
        assert sum(p.numel() for p in served.parameters()) < sum(t.numel() for t in before.values())


def test_weights_named_as_a_bare_model_has_them_are_found(tmp_path: Path) -> None:
    """As BLOOM's on the hub: h.0.… and not transformer.h.0.…"""
    folder = write_family(tmp_path / "bloom", "bloom")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    base = open_base(folder)
    attached = METHODS["lora"].attach(load_model(base), seed=3)
    train(attached)
    check_recast(base, attached.recast())
    write_recast(base, attached.recast(), tmp_path / "served", record={})
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32)
    after = logits(attached.model)
    assert (logits(served) - after).abs().max() < 2e-5 * after.abs().max()


def test_every_kind_is_in_the_battery() -> None:
    assert {type(method) for method in METHODS.values()} == set(KINDS.values())


def test_peft_reads_what_is_saved(bases: dict[str, Base], tmp_path: Path) -> None:
    from peft import PeftModel

    base = bases["llama"]
    attached = METHODS["rslora"].attach(load_model(base), seed=3)
    train(attached)
    attached.save(tmp_path)
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), tmp_path)
    assert torch.equal(logits(read), logits(attached.model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.path)
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
