# SPDX-License-Identifier: Apache-2.0
"""A permuted checkpoint computes what the model does, in every layout of experts; and maps say the same placement."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from refound.export.directory import ModelDirectory, open_directory
from refound.nas.serving.errors import MismatchError, PlanError
from refound.nas.serving.maps import expert_map
from refound.nas.serving.permute import moe_layers, order_of, permute_experts
from safetensors.torch import load_file

from ...export.models import decoder, with_layer, write_model

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def model_of(folder: Path, family: str, **changes: object) -> ModelDirectory:
    return open_directory(write_model(folder, decoder(family, layers=3, **changes)))  # type: ignore[arg-type]


def permutations(layers: int, experts: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(experts) for _ in range(layers)])


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_model_computes_the_same(tmp_path: Path, family: str) -> None:
    model = model_of(tmp_path / "model", family)
    order = permutations(3, 4)
    left_out = permute_experts(model, order, tmp_path / "permuted", record={"from": "test"})
    assert left_out == ()
    ids = torch.randint(0, model.decoder.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = logits(tmp_path / "model", ids), logits(tmp_path / "permuted", ids)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    # and it is really another checkpoint, with the experts where the order says
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "permuted"))
    moe = model.decoder.blocks.moe
    assert moe is not None
    for layer in range(3):
        router = f"model.layers.{layer}.{moe.router}"
        assert torch.equal(new[router], old[router][torch.from_numpy(order[layer])])
        for number, source in enumerate(order[layer]):
            name = f"model.layers.{layer}.{moe.expert}.weight"
            for matrix in moe.matrices:
                wanted = old[name.replace("{expert}", str(source)).format(matrix)]
                assert torch.equal(new[name.replace("{expert}", str(number)).format(matrix)], wanted)
    told = json.loads((tmp_path / "permuted" / "refound.json").read_text())
    assert told["from"] == "test" and "model.safetensors" in told["files"]


def test_dense_layers_stay_and_shards_stay_apart(tmp_path: Path) -> None:
    """Qwen3-MoE with a dense layer between, in two shards, and a file that nobody knows."""
    from refound.export.architecture import FFN

    made = with_layer(decoder("qwen3_moe", layers=3), 1, ffn=FFN(width=96))
    folder = write_model(tmp_path / "model", made)
    _in_two_shards(folder)
    (folder / "pregate.safetensors").write_bytes(b"?")
    model = open_directory(folder)
    assert moe_layers(model) == [0, 2] and len(model.files) == 2
    order = permutations(2, 4)
    assert permute_experts(model, order, tmp_path / "out", record={}) == ("pregate.safetensors",)
    assert len(open_directory(tmp_path / "out").files) == 2
    ids = torch.arange(48).reshape(2, 24)
    before, after = logits(folder, ids), logits(tmp_path / "out", ids)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


def _in_two_shards(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_orders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "mixtral")
    out = tmp_path / "out"
    with pytest.raises(MismatchError, match="3 layers of experts, and the plan is for 2"):
        permute_experts(model, permutations(2, 4), out, record={})
    with pytest.raises(MismatchError, match="does not number each of them once"):
        permute_experts(model, np.zeros((3, 4), int), out, record={})
    with pytest.raises(PlanError, match="is the model itself"):
        permute_experts(model, permutations(3, 4), model.path, record={}, overwrite=True)
    dense = open_directory(write_model(tmp_path / "dense", decoder()))
    with pytest.raises(MismatchError, match="has no experts"):
        permute_experts(dense, permutations(3, 4), out, record={})
    assert not out.exists()


def test_maps_say_the_placement() -> None:
    device_of = np.array([[1, 0, 1, 0], [0, 0, 1, 1]])
    told = expert_map("sglang", device_of, 2, family="qwen2_moe", layers=[0, 2], model_layers=3)
    rows = told["physical_to_logical_map"]
    assert rows == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    for row, index in ((0, 0), (1, 2)):  # as SGLang reads it: place // experts on a rank
        for place, expert in enumerate(rows[index]):
            assert place // 2 == device_of[row][expert]
    told = expert_map("vllm-ascend", device_of, 2, family="qwen3_moe", layers=[0, 1], model_layers=2)
    assert told["moe_layer_count"] == 2
    assert told["layer_list"][0] == {
        "layer_id": 0,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [1, 3]}, {"device_id": 1, "device_expert": [0, 2]}],
    }
    assert told["layer_list"][1]["layer_id"] == 1


@pytest.mark.parametrize(
    ("engine", "family", "devices", "layers", "told"),
    [
        ("sglang", "qwen3_moe", 3, [0], "do not divide by 3 devices"),
        ("vllm-ascend", "qwen3_moe", 3, [0], "do not divide by 3 devices"),  # its reader makes one tensor of them
        ("sglang", "mixtral", 2, [0], "and not for mixtral"),  # its class says nothing of where experts are
        ("vllm-ascend", "qwen2_moe", 2, [0], "and not for qwen2_moe"),
        ("vllm-ascend", "qwen3_moe", 2, [1], "only 1 of 2 layers have experts"),
        ("vllm", "qwen3_moe", 2, [0], "'vllm' reads no expert map"),
    ],
)
def test_what_takes_no_map_is_told(engine: str, family: str, devices: int, layers: list[int], told: str) -> None:
    device_of = np.array([[0, 0, 1, 1]]) if devices == 2 else np.array([[0, 0, 1, 2]])
    with pytest.raises(PlanError, match=told):
        expert_map(engine, device_of, devices, family=family, layers=layers, model_layers=layers[-1] + 1)


def test_the_order_puts_each_device_together() -> None:
    device_of = np.array([[2, 0, 1, 0, 2, 1]])
    order = order_of(device_of)
    assert device_of[0][order[0]].tolist() == [0, 0, 1, 1, 2, 2]
