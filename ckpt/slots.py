# SPDX-License-Identifier: Apache-2.0
"""Memory that outlives the worker which fills it: memfds owned by the snapshot process."""

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np

from .errors import SnapshotMemoryError


class Segment:
    """Bytes in a memfd, every page of them present before they are first used.

    Unnamed, so nothing can leak; not bounded by /dev/shm; readable only by processes that are handed the descriptor.
    The pages are made by `posix_fallocate`, which fails cleanly where a page fault would kill.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(f"refound-{name}", os.MFD_CLOEXEC)
        try:
            if size_bytes:
                os.posix_fallocate(self.fd, 0, size_bytes)
                self._map = mmap.mmap(self.fd, size_bytes)
                self.array = np.frombuffer(self._map, dtype=np.uint8)
            else:
                self.array = np.empty(0, dtype=np.uint8)
        except OSError as error:
            os.close(self.fd)
            raise SnapshotMemoryError(
                f"{format_bytes(size_bytes)} of memory for {name} could not be had: {error.strerror}. "
                f"{format_bytes(available_bytes())} is available on this node"
            ) from error

    def read_only_fd(self) -> int:
        """A new descriptor of the same memory that cannot be written through."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def free(self) -> None:
        """Give the memory back. Views handed out by `array` keep their pages until they are gone."""
        self.array = np.empty(0, dtype=np.uint8)
        if self.fd >= 0:
            # Shrinking frees the pages at once, whoever still holds the descriptor. A view of ours that is still in
            # use must not fault, so the mapping itself is left to the garbage collector.
            with contextlib.suppress(BufferError):
                if self.size_bytes:
                    self._map.close()
            os.close(self.fd)
            self.fd = -1


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
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, usage = Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder, limit, usage = (
                Path("/sys/fs/cgroup/memory") / path.lstrip("/"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        while folder.is_relative_to("/sys/fs/cgroup"):
            rooms += _headroom(folder / limit, folder / usage)
            folder = folder.parent
    return rooms


def _headroom(limit_file: Path, usage_file: Path) -> list[int]:
    try:
        limit, usage = limit_file.read_text().strip(), usage_file.read_text().strip()
    except OSError:
        return []  # the root cgroup has no limit file, and a container may not see its own
    return [] if limit == "max" else [max(0, int(limit) - int(usage))]
