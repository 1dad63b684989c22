# SPDX-License-Identifier: Apache-2.0
"""A snapshot of other ranks, or of other layouts, back into live objects (docs/reshape.md says what is promised).

Tensors are global: each rank works out which values it now needs, which saved ranks hold them (`boxes`), and reads
those alone, bit for bit. Optimizer state lies like its parameter. What belongs to a rank and not to a tensor follows
the rules in `rankstate`. Everything is planned, and refused where it does not fit, before anything is changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate

from .boxes import Layout, Overlap, Part, extent, gather, overlaps, whole
from .buckets import BUCKETS
from .collect import RNG, spec_of
from .errors import DamageError, LayoutMismatchError
from .loader import compare_groups, entries, is_extra, load_optimizer, refuse
from .rankstate import load_object, load_random_state
from .saved import Read, SavedRanks
from .shard import Slot
from .tree import Json, absent_tensors, decode
from .zero import ZeroState

_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before names


@dataclass(frozen=True, kw_only=True)
class Source:
    """Values of one saved rank that go into one tensor."""

    rank: int
    slot: Slot
    boxes: Sequence[Overlap]

    @property
    def item_bytes(self) -> int:
        return getattr(torch, self.slot.dtype).itemsize

    @property
    def span(self) -> tuple[int, int]:
        """Bytes of the saved leaf between which all boxes lie."""
        spans = [box.span(self.slot.shape) for box in self.boxes]
        return min(low for low, _ in spans) * self.item_bytes, max(high for _, high in spans) * self.item_bytes


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A dense local tensor and where its values come from."""

    target: torch.Tensor
    sources: Sequence[Source]


class Reshaper:
    """One rank's state out of a snapshot of other ranks."""

    def __init__(self, read: Read, *, rank: int, world_size: int, saved_world_size: int) -> None:
        self._saved = SavedRanks(read, saved_world_size)
        self._rank, self._world_size = rank, world_size
        self._like = rank % saved_world_size
        """The saved rank whose description, and whose rank-local values, this rank goes by."""
        self._shard = self._saved.shard(self._like)
        self._layouts: dict[str, Layout] = {}
        self._gathered: dict[tuple[Layout, Part], list[tuple[int, tuple[int, ...], list[Overlap]]]] = {}
        self._fills: list[Fill] = []

    def load(self, objects: dict[str, Any]) -> None:
        """Put everything back. Raises LayoutMismatchError or WorldSizeError, before anything is changed, if it cannot
        be; DamageError if the shards do not hold all of it."""
        saved, now = set(self._shard.objects) - {RNG, BUCKETS}, set(objects)
        problems = [f"the snapshot holds {name!r}, which is not protected now" for name in sorted(saved - now)]
        problems += [f"{name!r} is protected now and not in the snapshot" for name in sorted(now - saved)]
        problems += self._cannot(objects)
        refuse(problems)
        for name, value in objects.items():
            if name in saved and isinstance(value, torch.nn.Module):
                problems += self._check_module(name, value)
            elif name in saved and isinstance(value, torch.optim.Optimizer):
                problems += compare_groups(name, value, self._shard.objects[name])
        refuse(problems)
        finish = [self._prepare(name, value) for name, value in objects.items()]
        finish.append(load_random_state(self._saved, self._rank, self._world_size))
        self._read()
        for step in finish:
            step()

    def _cannot(self, objects: dict[str, Any]) -> list[str]:
        """What has no way yet to lie otherwise."""
        was = f"the snapshot is of {self._saved.world_size} ranks or of another layout, and"
        problems = [
            f"{was} {name!r} is a DeepSpeed engine that cannot take it: {why}"
            for name, value in objects.items()
            if isinstance(value, ZeroState) and name in self._shard.objects
            if (why := value.cannot_take(self._shard.objects[name]))
        ]
        if absent := absent_tensors(self._shard.objects):
            problems.append(
                f"{was} save_frozen=False left {next(iter(absent))} out of it, which is not proven there yet"
            )
        return problems

    def _prepare(self, name: str, value: Any) -> Callable[[], None]:
        """Plan an object's loading; what is returned does the rest once the values are there."""
        data = self._shard.objects[name]
        if isinstance(value, torch.nn.Module):
            return self._prepare_module(name, value, data)
        if isinstance(value, torch.optim.Optimizer):
            state = decode(data, lambda number: self._optimizer_tensor(name, value, self._shard.slots[number]))
            return lambda: load_optimizer(value, state)
        if isinstance(value, ZeroState):
            found = decode(data, lambda number: self._zero_tensor(name, value, self._shard.slots[number]))
            return lambda: value.load_state_dict(found)
        return load_object(self._saved, name, value, self._rank, self._world_size)

    # --- modules -----------------------------------------------------------------------------------------------

    def _check_module(self, name: str, module: torch.nn.Module) -> list[str]:
        data, live = dict(entries(self._shard.objects[name])), module.state_dict()
        names = _matched([k for k in data if not is_extra(k)], [k for k in live if not is_extra(k)])
        problems = []
        for key, other in names:
            slot = self._saved.slot(self._like, f"{name}/{key}") if key is not None else None
            if slot is None:
                problems.append(f"{name}/{other} is new")
            elif other is None:
                problems.append(f"{name}/{key} is in the snapshot and not in the job")
            else:
                found = f"{slot.dtype} {list(_global_shape(slot))}"
                needed = f"{str(live[other].dtype).removeprefix('torch.')} {list(live[other].shape)}"
                problems += [f"{name}/{other} was {found} and is {needed}"] * (found != needed)
        return problems

    def _prepare_module(self, name: str, module: torch.nn.Module, data: Json) -> Callable[[], None]:
        """In place, without a second copy of the model."""
        saved, live = dict(entries(data)), module.state_dict()
        names = _matched([k for k in saved if not is_extra(k)], [k for k in live if not is_extra(k)])
        for key, other in names:
            assert key is not None and other is not None
            tensor, path = live[other], f"{name}/{key}"
            slot = self._saved.slot(self._like, path)
            assert slot is not None
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._fill(local, slot, path, self._part(tensor))
        extra = {
            other: decode(saved[key], lambda number: self._plain(self._shard.slots[number]))
            for key, other in _matched([k for k in saved if is_extra(k)], [k for k in live if is_extra(k)])
            if key is not None and other is not None
        }
        return lambda: _load_extra(module, live, extra)

    # --- optimizers --------------------------------------------------------------------------------------------

    def _optimizer_tensor(self, name: str, optimizer: torch.optim.Optimizer, slot: Slot) -> torch.Tensor:
        """A fresh tensor of optimizer state, to be filled; it lies like the parameter it belongs to."""
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        number = slot.path.removeprefix(f"{name}/state/").split("/")[0]
        belongs = slot.path.startswith(f"{name}/state/") and number.isdigit() and int(number) < len(ordered)
        parameter = ordered[int(number)] if belongs else None
        shape = _global_shape(slot)
        if not isinstance(parameter, DTensor) or (slot.spec is None and (not shape or shape != tuple(parameter.shape))):
            return self._plain(slot)
        mesh = parameter.device_mesh
        placements = tuple(parameter.placements)
        if shape != tuple(parameter.shape):  # Adafactor's factors, for instance: whole on every rank
            placements = tuple(Replicate() for _ in placements)
        spec = {"shape": shape, "placements": [str(p) for p in placements], "mesh": mesh.mesh.tolist()}
        part = self._layout(spec).part(self._rank)
        local = torch.empty(extent(part), dtype=getattr(torch, slot.dtype), device=parameter.device)
        self._fill(local, slot, slot.path, part)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _zero_tensor(self, name: str, engine: ZeroState, slot: Slot) -> torch.Tensor:
        """This rank's share of what DeepSpeed keeps flat; padding is zero, as DeepSpeed makes it."""
        share = engine.share_of(slot.path.removeprefix(f"{name}/"))
        if share is None or slot.spec is None:
            return self._plain(slot)
        low, count, real = share
        tensor = torch.zeros(count, dtype=getattr(torch, slot.dtype))
        if held := max(0, min(count, real - low)):
            self._fill(tensor[:held], slot, slot.path, (((low, held),),))
        return tensor

    def _plain(self, slot: Slot) -> torch.Tensor:
        """A fresh tensor with all of a leaf's values, to be filled."""
        shape = _global_shape(slot)
        tensor = torch.empty(shape, dtype=getattr(torch, slot.dtype))
        self._fill(tensor, slot, slot.path, whole(shape))
        return tensor

    # --- values ------------------------------------------------------------------------------------------------

    def _part(self, tensor: torch.Tensor) -> Part:
        if isinstance(tensor, DTensor):
            return self._layout(spec_of(tensor)).part(self._rank)
        return whole(tensor.shape)

    def _layout(self, spec: dict[str, Any]) -> Layout:
        key = f"{spec['shape']} {spec['placements']} {spec['mesh']}"
        if key not in self._layouts:
            self._layouts[key] = Layout.of(spec)
        return self._layouts[key]

    def _fill(self, target: torch.Tensor, slot: Slot, path: str, part: Part) -> None:
        """Plan to fill `target`, which is `part` of the saved tensor at `path`."""
        if tuple(target.shape) != extent(part):
            raise LayoutMismatchError(f"{path}: a local tensor of {list(target.shape)} where {extent(part)} belongs")
        if slot.spec is None:
            boxes = overlaps(whole(slot.shape), part)
            sources = [Source(rank=self._like, slot=slot, boxes=boxes)] if target.numel() else []
        else:
            layout = self._layout(slot.spec)
            if (layout, part) not in self._gathered:
                self._gathered[layout, part] = gather(layout, part, self._rank)
            sources = []
            for rank, shape, boxes in self._gathered[layout, part]:
                held = self._saved.slot(rank, path)
                if held is None or held.shape != shape or held.dtype != slot.dtype or held.spec != slot.spec:
                    raise DamageError(f"ranks {self._like} and {rank} of the snapshot disagree about {path}")
                sources.append(Source(rank=rank, slot=held, boxes=boxes))
        for source in sources:
            self._saved.want(source.rank, source.slot, *source.span)
        self._fills.append(Fill(target=target, sources=sources))

    def _read(self) -> None:
        self._saved.fetch()
        for fill in self._fills:
            if not fill.sources:
                continue
            view = _bytes_view(fill.target)
            into = np.empty((*fill.target.shape, fill.target.element_size()), np.uint8) if view is None else view
            for source in fill.sources:
                data = _local_bytes(self._saved, source)
                for box in source.boxes:
                    into[box.target] = data[box.source]
            if view is None:
                values = torch.from_numpy(into.reshape(-1)).view(fill.target.dtype).reshape(fill.target.shape)
                with torch.no_grad():
                    fill.target.copy_(values)


def _local_bytes(saved: SavedRanks, source: Source) -> np.ndarray:
    """uint8 (*local shape, bytes of a value): a saved local tensor, of which only what is wanted is there."""
    low, high = source.span
    data = saved.bytes_of(source.rank, source.slot, low, high)
    if len(data) != source.slot.size_bytes:
        around = np.empty(source.slot.size_bytes, np.uint8)  # pages that are never touched cost nothing
        around[low:high] = data
        data = around
    return data.reshape(*source.slot.shape, source.item_bytes)


def _bytes_view(tensor: torch.Tensor) -> np.ndarray | None:
    """A tensor's own bytes, as (*shape, bytes of a value), where they can be written in place."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(*tensor.shape, tensor.element_size())


def _global_shape(slot: Slot) -> tuple[int, ...]:
    return tuple(slot.spec["shape"]) if slot.spec is not None else slot.shape


def _matched(saved: Sequence[str], live: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """Names of the snapshot beside names of now, whatever wrappers either has; None where there is no partner."""
    of_saved, of_live = _unwrapped(saved), _unwrapped(live)
    pairs: list[tuple[str | None, str | None]] = [(key, of_live.get(name)) for name, key in of_saved.items()]
    return pairs + [(None, key) for name, key in of_live.items() if name not in of_saved]


def _unwrapped(keys: Sequence[str]) -> dict[str, str]:
    names = list(keys)
    while names and (prefix := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, keys, strict=True))


def _load_extra(module: torch.nn.Module, live: dict[str, Any], extra: dict[str, Any]) -> None:
    if extra:
        module.load_state_dict({**live, **extra})
