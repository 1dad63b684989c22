# SPDX-License-Identifier: Apache-2.0
"""A file that proves itself: no byte of it can change unseen, and a failed write leaves what was there."""

import errno
import os
from pathlib import Path

import pytest
import torch
from refound.distill.errors import DamagedFileError
from refound.distill.proven import read_proven, write_proven

TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(7), "none": torch.empty(0, 4, dtype=torch.int32)}
FACTS = {"step": 3, "data": {"drawn": 17}, "said": "ä"}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS
    )


def test_it_reads_what_it_wrote_and_writes_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_proven(tmp_path / "new" / name, TENSORS, FACTS)
    tensors, facts = read_proven(tmp_path / "new" / "one")
    assert same(tensors) and facts == FACTS
    assert (tmp_path / "new" / "one").read_bytes() == (tmp_path / "new" / "two").read_bytes()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["one", "two"]


def test_no_byte_changes_unseen_and_none_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_proven(path, TENSORS, FACTS)
    sound = path.read_bytes()
    for place in range(len(sound)):
        for damaged in (sound[:place] + bytes([sound[place] ^ 0x11]) + sound[place + 1 :], sound[:place]):
            path.write_bytes(damaged)
            try:
                tensors, facts = read_proven(path)
            except DamagedFileError as error:
                assert str(path) in str(error)
            else:  # padding
                assert same(tensors) and facts == FACTS, place


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_proven(path, TENSORS, FACTS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_proven(path, {"a": torch.zeros(9)}, {})
    assert same(read_proven(path)[0]) and [file.name for file in tmp_path.iterdir()] == ["file"]
