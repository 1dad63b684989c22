# SPDX-License-Identifier: Apache-2.0
"""A placement put into a checkpoint: experts renumbered, router rows with them, so that it computes the same.

Engines share experts out over ranks in the order of their numbers (vLLM's `linear` placement: `determine_expert_map`
in `vllm/model_executor/layers/fused_moe/layer.py`, the first ranks one more where it does not divide; SGLang's
`trivial` location). With the numbers chosen so that each device's experts lie together, every engine realizes the
placement with no change and no map. Softmax, top k and the weighted sum do not know an expert's number; only the
order of that sum changes, and with it the last bits.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...export.atomic import fresh_directory, require_space
from ...export.directory import INDEX, ModelDirectory
from .errors import MismatchError, PlanError

if TYPE_CHECKING:
    import torch

RECORD = "refound.json"


def order_of(device_of: np.ndarray) -> np.ndarray:
    """For each layer and new number, the expert that gets it: (layers, experts). A device keeps the old order."""
    return np.argsort(device_of, axis=1, kind="stable")


def moe_layers(model: ModelDirectory) -> list[int]:
    """The layers that have experts, in order; layer l of a trace is the l-th of these."""
    return [index for index, layer in enumerate(model.decoder.layers) if layer.ffn.kind == "moe"]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """Where a tensor of the new directory comes from."""

    name: str
    source: str
    rows: np.ndarray | None
    """Of a router: new row -> old row."""


def changes_of(model: ModelDirectory, order: np.ndarray) -> list[_Change]:
    """One for every tensor of the model.

    Raises:
        MismatchError: if `order` is not one permutation for each layer of experts.
    """
    layers, moe = moe_layers(model), model.decoder.blocks.moe
    if moe is None or not layers:
        raise MismatchError(
            f"{model.path} has no experts (it is {model.decoder.family}); carve it first: refound carve"
        )
    if len(order) != len(layers):
        raise MismatchError(f"{model.path} has {len(layers)} layers of experts, and the plan is for {len(order)}")
    changed: dict[str, _Change] = {}
    for row, index in zip(order, layers, strict=True):
        experts, prefix = model.decoder.layers[index].ffn.experts, f"model.layers.{index}."
        if sorted(row.tolist()) != list(range(experts)):
            raise MismatchError(f"layer {index} has {experts} experts, and the plan does not number each of them once")
        changed[prefix + moe.router] = _Change(name=prefix + moe.router, source=prefix + moe.router, rows=row)
        for new, old in enumerate(row.tolist()):
            for matrix in moe.matrices:
                pattern = prefix + moe.expert + ".weight"
                name, source = (pattern.replace("{expert}", str(n)).format(matrix) for n in (new, old))
                changed[name] = _Change(name=name, source=source, rows=None)
    return [changed.get(name, _Change(name=name, source=name, rows=None)) for name in model.tensors]


def permute_experts(
    model: ModelDirectory,
    order: np.ndarray,
    out: Path,
    *,
    record: dict[str, Any],
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[str, ...]:
    """Write the model with its experts renumbered: `order` as from `order_of`. One shard at a time is in memory.

    Every tensor is read back and held against its source, bit for bit. Returns names of files of the source that do
    not go along, since nothing is known of what they say about experts.

    Raises:
        MismatchError: if `order` does not fit the model, or what was written is not what was meant.
        OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`.
    """
    from safetensors.torch import save_file

    changes = changes_of(model, order)
    if out.resolve() == model.path.resolve():
        raise PlanError(f"{out} is the model itself; write the permuted one beside it with another --out")
    require_space(out.parent, sum(file.stat().st_size for file in model.files))
    with fresh_directory(out, overwrite=overwrite) as folder:
        weight_map: dict[str, str] = {}
        for file in model.files:
            mine = [change for change in changes if model.tensors[change.source].file == file]
            progress(f"writing {file.name}")
            save_file(dict(_moved(model, mine)), folder / file.name, metadata={"format": "pt"})
            weight_map |= {change.name: file.name for change in mine}
        if len(model.files) > 1:
            total = sum(stored.bytes for stored in model.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        shutil.copyfile(model.path / "config.json", folder / "config.json")
        for file in model.companions:
            shutil.copyfile(file, folder / file.name)
        _prove(model, changes, folder, weight_map)
        files = {file.name: _file(file) for file in sorted(folder.iterdir())}
        told = {"schema": 1, "parameters": model.decoder.parameters, **record, "files": files}
        (folder / RECORD).write_text(json.dumps(told, indent=2) + "\n")
    known = {"config.json", INDEX, RECORD, *(file.name for file in (*model.files, *model.companions))}
    return tuple(sorted(path.name for path in model.path.iterdir() if path.name not in known))


def _moved(model: ModelDirectory, changes: list[_Change]) -> "Iterator[tuple[str, torch.Tensor]]":
    import torch

    by_source = {change.source: change for change in changes}
    for source, tensor in model.weights(list(by_source)):
        change = by_source[source]
        moved = tensor if change.rows is None else tensor[torch.from_numpy(change.rows)].contiguous()
        yield change.name, moved


def _prove(model: ModelDirectory, changes: list[_Change], folder: Path, weight_map: dict[str, str]) -> None:
    import torch
    from safetensors import safe_open

    by_source = {change.source: change for change in changes}
    for source, tensor in model.weights(list(by_source)):
        change = by_source[source]
        with safe_open(folder / weight_map[change.name], framework="pt") as opened:
            found = opened.get_tensor(change.name)
        if change.rows is None:
            same = torch.equal(_bits(found), _bits(tensor))
        else:
            same = all(
                torch.equal(_bits(found[new]), _bits(tensor[old])) for new, old in enumerate(change.rows.tolist())
            )
        if not same:
            raise MismatchError(f"{change.name} was not written as {source} is: nothing is kept. Is the disk sound?")


def _bits(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().view(torch.uint8)


def _file(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
