# SPDX-License-Identifier: Apache-2.0
"""Tensors and facts in one safetensors file that proves itself: the SHA-256 of both is in it.

It is written beside its place, synced and renamed, so a process killed at any moment leaves the file that was there
before, and a scrap named `.NAME.PID.part`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import DamagedFileError


def write_proven(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """facts: plain JSON values. The same arguments give the same bytes.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    told = {"facts": dict(facts), "sha256": _digest(plain, facts)}
    body = save(plain, {"refound": json.dumps(told, sort_keys=True)})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first one is what is told
            part.unlink()
        raise


def read_proven(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, facts), every byte proven.

    Raises:
        DamagedFileError: if it is not what `write_proven` wrote, with the reason.
        OSError: if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["refound"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts, wanted = told["facts"], told["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    if _digest(tensors, facts) != wanted:
        raise DamagedFileError(f"{path} is damaged: its bytes are not what was written")
    return tensors, facts


def read_facts(path: Path) -> dict[str, Any]:
    """What a file says of itself, of which nothing is proven. Raises as `read_proven`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["refound"])["facts"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def _digest(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
