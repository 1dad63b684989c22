# SPDX-License-Identifier: Apache-2.0
"""Model directories that are not what they should be: each is told by name, before anything is written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refound.export.directory import open_directory, read_header
from refound.export.errors import ExportError, ModelDamageError, ModelDirectoryError
from safetensors.torch import load_file, save_file

from .models import decoder, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", decoder(layers=2))


def rewrite(model: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights by name (dots as `__`), or take them out."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, model / "model.safetensors")


def shard(model: Path) -> list[Path]:
    """Split the weights over two files with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    half = len(names) // 2
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save_file({name: tensors[name] for name in part}, model / file)
    weight_map = {name: files[i >= half] for i, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [model / file for file in files]


def test_a_whole_directory_is_read(model: Path) -> None:
    found = open_directory(model)
    assert found.decoder == decoder(layers=2)
    assert {name: stored.shape for name, stored in found.tensors.items()} == {
        name: spec.shape for name, spec in found.decoder.tensors().items()
    }
    found.check_numbers()
    before = found.fingerprint()
    shard(model)
    sharded = open_directory(model)
    assert len(sharded.files) == 2
    assert sharded.fingerprint() != before


def test_what_is_no_model_directory(tmp_path: Path, model: Path) -> None:
    for path, told in (
        (tmp_path / "none", "is not there"),
        (model / "config.json", "is a file"),
        (tmp_path, f"did you mean {model}"),
    ):
        with pytest.raises(ModelDirectoryError, match=told):
            open_directory(path)


def test_pickled_weights_are_not_read_and_can_be_converted(model: Path) -> None:
    """The command that the message gives does what it says."""
    import subprocess
    import sys

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    with pytest.raises(ModelDirectoryError, match="pickled weights") as caught:
        open_directory(model)
    command = str(caught.value).splitlines()[1].strip().replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert open_directory(model).decoder == decoder(layers=2)


def test_a_missing_shard(model: Path) -> None:
    files = shard(model)
    files[1].unlink()
    with pytest.raises(ModelDamageError, match=f"1 of 2 shards are missing: {files[1].name}"):
        open_directory(model)


def test_an_index_that_points_elsewhere(model: Path) -> None:
    shard(model)
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelDamageError, match="points out of its directory"):
        open_directory(model)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(keep=st.floats(0, 0.9999))
def test_a_file_that_is_cut_short_anywhere(model: Path, keep: float) -> None:
    whole = (model / "model.safetensors").read_bytes()
    try:
        (model / "model.safetensors").write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(ModelDamageError, match=r"cut short|no safetensors header"):
            open_directory(model)
    finally:
        (model / "model.safetensors").write_bytes(whole)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(header=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode), st.just(b"[1]")))
def test_a_header_of_anything_is_an_error_and_no_crash(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "any.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        assert read_header(file) == {}
    except ExportError as error:
        assert isinstance(error, ModelDamageError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(model: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(model / "model.safetensors")[name]
    tensor[3, 5] = value
    rewrite(model, **{name: tensor})
    with pytest.raises(ModelDamageError, match=f"NaN or infinity in {name}"):
        open_directory(model).check_numbers()


def test_weights_that_are_missing_unknown_or_misshapen_are_told_at_once(model: Path) -> None:
    rewrite(model, model__norm__weight=None, lm_head__bias=torch.zeros(4), lm_head__weight=torch.zeros(4, 4))
    with pytest.raises(ModelDamageError) as caught:
        open_directory(model)
    assert "1 weights are missing: model.norm.weight" in str(caught.value)
    assert "1 weights have no place in llama: lm_head.bias" in str(caught.value)
    assert "lm_head.weight has shape [4, 4] where config.json says [384, 64]" in str(caught.value)


def test_tied_weights_stored_twice(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tied", decoder(layers=1, tied=True))
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(model, lm_head__weight=embedding.clone())
    found = open_directory(model)
    assert "it is written once" in found.notes[0]
    assert "lm_head.weight" not in found.tensors
    rewrite(model, lm_head__weight=embedding + 1)
    with pytest.raises(ModelDamageError, match="both are stored and differ"):
        open_directory(model)


def test_a_model_without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelDirectoryError, match=r"no tokenizer .* --no-tokenizer"):
        open_directory(model)
    assert open_directory(model, tokenizer=False).companions


def test_quantized_weights_are_not_taken_for_numbers(model: Path) -> None:
    rewrite(model, lm_head__weight=torch.zeros(384, 64, dtype=torch.int8))
    with pytest.raises(ModelDamageError, match=r"lm_head.weight is I8"):
        open_directory(model)


def test_a_config_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ')
    with pytest.raises(ModelDamageError, match=r"config.json cannot be read"):
        open_directory(model)
