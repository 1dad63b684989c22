# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors files (https://huggingface.co/docs/safetensors): a JSON header and the bytes, nothing that runs.

Tensors are written one by one as they are made, so that a file may be larger than memory.
"""

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UnsupportedStateError

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to write."""

    name: str
    dtype: str
    """As torch calls it, without "torch."."""
    shape: tuple[int, ...]
    size_bytes: int
    read: Callable[[], np.ndarray]
    """Its bytes, row by row."""


def write_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file, durably. Raises UnsupportedStateError for a type that the format has not."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        if entry.dtype not in _DTYPES:
            raise UnsupportedStateError(f"{entry.name} is {entry.dtype}, which safetensors cannot hold: use --to dcp")
        place = [at, at + entry.size_bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        at += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            data = entry.read()
            assert len(data) == entry.size_bytes, entry.name
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())


def write_split(folder: Path, stem: str, entries: Sequence[Entry], largest_bytes: int) -> dict[str, str]:
    """One file `stem.safetensors`, or as Hugging Face splits them: parts and an index. Returns tensor → file."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.size_bytes > largest_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size_bytes
    if len(groups) == 1:
        write_tensors(folder / f"{stem}.safetensors", groups[0])
        return {entry.name: f"{stem}.safetensors" for entry in entries}
    where: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / name, group)
        where |= {entry.name: name for entry in group}
    index = {"metadata": {"total_size": sum(entry.size_bytes for entry in entries)}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return where
