# SPDX-License-Identifier: Apache-2.0
"""A LoRA merged into a base of INT8 or INT4 weights, and what the rounding takes of it.

The base is a compressed-tensors directory as `refound export --quantize` writes it. Each changed matrix W + s B A is
rounded anew, each group of a row with the scale that it had or the one that its numbers now ask for, whichever is
nearer. Rounding may take more than a small change has: the error is told as a share of the change, and a server that
takes LoRA beside the base loses nothing.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distill.save import RECORD
from ..export.atomic import fresh_directory
from ..export.compressed import PACKED, Rounding
from ..export.directory import COMPANIONS, INDEX
from .base import Base, open_base
from .errors import AdapterDamageError, BaseMismatchError, TuneUsageError
from .ranks import Pairs
from .saved import write_record


@dataclass(frozen=True, kw_only=True)
class QuantizedMerge:
    """What a merge did."""

    bits: int
    errors: Mapping[str, float]
    """Of each matrix: Frobenius norm of what rounding moved, by that of the change. Above 1 it hides the change."""
    error: float
    """The same over all matrices together."""

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "error": self.error, "errors": dict(self.errors)}

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        advice = "" if self.error < 0.5 else ". Serve it beside the base instead: there nothing is lost"
        return (
            f"merged into {len(self.errors)} matrices of INT{self.bits}: rounding moves them by {self.error:.2f} of "
            f"the change (Frobenius norm), most in {worst}, by {self.errors[worst]:.2f}{advice}"
        )


def rounding_in(directory: Path) -> Rounding:
    """How the matrices in `directory` are rounded.

    Raises:
        TuneUsageError: they are not, or by another scheme than those that refound writes.
        AdapterDamageError: its config.json cannot be read.
    """
    try:
        told = json.loads((directory / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterDamageError(f"{directory / 'config.json'} cannot be read: {error}") from error
    try:
        weights = told["config_groups"]["group_0"]["weights"]
        found = Rounding(bits=int(weights["num_bits"]), group=int(weights["group_size"]))
        same = {key: found.config()[key] for key in ("quant_method", "format", "ignore")}
        if any(told[key] != value for key, value in same.items()) or not weights["symmetric"]:
            raise ValueError
        if len(told["config_groups"]) > 1:
            raise ValueError  # matrices of several formats, as a search chooses them
    except (KeyError, TypeError, ValueError) as error:
        raise TuneUsageError(
            f"{directory} is not rounded as `refound export --quantize int8|int4` does it (compressed-tensors, "
            "pack-quantized, symmetric groups); merge into the base before it is rounded"
        ) from error
    return found


def check_rounded_from(directory: Path, base: Base) -> None:
    """Whether `directory` is `base`, or what was made of it by rounding.

    Raises:
        BaseMismatchError: it is of other weights, or does not say of which.
        ExportError, AdapterError: see `base.open_base`.
    """
    wanted = base.fingerprint()
    try:
        source = json.loads((directory / RECORD).read_text())["source"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        source = None
    if source != wanted and open_base(directory).fingerprint() != wanted:
        of = f"was rounded from other weights than those in {base.path}" if source else "does not say what it was"
        raise BaseMismatchError(
            f"{directory} {of}, which the adapter was trained on (SHA-256 {wanted[:12]}…): refound export {base.path} "
            "--to vllm --quantize int8|int4"
        )


def merge_quantized(directory: Path, pairs: Pairs, out: Path, *, overwrite: bool = False) -> QuantizedMerge:
    """Write `directory` with the changes in its matrices into `out`.

    pairs: A and B of each module, the scale in B. They must belong to it: see `check_rounded_from`.

    Raises:
        TuneUsageError: see `rounding_in`; or it lacks a matrix that is changed, or has it in another shape.
        AdapterDamageError, ModelDamageError: weights of it are missing or cut short.
        OutputExistsError, OutputSpaceError: see `export.atomic`.
        ExportError: the package compressed-tensors is missing.
    """
    from safetensors.torch import load_file, save_file

    rounding, base = rounding_in(directory), open_base(directory)
    assert base.source is not None
    stored = base.source.tensors
    missing = [name for name in pairs if f"{name}.weight_packed" not in stored]
    if missing:
        raise TuneUsageError(f"{directory} has no rounded {', '.join(missing[:4])}, which the adapter changes")
    changed = dict[str, torch.Tensor]()
    moved, size = dict[str, float](), dict[str, float]()
    for name, (a, b) in pairs.items():
        read = dict(base.source.weights([f"{name}.{key}" for key in PACKED]))
        parts = {key: read[f"{name}.{key}"] for key in PACKED}
        change = b.float() @ a.float()
        before = rounding.unpack(parts)
        if before.shape != change.shape:
            raise TuneUsageError(f"{name} is {list(before.shape)} there, and the adapter is for {list(change.shape)}")
        wanted = before + change
        packed, found = _nearest(rounding, f"{name}.weight", wanted, parts["weight_scale"].float())
        changed |= packed
        moved[name], size[name] = float((found - wanted).square().sum()), float(change.square().sum())
    total = sum(size.values())
    merge = QuantizedMerge(
        bits=rounding.bits,
        errors={name: (moved[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in pairs},
        error=(sum(moved.values()) / total) ** 0.5 if total else 0.0,
    )
    with fresh_directory(out, overwrite=overwrite) as folder:
        for file in base.files:
            tensors = load_file(file)
            tensors |= {name: changed[name] for name in tensors if name in changed}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        for name in ("config.json", INDEX, *COMPANIONS):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, folder / name)
        source = {"path": str(directory.absolute()), "sha256": base.fingerprint()}
        write_record(folder, {"source": source, "merged": merge.to_json()})
    return merge


def _nearest(
    rounding: Rounding, name: str, wanted: torch.Tensor, old: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(packed, the same unpacked), each group with the better of two scales."""
    base = name.removesuffix("weight")

    def rounded(scale: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        packed = rounding.pack(name, wanted, scale)
        return packed, rounding.unpack({key.removeprefix(base): tensor for key, tensor in packed.items()})

    new = rounding.scales(wanted)
    errors = [(rounded(scale)[1] - wanted).unflatten(-1, (-1, rounding.group)).square().sum(-1) for scale in (old, new)]
    return rounded(torch.where(errors[0] <= errors[1], old, new))
