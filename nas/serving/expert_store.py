# SPDX-License-Identifier: Apache-2.0
"""Experts on disk, in host slots and in device slots: what `streaming` computes with.

Slots are buffers that are made once. What was used longest ago gives its slot up, but in the host not what is expected
and was not used yet; what was changed on the device goes down to the host, and from there to the disk, before another
expert has its slot, so that a write that fails loses nothing. One thread reads ahead; all else is the caller's thread.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ...export.directory import ModelDirectory
from .errors import CapacityError, MismatchError

Key = tuple[int, int]
"""Layer (its number in the model) and expert."""
Buffers = tuple[torch.Tensor, ...]
"""gate_up (2 width, hidden) and down (hidden, width), and whatever else there is of an expert."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How much memory experts may take, in experts of the model."""

    device_slots: int = 8
    host_slots: int = 32
    read_ahead: int = 1
    """Layers whose expected experts are read while one computes. 0: none."""


@dataclass(kw_only=True)
class Counts:
    """What has happened since the model was opened."""

    asked: int = 0
    on_device: int = 0
    """Of those asked for, found in a device slot."""
    in_host: int = 0
    """Found in a host slot, or on their way into one."""
    from_disk: int = 0
    read_ahead: int = 0
    """Read before a layer asked, used or not."""
    written: int = 0
    """To disk."""


class ExpertFiles:
    """One expert's matrices out of the model's files, in the form in which the experts loop uses them."""

    def __init__(self, source: ModelDirectory, dtype: torch.dtype) -> None:
        moe = source.decoder.blocks.moe
        if moe is None:
            raise MismatchError(
                f"{source.path} has no experts (it is {source.decoder.family}); nothing is to be streamed"
            )
        self.layers = [index for index, layer in enumerate(source.decoder.layers) if layer.ffn.kind == "moe"]
        self.source, self.moe, self.dtype = source, moe, dtype
        ffns = {(source.decoder.layers[index].ffn.width, source.decoder.hidden_size) for index in self.layers}
        if len(ffns) != 1:
            raise MismatchError(f"{source.path} has experts of different widths; slots are of one size")
        self.width, self.hidden = next(iter(ffns))

    @property
    def expert_bytes(self) -> int:
        """Of its matrices."""
        return 3 * self.width * self.hidden * torch.empty((), dtype=self.dtype).element_size()

    def is_expert(self, name: str) -> bool:
        prefix, _, _ = self.moe.expert.partition("{expert}")
        return name.startswith("model.layers.") and name.split(".", 3)[3].startswith(prefix)

    def names_of(self, key: Key) -> list[str]:
        """Of its gate, up and down matrices in the model's files."""
        pattern = f"model.layers.{key[0]}.{self.moe.expert}.weight".replace("{expert}", str(key[1]))
        return [pattern.format(matrix) for matrix in self.moe.matrices]

    def buffers(self, device: torch.device) -> Buffers:
        """Room for one expert."""
        gate_up = torch.empty(2 * self.width, self.hidden, dtype=self.dtype, device=device)
        return gate_up, torch.empty(self.hidden, self.width, dtype=self.dtype, device=device)

    def read(self, key: Key, buffers: Buffers) -> None:
        """Fill the buffers from disk; the file is mapped, not kept."""
        gate_up, down = buffers[:2]
        names = self.names_of(key)
        found = dict(self.source.weights(names))
        for name, target in zip(names, (gate_up[: self.width], gate_up[self.width :], down), strict=True):
            target.copy_(found[name])

    def write(self, key: Key, buffers: Buffers) -> None:
        """Keep what was changed. The model's own files are never written."""
        raise io.UnsupportedOperation(f"expert {key} was changed, and these files are only read")


class _Slots:
    """Buffers that are made once, and which expert each holds; what was used longest ago is given up."""

    def __init__(self, count: int, files: ExpertFiles, device: torch.device) -> None:
        self._free = [files.buffers(device) for _ in range(count)]
        self.held: OrderedDict[Key, Buffers] = OrderedDict()

    def get(self, key: Key) -> Buffers | None:
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def oldest(self, *, keep: Callable[[Key], bool] = lambda _: False) -> Key | None:
        """Whose slot is given up first; None if all hold what must be kept."""
        return next((key for key in self.held if not keep(key)), None)

    def take(self, key: Key, old: Key | None) -> Buffers:
        """The slot of `old` for `key`, or a free one."""
        self.held[key] = self._free.pop() if old is None else self.held.pop(old)
        return self.held[key]

    def give_back(self, key: Key) -> None:
        self._free.append(self.held.pop(key))


class ExpertStore:
    """Gives experts to one thread at a time."""

    def __init__(self, files: ExpertFiles, config: StreamConfig, device: torch.device) -> None:
        if min(config.device_slots, config.host_slots) < 1 or config.read_ahead < 0:
            raise CapacityError(
                f"{config.device_slots} device slots and {config.host_slots} host slots: at least one of each is needed"
            )
        self.files, self.config, self.counts = files, config, Counts()
        self._device, self._host = _Slots(config.device_slots, files, device), _Slots(config.host_slots, files, CPU)
        self._changed_device: set[Key] = set()
        self._changed_host: set[Key] = set()
        self._reading: dict[Key, Future[None]] = {}
        self._expected: dict[Key, None] = {}
        """What `expect` named last and `get` has not asked for since, in that order."""
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="expert-reader")

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def get(self, key: Key) -> Buffers:
        """The expert on the device, valid until the next call."""
        self.counts.asked += 1
        self._expected.pop(key, None)
        found = self._device.get(key)
        if found is not None:
            self.counts.on_device += 1
            return found
        old = None if self._device.has_free else self._device.oldest()
        if old in self._changed_device:
            self._put_down(old, self._device.held[old])
        buffers = self._device.take(key, old)
        try:
            for target, source in zip(buffers, self._from_host(key), strict=True):
                target.copy_(source)
        except BaseException:
            self._device.give_back(key)
            raise
        return buffers

    def changed(self, key: Key) -> None:
        """What `get` returned last was written to."""
        self._changed_device.add(key)

    def flush(self) -> None:
        """Everything that was changed is in the files."""
        for key in sorted(self._changed_device):
            self._put_down(key, self._device.held[key])
        for key in sorted(self._changed_host):
            self._write(key, self._host.held[key])

    def expect(self, keys: Sequence[Key]) -> None:
        """Begin to read these into host slots, as far as there is room beside what is being read already."""
        self._expected = dict.fromkeys(key for key in keys if key not in self._device.held)
        for key in keys:
            with self._lock:
                known = key in self._device.held or key in self._host.held
            if known:
                continue
            buffers = self._host_slot(key, wait=False)
            if buffers is None:
                return
            with self._lock:
                self._reading[key] = self._reader.submit(self._read, key, buffers)
            self.counts.read_ahead += 1

    def _read(self, key: Key, buffers: Buffers) -> None:
        try:
            self.files.read(key, buffers)
        except BaseException:
            with self._lock:
                self._host.give_back(key)  # it holds half of something
            raise
        finally:
            with self._lock:
                self._reading.pop(key, None)

    def _from_host(self, key: Key) -> Buffers:
        with self._lock:
            found, coming = self._host.get(key), self._reading.get(key)
            self.counts.in_host += found is not None
        if coming is not None:
            coming.result()
        if found is not None:
            return found
        self.counts.from_disk += 1
        buffers = self._host_slot(key, wait=True)
        assert buffers is not None
        try:
            self.files.read(key, buffers)
        except BaseException:
            with self._lock:
                self._host.give_back(key)
            raise
        return buffers

    def _host_slot(self, key: Key, *, wait: bool) -> Buffers | None:
        """Room in the host; what it held goes to disk if it was changed, before the slot is another's.

        None: all slots are being read into, or (unless it has to `wait`) hold what is expected.
        """
        while True:
            with self._lock:
                if self._host.has_free:
                    return self._host.take(key, None)
                old = self._host.oldest(keep=lambda one: one in self._reading or one in self._expected)
                if old is None and wait:
                    old = self._last_expected()
                waiting = next(iter(self._reading.values()), None)
            if old is None:
                if not wait or waiting is None:
                    return None
                waiting.exception()  # only that it is done; whoever asks for it is told how
                continue
            if old in self._changed_host:
                self._write(old, self._host.held[old])
            with self._lock:
                return self._host.take(key, old)

    def _last_expected(self) -> Key | None:
        """What will be needed last of what the host holds."""
        held = (key for key in reversed(self._expected) if key in self._host.held and key not in self._reading)
        return next(held, None)

    def _put_down(self, key: Key, buffers: Buffers) -> None:
        with self._lock:
            target = self._host.get(key)
        target = target or self._host_slot(key, wait=True)
        assert target is not None
        for place, source in zip(target, buffers, strict=True):
            place.copy_(source)
        self._changed_device.discard(key)
        self._changed_host.add(key)

    def _write(self, key: Key, buffers: Buffers) -> None:
        self.files.write(key, buffers)
        self._changed_host.discard(key)
        self.counts.written += 1
