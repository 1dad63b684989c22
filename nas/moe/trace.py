# SPDX-License-Identifier: Apache-2.0
"""A routing trace: which experts a mixture chose, for every token of some text. The format, and its reader and writer.

One safetensors file.

Tensors, and no others:

    experts  int16  (layers, tokens, top_k)   the experts of each token, the one with the largest weight first;
                                              within one token and layer all differ
    tokens   int32  (tokens,)                 the token ids, in the order of the text
    starts   int64  (sequences + 1,)          where each sequence begins, and at the end the number of tokens:
                                              sequence s is tokens[starts[s]:starts[s + 1]], and none is empty

Metadata, all strings:

    format   "refound-routing-trace-1"
    model    the SHA-256 that `model_sha256` gives for the model's directory, in hexadecimal
    experts  how many experts a layer has, decimal
    top_k    how many of them a token takes, decimal
    layers   how many layers have experts, decimal: layers of the trace are those alone, in order, so that in a model
             with dense layers between them layer 0 of the trace need not be layer 0 of the model

Shared experts, which every token takes, are not in it. Needs neither torch nor transformers.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import MoeError, TraceError

FORMAT = "refound-routing-trace-1"
_HEADER_LIMIT = 100_000_000  # as in the safetensors library
_TYPES = {"experts": ("I16", np.int16, 3), "tokens": ("I32", np.int32, 1), "starts": ("I64", np.int64, 1)}
_KEYS = ("format", "model", "experts", "top_k", "layers")


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """A trace in memory. What it holds is checked when it is made.

    Raises:
        TraceError: if its parts contradict each other.
    """

    model: str
    """SHA-256 of the model, see `model_sha256`."""
    experts: int
    """Experts of a layer."""
    choice: np.ndarray
    """(layers, tokens, top_k) int16; the file calls it `experts`."""
    tokens: np.ndarray
    """(tokens,) int32."""
    starts: np.ndarray
    """(sequences + 1,) int64."""

    @property
    def layers(self) -> int:
        return self.choice.shape[0]

    @property
    def top_k(self) -> int:
        return self.choice.shape[2]

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    def sequence(self, number: int) -> np.ndarray:
        """The experts of one sequence: (layers, its tokens, top_k)."""
        return self.choice[:, self.starts[number] : self.starts[number + 1]]

    def part(self, first: int, last: int) -> "RoutingTrace":
        """The sequences from `first` up to, without, `last`: for a trace that is split into one to plan with and one
        to judge by."""
        low, high = int(self.starts[first]), int(self.starts[last])
        return RoutingTrace(
            model=self.model,
            experts=self.experts,
            choice=self.choice[:, low:high],
            tokens=self.tokens[low:high],
            starts=self.starts[first : last + 1] - low,
        )

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise TraceError(f"this is no routing trace: {problem}")

    def _problem(self) -> str | None:
        for name, array in (("experts", self.choice), ("tokens", self.tokens), ("starts", self.starts)):
            _, dtype, dimensions = _TYPES[name]
            if array.dtype != dtype or array.ndim != dimensions:
                return f"{name} is {array.dtype} of {array.ndim} dimensions, not {dtype.__name__} of {dimensions}"
        layers, tokens, top_k = self.choice.shape
        if min(layers, tokens, top_k) < 1:
            return f"experts has the shape {self.choice.shape}: nothing is in it"
        if len(self.tokens) != tokens:
            return f"experts is of {tokens} tokens and there are {len(self.tokens)} token ids"
        if top_k > self.experts:
            return f"a token takes {top_k} of {self.experts} experts"
        if len(self.starts) < 2 or self.starts[0] != 0 or self.starts[-1] != tokens or (np.diff(self.starts) < 1).any():
            return f"starts does not cut {tokens} tokens into sequences: it must rise from 0 to that number"
        if self.tokens.min() < 0:
            return f"a token id is {self.tokens.min()}"
        low, high = int(self.choice.min()), int(self.choice.max())
        if low < 0 or high >= self.experts:
            return f"it names expert {low if low < 0 else high} of {self.experts}"
        ranked = np.sort(self.choice, axis=2)
        if (ranked[:, :, 1:] == ranked[:, :, :-1]).any():
            return "a token takes the same expert twice in one layer"
        if len(self.model) != 64 or set(self.model) - set("0123456789abcdef"):
            return f"model is {self.model[:80]!r}, which is no SHA-256"
        return None


def model_sha256(directory: Path) -> str:
    """The SHA-256 over config.json and the weights (*.safetensors) of a model's directory, by name and contents.

    Raises:
        MoeError: if it is none.
    """
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise MoeError(f"{directory} is no model directory: config.json or *.safetensors is missing")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write beside its place, sync, rename: a kill leaves what was there before. The same trace gives the same bytes.

    Raises:
        MoeError: if it cannot be written.
    """
    told = {
        "format": FORMAT,
        "model": trace.model,
        "experts": str(trace.experts),
        "top_k": str(trace.top_k),
        "layers": str(trace.layers),
    }
    body = _body(told, {"starts": trace.starts, "tokens": trace.tokens, "experts": trace.choice})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first one is what is told
            part.unlink()
        raise MoeError(f"cannot write {path}: {error.strerror}. Choose another place with --out") from error


def _body(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file by hand: the library writes metadata in an order that changes from run to run. Arrays come
    by falling alignment, as the library orders them."""
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, end = [], 0
    for name, array in arrays.items():
        stored, dtype, _ = _TYPES[name]
        parts.append(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": stored, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_trace(path: Path, *, model: str | None = None) -> RoutingTrace:
    """The trace in `path`, checked whole. Every length is held against the file's own before anything is read by it.

    model: the SHA-256 of the model it must be of; None: of any.

    Raises:
        TraceError: if it is not there, is damaged, is no routing trace, or is one of another model.
    """
    try:
        with path.open("rb") as file:
            header, base = _header(path, file, path.stat().st_size)
            arrays = {name: _array(path, file, base, name, header[name]) for name in _TYPES}
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}. Make one with: refound trace MODEL") from error
    told = header["__metadata__"]
    try:
        trace = RoutingTrace(
            model=told["model"],
            experts=int(told["experts"]),
            choice=arrays["experts"],
            tokens=arrays["tokens"],
            starts=arrays["starts"],
        )
        said = (int(told["layers"]), int(told["top_k"]))
    except (TraceError, ValueError) as error:
        raise TraceError(f"{path} is damaged: {error}") from error
    if said != (trace.layers, trace.top_k):
        raise TraceError(
            f"{path} is damaged: it says {said[0]} layers and top {said[1]}, and holds {trace.layers} and {trace.top_k}"
        )
    if model is not None and trace.model != model:
        raise TraceError(
            f"{path} is the trace of another model ({trace.model[:12]}… and not {model[:12]}…), and says nothing about "
            "this one. Make one of its own with: refound trace MODEL"
        )
    return trace


def _header(path: Path, file: Any, size_bytes: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size_bytes < 8 or length > min(size_bytes - 8, _HEADER_LIMIT):
        raise TraceError(f"{path} is cut short within its header ({size_bytes} bytes), or is no safetensors file")
    try:
        header = json.loads(file.read(length))
        told = header["__metadata__"]
        missing = [key for key in _KEYS if not isinstance(told.get(key), str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceError(f"{path} is no routing trace: it has no metadata of one") from error
    if missing or told["format"] != FORMAT:
        found = f"it lacks {', '.join(missing)}" if missing else f"its format is {told['format'][:40]!r}, not {FORMAT}"
        raise TraceError(f"{path} is no routing trace: {found}")
    if odd := sorted((header.keys() - {"__metadata__"}) ^ _TYPES.keys()):
        raise TraceError(f"{path} is no routing trace: {odd[0]} is missing or does not belong there")
    return header, 8 + length


def _array(path: Path, file: Any, base: int, name: str, entry: Any) -> np.ndarray:
    stored, dtype, dimensions = _TYPES[name]
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        whole = all(isinstance(number, int) for number in (*shape, begin, end))
        fits = whole and entry["dtype"] == stored and len(shape) == dimensions and min(*shape, begin) >= 0
        size_bytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        fits = fits and end - begin == size_bytes and base + end <= path.stat().st_size
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is damaged: the header's entry for {name} cannot be read") from error
    if not fits:
        raise TraceError(f"{path} is damaged: {name} is not {stored}, or has another length than its shape says")
    file.seek(base + begin)
    return np.frombuffer(bytearray(file.read(size_bytes)), dtype).reshape(shape)
