# SPDX-License-Identifier: Apache-2.0
"""Real jobs for the tests: torchrun agents on loopback, real signals, and a record of every bit they compute.

A `Job` is some agents ("nodes") that run `jobs/train.py`, whose steps go only as far as the test allows. A test lets
it train to a step, strikes, lets it go on, and compares all losses with an undisturbed run of the same script without
refound (`reference`). Every process of a job carries a mark in its environment, by which it is found and ended.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from refound.ckpt.client import Client, find_nodes, stop_job
from refound.ckpt.paths import job_dir, socket_path

SCRIPT = Path(__file__).parent / "jobs" / "train.py"
STEPS = 100
"""How long a job is, unless it says otherwise."""
PATIENCE_S = 120.0
"""How long anything may take before a test says that it hangs."""
_POLL_S = 0.02
T = TypeVar("T")
_MARK = "REFOUND_TEST_JOB"
_QUIET = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}

Status = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run computes."""

    losses: Mapping[int, Mapping[int, str]]
    """Rank → step → loss, as a hex float."""
    digests: Mapping[int, Mapping[str, str]]
    """Rank → what → sha256 at the end."""


@functools.cache
def reference(kind: str, world: int, steps: int, script: tuple[str, ...]) -> Reference:
    """The undisturbed run, without refound, of `world` ranks; made once a session."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        command = [*_TORCHRUN, "--standalone", f"--nproc-per-node={world}", str(SCRIPT)]
        command += [*_arguments(out, kind, steps), *script]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("REFOUND_")}
        done = subprocess.run(command, env=environment | _QUIET, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("nothing is protected") == world, "each rank says once that it is not protected"
        losses = {rank: {r["step"]: r["loss"] for r in _steps(read_records(out, rank))} for rank in range(world)}
        digests = {rank: json.loads((out / f"final{rank}.json").read_text())["digests"] for rank in range(world)}
    return Reference(losses, digests)


_TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def _arguments(out: Path, kind: str, steps: int) -> list[str]:
    return ["--out", str(out), "--kind", kind, "--steps", str(steps)]


def read_records(out: Path, rank: int) -> list[dict[str, Any]]:
    """Everything a rank has written, over all its incarnations."""
    path = out / f"rank{rank}.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is still being written


def _steps(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "step" in record]


def eventually(look: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """Look again and again until what is seen is true; fails, saying `what`, if it never is."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(_POLL_S)
    return seen


def send(pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal processes; one that has just ended by itself is no matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class Job:
    """One training job of `nodes` agents with `workers` ranks each."""

    folder: Path
    nodes: int = 3
    workers: int = 1
    kind: str = "ddp"
    steps: int = STEPS
    conf: str = ""
    """More of `--rdzv-conf`."""
    least: int = 0
    """Nodes that suffice, if fewer than `nodes` do."""
    max_restarts: int = 50
    standalone: bool = False
    program: Path = SCRIPT
    hosts_store: bool = False
    """The agent of node 0 hosts the rendezvous store; else this process does, which is none of the nodes."""
    script: Sequence[str] = ()
    """More arguments of the script."""
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:8]}")

    def __post_init__(self) -> None:
        self.out = self.folder / self.name
        self.out.mkdir()
        self._gate = self.out / "gate"
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._store: Any = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._checked: dict[int, int] = {}
        self.allow(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- starting and ending -----------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start all nodes; returns at once."""
        for node in range(self.nodes):
            self.start_node(node)
        return self

    def start_node(self, node: int, *, conf: str = "", environment: Mapping[str, str] | None = None) -> None:
        """Start the agent of one node, with settings of its own if any."""
        script = [*_arguments(self.out, self.kind, self.steps), "--gate", str(self._gate), *self.script]
        command = [*_TORCHRUN, f"--nproc-per-node={self.workers}", f"--max-restarts={self.max_restarts}"]
        command += self._rendezvous(node, conf)
        env = os.environ | _QUIET | {_MARK: self.name} | dict(self.environment) | dict(environment or {})
        with self._log(node).open("ab") as log:
            self._agents[node] = subprocess.Popen(
                [*command, str(self.program), *script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )

    def _rendezvous(self, node: int, conf: str) -> list[str]:
        if self.standalone:
            return ["--standalone", "--logs-specs=refound"]
        if self._store is None and not self.hosts_store:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        is_host = int(self.hosts_store and node == 0)
        settings = ",".join(part for part in (f"node=node{node},is_host={is_host}", self.conf, conf) if part)
        return [
            f"--nnodes={self.least}:{self.nodes}" if self.least else f"--nnodes={self.nodes}",
            "--rdzv-backend=refound",
            f"--rdzv-endpoint=127.0.0.1:{self._port if self.hosts_store else self._store.port}",
            f"--rdzv-id={self.name}",
            "--local-addr=127.0.0.1",
            f"--rdzv-conf={settings}",
        ]

    def new_store(self) -> None:
        """Forget the rendezvous: a job that has failed as a whole starts with another one."""
        self._store = None

    def wait_agents(self) -> dict[int, int]:
        """Wait until all agents have ended; node → exit status."""
        eventually(lambda: all(agent.poll() is not None for agent in self._agents.values()), "the agents end")
        return {node: agent.returncode for node, agent in self._agents.items()}

    def close(self) -> None:
        """End every process of the job, whatever it is doing."""
        send(agent.pid for agent in self._agents.values() if agent.poll() is None)
        stop_job(self.name)
        for _ in range(3):  # more than once: a process may have been starting another during the first look
            send(self.processes())
            with contextlib.suppress(AssertionError):
                eventually(lambda: not self.processes(), "all processes of the job are gone", timeout_s=5)
        for agent in self._agents.values():
            agent.wait()
        for path in job_dir(self.name).glob("*"):
            path.unlink()
        if job_dir(self.name).exists():
            job_dir(self.name).rmdir()
        self._store = None

    # --- looking -----------------------------------------------------------------------------------------------

    @property
    def world(self) -> int:
        return self.nodes * self.workers

    def processes(self) -> dict[int, str]:
        """Every process of this job that is still there: pid → command line."""
        mark, found = f"{_MARK}={self.name}".encode(), {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has just ended, or is another user's
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        return found

    def statuses(self) -> dict[int, Status]:
        """What each node's snapshot process says: node → status."""
        if self.standalone:
            return dict(enumerate(find_nodes(self.name)))
        return {int(status["node"].removeprefix("node")): status for status in find_nodes(self.name)}

    def status(self, node: int) -> Status:
        """What one node's snapshot process says; the others may be stopped."""
        return eventually(lambda: self._ask(node), f"node {node} has a snapshot process")

    def _ask(self, node: int) -> Status:
        if self.standalone:
            return self.statuses().get(node, {})
        try:
            client = Client(socket_path(self.name, f"node{node}"))
        except OSError:
            return {}
        with contextlib.closing(client), contextlib.suppress(OSError):
            return client.call({"op": "status"})[0]
        return {}

    @property
    def generation(self) -> int:
        return max((status["generation"] for status in self.statuses().values()), default=0)

    def committed(self) -> dict[int, int]:
        """Node → the step of the committed snapshot."""
        return {node: (status["committed"] or {}).get("step", 0) for node, status in self.statuses().items()}

    def worker_pids(self, *nodes: int) -> list[int]:
        """Processes of the workers of these nodes, or of all."""
        chosen = [status for node, status in self.statuses().items() if not nodes or node in nodes]
        return [worker["pid"] for status in chosen for worker in status["workers"]]

    def events(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """(node, event) of a kind, in the order of each node."""
        return [(n, e) for n, status in self.statuses().items() for e in status["events"] if e["kind"] == kind]

    def starts(self, rank: int) -> list[dict[str, Any]]:
        """Each start of a rank: what step it went on from and from where."""
        return [record for record in read_records(self.out, rank) if "start" in record]

    def log(self, node: int) -> str:
        return self._log(node).read_text(errors="replace") if self._log(node).exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- node {node}\n{self.log(node)}" for node in range(self.nodes))

    def _log(self, node: int) -> Path:
        return self.out / f"node{node}.log"

    # --- training ----------------------------------------------------------------------------------------------

    def allow(self, step: int) -> None:
        """Steps up to this one may be run."""
        beside = self._gate.with_suffix(".new")
        beside.write_text(str(step))
        beside.replace(self._gate)

    def train_to(self, step: int) -> None:
        """Run to this step and wait until all nodes hold it, parity and all."""
        self.allow(step)
        self.wait(lambda: self.rests_at(step), f"all nodes hold step {step}")

    def rests_at(self, step: int) -> bool:
        """Whether all nodes hold this step and nothing is under way."""
        statuses = self.statuses()
        return len(statuses) == self.nodes and all(
            (status["committed"] or {}).get("step") == step and status["phase"] == "idle"
            for status in statuses.values()
        )

    def wait_back(self, generation: int, world: int | None = None) -> int:
        """Wait until all ranks train again in a generation after this one; returns the step they went on from."""

        def look() -> list[dict[str, Any]]:
            last = [(self.starts(rank) or [{"generation": 0}])[-1] for rank in range(world or self.world)]
            now = {status["generation"] for status in self.statuses().values()}
            return last if {start["generation"] for start in last} == now and min(now) > generation else []

        last = self.wait(look, f"all ranks are back after generation {generation}")
        steps = {start["start"] for start in last}
        assert len(steps) == 1, f"ranks went on from different steps: {last}"
        return steps.pop()

    def wait_back_as(self, world: int, generation: int) -> int:
        """The same for a job whose nodes may be fewer: the ranks that started last are `world` of a new generation."""

        def look() -> set[int]:
            starts = [(self.starts(rank) or [{"generation": 0}])[-1] for rank in range(world)]
            fresh = {start["generation"] for start in starts}
            return fresh if len(fresh) == 1 and min(fresh) > generation and starts[0]["world"] == world else set()

        # An agent that has died is no reason to stop looking.
        eventually(look, f"{world} ranks are back after generation {generation}; {self._describe()}")
        steps = {self.starts(rank)[-1]["start"] for rank in range(world)}
        assert len(steps) == 1, f"ranks went on from different steps: {steps}"
        return steps.pop()

    def sources(self) -> list[str]:
        """By rank, from where it last went on."""
        return [self.starts(rank)[-1]["source"] for rank in range(self.world)]

    def strike(self, pids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> int:
        """Signal processes; returns the generation that this ends."""
        generation = self.generation
        send(pids, number)
        return generation

    def lose_node(self, node: int, *, restart: bool = True) -> int:
        """Kill a node's agent, workers and snapshot process at once, and bring an empty one back."""
        generation = self.generation
        send(self.node_pids(node))
        self._agents[node].wait()
        if restart:
            self.start_node(node)
        return generation

    def node_pids(self, node: int) -> list[int]:
        """All that runs on a node: the agent first, so that it does not replace what dies after it."""
        status = self.status(node)
        return [self._agents[node].pid, *(worker["pid"] for worker in status["workers"]), status["pid"]]

    def agent(self, node: int) -> subprocess.Popen[bytes]:
        return self._agents[node]

    def check_losses(self, least: int = 0) -> None:
        """Every loss so far, of steps run twice too, is that of the undisturbed run, on every rank.

        least: a step that must have been reached.
        """
        expected = reference(self.kind, self.world, self.steps, tuple(self.script)).losses
        for rank in range(self.world):
            steps = _steps(read_records(self.out, rank))
            wrong = [record for record in steps if record["loss"] != expected[rank][record["step"]]]
            assert not wrong, f"rank {rank} computed other losses than undisturbed: {wrong[:3]}"
            assert max((record["step"] for record in steps), default=0) >= least

    def finish(self) -> None:
        """Let the job end by itself; it must end as undisturbed and leave nothing behind."""
        self.allow(self.steps)
        statuses = self.wait_agents()
        assert set(statuses.values()) == {0}, f"{statuses}\n{self.logs()}"
        self.check_losses(self.steps)
        expected = reference(self.kind, self.world, self.steps, tuple(self.script)).digests
        for rank in range(self.world):
            final = json.loads((self.out / f"final{rank}.json").read_text())
            assert final == {"committed": True, "digests": expected[rank]}
        self.check_nothing_left()

    def check_nothing_left(self) -> None:
        """No process, and with them no memory; no socket, no file."""
        eventually(lambda: not self.processes(), f"nothing of the job is left: {self.processes()}", timeout_s=10)
        assert not job_dir(self.name).exists(), sorted(job_dir(self.name).iterdir())

    def wait(self, look: Callable[[], T], what: str) -> T:
        """Like `eventually`, and at once when an agent has ended, with what the nodes said."""

        def watch() -> tuple[T, bool] | None:
            seen = look()
            ended = any(agent.poll() is not None for agent in self._agents.values())
            return (seen, ended) if seen or ended else None

        try:
            seen, _ = eventually(watch, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self._describe()}\n{self.logs()}") from None
        assert seen, f"an agent ended while waiting: {what}; {self._describe()}\n{self.logs()}"
        return seen

    def _describe(self) -> str:
        said = ("generation", "phase", "committed", "workers", "trouble")
        return str({node: {key: status[key] for key in said} for node, status in self.statuses().items()})
