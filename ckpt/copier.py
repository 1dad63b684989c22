# SPDX-License-Identifier: Apache-2.0
"""From tensors into a slot, with a checksum of every bucket as it fills.

CPU tensors are copied bucket by bucket, so that the checksum reads what is still in cache. Device tensors go through a
side stream into the slot, which is registered as pinned memory, and are checksummed when they have arrived.
"""

import mmap
import os

import numpy as np
import torch

from ..erasure import checksum
from .collect import Leaf
from .shard import Plan
from .stripes import BUCKET_BYTES


class SlotMemory:
    """This worker's mapping of a slot. `fd` stays the caller's to close."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool = True) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        if os.fstat(fd).st_size < size_bytes:
            raise ValueError(f"a slot of {os.fstat(fd).st_size} bytes cannot hold {size_bytes}")
        self._map = mmap.mmap(fd, size_bytes, access=access)
        self.array = np.frombuffer(self._map, dtype=np.uint8)
        self._pinned = False

    def pin(self) -> None:
        """Register the mapping with the device, for copies that run beside computation."""
        if not self._pinned and torch.cuda.is_available():
            from torch.cuda._pin_memory_utils import pin_memory

            pin_memory(self.array.ctypes.data, len(self.array))
            self._pinned = True

    def close(self) -> None:
        if self._pinned:
            from torch.cuda._pin_memory_utils import unpin_memory

            unpin_memory(self.array.ctypes.data)
        del self.array  # the mapping itself goes with its last view


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as a flat uint8 tensor; a view if it is dense, a copy if it is not."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class Copier:
    """Copies leaves into slots by a plan."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready_event(self) -> "torch.cuda.Event | None":
        """A mark on the device's current stream: what was computed before it is what gets copied."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def fill(
        self,
        plan: Plan,
        leaves: list[Leaf],
        header: bytes,
        slot: SlotMemory,
        ready: "torch.cuda.Event | None",
    ) -> np.ndarray:
        """Fill the slot and return its checksums: uint32 (buckets,)."""
        slot.array[: len(header)] = np.frombuffer(header, np.uint8)
        if self._stream is not None and ready is not None:
            return self._fill_from_device(plan, leaves, slot, ready)
        sums, done = np.empty(plan.size_bytes // BUCKET_BYTES, np.uint32), 0
        for copy in plan.copies:
            source = flat_bytes(leaves[copy.leaf].tensor).cpu().numpy()
            low, at = copy.low, copy.at
            while low < copy.high:
                count = min(copy.high - low, BUCKET_BYTES - at % BUCKET_BYTES)
                slot.array[at : at + count] = source[low : low + count]
                low, at = low + count, at + count
                done = _checksum_until(slot.array, sums, done, at // BUCKET_BYTES)
        _checksum_until(slot.array, sums, done, len(sums))
        return sums

    def _fill_from_device(
        self, plan: Plan, leaves: list[Leaf], slot: SlotMemory, ready: "torch.cuda.Event"
    ) -> np.ndarray:
        assert self._stream is not None
        slot.pin()
        target = torch.from_numpy(slot.array)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for copy in plan.copies:
                source = flat_bytes(leaves[copy.leaf].tensor)
                source.record_stream(self._stream) if source.is_cuda else None
                target[copy.at : copy.at + copy.high - copy.low].copy_(source[copy.low : copy.high], non_blocking=True)
        self._stream.synchronize()
        sums = np.empty(plan.size_bytes // BUCKET_BYTES, np.uint32)
        _checksum_until(slot.array, sums, 0, len(sums))
        return sums


def _checksum_until(array: np.ndarray, sums: np.ndarray, done: int, until: int) -> int:
    while done < until:
        sums[done] = checksum(array[done * BUCKET_BYTES : (done + 1) * BUCKET_BYTES])
        done += 1
    return done
