# SPDX-License-Identifier: Apache-2.0
"""A cached directory is whole under its name, or not there: whoever builds, waits, fails or is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from refound.distill.cache import cache_root, cached_directory
from refound.distill.errors import CacheWriteError

BUILDER = """
import sys, time
from pathlib import Path
from refound.distill.cache import cached_directory
root, name = Path(sys.argv[1]), sys.argv[2]
def build(directory):
    (directory / "half").write_text("half")
    print("building", flush=True)
    sys.stdin.readline()
    (directory / "whole").write_text("whole")
print(cached_directory(name, build, root), flush=True)
"""


def builder(root: Path, name: str = "thing") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(root), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def write_whole(directory: Path) -> None:
    (directory / "whole").write_text("whole")


def test_it_is_built_once_and_then_only_found(tmp_path: Path):
    built: list[Path] = []

    def build(directory: Path) -> None:
        built.append(directory)
        write_whole(directory)

    assert cached_directory("thing", build, tmp_path) == tmp_path / "thing"
    assert cached_directory("thing", build, tmp_path) == tmp_path / "thing"
    assert len(built) == 1 and built[0] != tmp_path / "thing" and not built[0].exists()
    assert (tmp_path / "thing" / "whole").read_text() == "whole"


def test_of_two_processes_one_builds_and_the_other_waits_for_it(tmp_path: Path):
    with builder(tmp_path) as first:
        assert line_of(first) == "building"
        with builder(tmp_path) as second:
            assert not (tmp_path / "thing").exists()
            first.communicate("\n")
            # The second one found it built: it never says "building", and needs no input
            assert line_of(second) == str(tmp_path / "thing")
            second.communicate()
    assert first.returncode == second.returncode == 0
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["half", "whole"]


def test_a_killed_builder_leaves_nothing_under_the_name_and_the_next_one_clears_up(tmp_path: Path):
    with builder(tmp_path) as killed:
        assert line_of(killed) == "building"
        killed.send_signal(signal.SIGKILL)
    scraps = list(tmp_path.glob("*.part"))
    assert not (tmp_path / "thing").exists()
    cached_directory("thing", write_whole, tmp_path)
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["whole"]
    assert not any(scrap.exists() for scrap in scraps) and not list(tmp_path.glob(".*.part"))


def test_a_builder_that_fails_leaves_nothing_and_says_why(tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise ZeroDivisionError("no room")

    with pytest.raises(ZeroDivisionError, match="no room"):
        cached_directory("thing", fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]


def test_a_root_that_cannot_be_made_is_said_with_the_way_out(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheWriteError, match="set XDG_CACHE_HOME"):
        cached_directory("thing", write_whole, tmp_path / "file" / "below")


@pytest.mark.parametrize(("value", "expected"), [("/x/y", "/x/y/refound"), ("", None), ("relative", None)])
def test_the_root_follows_xdg(monkeypatch: pytest.MonkeyPatch, value: str, expected: str | None):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_root() == (Path(expected) if expected else Path.home() / ".cache" / "refound")


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name, (tmp_path / "thing").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    cached_directory("thing", write_whole, tmp_path)
    (file, file_named), (_, directory_named), (parent, parent_named) = synced
    assert (file, file_named, directory_named) == ("whole", False, False)
    assert (parent, parent_named) == (tmp_path.name, True)


def test_a_full_disk_is_said_with_the_way_out(tmp_path: Path):
    def fill(directory: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)

    with pytest.raises(CacheWriteError, match=r"No space left on device.*XDG_CACHE_HOME"):
        cached_directory("thing", fill, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]
