# SPDX-License-Identifier: Apache-2.0
"""Live progress: one line that is rewritten on a terminal, one line a step elsewhere."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

import pytest
from refound.demo.progress import Progress, describe, describe_starts

from .made_up import start_record, step_record

NAMES = ("node0", "node1", "node2")


def status(node: str, step: int | None = None, age_s: float = 0.5, workers: int = 1) -> dict[str, object]:
    committed = None if step is None else {"step": step, "age_s": age_s}
    return {"node": node, "committed": committed, "workers": [{"rank": 0, "pid": 1}] * workers}


def test_a_line_has_step_loss_snapshot_stall_and_nodes():
    nodes = [status("node0", 7, 0.4), status("node1", 6, 1.5), status("node2", 7, 0.4)]
    line = describe("faulted", 12, step_record(7, loss=3.4031), nodes, NAMES)
    assert " ".join(line.split()) == (
        "faulted step 7/12 loss 3.4031 snapshot 6, 1.5 s old stall 2 ms nodes 3/3"  # the oldest commit
    )


def test_a_node_without_snapshot_process_or_workers_is_named():
    line = describe("faulted", 12, None, [status("node0"), status("node2", workers=0)], NAMES)
    assert "nodes 1/3 (no node1, node2)" in line and "loss" not in line and "snapshot" not in line


def test_elsewhere_than_on_a_terminal_each_step_is_one_line():
    stream = io.StringIO()
    progress = Progress(stream)
    for step in (1, 1, 1, 2, 2, 1, 1):  # back to 1: run again after a restart
        progress.show("run", 3, step_record(step), [], NAMES)
    progress.say("an event")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert ["step  1/3" in line for line in lines] == [True, False, True, False]
    assert len(lines) == 4 and lines[3].endswith("an event") and "\x1b" not in stream.getvalue()


def read_all(leader: int) -> str:
    """What was written to a terminal that is closed by now. It arrives in pieces: one read may see a part only."""
    pieces = []
    with os.fdopen(leader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO is a terminal's end
        while piece := terminal.read(10_000):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_on_a_terminal_the_line_is_rewritten_and_never_wraps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(follower, "w") as stream:
        progress = Progress(stream)
        for step in (1, 2, 3):
            progress.show("run", 3, step_record(step), [status("node0", 1)], NAMES)
        progress.say("an event")
        progress.close()
    shown = read_all(leader)
    rewritten = shown.split("\r\x1b[K")
    assert rewritten[0] == "" and shown.count("\n") == 1
    assert all(len(line.rstrip("\r\n")) < 40 for line in rewritten)
    assert "an event" in shown


def test_a_restart_says_which_rank_came_from_where():
    starts = [
        start_record(0, 7, "memory", 1.0),
        start_record(2, 7, "memory", 1.0),
        start_record(1, 7, "parity", 1.0, 0.3),
    ]
    assert describe_starts(starts) == "training on from step 7: rank 0, 2 from memory; rank 1 from parity (0.30 s)"
    assert describe_starts([start_record(0, 0, None, 1.0)]) == "training from step 0 on"
