# SPDX-License-Identifier: Apache-2.0
"""A model directory as it is written: whole under its name or not there, with the record of where it came from."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.architecture import Decoder
from ..export.atomic import fresh_directory, require_apart
from ..export.compressed import Rounding, is_rounded, mixed_config
from ..export.configs import uniform_obstacles, write_config, write_nemotron
from ..export.directory import ModelDirectory
from ..export.writers import copy_remote

if TYPE_CHECKING:
    import torch

RECORD = "refound.json"
SCHEMA = 1


def save_model(
    directory: Path,
    decoder: Decoder,
    weights: "Mapping[str, torch.Tensor]",
    *,
    companions_of: ModelDirectory,
    record: Mapping[str, Any],
    overwrite: bool = False,
    card: str = "",
    roundings: Mapping[str, Rounding] | None = None,
) -> None:
    """Write the model, with the tokenizer of `companions_of`; `record` goes into refound.json with the files' hashes.

    card: README.md, if there is to be one. roundings: of weights that are packed as compressed-tensors, by name.

    Raises:
        ExportError: the package compressed-tensors is missing, and `roundings` are asked for.
        OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`; the former too if `directory` is, or
            holds, what the companions are of.
    """
    require_apart(directory, [companions_of.path])
    with fresh_directory(directory, overwrite=overwrite) as folder:
        fill_model(folder, decoder, weights, companions_of=companions_of, record=record, card=card, roundings=roundings)


def fill_model(
    folder: Path,
    decoder: Decoder,
    weights: "Mapping[str, torch.Tensor]",
    *,
    companions_of: ModelDirectory,
    record: Mapping[str, Any],
    card: str = "",
    roundings: Mapping[str, Rounding] | None = None,
) -> None:
    """What `save_model` writes, into a directory that is there and empty."""
    from safetensors.torch import save_file

    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    decoder = replace(decoder, dtype=dtype)
    uneven = bool(uniform_obstacles(decoder))
    config = write_nemotron(decoder) if uneven else write_config(decoder)
    tensors: dict[str, torch.Tensor] = {}
    for name in decoder.tensors():
        weight = weights[name].detach().cpu().contiguous()
        rounding = (roundings or {}).get(name)
        tensors |= rounding.pack(name, weight) if rounding else {name: weight}
    if roundings:
        matrices = [name for name, spec in decoder.tensors().items() if is_rounded(name, spec.shape)]
        config["quantization_config"] = mixed_config(roundings, matrices)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in companions_of.companions:
        shutil.copyfile(file, folder / file.name)
    if uneven:
        copy_remote(folder)
    if card:
        (folder / "README.md").write_text(card)
    files = {file.name: _file(file) for file in sorted(folder.iterdir())}
    told = {"schema": SCHEMA, "parameters": decoder.parameters, **record, "files": files}
    (folder / RECORD).write_text(json.dumps(told, indent=2) + "\n")


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _file(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
