# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of torch.distributed.checkpoint (DCP), which is what FSDP2 trainings save: read without running anything.

Their index is a pickle by format: it is read as what it says (`pickled`), and none of it is done. Each tensor lies in
chunks, which torch reads with `weights_only`.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelDamageError, UnknownArchitectureError
from .pickled import Name, Node, read_pickle
from .trained import Trained, damaged

if TYPE_CHECKING:
    import torch

INDEX = ".metadata"
_FORM = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A block of a tensor, and where its bytes lie."""

    low: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[_Chunk, ...]


def is_dcp(path: Path) -> bool:
    return (path / INDEX).is_file()


def read_dcp(path: Path) -> Trained:
    """The tensors of the checkpoint at `path`, whatever else it holds.

    Raises:
        ModelDamageError: if index or data cannot be read.
        UnknownArchitectureError: if its data is compressed or encrypted.
    """
    try:
        with (path / INDEX).open("rb") as file:
            tensors = _tensors(read_pickle(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, UnknownArchitectureError):
            raise
        raise damaged(path / INDEX, error) from error
    return Trained(
        told=f"DCP checkpoint {path}",
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        read=lambda name: _read(path, name, tensors[name]),
    )


def _fields(value: Any, kind: str, module: str = _FORM) -> Mapping[str, Any]:
    """The fields of a data class of the index. Raises ValueError if it is something else."""
    if not isinstance(value, Node) or value.kind != Name(module, kind) or not isinstance(value.state, dict):
        found = f"{value.kind.module}.{value.kind.name}" if isinstance(value, Node) else type(value).__name__
        raise ValueError(f"it holds {found} where {kind} belongs, and was not looked up")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    """A torch.Size."""
    if not isinstance(value, Node) or value.kind != Name("torch", "Size"):
        raise ValueError("it has no size where one belongs")
    return tuple(int(length) for length in (value.arguments[0] if value.arguments else ()))


def _tensors(index: Any) -> dict[str, _Tensor]:
    whole = _fields(index, "Metadata")
    places = {}
    for key, place in whole["storage_data"].items():
        at = _fields(key, "MetadataIndex")
        low = _size(at["offset"]) if at.get("offset") is not None else None
        places[at["fqn"], low] = _fields(place, "_StorageInfo", "torch.distributed.checkpoint.filesystem")
    tensors = {}
    for name, entry in whole["state_dict_metadata"].items():
        if isinstance(entry, Node) and entry.kind == Name(_FORM, "BytesStorageMetadata"):
            continue  # what is no tensor is pickled, and not read
        found = _fields(entry, "TensorStorageMetadata")
        dtype = found["properties"].state[0]
        chunks = tuple(_chunk(name, chunk, places) for chunk in found["chunks"])
        tensors[name] = _Tensor(shape=_size(found["size"]), dtype=dtype.name, chunks=chunks)
    return tensors


def _chunk(name: str, value: Any, places: Mapping[tuple[str, Any], Mapping[str, Any]]) -> _Chunk:
    fields = _fields(value, "ChunkStorageMetadata")
    low = _size(fields["offsets"])
    place = places[name, low]
    if place.get("transform_descriptors"):
        raise UnknownArchitectureError(f"{name} is stored by {place['transform_descriptors']}, which is not read here")
    file = place["relative_path"]
    if Path(file).name != file:
        raise ValueError(f"it points out of its directory: {file}")
    return _Chunk(
        low=low, shape=_size(fields["sizes"]), file=file, offset=int(place["offset"]), length=int(place["length"])
    )


def _read(path: Path, name: str, tensor: _Tensor) -> "torch.Tensor":
    import torch

    whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    covered = 0
    for chunk in tensor.chunks:
        try:
            with (path / chunk.file).open("rb") as file:
                file.seek(chunk.offset)
                found = torch.load(io.BytesIO(file.read(chunk.length)), map_location="cpu", weights_only=True)
            if not isinstance(found, torch.Tensor) or tuple(found.shape) != chunk.shape or found.dtype != whole.dtype:
                raise ValueError(f"a chunk of {name} is not what the index says")
            high = tuple(low + size for low, size in zip(chunk.low, chunk.shape, strict=True))
            if any(end > size for end, size in zip(high, tensor.shape, strict=True)):
                raise ValueError(f"a chunk of {name} goes beyond it")
        except Exception as error:  # torch raises this and that for a file that is cut short
            raise damaged(path / chunk.file, error) from error
        whole[tuple(slice(low, end) for low, end in zip(chunk.low, high, strict=True))] = found
        covered += math.prod(chunk.shape)
    if covered != math.prod(tensor.shape):
        raise ModelDamageError(f"{path}: {covered} of the {math.prod(tensor.shape)} numbers of {name} are there")
    return whole
