# SPDX-License-Identifier: Apache-2.0
"""The private directory: nobody else's, open to nobody else, and short enough for a socket."""

import os
import socket
import stat
from pathlib import Path

import pytest
from refound.ckpt.errors import ConfigError
from refound.ckpt.paths import MAX_SOCKET_PATH_BYTES, job_dir, private_dir, runtime_dir, socket_path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_directory_is_chosen_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOUND_DIR", "/a/b")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert runtime_dir() == Path("/a/b")
    monkeypatch.delenv("REFOUND_DIR")
    assert runtime_dir() == Path("/run/user/7/refound")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_dir() == Path(f"/tmp/refound-{os.getuid()}")


def test_a_new_directory_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = private_dir(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert mode_of(path) == 0o700
    assert private_dir(path) == path  # and again


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770, 0o777])
def test_a_directory_open_to_others_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"open to others .mode {mode:o}.; run: chmod 700 {path}"):
        private_dir(path)
    assert mode_of(path) == mode  # it was not changed behind anyone's back
    path.chmod(0o700)
    private_dir(path)


def test_a_link_is_refused_even_to_a_good_directory(tmp_path: Path) -> None:
    good = private_dir(tmp_path / "good")
    link = tmp_path / "link"
    link.symlink_to(good)
    with pytest.raises(ConfigError, match="is not a directory"):
        private_dir(link)


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a directory"):
        private_dir(link)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match="is not a directory; set REFOUND_DIR"):
        private_dir(path)


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set REFOUND_DIR"):
        private_dir(tmp_path / "file" / "d")


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private_dir(tmp_path / "d")
    if os.getuid() == 0:
        os.chown(path, 65534, -1)
        found, mine = 65534, 0
    else:
        found, mine = os.getuid(), os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: mine)
    with pytest.raises(ConfigError, match=rf"belongs to uid {found}, not to you \(uid {mine}\); set REFOUND_DIR"):
        private_dir(path)


def test_jobs_and_nodes_have_paths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOUND_DIR", "/run/r")
    names = ["a", "b", "a/b", "../a", "", "ü", "a" * 5000, "a\0b"]
    paths = {socket_path(job, node) for job in names for node in names}
    assert len(paths) == len(names) ** 2
    assert {path.parent for path in paths} == {job_dir(job) for job in names}
    assert all(path.parent.parent == Path("/run/r") and len(str(path)) < 40 for path in paths)


def test_the_longest_path_can_be_bound_and_a_longer_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = len(os.fsencode(socket_path("j", "n"))) - len(os.fsencode(runtime_dir()))
    base = tmp_path / "b"
    room = MAX_SOCKET_PATH_BYTES - tail - len(os.fsencode(base)) - 1
    assert room > 2, "pytest's folder is too deep for this test; give it --basetemp"
    monkeypatch.setenv("REFOUND_DIR", str(base / ("x" * room)))
    longest = socket_path("j", "n")
    assert len(os.fsencode(longest)) == MAX_SOCKET_PATH_BYTES
    longest.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(longest))
    monkeypatch.setenv("REFOUND_DIR", str(base / ("x" * (room + 1))))
    with pytest.raises(ConfigError, match="too long for a Unix socket; set REFOUND_DIR to a shorter"):
        socket_path("j", "n")
    monkeypatch.setenv("REFOUND_DIR", str(base / ("ü" * (room // 2 + 1))))  # bytes count, not characters
    with pytest.raises(ConfigError, match="too long"):
        socket_path("j", "n")
