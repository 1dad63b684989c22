# SPDX-License-Identifier: Apache-2.0
"""Memory for snapshots: all there before use, gone when freed, and refused cleanly."""

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from refound.ckpt import slots
from refound.ckpt.errors import SnapshotMemoryError
from refound.ckpt.slots import Segment, available_bytes, format_bytes

MIB = 1 << 20


def memfds() -> int:
    """Pieces of snapshot memory that this process holds descriptors of."""
    links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return len({fd.stat().st_ino for fd in links if "memfd:refound-" in str(fd.readlink())})


def test_every_page_is_there_before_it_is_used() -> None:
    segment = Segment("t", 3 * MIB)
    info = os.fstat(segment.fd)
    assert info.st_size == 3 * MIB and info.st_blocks * 512 == 3 * MIB
    assert not segment.array.any() and segment.array.shape == (3 * MIB,)
    segment.free()


def test_the_descriptor_names_the_same_memory() -> None:
    segment = Segment("t", MIB)
    with mmap.mmap(segment.fd, MIB) as other:
        other[5:8] = b"abc"
        assert bytes(segment.array[5:8]) == b"abc"
    segment.free()


def test_a_read_only_descriptor_cannot_be_written_through() -> None:
    segment = Segment("t", MIB)
    segment.array[0] = 9
    fd = segment.read_only_fd()
    assert os.pread(fd, 1, 0) == b"\x09"
    with pytest.raises(OSError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        mmap.mmap(fd, MIB, access=mmap.ACCESS_WRITE)
    os.close(fd)
    segment.free()


def test_no_program_started_later_inherits_the_descriptor() -> None:
    segment = Segment("t", MIB)
    assert not os.get_inheritable(segment.fd)
    segment.free()


def test_freed_memory_is_gone_and_freeing_twice_is_no_error() -> None:
    before = memfds()
    segment = Segment("t", MIB)
    assert memfds() == before + 1
    segment.free()
    segment.free()
    assert memfds() == before and segment.fd == -1 and len(segment.array) == 0


def test_a_view_in_use_survives_freeing() -> None:
    segment = Segment("t", MIB)
    view = segment.array[:10]
    view[:] = 7
    segment.free()
    assert view.tolist() == [7] * 10  # no fault


def test_a_segment_nobody_refers_to_frees_itself() -> None:
    before = memfds()
    segments = [Segment("t", MIB) for _ in range(3)]
    assert memfds() == before + 3
    del segments
    gc.collect()
    assert memfds() == before


def test_no_bytes_are_a_segment_too() -> None:
    segment = Segment("t", 0)
    assert segment.array.size == 0 and segment.array.dtype == np.uint8
    segment.free()


LIMITED = """
import os, resource, sys
from refound.ckpt.errors import SnapshotMemoryError
from refound.ckpt.slots import Segment
kind, low, size = getattr(resource, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(kind, (low, low))
before = len(os.listdir("/proc/self/fd"))
try:
    Segment("t", size)
except SnapshotMemoryError as error:
    print(error)
print(len(os.listdir("/proc/self/fd")) - before)
"""


@pytest.mark.parametrize(
    ("limit", "low", "why"),
    [("RLIMIT_FSIZE", MIB, "File too large"), ("RLIMIT_AS", 256 * MIB, "Cannot allocate memory")],
)
def test_memory_that_cannot_be_had_is_refused_cleanly(limit: str, low: int, why: str) -> None:
    command = [sys.executable, "-c", LIMITED, limit, str(low), str(512 * MIB)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    message, kept = done.stdout.splitlines()
    assert message.startswith(f"512.0 MiB of memory for t could not be had: {why}. ")
    assert message.endswith("is available on this node")
    assert kept == "0"


def test_an_absurd_size_is_refused_cleanly() -> None:
    before = memfds()
    with pytest.raises(SnapshotMemoryError, match="could not be had"):
        Segment("t", 1 << 70)
    assert memfds() == before


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.6 * 2**30, "1.6 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5 * 2**60, "5242880.0 TiB"),
    ],
)
def test_bytes_as_people_read_them(count: float, text: str) -> None:
    assert format_bytes(count) == text


# --- how much is there -----------------------------------------------------------------------------------------


def test_available_memory_is_some_and_less_than_all() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes() <= total


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup of our own, and no membership."""
    root = tmp_path / "cgroup"
    root.mkdir()
    own = tmp_path / "self"
    own.write_text("")
    monkeypatch.setattr(slots, "_CGROUPS", root)
    monkeypatch.setattr(slots, "_OWN_CGROUPS", own)
    return root


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def belong_to(cgroups: Path, *lines: str) -> None:
    (cgroups.parent / "self").write_text("".join(f"{line}\n" for line in lines))


def test_a_v2_limit_counts_with_those_of_all_ancestors(cgroups: Path) -> None:
    belong_to(cgroups, "0::/a/b")
    write_group(cgroups / "a" / "b", memory__max="max\n", memory__current="5\n")
    assert available_bytes() > 1000 * MIB / 1024  # "max" is no limit
    write_group(cgroups / "a", memory__max="1000\n", memory__current="400\n")
    assert available_bytes() == 600
    write_group(cgroups / "a" / "b", memory__max="700\n", memory__current="650\n")
    assert available_bytes() == 50


def test_a_v1_limit_is_the_memory_controllers(cgroups: Path) -> None:
    belong_to(cgroups, "9:name=systemd:/x", "4:memory:/job/7", "3:cpuset:/x", "0::/x")
    write_group(cgroups / "memory" / "job" / "7", memory__limit_in_bytes="5000", memory__usage_in_bytes="1500")
    write_group(cgroups / "cpuset" / "x", memory__limit_in_bytes="1", memory__usage_in_bytes="1")
    assert available_bytes() == 3500


def test_a_controller_among_others_is_found(cgroups: Path) -> None:
    belong_to(cgroups, "4:hugetlb,memory:/j:with:colons")
    write_group(cgroups / "memory" / "j:with:colons", memory__limit_in_bytes="50", memory__usage_in_bytes="15")
    assert available_bytes() == 35


def test_usage_above_the_limit_is_no_room(cgroups: Path) -> None:
    belong_to(cgroups, "0::/")
    write_group(cgroups, memory__max="100", memory__current="150")
    assert available_bytes() == 0


def test_cached_files_are_room_because_the_kernel_gives_them_back(cgroups: Path) -> None:
    belong_to(cgroups, "0::/a")
    stat = "anon 100\nfile 800\nshmem 200\nactive_file 250\ninactive_file 350\nslab 5\n"
    write_group(cgroups / "a", memory__max="1000", memory__current="900", memory__stat=stat)
    assert available_bytes() == 700
    belong_to(cgroups, "4:memory:/b")
    totals = "active_file 1\ninactive_file 2\ntotal_active_file 30\ntotal_inactive_file 40\n"
    write_group(
        cgroups / "memory" / "b", memory__limit_in_bytes="500", memory__usage_in_bytes="400", memory__stat=totals
    )
    assert available_bytes() == 170


def test_a_group_that_cannot_be_seen_sets_no_limit(cgroups: Path) -> None:
    belong_to(cgroups, "0::/../elsewhere", "4:memory:/not/here")
    assert available_bytes() > MIB
