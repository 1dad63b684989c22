# SPDX-License-Identifier: Apache-2.0
"""Nested state as data: JSON for what is small, tensors by number. Nothing in it can run.

`encode` and `decode` are inverse for what `state_dict()` of models, optimizers, schedulers, samplers and random
generators is made of; anything else is refused by name when it is saved, not when it is needed.
"""

import base64
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .errors import DamageError, UnsupportedStateError

Json = Any
_PLAIN = (bool, int, float, str, type(None))
ABSENT = "$absent"
"""Tags a tensor that the snapshot knows and does not hold."""


def encode(value: Any, path: str, tensor: Callable[[str, torch.Tensor], Any]) -> Json:
    """`value` as JSON-able data. `tensor(path, t)` is called for every tensor and gives its number.

    It may also give a dict, the facts of a tensor that is not held; `decode` hands them to `absent`.

    Raises UnsupportedStateError naming the path and type of what cannot be represented.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        placed = tensor(path, value)
        return {ABSENT: placed} if isinstance(placed, dict) else {"$tensor": placed}
    if isinstance(value, np.ndarray):
        # A subclass holds more than its values, and a record's fields are more than its bytes.
        if type(value) not in (np.ndarray, np.memmap) or value.dtype.hasobject or value.dtype.kind == "V":
            raise _unsupported(path, value)
        return {"$array": tensor(path, torch.from_numpy(np.atleast_1d(value).copy().view(np.uint8)))} | {
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }
    if isinstance(value, dict):
        return _encode_mapping(value, path, tensor)
    for kind, name in _SEQUENCES.items():
        if type(value) is kind:
            items = [encode(item, f"{path}/{i}", tensor) for i, item in enumerate(value)]
            if isinstance(value, deque):
                return {name: items, "maxlen": value.maxlen}
            return items if name == "$list" else {name: items}
    return _encode_scalar(value, path)


_SEQUENCES: dict[type, str] = {
    list: "$list",
    tuple: "$tuple",
    set: "$set",
    frozenset: "$frozenset",
    deque: "$deque",
    torch.Size: "$size",
}
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}


def _encode_mapping(value: dict[Any, Any], path: str, tensor: Callable[[str, torch.Tensor], Any]) -> Json:
    name = _MAPPINGS.get(type(value), "$dict")
    pairs = [(key, encode(item, f"{path}/{key}", tensor)) for key, item in value.items()]
    if name == "$dict" and all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {name: [[encode(key, f"{path}/{key}", tensor), item] for key, item in pairs]}


def _encode_scalar(value: Any, path: str) -> Json:
    if isinstance(value, bytes | bytearray):
        return {"$bytes" if isinstance(value, bytes) else "$bytearray": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, np.generic) and not value.dtype.hasobject and value.dtype.kind != "V":
        return {"$scalar": base64.b64encode(value.tobytes()).decode(), "dtype": value.dtype.str}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, _PLAIN):  # a subclass, an IntEnum for instance: its plain value is not what was saved
        raise _unsupported(path, value)
    raise _unsupported(path, value)


def _unsupported(path: str, value: Any) -> UnsupportedStateError:
    return UnsupportedStateError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which has no form as plain data. "
        "Leave it out of state_dict(), or turn it into numbers, strings, lists, dicts or tensors there"
    )


def decode(
    data: Json, tensor: Callable[[int], torch.Tensor], absent: Callable[[dict[str, Any]], torch.Tensor] | None = None
) -> Any:
    """The inverse of `encode`; `tensor(number)` gives the tensors, `absent(facts)` those that are not held.

    Raises DamageError if the data is malformed, or a tensor is not held and `absent` is None.
    """
    if isinstance(data, list):
        return [decode(item, tensor, absent) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next((key for key in data if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item, tensor, absent) for key, item in data.items()}
    if tag == "$tensor":
        return tensor(data[tag])
    if tag == ABSENT:
        if not absent:
            raise DamageError(f"{data[tag]['path']} is a frozen parameter, which this snapshot does not hold")
        return absent(data[tag])
    if tag == "$array":
        raw = tensor(data[tag]).cpu().contiguous().numpy().view(np.dtype(data["dtype"]))
        return raw.reshape(data["shape"]).copy()
    if tag == "$deque":
        return deque((decode(item, tensor, absent) for item in data[tag]), maxlen=data["maxlen"])
    for kind, name in _SEQUENCES.items():
        if tag == name:
            return kind(decode(item, tensor, absent) for item in data[tag])
    for kind, name in _MAPPINGS.items():
        if tag == name:
            return kind({decode(key, tensor, absent): decode(item, tensor, absent) for key, item in data[tag]})
    return _decode_scalar(tag, data)


def _decode_scalar(tag: str, data: dict[str, Any]) -> Any:
    value = data[tag]
    if tag == "$bytes":
        return base64.b64decode(value)
    if tag == "$bytearray":
        return bytearray(base64.b64decode(value))
    if tag == "$scalar":
        return np.frombuffer(base64.b64decode(value), np.dtype(data["dtype"]))[0]
    if tag == "$complex":
        return complex(*value)
    if tag == "$dtype" and isinstance(dtype := getattr(torch, value, None), torch.dtype):
        return dtype
    if tag == "$device":
        return torch.device(value)
    raise DamageError(f"a snapshot's description holds the unknown tag {tag!r}")


def tensor_numbers(data: Json) -> set[int]:
    """Numbers of all tensors that `data` refers to."""
    found: set[int] = set()

    def note(number: int) -> torch.Tensor:
        found.add(number)
        return torch.zeros(1, dtype=torch.uint8)

    _walk(data, note)
    return found


def _walk(data: Json, note: Callable[[int], Any]) -> None:
    if isinstance(data, list):
        for item in data:
            _walk(item, note)
    elif isinstance(data, dict):
        for key, item in data.items():
            if key in ("$tensor", "$array"):
                note(item)
            else:
                _walk(item, note)


def absent_tensors(data: Json) -> dict[str, dict[str, Any]]:
    """The facts of all tensors that `data` knows and does not hold, by their path; each has `path` too."""
    if isinstance(data, list):
        data = dict(enumerate(data))
    found: dict[str, dict[str, Any]] = {}
    if isinstance(data, dict):
        if ABSENT in data:
            return {data[ABSENT]["path"]: data[ABSENT]}
        for item in data.values():
            found |= absent_tensors(item)
    return found


def held(data: Json, number: Callable[[str], int | None]) -> Json:
    """`data` with absent tensors that are held now: `number(path)` gives a tensor's number, or None to leave it."""
    if isinstance(data, list):
        return [held(item, number) for item in data]
    if not isinstance(data, dict):
        return data
    if ABSENT in data:
        found = number(data[ABSENT]["path"])
        return data if found is None else {"$tensor": found}
    return {key: held(item, number) for key, item in data.items()}
