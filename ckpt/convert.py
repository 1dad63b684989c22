# SPDX-License-Identifier: Apache-2.0
"""A snapshot or checkpoint as plain files: safetensors with global tensors, or a torch DCP checkpoint.

Whatever is written goes into a directory beside the destination, which takes its name when all of it is durable.
"""

import json
import os
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from .checkpoints import sync_directory
from .collect import RNG
from .errors import ConfigError
from .shard import Slot
from .source import Source
from .tensorfile import Entry, write_split, write_tensors
from .tree import Json, decode
from .whole import Whole, is_module, renamed

FORMATS = ("safetensors", "dcp")
LARGEST_FILE_BYTES = 5_000_000_000
_OURS = ("refound.json", ".metadata")


def convert(
    source: Source, to: Path, kind: str, *, overwrite: bool = False, largest_bytes: int = LARGEST_FILE_BYTES
) -> list[str]:
    """Write all of `source` to the new directory `to`; returns the names of its files.

    Raises ConfigError if `to` is in the way, DamageError if a shard cannot be proven, LayoutMismatchError if the ranks'
    parts do not make up a tensor, UnsupportedStateError for what the format cannot hold, OSError (a full disk).
    """
    to = to.resolve()
    _check_free(to, overwrite)
    beside = to.with_name(f".{to.name}.{secrets.token_hex(4)}.partial")
    beside.mkdir(parents=True)
    try:
        whole = Whole(source.shard, source.facts["world_size"])
        if kind == "dcp":
            _write_dcp(whole, source.facts, beside)
        else:
            _Safetensors(whole, beside, largest_bytes).write(source.facts)
        names = sorted(file.name for file in beside.iterdir())
        for name in names:
            _sync_file(beside / name)
        sync_directory(beside)
        _take_name(beside, to)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return names


def _check_free(to: Path, overwrite: bool) -> None:
    if not to.exists():
        return
    if not overwrite:
        raise ConfigError(f"{to} exists already; name another directory or give --overwrite")
    # Never remove what something else has made.
    if not to.is_dir() or (any(to.iterdir()) and not any((to / name).exists() for name in _OURS)):
        raise ConfigError(f"{to} is not an earlier conversion, so it is not overwritten; remove it yourself")


def _take_name(beside: Path, to: Path) -> None:
    if to.exists():
        old = to.with_name(f".{to.name}.{secrets.token_hex(4)}.old")
        to.replace(old)
        beside.replace(to)
        shutil.rmtree(old)
    else:
        beside.replace(to)
    sync_directory(to.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# --- safetensors -----------------------------------------------------------------------------------------------


class _Safetensors:
    """`model.safetensors` for the model, `NAME.safetensors` for the tensors of everything else, `refound.json` for what
    is no tensor, and `ranks.safetensors` for what other ranks have that is not rank 0's (random states and the like).
    """

    def __init__(self, whole: Whole, folder: Path, largest_bytes: int) -> None:
        self._whole, self._folder, self._largest = whole, folder, largest_bytes
        modules = [name for name, data in whole.objects().items() if is_module(data)]
        self._only_module = modules[0] if len(modules) == 1 else None

    def write(self, facts: dict[str, Any]) -> None:
        objects: dict[str, Json] = {}
        for name, data in self._whole.objects().items():
            objects[name] = self._module(name) if is_module(data) else self._object(name, data)
        about = {"format": 1, **facts, "objects": objects, "ranks": self._other_ranks()}
        (self._folder / "refound.json").write_text(json.dumps(about))

    def _module(self, name: str) -> Json:
        """The union of what the ranks hold, under the names that the bare model has."""
        found, rest = self._whole.module(name)
        entries = [self._entry(key, *where) for key, where in found.items()]
        stem = "model" if name == self._only_module else _stem(name)
        write_split(self._folder, stem, entries, self._largest)
        return {"$module": f"{stem}.safetensors", **({"$extra": rest} if rest else {})}

    def _object(self, name: str, data: Json) -> Json:
        stem, entries = _stem(name), {}

        def note(number: int) -> str:
            slot = self._whole.slot(0, number)
            key = slot.path.removeprefix(f"{name}/")
            entries[key] = self._entry(key, 0, slot)
            return f"{stem}.safetensors:{key}"

        described = renamed(data, note)
        if entries:
            write_split(self._folder, stem, list(entries.values()), self._largest)
        return described

    def _other_ranks(self) -> dict[str, dict[str, Json]]:
        ranks: dict[str, dict[str, Json]] = {}
        entries: dict[str, Entry] = {}
        for name, data in self._whole.objects().items():
            for rank in [] if is_module(data) else self._whole.differing_ranks(name):

                def note(number: int, rank: int = rank) -> str:
                    slot = self._whole.slot(rank, number)
                    if slot.spec is not None:
                        return f"{_stem(slot.path.split('/')[0])}.safetensors:{slot.path.partition('/')[2]}"
                    entries[f"{rank}/{slot.path}"] = self._entry(f"{rank}/{slot.path}", rank, slot)
                    return f"ranks.safetensors:{rank}/{slot.path}"

                ranks.setdefault(str(rank), {})[name] = renamed(self._whole.objects(rank).get(name), note)
        if entries:
            write_tensors(self._folder / "ranks.safetensors", list(entries.values()))
        return ranks

    def _entry(self, name: str, rank: int, slot: Slot) -> Entry:
        shape = self._whole.shape(slot)
        local = torch.Size(slot.shape).numel()
        item_bytes = slot.size_bytes // local if local else getattr(torch, slot.dtype).itemsize
        return Entry(
            name=name,
            dtype=slot.dtype,
            shape=shape,
            size_bytes=torch.Size(shape).numel() * item_bytes,
            read=lambda: self._whole.tensor(rank, slot),
        )


def _stem(name: str) -> str:
    """A file name for an object's name."""
    return "rng" if name == RNG else "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


# --- DCP -------------------------------------------------------------------------------------------------------


def _write_dcp(whole: Whole, facts: dict[str, Any], folder: Path) -> None:
    """The protected objects' state_dicts by name, with global tensors, and `refound` for step and world size.

    The format itself pickles what is no tensor; nothing of that is read back by refound. Of what differs between ranks
    it holds rank 0's, and no random states.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    def tensor(number: int) -> torch.Tensor:
        slot = whole.slot(0, number)
        data = torch.from_numpy(whole.tensor(0, slot).copy())
        return data.view(getattr(torch, slot.dtype)).reshape(whole.shape(slot))

    absent = object()  # in the place of frozen parameters, which a snapshot may leave out
    objects = {name: data for name, data in whole.objects().items() if name != RNG}
    state: dict[str, Any] = {
        name: _without(decode(data, tensor, lambda _: absent), absent)  # type: ignore[arg-type,return-value]
        for name, data in objects.items()
    }
    state["refound"] = {name: facts[name] for name in ("step", "generation", "world_size", "job")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended: one process writes it all
        save(state, checkpoint_id=folder, no_dist=True)


def _without(value: Any, absent: object) -> Any:
    """Nested dicts without the entries that are `absent`."""
    if not isinstance(value, dict):
        return value
    return type(value)((key, _without(item, absent)) for key, item in value.items() if item is not absent)
