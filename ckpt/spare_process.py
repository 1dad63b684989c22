# SPDX-License-Identifier: Apache-2.0
"""A worker that waits: an interpreter that has imported what its script will need, until its agent says what to run.

It is started, not forked from a process that has imported torch, so none of its libraries has ever lost its threads,
CUDA has not been touched, and every random generator and hash seed is its own. It is a child of the agent like any
worker, so that signals, exit codes and sessions are what torchrun takes them for. When the agent goes away, it does.

From `become` on it is what `python -u SCRIPT` or `python -u -m MODULE` would be: environment, directory, arguments,
`__main__`, `sys.path`, standard streams. What differs: its name in `ps`, and that modules were imported before the
environment of this very start was known, with that of the start before it.
"""

import builtins
import contextlib
import importlib.machinery
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import wire
from .preload import preload

BOOT = "import sys; sys.flags.safe_path or sys.path.pop(0); from refound.ckpt.spare_process import main; main(sys.argv)"
"""What `python -c` runs. The first entry of the path is the script's, later; nothing of the working directory is to be
imported before."""


def main(arguments: Sequence[str]) -> None:
    """arguments: anything, and the descriptor of the socket to the agent."""
    sock = socket.socket(fileno=int(arguments[1]))
    sock.set_inheritable(False)
    streams = _HeldStreams()
    try:
        names = wire.receive(sock)[0]["modules"]
        failed = preload(names)
        wire.send(sock, {"modules": len(names) - failed})
        order, _, fds = wire.receive(sock)
    except ConnectionError:
        os._exit(0)  # the agent has gone, or wants no spare any more
    except BaseException:
        streams.release({})
        raise
    sock.close()
    streams.release(dict(zip(order["streams"], fds, strict=True)))
    become(order["arguments"], order["environment"], order["directory"])


class _HeldStreams:
    """What is written to stdout and stderr while modules are imported is kept, and written where the worker writes."""

    def __init__(self) -> None:
        self._own = {fd: os.dup(fd) for fd in (1, 2)}
        self._held = {fd: os.memfd_create(f"refound-spare-{fd}", os.MFD_CLOEXEC) for fd in (1, 2)}
        for fd, held in self._held.items():
            os.dup2(held, fd)

    def release(self, targets: dict[str, int]) -> None:
        """Point the streams at `targets` ("1", "2"), or where they pointed at first."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, AttributeError):  # an import has closed or replaced it
                stream.flush()
        for fd, own in self._own.items():
            target = targets.get(str(fd), own)
            os.dup2(target, fd)
            os.close(target)
            if target != own:
                os.close(own)
            size_bytes, done = os.fstat(self._held[fd]).st_size, 0
            while done < size_bytes and (sent := os.write(fd, os.pread(self._held[fd], 1 << 20, done))):
                done += sent
            os.close(self._held[fd])


def become(arguments: Sequence[str], environment: dict[str, str], directory: str) -> None:
    """Run as `python -u *arguments`, which are a script or "-m" and a module, and theirs. Ends as that would end."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    is_module = arguments[0] == "-m"
    sys.orig_argv[:] = [sys.orig_argv[0], "-u", *arguments]
    sys.argv[:] = ["-m", *arguments[2:]] if is_module else arguments
    if not sys.flags.safe_path:
        sys.path.insert(0, str(Path.cwd() if is_module else Path(arguments[0]).resolve().parent))
    namespace = sys.modules["__main__"].__dict__
    namespace.clear()
    namespace.update(
        __name__="__main__", __doc__=None, __package__=None, __spec__=None, __annotations__={}, __builtins__=builtins
    )
    if is_module:
        as_python_does: Any = runpy
        _run(lambda: as_python_does._run_module_as_main(arguments[1]))
    else:
        _run(lambda: _run_script(arguments[0], namespace))


def _run_script(script: str, namespace: dict[str, Any]) -> None:
    path = str(Path.cwd() / script)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    namespace.update(__file__=path, __cached__=None, __loader__=loader)
    exec(loader.source_to_code(loader.get_data(path), path), namespace)


def _run(program: Callable[[], None]) -> None:
    try:
        program()
        return
    except (SystemExit, KeyboardInterrupt):
        raise  # the interpreter knows best how to end by these
    except BaseException as error:
        failure = error
    failure.__traceback__ = _theirs(failure.__traceback__)
    sys.excepthook(type(failure), failure, failure.__traceback__)
    raise SystemExit(1)


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that the program would have had by itself."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
