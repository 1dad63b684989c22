# SPDX-License-Identifier: Apache-2.0
"""INT8 and INT4: rounded to the nearest, unpacked by the library and run by transformers to the same numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from refound.export.compressed import BITS, Rounding, is_rounded, rounding_of
from refound.export.directory import open_directory
from refound.export.errors import EngineFitError
from refound.export.plan import ExportConfig
from refound.export.proof import make_prompts, run_engine
from refound.export.run import export_model
from safetensors.torch import load_file, save_file

from .models import decoder, heterogeneous, write_model


def unpacked(tensors: dict[str, torch.Tensor], name: str, rounding: Rounding) -> torch.Tensor:
    """A weight as the library reads it."""
    base = name.removesuffix("weight")
    scheme = QuantizationScheme(**rounding.config()["config_groups"]["group_0"])
    parts = {key.removeprefix(base): tensor for key, tensor in tensors.items() if key.startswith(base)}
    parts["weight_scale"] = parts["weight_scale"].float()
    return PackedQuantizationCompressor.decompress(parts, scheme)["weight"].float()


@given(st.sampled_from([4, 8]), st.sampled_from([32, 64]), st.integers(0, 10**6), st.floats(1e-4, 1e4))
def test_no_number_moves_by_more_than_half_a_step(bits: int, group: int, seed: int, size: float) -> None:
    weight = size * torch.randn(3, 2 * group, generator=torch.Generator().manual_seed(seed))
    rounding = Rounding(bits=bits, group=group)
    found = unpacked(rounding.pack("x.weight", weight), "x.weight", rounding)
    step = weight.unflatten(-1, (2, group)).abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
    moved = (found - weight).unflatten(-1, (2, group)).abs()
    # the scale is a bfloat16: 2^-8 off at most, times up to 2^(bits - 1) steps; and the largest number may be cut off
    assert (moved <= step * (0.51 + 2.0 ** (bits - 1 - 8)) + 1e-30).all()


def test_transformers_computes_what_the_rounded_weights_say(tmp_path: Path) -> None:
    """Beside a model whose weights are those numbers, written out."""
    weights = "int4"
    model = decoder(layers=2, hidden_size=128, width=256)
    source = write_model(tmp_path / "model", model)
    config = ExportConfig(model=source, engines=("transformers",), out=tmp_path / "out", quantize=weights, verify=False)
    (done,) = export_model(config, lambda line: None)
    path = done.part.model_path
    assert abs(done.part.files[0][1] - (path / "model.safetensors").stat().st_size) < 20_000
    tensors = load_file(path / "model.safetensors")
    rounding = rounding_of(model, weights)
    assert isinstance(rounding, Rounding) and rounding.group == 128
    plain = {
        name: unpacked(tensors, name, rounding) if is_rounded(name, spec.shape) else tensors[name].float()
        for name, spec in model.tensors().items()
    }
    write_model(tmp_path / "plain", model)
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    answers = run_engine("transformers", [tmp_path / "plain", path], make_prompts(open_directory(source)))["models"]
    assert answers[1]["logit_difference"] < 0.02 * max(map(max, answers[0]["margins"]))
    told = json.loads((path / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["weights"]["num_bits"] == BITS[weights]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (decoder("mixtral"), "experts are not rounded to int4"),
        (replace(decoder(), layers=decoder(width=90).layers), "rows of 90 numbers are no multiple of 32"),
    ],
)
def test_what_cannot_be_packed_is_told(tmp_path: Path, model, told: str) -> None:
    source = write_model(tmp_path / "model", model)
    config = ExportConfig(model=source, engines=("transformers",), out=tmp_path / "out", quantize="int4", verify=False)
    with pytest.raises(EngineFitError, match=told):
        export_model(config, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_layers_may_differ() -> None:
    assert rounding_of(heterogeneous(), "int4") == Rounding(bits=4, group=32)
