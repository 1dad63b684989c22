# SPDX-License-Identifier: Apache-2.0
"""Memory that outlives the worker which fills it: memfds owned by the snapshot process."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

from .errors import SnapshotMemoryError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


class Segment:
    """Bytes in a memfd, every page of them present before they are first used.

    Unnamed, so nothing can leak; not bounded by /dev/shm; readable only by processes that are handed the descriptor.
    The pages are made by `posix_fallocate`, which fails cleanly where a page fault would kill.
    """

    def __init__(self, name: str, size_bytes: int, *, sparse: bool = False) -> None:
        """sparse: pages are made as they are written, for memory of which only parts are needed."""
        self.size_bytes = size_bytes
        self.fd = -1
        self._map: mmap.mmap | None = None
        self.array = np.empty(0, dtype=np.uint8)
        try:
            self.fd = os.memfd_create(f"refound-{name}", os.MFD_CLOEXEC)
            if size_bytes:
                if sparse:
                    os.ftruncate(self.fd, size_bytes)
                else:
                    os.posix_fallocate(self.fd, 0, size_bytes)
                self._map = mmap.mmap(self.fd, size_bytes)
                self.array = np.frombuffer(self._map, dtype=np.uint8)
        except (OSError, OverflowError) as error:
            self.free()
            reason = error.strerror if isinstance(error, OSError) else "no machine has as much"
            raise SnapshotMemoryError(
                f"{format_bytes(size_bytes)} of memory for {name} could not be had: {reason}. "
                f"{format_bytes(available_bytes())} is available on this node"
            ) from error

    def read_only_fd(self) -> int:
        """A new descriptor of the same memory that cannot be written through."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def free(self) -> None:
        """Give the memory back. Views handed out by `array` keep their pages until they are gone."""
        self.array = np.empty(0, dtype=np.uint8)
        if self.fd >= 0:
            # A view of ours that is still in use must not fault: then its mapping is left to the garbage collector.
            with contextlib.suppress(BufferError):
                if self._map is not None:
                    self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        # A thread that is cut short between making memory and handing it on must not leak it.
        self.free()


def format_bytes(count: float) -> str:
    """Bytes as people read them: '1.6 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def available_bytes() -> int:
    """Memory this process could still allocate: what the kernel calls available, or less under a cgroup's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_cgroup_headroom()])


def _cgroup_headroom() -> list[int]:
    """Room under the memory limits of this process's cgroups (v2: all ancestors; v1: the memory controller)."""
    rooms: list[int] = []
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, usage, kind = _CGROUPS / path.lstrip("/"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder, kind = _CGROUPS / "memory" / path.lstrip("/"), "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        while folder.is_relative_to(_CGROUPS):
            rooms += _headroom(folder / limit, folder / usage, kind)
            folder = folder.parent
    return rooms


def _headroom(limit_file: Path, usage_file: Path, kind: str) -> list[int]:
    try:
        limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
    except OSError:
        return []  # the root cgroup has no limit file, and a container may not see its own
    if limit == "max":
        return []
    # Usage counts the page cache, which a long-lived container lets grow to its limit and the kernel gives back.
    return [max(0, int(limit) - max(0, int(usage) - _cached_bytes(limit_file.parent / "memory.stat", kind)))]


def _cached_bytes(stat_file: Path, kind: str) -> int:
    try:
        pairs = dict(line.split(" ", 1) for line in stat_file.read_text().splitlines())
    except OSError:
        return 0
    return sum(int(pairs.get(f"{kind}{name}", 0)) for name in ("active_file", "inactive_file"))
