# SPDX-License-Identifier: Apache-2.0
"""A worker that begins from a warm spare is what torchrun's own would be, but for what is imported already."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from refound.ckpt import preload, spares
from refound.ckpt.spares import Spare, Spares, unfit
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from .harness import Job, eventually, send

PROBE = """
import json, multiprocessing, os, signal, sys, threading

def facts():
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": list(sys.flags), "cwd": os.getcwd(),
        "file": __file__, "name": __name__, "package": __package__, "spec": getattr(__spec__, "name", None),
        "loader": type(__loader__).__name__, "doc": __doc__, "main": sys.modules["__main__"].__dict__ is globals(),
        "globals": sorted(set(globals()) - {"message"}), "builtins": type(__builtins__).__name__,
        "env": {k: v for k, v in os.environ.items() if not k.startswith("REFOUND_")},
        "tty": [s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)], "stdin": os.readlink("/proc/self/fd/0"),
        "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()], "parent": os.getppid(),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "fds": sorted(os.listdir("/proc/self/fd"))[:-1], "threads": threading.active_count(),
        "buffering": [sys.stdout.write_through, sys.stdout.line_buffering],
        "imported": "xmlrpc.client" in sys.modules,
    }

def square(x):
    return x * x

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # finds this script again by what __main__ says
        assert pool.map(square, [3]) == [9]
    print(json.dumps(facts()))
"""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spares]:
    """Spares for any worker that this process starts, with two modules that nothing here needs."""
    monkeypatch.setattr(spares, "_SETTLE", timedelta(0))
    monkeypatch.setattr(spares, "_LOOK_EVERY", timedelta(milliseconds=20))
    monkeypatch.setattr(SubprocessHandler, "_popen", SubprocessHandler._popen)
    made = Spares(1, lambda: ["xmlrpc.client", "this", "no.such.module"])
    made.install()
    yield made
    made.close()


class Worker:
    """A worker as torchrun starts it, and whether that was from a spare."""

    def __init__(self, folder: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self._out, self._err = folder / "out", folder / "err"
        environment = {"LOCAL_RANK": "0", "RANK": "5", **(env or {})}
        where = (str(self._out), str(self._err), 0, None)
        self._handler = SubprocessHandler(sys.executable, ("-u", *args), environment, *where)
        self.process: subprocess.Popen[Any] = self._handler.proc
        self.is_warm = "spare_process" in str(self.process.args)

    def end(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        status = self.process.wait(60)
        for file in (self._handler._stdout, self._handler._stderr):
            assert file is not None
            file.close()
        return status, self._out.read_text(), self._err.read_text()


def ready(pool: Spares) -> None:
    eventually(lambda: [spare for spare in pool._waiting.get("0", []) if spare.is_ready], "a spare is ready")


def both(pool: Spares, folder: Path, *args: str) -> tuple[tuple[int, str, str], tuple[int, str, str]]:
    """What comes of a command, cold and from a spare. What the spare printed while it imported is taken off."""
    pool._closed.clear()
    for waiting in pool._waiting.values():
        while waiting:
            waiting.pop().end()
    cold = Worker(folder, *args)
    assert not cold.is_warm
    ended = cold.end()
    ready(pool)
    warm = Worker(folder, *args)
    assert warm.is_warm
    status, out, err = warm.end()
    zen = out.index(" those!\n") + len(" those!\n")
    assert out.startswith("The Zen of Python"), "what imports print goes where the worker prints"
    return ended, (status, out[zen:], err)


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_script_finds_itself_and_its_surroundings_as_ever(
    pool: Spares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "sub" / "link.py").symlink_to(tmp_path / "probe.py")
    args = ("sub/link.py", "--a", "b c") if how == "script" else ("-m", "probe", "--a")
    seen = []
    for status, out, err in both(pool, tmp_path, *args):
        assert (status, err) == (0, "")
        seen.append(json.loads(out))
    cold, warm = seen
    assert (cold.pop("imported"), warm.pop("imported")) == (False, True)
    assert warm == cold
    assert warm["parent"] == os.getpid()


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('a few words')",
        "import atexit\natexit.register(print, 'at exit')\ndef f():\n    raise ValueError('x')\nf()",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import sys\nsys.excepthook = lambda *a: print('hook', a[0], a[2].tb_lineno)\nraise KeyError(1)",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()",
    ],
)
def test_it_ends_as_ever(pool: Spares, tmp_path: Path, code: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    cold, warm = both(pool, tmp_path, str(script))
    assert warm == cold


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_do_what_they_do(
    pool: Spares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nopen('up', 'w').close()\ntime.sleep(60)")
    monkeypatch.chdir(tmp_path)
    for warm in (False, True):
        if warm:
            ready(pool)
        worker = Worker(tmp_path, "script.py")
        assert worker.is_warm == warm
        eventually((tmp_path / "up").exists, "it runs")
        (tmp_path / "up").unlink()
        os.killpg(worker.process.pid, number)
        assert worker.end()[0] == -number


def test_a_spare_that_has_seen_another_environment_is_not_used(pool: Spares, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    Worker(tmp_path, str(script)).end()
    ready(pool)
    changed = Worker(tmp_path, str(script), env={"NCCL_DEBUG": "INFO"})
    assert not changed.is_warm
    assert changed.end()[0] == 0
    ready(pool)
    again = Worker(tmp_path, str(script), env={"NCCL_DEBUG": "INFO", "RANK": "3", "MASTER_PORT": "1"})
    assert again.is_warm, "ranks and addresses are those of a start"
    assert again.end()[0] == 0


def test_spares_go_with_their_agent(pool: Spares, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    Worker(tmp_path, str(script)).end()
    ready(pool)
    spare = pool._waiting["0"][0]
    spare._sock.close()  # as the kernel does when the agent is killed
    assert spare.process.wait(60) == 0
    assert Worker(tmp_path, str(script)).end()[0] == 0, "a dead one is no matter"


def test_what_a_spare_cannot_run_is_started_cold(tmp_path: Path) -> None:
    script = tmp_path / "s.py"
    script.write_text("")
    assert unfit([sys.executable, "-u", str(script)]) == ""
    assert unfit([sys.executable, "-u", "-m", "json.tool"]) == ""
    for args in ([sys.executable, str(script), "a"], ["/bin/sh", "-c", "x"], [sys.executable, "-u", str(tmp_path)]):
        assert unfit(args)


def test_only_installed_modules_are_imported_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_the_script.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import of_the_script  # pyright: ignore[reportMissingImports]  # noqa: F401

    names = preload.loaded()
    assert {"json", "torch", "torch.nn", "refound.ckpt.preload", "numpy"} <= set(names)
    assert {"of_the_script", "__main__", __name__}.isdisjoint(names)
    assert preload.preload(["json", "no.such.module"]) == 1


def test_a_job_goes_on_from_its_spares_with_the_same_bits(tmp_path: Path) -> None:
    """Twice, since spares are made again; from the command line on, and nothing is left at the end."""
    with Job(tmp_path, nodes=1, workers=2, conf="warm_spares=1") as job:
        job.start()
        step = 3
        job.train_to(step)
        assert all("spare_process" in job.processes()[pid] for pid in job.worker_pids()), "the first ones too"
        for count in (1, 2):
            job.wait(lambda n=count: job.log(0).count("stand by") >= n, "spares are ready")
            generation = job.strike(job.worker_pids()[:1])
            assert job.wait_back(generation) == step
            commands = [job.processes()[pid] for pid in job.worker_pids()]
            assert all("spare_process" in command for command in commands), commands
            step += 3
            job.train_to(step)
        job.finish()


def first_spare(folder: Path, code: str, more: dict[str, str] | None = None) -> Spare:
    """As `first_spares.py` makes them, for a worker started by `Worker`; it imports a module of this code."""
    (folder / "imported_first.py").write_text(code)
    environment = {**os.environ, "LOCAL_RANK": "0", "PYTHONPATH": str(folder), **(more or {})}
    return Spare(sys.executable, environment, ["imported_first"])


def test_the_first_start_waits_for_what_is_still_imported(
    pool: Spares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    go = tmp_path / "go"
    waits = f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)"
    first = pool._first["0"] = first_spare(tmp_path, waits)
    script = tmp_path / "script.py"
    script.write_text("import sys; print('imported_first' in sys.modules)")
    with ThreadPoolExecutor(1) as thread:
        started = thread.submit(Worker, tmp_path, str(script))
        assert not first.is_ready
        go.touch()
        worker = started.result(60)
    assert worker.process is first.process
    assert worker.end() == (0, "True\n", "")
    assert not pool._first


@pytest.mark.parametrize("how", ["dies", "has seen another environment"])
def test_a_first_spare_that_does_not_fit_or_has_died_is_no_matter(
    pool: Spares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    dies = how == "dies"
    code = "import os; os._exit(3)" if dies else ""
    first = pool._first["0"] = first_spare(tmp_path, code, {} if dies else {"NCCL_DEBUG": "INFO"})
    script = tmp_path / "script.py"
    script.write_text("import sys; print('imported_first' in sys.modules)")
    worker = Worker(tmp_path, str(script))
    assert worker.end() == (0, "False\n", "")
    assert worker.process is not first.process
    assert first.process.poll() is not None, "it has been ended"


def test_an_agent_that_is_killed_as_it_waits_for_others_takes_its_first_spares_along(tmp_path: Path) -> None:
    with Job(tmp_path, nodes=2, workers=2, conf="warm_spares=1") as job:
        job.start_node(0)

        def spares_pids() -> list[int]:
            return [pid for pid, command in job.processes().items() if "spare_process" in command]

        eventually(lambda: len(spares_pids()) == 2, "both are started")
        send([job.agent(0).pid])
        eventually(lambda: not spares_pids(), "they have gone")
