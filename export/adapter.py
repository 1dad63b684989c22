# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT writes them: checked against the model they belong to, and merged into it.

W' = W + s B A (Hu et al. 2021, arXiv:2106.09685), s = alpha / r, or alpha / sqrt(r) with `use_rslora`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .directory import ModelDirectory, Stored, read_header
from .errors import ExportUsageError, ModelDamageError, ModelDirectoryError, UnknownArchitectureError
from .trained import Trained

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "refound.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What PEFT can do beyond B A, and no server can.
_REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the low-rank ones",
    "fan_in_fan_out": "transposed weights",
    "target_parameters": "low-rank changes of fused expert tensors",
    "trainable_token_indices": "single trained token embeddings",
    "lora_bias": "biases of B",
    "megatron_config": "Megatron's layers",
}


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change of one weight."""

    weight: str
    """The base model's name of it."""
    a: str
    """(rank, columns)"""
    b: str
    """(rows, rank)"""
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that has been checked against its base."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    changes: tuple[LowRank, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.tensors.values())

    @property
    def rank(self) -> int:
        """The largest."""
        return max(change.rank for change in self.changes)

    def read(self, name: str) -> "torch.Tensor":
        """One of its tensors in float32."""
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS, framework="pt") as opened:
            return opened.get_tensor(name).float()

    def check_numbers(self) -> None:
        """Raise ModelDamageError naming what holds NaN or infinity."""
        bad = [name for name in self.tensors if not self.read(name).isfinite().all()]
        if bad:
            raise ModelDamageError(f"{self.path}: NaN or infinity in {', '.join(bad[:4])}: take an earlier checkpoint")


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def base_of(path: Path) -> Path:
    """What the adapter calls its base, as a path; it need not be one, or be there.

    Raises:
        ModelDamageError: see `read_adapter`.
    """
    return Path(str(_config(path).get("base_model_name_or_path") or path / "no-base"))


def read_adapter(path: Path, base: ModelDirectory) -> Adapter:
    """Check the adapter in `path` whole, against the shapes of `base` and, where it names one, its hash.

    Raises:
        ModelDirectoryError: pickled or missing weights.
        ModelDamageError: cut short, halves missing, or it says that it belongs to other weights than those of `base`.
        UnknownArchitectureError: another method than LoRA, or an extension that servers do not take.
        ExportUsageError: it changes weights that `base` does not have, or with another shape.
    """
    config = _config(path)
    if not (path / WEIGHTS).is_file():
        pickled = f"pickled weights ({PICKLE}), which are not read" if (path / PICKLE).is_file() else f"no {WEIGHTS}"
        raise ModelDirectoryError(
            f"{path} has {pickled}: save it with save_pretrained of a PEFT that is not older than 0.5"
        )
    tensors = read_header(path / WEIGHTS)
    halves: dict[str, dict[str, str]] = {}
    unknown = []
    for name in tensors:
        if match := _KEY.fullmatch(name.removeprefix(_PREFIX)):
            halves.setdefault(match["module"], {})[match["side"]] = name
        else:
            unknown.append(name)
    if unknown:
        raise UnknownArchitectureError(f"{path} holds {', '.join(unknown[:3])}, which is no half of a LoRA pair")
    alone = [module for module, sides in halves.items() if len(sides) != 2]
    if alone or not halves:
        raise ModelDamageError(f"{path} lacks one half of {', '.join(alone[:3]) or 'everything'}: save it again")
    changes = tuple(_change(config, tensors, module, sides["A"], sides["B"]) for module, sides in halves.items())
    if problems := list(_misfits(changes, tensors, base)):
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ExportUsageError(f"{path} does not belong to {base.path}: {'; '.join(problems[:4])}{more}")
    return Adapter(path=path, config=config, tensors=tensors, changes=changes, notes=_check_base(path, base))


def _config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        what = f"has no {CONFIG}, so it is no adapter of PEFT" if path.is_dir() else "is not there"
        raise ModelDirectoryError(f"{path} {what}")
    try:
        config = json.loads((path / CONFIG).read_text())
        kind, problems = config.get("peft_type"), [told for key, told in _REFUSED.items() if config.get(key)]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelDamageError(f"{path / CONFIG} cannot be read: {error}") from error
    if kind != "LORA":
        raise UnknownArchitectureError(
            f"{path} is {kind}; servers take LoRA only. Merge it with PEFT, export the model"
        )
    if config.get("bias", "none") != "none":
        problems.append("trained biases")
    if problems:
        raise UnknownArchitectureError(
            f"{path} has {', '.join(problems)}, which servers do not take in an adapter. Merge it with PEFT "
            "(merge_and_unload) and export the model"
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise ModelDamageError(f"{path / CONFIG} has no usable r and lora_alpha")
    return config


def _change(config: dict[str, Any], tensors: dict[str, Stored], module: str, a: str, b: str) -> LowRank:
    rank = tensors[a].shape[0] if tensors[a].shape else 0
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    return LowRank(weight=f"{module}.weight", a=a, b=b, rank=rank, scale=scale)


def _patterned(patterns: Any, module: str, usual: Any) -> Any:
    """The value of the first pattern that ends the module's name at a dot, which is PEFT's rule."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, usual)


def _misfits(changes: tuple[LowRank, ...], tensors: dict[str, Stored], base: ModelDirectory) -> Iterator[str]:
    specs = base.decoder.tensors()
    for change in changes:
        a, b = tensors[change.a].shape, tensors[change.b].shape
        spec = specs.get(change.weight)
        if spec is None or len(spec.shape) != 2 or change.weight == "model.embed_tokens.weight":
            yield f"it changes {change.weight}, which is no matrix of that model"
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            yield f"{change.weight}: A is {list(a)} and B is {list(b)}"
        elif (b[0], a[1]) != spec.shape:
            yield f"{change.weight} is {list(spec.shape)}, and the adapter is for {[b[0], a[1]]}"


def _check_base(path: Path, base: ModelDirectory) -> tuple[str, ...]:
    """Hold the hash of the base that an adapter of ours carries against `base`."""
    try:
        wanted = json.loads((path / RECORD).read_text())["base"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return ("the adapter names no hash of its base, so only shapes were compared",)
    if wanted != base.fingerprint():
        raise ModelDamageError(
            f"{path} was made for other weights than those in {base.path} (SHA-256 {str(wanted)[:12]}…): name that one"
        )
    return ()


def merged(adapter: Adapter, base: ModelDirectory, *, dtype: str = "") -> Trained:
    """The base with the adapter in its weights, in the base's own types, or all as `dtype`."""
    import torch

    changes = {change.weight: change for change in adapter.changes}

    def read(name: str) -> "torch.Tensor":
        ((_, weight),) = base.weights([name])
        wide, change = weight.float(), changes.get(name)
        if change:
            wide = wide + change.scale * (adapter.read(change.b) @ adapter.read(change.a))
        return wide.to(getattr(torch, dtype) if dtype else weight.dtype)

    return Trained(
        told=f"{base.path} with the adapter {adapter.path} merged",
        shapes={name: stored.shape for name, stored in base.tensors.items()},
        dtypes={name: dtype or _NAMES[stored.dtype] for name, stored in base.tensors.items()},
        read=read,
    )
