# SPDX-License-Identifier: Apache-2.0
"""`refound` commands under torchrun with refound's snapshots, of which one rank is killed once."""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from refound.ckpt.client import stop_job

from ..ckpt.harness import send

_TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--logs-specs=refound",
    "--nproc-per-node=2",
)


def run(arguments: Sequence[str], folder: Path, *, kill_after: int = 0) -> list[str]:
    """What `refound ARGUMENTS` said on two ranks.

    kill_after: the step after which the second rank gets SIGKILL; 0: none.

    Fails if the command does, or if it has ended before it could be killed.
    """
    job = f"job-{uuid.uuid4().hex[:8]}"
    command = [*_TORCHRUN, "--max-restarts=3", "-m", "refound", *arguments]
    environment = os.environ | {"REFOUND_JOB": job, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment, start_new_session=True
    )
    said, killed = [], False
    try:
        assert process.stderr
        for line in process.stderr:
            said.append(line.rstrip())
            found = re.match(r"step (\d+) of (\d+): ", line)
            if kill_after and not killed and found and int(found[1]) >= kill_after:
                assert int(found[1]) < int(found[2]), "it has ended already"
                send([_ranks(process.pid)[1]])
                killed = True
        assert process.wait() == 0, "\n".join(said)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stop_job(job)
    return said


def _ranks(agent: int) -> dict[int, int]:
    """Rank to process."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(one[5:]): int(child) for one in environment if one.startswith(b"RANK=")}
    return found
