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

from ..ckpt.client import find_nodes
from ..ckpt.faults import Fault, target_pids

DIRECTORY_ENV = "REFOUND_DIR"
_NODE_ENV = "REFOUND_DEMO_NODE"
_CLOSE_S = 10.0

# FSDP gathers the weights of each layer into new buffers and frees them again. By default glibc gives those back to
# the kernel, which clears every page of the next ones: a third of a step on the CPU. So: keep them, in large pages.
_MEMORY_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Cluster:
    """`nodes` torchrun agents on loopback running one job, with its rendezvous store in this process.

    Losing the host of the store would end the job, so no node is that host (`is_host=0`).
    """

    def __init__(self, *, job: str, nodes: int, script: Sequence[str], logs: Path, restarts: int = 20) -> None:
        """Starts nothing but the store. `script` is what torchrun runs, `logs` the directory of the agents' output."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self.job, self.nodes = job, nodes
        self.names = {index: f"node{index}" for index in range(nodes)}
        self._script, self._logs, self._restarts = tuple(script), logs, restarts
        self._logs.mkdir(parents=True, exist_ok=True)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._directory = Path(tempfile.mkdtemp(prefix="rf-"))  # short: socket paths have about 100 bytes
        self._outer_directory = os.environ.get(DIRECTORY_ENV)
        os.environ[DIRECTORY_ENV] = str(self._directory)  # where find_nodes looks
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._continue_at_s: list[tuple[float, tuple[int, ...]]] = []
        self._statuses: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts all nodes."""
        for index in self.names:
            self._start_node(index)

    def statuses(self) -> list[dict[str, Any]]:
        """What the snapshot process of each node says; a node without one is left out.

        While a fault has stopped some of them, they say what they said last: they could not answer.
        """
        if not self._continue_at_s:
            self._statuses = find_nodes(self.job)
        return self._statuses

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
        if self._continue_at_s:
            raise LookupError(f"{fault}: an earlier one has stopped processes that have not gone on yet")
        told = target_pids(fault, self.statuses(), self.names)
        # A worker that has just started is not known to its snapshot process yet, but belongs to its node.
        more = self._processes(self.names[fault.index]) if fault.target == "node" else []
        pids = tuple(pid for pid in dict.fromkeys((*told, *more)) if self._is_ours(pid))
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
        return self._processes()

    def wait_until_empty(self, timeout_s: float) -> list[int]:
        """Waits for the last process of an ended job to go; returns those that have not gone."""
        deadline = time.monotonic() + timeout_s
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def close(self) -> None:
        """Ends every process of the cluster, frees its snapshots and removes its directory."""
        deadline = time.monotonic() + _CLOSE_S
        # Again and again, since a process may have been starting another while the last look was taken
        while (left := self.leftovers()) and time.monotonic() < deadline:
            _send(left, signal.SIGKILL)
            self.wait_until_empty(0.2)
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
                env={**os.environ, **_worker_environment(), _NODE_ENV: self.names[index]},
                start_new_session=True,  # Ctrl-C is for the driver, which ends the nodes in order
            )

    def _rendezvous(self, index: int) -> list[str]:
        return [
            f"--nnodes={self.nodes}",
            "--nproc-per-node=1",
            f"--max-restarts={self._restarts}",
            "--rdzv-backend=refound",
            f"--rdzv-endpoint=127.0.0.1:{self._store.port}",
            f"--rdzv-id={self.job}",
            "--local-addr=127.0.0.1",
            f"--rdzv-conf=node={self.names[index]},is_host=0",
        ]

    def _processes(self, node: str = "") -> list[int]:
        running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in running if self._is_ours(pid, node)]

    def _is_ours(self, pid: int, node: str = "") -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # ended, or another user's
            return False
        marks = {DIRECTORY_ENV: str(self._directory)} | ({_NODE_ENV: node} if node else {})
        return pid != os.getpid() and all(f"{name}={value}".encode() in environment for name, value in marks.items())


def _worker_environment() -> Mapping[str, str]:
    fixed = {
        "OMP_NUM_THREADS": "1",  # the workers share this machine; and one thread sums in one order
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",  # what lies in the working directory is not to be imported
    }
    return fixed | {name: value for name, value in _MEMORY_ENVIRONMENT.items() if name not in os.environ}


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has ended by itself meanwhile
