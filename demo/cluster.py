# SPDX-License-Identifier: Apache-2.0
"""A cluster on one machine: a torchrun agent for each node, started, struck by faults, replaced and cleared away.

Every process of it carries the cluster's private directory in its environment, which tells them from all others: a
process is signalled only if it does, and none that does is left when the cluster is closed.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..ckpt.client import find_nodes, stop_job
from ..ckpt.faults import Fault, target_pids

DIRECTORY_ENV = "REFOUND_DIR"

# glibc gives large buffers back to the kernel and faults every page in again at the next use, which costs FSDP on
# the CPU a third of its step: all-gathered weights come and go with each layer. Told this, it keeps them.
_KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}


class Cluster:
    """`nodes` torchrun agents on loopback running one job, with its rendezvous store in this process.

    Losing the host of the store would end the job, so no node is that host (`is_host=0`).
    """

    def __init__(self, *, job: str, nodes: int, script: Sequence[str], logs: Path) -> None:
        """Starts nothing but the store. `script` is what torchrun runs, `logs` the directory of the agents' output."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self.job, self.nodes = job, nodes
        self.names = {index: f"node{index}" for index in range(nodes)}
        self._script, self._logs = tuple(script), logs
        self._logs.mkdir(parents=True, exist_ok=True)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._directory = Path(tempfile.mkdtemp(prefix="rf-"))  # short: socket paths have about 100 bytes
        self._outer_directory = os.environ.get(DIRECTORY_ENV)
        os.environ[DIRECTORY_ENV] = str(self._directory)  # where find_nodes looks
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._continue_at_s: list[tuple[float, tuple[int, ...]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts all nodes."""
        for index in self.names:
            self._start_node(index)

    def statuses(self) -> list[dict[str, Any]]:
        """What the snapshot process of each node says; a node without one is left out."""
        return find_nodes(self.job)

    def running(self) -> list[int]:
        """The nodes whose agent is running."""
        return [index for index, agent in self._agents.items() if agent.poll() is None]

    def failed(self) -> dict[int, int]:
        """Node to exit status, of the agents that have ended with another one than 0."""
        ended = {index: agent.poll() for index, agent in self._agents.items()}
        return {index: status for index, status in ended.items() if status}

    def strike(self, fault: Fault) -> tuple[int, ...]:
        """Does what the fault says, and brings back what it says is brought back. Returns the pids it fell on.

        Raises:
            LookupError: if the target is not running just now; nothing was done.
        """
        pids = tuple(pid for pid in target_pids(fault, self.statuses(), self.names) if self._is_ours(pid))
        if not pids:
            raise LookupError(f"{fault}: its processes have just ended")
        if fault.action == "stop":
            _send(pids, signal.SIGSTOP)
            self._continue_at_s.append((time.monotonic() + fault.for_ms / 1000, pids))
            return pids
        _send(pids, signal.SIGKILL)
        if fault.target in ("node", "agent"):
            self._agents[fault.index].wait()
            self._start_node(fault.index)
        return pids

    def tick(self) -> None:
        """Continues what was stopped, when its time has come. To be called every so often."""
        now = time.monotonic()
        for due, pids in self._continue_at_s:
            if due <= now:
                _send([pid for pid in pids if self._is_ours(pid)], signal.SIGCONT)
        self._continue_at_s = [entry for entry in self._continue_at_s if entry[0] > now]

    def leftovers(self) -> list[int]:
        """The processes of this cluster that are still there."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and self._is_ours(int(entry.name))
        ]

    def wait_until_empty(self, timeout_s: float) -> list[int]:
        """Waits for the last process of an ended job to go; returns those that have not gone."""
        deadline = time.monotonic() + timeout_s
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def close(self) -> None:
        """Ends every process of the cluster, frees its snapshots and removes its directory."""
        for agent in self._agents.values():
            if agent.poll() is None:
                agent.kill()
        stop_job(self.job)
        if self.wait_until_empty(1.0):
            # Twice, since a process may have been starting another while the first look was taken
            for _ in range(2):
                _send(self.leftovers(), signal.SIGKILL)
                self.wait_until_empty(2.0)
        for agent in self._agents.values():
            agent.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._outer_directory is None:
            os.environ.pop(DIRECTORY_ENV, None)
        else:
            os.environ[DIRECTORY_ENV] = self._outer_directory

    def _start_node(self, index: int) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", *self._rendezvous(index), *self._script]
        with (self._logs / f"{self.names[index]}.log").open("ab") as log:
            self._agents[index] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_worker_environment()},
                start_new_session=True,  # Ctrl-C is for the driver, which ends the nodes in order
            )

    def _rendezvous(self, index: int) -> list[str]:
        return [
            f"--nnodes={self.nodes}",
            "--nproc-per-node=1",
            "--max-restarts=20",
            "--rdzv-backend=refound",
            f"--rdzv-endpoint=127.0.0.1:{self._store.port}",
            f"--rdzv-id={self.job}",
            "--local-addr=127.0.0.1",
            f"--rdzv-conf=node={self.names[index]},is_host=0",
        ]

    def _is_ours(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # ended, or another user's
            return False
        return f"{DIRECTORY_ENV}={self._directory}".encode() in environment.split(b"\0") and pid != os.getpid()


def _worker_environment() -> Mapping[str, str]:
    # One thread a worker, for the same bits wherever it runs; three share this machine anyway
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return fixed | {name: value for name, value in _KEEP_FREED_MEMORY.items() if name not in os.environ}


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has ended by itself meanwhile
