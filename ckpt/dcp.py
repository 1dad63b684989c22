# SPDX-License-Identifier: Apache-2.0
"""Snapshots in memory for code that is written for torch's distributed checkpoints (DCP): one object is swapped.

    memory = refound.DcpMemory()                             # instead of a directory
    if memory.saved:
        dcp.load(state, storage_reader=memory.reader)
    dcp.save(state, storage_writer=memory.writer)            # or dcp.async_save, with its default, threads

When `dcp.save` returns, or the future of `async_save` is done, all nodes hold the checkpoint and its parity: what
`protect` survives, it survives. It replaces the one before, so there is one to load, in the next start of the workers.

Promised and not: the state is what the script puts into it; random generators are not added. Values that are no
tensors go through DCP's planner, which pickles them; `protect` pickles nothing. Not for async_save with processes,
since the connection belongs to this one, nor with use_collectives=False, where no rank knows the whole.
"""

import io
import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .collect import Leaf, State
from .copier import Copier
from .errors import ConfigError, LayoutMismatchError, SnapshotError, StaleWriterError, WorldSizeError
from .link import Link, Place
from .shard import Shard, make_plan
from .tree import Json, decode, encode

_DCP = "$dcp"
_COMMIT_MS = 60_000


class DcpMemory:
    """This worker's place for DCP checkpoints in its node's snapshot process."""

    def __init__(self) -> None:
        """Raises ConfigError outside a refound agent, and WorldSizeError if the checkpoint there is of other ranks."""
        place = Place.from_environment()
        if place is None:
            raise ConfigError(
                "DcpMemory needs a refound agent: start with torchrun --rdzv-backend=refound, or torchrun --standalone "
                "--logs-specs=refound"
            )
        self.place, self.link = place, Link(place)
        facts = self.link.restore_facts()
        self.saved = facts["source"] != "start"
        """Whether there is a checkpoint to load."""
        self.step: int = facts["step"] if self.saved else 0
        """How many checkpoints this job has saved."""
        self._found = self.step
        if self.saved and facts["world_size"] != place.world_size:
            raise WorldSizeError(
                f"the checkpoint in memory was saved by {facts['world_size']} ranks and this group has "
                f"{place.world_size}. It is kept: bring the job back with {facts['world_size']} ranks, or start anew "
                "with another --rdzv-id"
            )
        self.writer, self.reader = MemoryWriter(self), MemoryReader(self, self.step)

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("DcpMemory belongs to one process: use async_save with threads, which is its default")

    def close(self) -> bool:
        """The job is done. Call it last: when all ranks have, a node that is lost is not waited for.

        True if all nodes hold the last checkpoint; False if they do not, or nobody is left to ask.
        """
        try:
            committed = self.step == self._found or self.link.wait_committed(self.step, _COMMIT_MS)
            if committed:
                self.link.finish()
            return committed
        except (OSError, StaleWriterError):
            return False  # the snapshot process has gone, or this group is being replaced
        finally:
            self.link.close()


class MemoryWriter(StorageWriter):
    """Writes what DCP plans for this rank into its slot of the snapshot process."""

    def __init__(self, memory: DcpMemory) -> None:
        self._memory, self._id = memory, ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._id = "" if checkpoint_id is None else os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_collectives", True) is False:
            raise ConfigError("checkpoints in memory need DCP's collectives: leave use_collectives as it is")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank what all hold, so that each shard describes the whole checkpoint."""
        if len(plans) != self._memory.place.world_size:
            raise ConfigError(
                f"{len(plans)} of {self._memory.place.world_size} ranks take part in this checkpoint; all must: give "
                "it a process_group of all, or none"
            )
        table = [[_describe(item) for item in plan.items] for plan in plans]
        names = [[key, value] for plan in plans for key, value in (plan.planner_data or {}).items()]
        return [replace(plan, storage_data={"ranks": table, "names": names}) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        memory, rank = self._memory, self._memory.place.rank
        leaves, results = [], []
        for number, item in enumerate(plan.items):
            tensor = _as_tensor(planner.resolve_data(item))
            path = f"{item.index.fqn}/{list(item.index.offset or ())}"
            leaves.append(Leaf(path=path, tensor=tensor, constant=False, replicas=(rank,), spec=None))
            results.append(WriteResult(item.index, leaves[-1].size_bytes, number))
        text = _to_json({_DCP: encode({"id": self._id} | plan.storage_data, _DCP, _no_tensor)})
        layout = make_plan(State(leaves=leaves), rank, len(text))
        header = layout.header(text)
        assert header is not None
        copier = Copier(next((x.tensor.device for x in leaves if x.tensor.device.type != "cpu"), torch.device("cpu")))
        slot = memory.link.begin(memory.step + 1, layout.size_bytes)
        sums = copier.fill(layout, leaves, header, slot, copier.ready_event())
        memory.link.complete(memory.step + 1, sums, {})
        memory.step += 1
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, while the others wait for it: until all nodes hold the checkpoint."""
        if not self._memory.link.wait_committed(self._memory.step, _COMMIT_MS):
            raise SnapshotError(
                f"not all nodes held checkpoint {self._memory.step} within {_COMMIT_MS // 1000} s; the one before it "
                "still counts. See: refound status"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


class MemoryReader(StorageReader):
    """Reads the checkpoint that was there when this process started."""

    def __init__(self, memory: DcpMemory, step: int) -> None:
        self._memory, self._step = memory, step
        self._shards: dict[int, Shard] = {}
        self._places: dict[MetadataIndex, tuple[int, int]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._shards.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not self._memory.saved:
            raise SnapshotError("no checkpoint is in memory: ask memory.saved before dcp.load")
        if self._memory.step != self._step:
            raise SnapshotError(
                "this process has saved another checkpoint since it started; only the one before can be loaded by it"
            )
        objects = self._shard(self._memory.place.rank).objects
        if _DCP not in objects:
            raise LayoutMismatchError("the snapshot in memory was taken by protect(), not by DCP: restore it with that")
        facts = decode(objects[_DCP], _no_tensor)
        found: dict[str, Any] = {}
        for rank, items in enumerate(facts["ranks"]):
            for number, item in enumerate(items):
                self._places[MetadataIndex(item["fqn"], item["offset"])] = (rank, number)
                _add(found, item)
        return Metadata(state_dict_metadata=found, planner_data=dict(facts["names"]), storage_data=dict(self._places))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            rank, number = self._places[item.storage_index]
            shard = self._shard(rank)
            slot = shard.slots[number]
            data = shard.part((rank,))[1][slot.offset : slot.offset + slot.size_bytes]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(data.tobytes()))
                continue
            saved = torch.from_numpy(data.copy()).view(getattr(torch, slot.dtype)).reshape(slot.shape)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                saved = saved.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(saved)
            planner.commit_tensor(item, target)
        self._shards.clear()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _shard(self, rank: int) -> Shard:
        if rank not in self._shards:
            self._shards[rank] = Shard(self._memory.link.shard(rank))
        return self._shards[rank]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _describe(item: WriteItem) -> dict[str, Any]:
    """A planned item as data."""
    offset = None if item.index.offset is None else list(item.index.offset)
    facts: dict[str, Any] = {"fqn": item.index.fqn, "offset": offset}
    if item.type == WriteItemType.BYTE_IO:
        return facts
    assert item.tensor_data is not None
    tensor = item.tensor_data
    return facts | {
        "dtype": tensor.properties.dtype,
        "requires_grad": tensor.properties.requires_grad,
        "size": list(tensor.size),
        "offsets": list(tensor.chunk.offsets),
        "sizes": list(tensor.chunk.sizes),
    }


def _add(found: dict[str, Any], item: dict[str, Any]) -> None:
    """Add an item to a checkpoint's metadata."""
    if "dtype" not in item:
        found[item["fqn"]] = BytesStorageMetadata()
        return
    properties = TensorProperties(dtype=item["dtype"], requires_grad=item["requires_grad"])
    whole = TensorStorageMetadata(properties=properties, size=torch.Size(item["size"]), chunks=[])
    chunk = ChunkStorageMetadata(offsets=torch.Size(item["offsets"]), sizes=torch.Size(item["sizes"]))
    found.setdefault(item["fqn"], whole).chunks.append(chunk)


def _as_tensor(data: torch.Tensor | io.BytesIO) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data.detach()
    return torch.from_numpy(np.frombuffer(data.getvalue(), np.uint8).copy())


def _no_tensor(*_: Any) -> Any:
    raise LayoutMismatchError("the description of a DCP checkpoint holds no tensors")


def _to_json(data: Json) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
