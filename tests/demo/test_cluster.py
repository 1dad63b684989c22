# SPDX-License-Identifier: Apache-2.0
"""Runs that go wrong end, say where to look, and leave nothing running."""

import io
import os
from datetime import timedelta
from pathlib import Path

import pytest
from refound.ckpt.faults import parse_fault
from refound.demo.cluster import Cluster
from refound.demo.errors import RunFailedError
from refound.demo.progress import Progress
from refound.demo.supervise import Supervisor

FAILS = "raise SystemExit('nothing to train here')"
HANGS = "import signal\nsignal.pause()"
ENDS = "pass"
PATIENCE = timedelta(minutes=2)


def run(tmp_path: Path, program: str, fault: str = "", patience: timedelta = PATIENCE) -> tuple[str, list[int], str]:
    """The error of a one-node run of `program`, what it left running, and its node's log."""
    script = tmp_path / "program.py"
    script.write_text(program)
    before = os.environ.get("REFOUND_DIR")
    faults = [parse_fault(fault)] if fault else []
    with Cluster(job="wrong", nodes=1, script=[str(script)], logs=tmp_path / "logs", restarts=0) as cluster:
        supervisor = Supervisor(
            cluster, tmp_path, name="wrong", steps=3, faults=faults, progress=Progress(io.StringIO())
        )
        with pytest.raises(RunFailedError) as caught:
            supervisor.run(patience)
    assert os.environ.get("REFOUND_DIR") == before
    return str(caught.value), cluster.leftovers(), (tmp_path / "logs" / "node0.log").read_text()


def test_a_job_that_fails_is_said_with_its_logs(tmp_path: Path):
    error, left, log = run(tmp_path, FAILS)
    assert "the wrong run failed after step 0 of 3: node 0 ended with status 1" in error
    assert str(tmp_path / "logs") in error and "nothing to train here" in log
    assert left == []


def test_a_job_that_hangs_is_ended(tmp_path: Path):
    error, left, _ = run(tmp_path, HANGS, patience=timedelta(seconds=8))
    assert "no step was completed for 8 s" in error and left == []


def test_a_fault_that_never_falls_is_a_failure(tmp_path: Path):
    error, left, _ = run(tmp_path, ENDS, fault="rank=0 step=2 kill")
    assert "the job ended before this could fall: rank=0 step=2 kill" in error and left == []
