# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of torch.distributed.checkpoint (DCP), which is what FSDP2 trainings save: read without running anything.

Their index is a pickle by format. It is read by an unpickler that knows the few data classes of such an index and
builds nothing else; the tensors are read with torch's `weights_only`.
"""

import pickle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import ModelDamageError
from .trained import Trained, damaged

if TYPE_CHECKING:
    import torch

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
# What an index consists of: data classes that only take their fields, and torch's names of types and layouts.
_KNOWN = {
    _METADATA: {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index; whatever else a file names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of DCP does; it was not looked up")
        return super().find_class(module, name)


def is_dcp(path: Path) -> bool:
    return (path / INDEX).is_file()


def read_index(file: IO[bytes], path: Path) -> Any:
    """The `Metadata` of a checkpoint.

    Raises:
        ModelDamageError: if it is no index of DCP, or names anything that does not belong into one.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        found = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, Metadata):
        raise ModelDamageError(f"{path} holds a {type(found).__name__} and not the index of a DCP checkpoint")
    return found


def read_dcp(path: Path) -> Trained:
    """The tensors of the checkpoint at `path`, whatever else it holds.

    Raises:
        ModelDamageError: if index or data cannot be read.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with (path / INDEX).open("rb") as file:
        index = read_index(file, path / INDEX)
    tensors = {
        name: entry for name, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> "torch.Tensor":
        return _read(path, index, name, tensors[name])

    return Trained(
        told=f"DCP checkpoint {path}",
        shapes={name: tuple(entry.size) for name, entry in tensors.items()},
        dtypes={name: str(entry.properties.dtype).removeprefix("torch.") for name, entry in tensors.items()},
        read=read,
    )


def _read(path: Path, index: Any, name: str, entry: Any) -> "torch.Tensor":
    import warnings

    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """DCP's own, but for the index, which it would unpickle with whatever code is in it."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

    target = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # as intended: one process reads it all
            load({name: target}, storage_reader=Reader(path), no_dist=True)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(path, error) from error
    except CheckpointException as error:  # what DCP makes of whatever went wrong; it is no Exception
        first = next(iter(error.failures.values()))[0]
        if not isinstance(first, Exception):
            raise
        raise damaged(path, first) from error
    return target
