# SPDX-License-Identifier: Apache-2.0
"""What a failing worker leaves behind: one traceback a node, in torchrun's own format, and no false blame."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from refound.ckpt import last_words
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from .cluster import Cluster, sleepers
from .harness import eventually


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def failure(rank: int, path: Path) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=str(path))


def test_torchruns_summary_shows_the_first_ranks_traceback_once(error_file: Path, tmp_path: Path) -> None:
    paths = {}
    for rank, first in ((0, 1), (1, 1)):
        try:
            raise ValueError(f"rank {rank} went wrong")
        except ValueError as error:
            last_words._record(error, last_words._follows({"first": first}, rank))
        paths[rank] = error_file.rename(tmp_path / f"{rank}.json")
    failed = ChildFailedError("train.py", {rank: failure(rank, path) for rank, path in paths.items()})
    assert failed.get_first_failure()[0] == 1
    summary = failed.format_msg()
    root = summary[summary.index("Root Cause") :]
    assert "ValueError: rank 1 went wrong" in root
    assert "test_last_words.py" in root
    assert summary.count("Traceback") == 1
    assert "ValueError: after rank 1 had failed, see there" in summary


def test_what_record_has_written_is_left(error_file: Path) -> None:
    error_file.write_text("theirs")
    last_words._record(ValueError(), "")
    assert error_file.read_text() == "theirs"


def test_without_a_snapshot_process_it_just_fails(
    error_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(last_words, "_installed", False)
    last_words.install(tmp_path / "none.sock", 3, 1)
    try:
        raise KeyError("gone")
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    assert "KeyError: 'gone'" in capsys.readouterr().err
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "KeyError: 'gone'"
    assert "test_last_words.py" in message["extraInfo"]["py_callstack"]


def test_only_a_node_that_is_gone_is_to_blame_for_a_lost_connection() -> None:
    nodes = Cluster(1, 0, [[1], [1]], heartbeat_s=30.0)
    try:
        nodes.open()
        first, second = (node.keeper for node in nodes.nodes)
        said = last_words.note(first, 0, nodes.generation, "ValueError", lost=False)
        assert said == {"first": 0, "missing": [], "elsewhere": ""}
        assert last_words.note(first, 1, nodes.generation, "RuntimeError", lost=False)["first"] == 0
        assert last_words.note(first, 1, nodes.generation - 1, "RuntimeError", lost=True) == {}
        # The other node's worker has failed: that is why, and nobody is gone.
        with sleepers() as (process,):
            writer = nodes.writer(1, 1).worker()
            writer.pid, writer.pidfd = process.pid, os.pidfd_open(process.pid)
            second.join(writer)
            process.kill()
            eventually(lambda: not writer.alive, "the worker has died")
            said = last_words.note(first, 0, nodes.generation, "RuntimeError", lost=True)
            assert said == {"first": 0, "missing": [], "elsewhere": nodes.nodes[1].name}
            assert nodes.nodes[1].name in last_words._follows(said, 0)
    finally:
        nodes.end()


def test_a_node_that_dies_while_it_is_asked_for_is_found_to_be_gone() -> None:
    nodes = Cluster(1, 0, [[1], [1]], heartbeat_s=30.0)
    try:
        views, gate = nodes.gated(1, 1 << 40)
        nodes.open(views)
        lost = next(p for p, node in enumerate(nodes.nodes) if node.name == "n1")
        keeper = nodes.nodes[1 - lost].keeper
        found: list[dict] = []
        asking = threading.Thread(
            target=lambda: found.append(last_words.note(keeper, 0, nodes.generation, "RuntimeError", lost=True))
        )
        asking.start()
        eventually(lambda: gate._sockets, "it asks")
        gate.cut()
        gate._listener.close()
        asking.join()
        assert found == [{"first": 0, "missing": ["n1"], "elsewhere": ""}]
    finally:
        nodes.end()
