# SPDX-License-Identifier: Apache-2.0
"""Warm spares: for each worker of a node, processes that wait with all imports done. A restart begins from them.

Most of a restart is a new interpreter importing torch. torchrun starts a worker by `SubprocessHandler._popen` and has
no plug-in point there: this replaces that method in the agent, when `warm_spares` is set and at no other time. What it
returns is a `Popen` of the agent's own child either way.

Spares are made while the workers train, one at a time on a node, once a worker has said what it has imported by its
third step. A worker for which none is ready starts cold. The first start has those of `first_spares.py`.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import wire
from .client import Client
from .preload import BASE, MOST_NAMES, WARM_ENV
from .spare_process import BOOT

_LOOK_EVERY = timedelta(milliseconds=500)
_SETTLE = timedelta(seconds=3)
"""Workers that have just started have the machine for themselves so long."""
_UNTOLD = timedelta(seconds=60)
"""After so long without word from a worker only torch is imported."""
_READY_WITHIN = timedelta(seconds=180)
_GOES_WITHIN = timedelta(seconds=5)
_MOST_FAILURES = 3
_OF_ONE_START = {"RANK", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"}
_OF_ONE_START |= {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
_OF_ONE_START_PREFIXES = ("TORCHELASTIC_", "REFOUND_")

Environment = Mapping[str, str]


class Spare:
    """One process that waits."""

    def __init__(self, python: str, environment: Environment, modules: Sequence[str]) -> None:
        self.environment = environment
        self.is_ready = False
        self._sock, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [python, "-u", "-c", BOOT, str(theirs.fileno())],
                env=dict(environment),
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        self._sock.settimeout(_READY_WITHIN.total_seconds())
        with contextlib.suppress(OSError):  # it has died already; `await_ready` finds that
            wire.send(self._sock, {"modules": list(modules)})

    def await_ready(self, closed: threading.Event) -> bool:
        """Wait until it has imported everything. False if it has died, or takes too long."""
        deadline = time.monotonic() + _READY_WITHIN.total_seconds()
        while not closed.is_set() and time.monotonic() < deadline:
            if wire.is_readable(self._sock.fileno(), _LOOK_EVERY):
                with contextlib.suppress(OSError):
                    wire.receive(self._sock)
                    self.is_ready = True
                break
        return self.is_ready

    def fits(self, environment: Environment) -> bool:
        """Whether what it has imported has seen the environment that the worker is to have."""
        return self.process.poll() is None and _lasting(self.environment) == _lasting(environment)

    def start(self, arguments: Sequence[str], environment: Environment, streams: Mapping[str, int]) -> bool:
        """Have it run. streams: "1" and "2" to descriptors, where they are not the agent's own. False if it is dead."""
        order = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": str(Path.cwd()),
            "streams": list(streams),
        }
        try:
            wire.send(self._sock, order, fds=list(streams.values()))
        except OSError:
            self.end()
            return False
        self._sock.close()
        return True

    def end(self) -> None:
        """It is not needed any more: it goes when its socket closes, or is made to."""
        self._sock.close()
        try:
            self.process.wait(_GOES_WITHIN.total_seconds() if self.is_ready else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()  # in the middle of an import, where it does not look at its socket
            self.process.wait()


class Spares:
    """The spares of one node's workers."""

    def __init__(self, count: int, modules: Callable[[], list[str]], first: Mapping[str, Spare] | None = None) -> None:
        """count: for each worker. modules: what the workers have imported; empty as long as nobody knows.

        first: local rank → the one that the very first start of that worker takes, though it be importing still.
        """
        self._count, self._modules = count, modules
        self._first = dict(first or {})
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Spare]] = {}
        self._wanted: dict[str, tuple[str, Environment]] = {}
        self._started_at = 0.0
        self._failures = 0
        self._said: set[str] = set()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refill, name="spares", daemon=True)

    def install(self) -> None:
        """Start workers from spares from now on."""
        from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

        handler_class: Any = SubprocessHandler
        original = getattr(handler_class, "_popen", None)
        if original is None:
            self._say("this torch starts its workers in another way, so there are no warm spares")
            for rank in list(self._first):
                self._end_first(rank)
            return

        def popen(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> "subprocess.Popen[Any]":
            streams = {"1": handler._stdout, "2": handler._stderr}
            fds = {name: file.fileno() for name, file in streams.items() if file is not None}
            return self.launch(args, env, fds) or original(handler, args, env)

        handler_class._popen = popen
        self._thread.start()

    def launch(
        self, args: Sequence[str], env: dict[str, str], streams: Mapping[str, int]
    ) -> "subprocess.Popen[Any] | None":
        """A process that runs `args`, a Python command, or None if a new one must be started."""
        rank = env.get("LOCAL_RANK", "0")
        if why := unfit(args):
            self._end_first(rank)
            self._say(f"workers are started cold, as {why}")
            return None
        env[WARM_ENV] = "1"
        warm = self._launch_first(rank, args, env, streams)
        with self._lock:
            self._wanted[rank] = (args[0], dict(env))
            self._started_at = time.monotonic()
            ready = [spare for spare in self._waiting.get(rank, []) if spare.is_ready and warm is None]
            for spare in ready:
                self._waiting[rank].remove(spare)
                if spare.fits(env) and spare.start(args[2:], env, streams):
                    return spare.process
                spare.end()
        return warm

    def _launch_first(
        self, rank: str, args: Sequence[str], env: Environment, streams: Mapping[str, int]
    ) -> "subprocess.Popen[Any] | None":
        """By the spare made as this agent came up. It is waited for: a new process would take longer still."""
        if (first := self._first.get(rank)) is None:
            return None
        if first.process.poll() is None and not first.fits(env):
            self._say("what was imported as this agent came up has seen another environment, and is not used")
        elif first.await_ready(self._closed) and first.start(args[2:], env, streams):
            del self._first[rank]
            return first.process
        self._end_first(rank)
        return None

    def _end_first(self, rank: str) -> None:
        if first := self._first.pop(rank, None):
            first.end()

    def close(self) -> None:
        """End all that wait."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_GOES_WITHIN.total_seconds())
        with self._lock:
            for spare in [spare for waiting in self._waiting.values() for spare in waiting]:
                spare.end()
            self._waiting.clear()
        for rank in list(self._first):
            self._end_first(rank)

    def _refill(self) -> None:
        while not self._closed.wait(_LOOK_EVERY.total_seconds()) and self._failures < _MOST_FAILURES:
            with self._lock:
                for rank, waiting in self._waiting.items():
                    self._waiting[rank] = [spare for spare in waiting if spare.process.poll() is None]
                rank = next((r for r in self._wanted if len(self._waiting.setdefault(r, [])) < self._count), None)
                since_s = time.monotonic() - self._started_at
            if rank is not None and since_s > _SETTLE.total_seconds():
                modules = self._modules() or (BASE if since_s > _UNTOLD.total_seconds() else ())
                if modules:
                    self._make(rank, modules)
        if self._failures >= _MOST_FAILURES:
            self._say(f"{self._failures} spares in a row have died as they imported modules: no more are made")

    def _make(self, rank: str, modules: Sequence[str]) -> None:
        with self._lock:
            python, environment = self._wanted[rank]
        try:
            spare = Spare(python, environment, modules)
        except OSError as error:
            self._failures += 1
            self._say(f"a spare could not be started: {error}")
            return
        if not spare.await_ready(self._closed):
            spare.end()
            self._failures += int(not self._closed.is_set())
            return
        self._failures = 0
        with self._lock:
            self._waiting[rank].append(spare)
            full = all(len(self._waiting.get(r, [])) >= self._count for r in self._wanted)
        if full:
            words = f"{self._count} warm spare(s) for each worker stand by, {len(modules)} modules imported"
            print(f"refound: {words}", file=sys.stderr, flush=True)

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            print(f"refound: {words}", file=sys.stderr, flush=True)


def unfit(args: Sequence[str]) -> str:
    """Why a spare cannot run this command; empty if it can."""
    if len(args) < 3 or args[1] != "-u" or not Path(args[0]).name.startswith("python"):
        return f"they are no plain Python script: {' '.join(args[:3])}"
    if args[2] == "-m":
        return "" if len(args) > 3 else "-m names no module"
    if not Path(args[2]).is_file() or args[2].endswith(".pyc") or zipfile.is_zipfile(args[2]):
        return f"{args[2]} is no Python source file"
    return ""


def told_modules(path: Path) -> list[str]:
    """What the workers have told the snapshot process at `path`; nothing if they have not, or it is not there."""
    try:
        client = Client(path)
        with contextlib.closing(client):
            client.sock.settimeout(_GOES_WITHIN.total_seconds())
            names = client.call({"op": "modules"})[0].get("modules")
    except OSError:
        return []
    return names if isinstance(names, list) and len(names) <= MOST_NAMES else []


def _lasting(environment: Environment) -> dict[str, str]:
    """The part of a worker's environment that is the same from one start to the next."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_ONE_START and not name.startswith(_OF_ONE_START_PREFIXES)
    }
