# SPDX-License-Identifier: Apache-2.0
"""What happens between an exception that nobody caught and the end of the worker.

First, what torch's `@record` does, for scripts without it: the traceback goes into the file from which torchrun's
summary shows it. Only the first worker to fail shows one; those that lost a connection because it did point to it,
in the summary and on their own stderr.

Then, if the cause is that another node is gone, the worker waits to be ended instead of failing: a change of members,
which torchrun does not count, and not a failure, of which it allows `--max-restarts`.
"""

import contextlib
import faulthandler
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from .client import Client
from .keeper import Keeper
from .wire import Message

_HOLD = timedelta(seconds=60)
_installed = False
_ASK_TIMEOUT = timedelta(seconds=10)
_LOST_CONNECTION = ("connection", "broken pipe", "timed out", "remote process exited", "peer")
"""Words of the errors that gloo, NCCL and torch's stores raise when the other side is gone."""


def install(socket_file: Path, rank: int, generation: int) -> None:
    """Have the last words of this process recorded. A second call changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be no file, as in a notebook
            faulthandler.enable(all_threads=True)
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        verdict = _tell(socket_file, rank, generation, error)
        follows = _follows(verdict, rank)
        if follows and _is_lost_connection(error):
            print(f"refound: rank {rank}: {_one_line(error)}; {follows}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)
        _record(error, follows)
        if names := verdict.get("missing"):
            print(
                f"refound: rank {rank} failed as node {', '.join(names)} is gone; waiting to be started again",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(_HOLD.total_seconds())

    sys.excepthook = hook


def _tell(socket_file: Path, rank: int, generation: int, error: BaseException) -> Message:
    with contextlib.suppress(OSError, ValueError):  # without its snapshot process it just fails
        client = Client(socket_file)
        with contextlib.closing(client):
            client.sock.settimeout(_ASK_TIMEOUT.total_seconds())
            said, lost = f"{type(error).__name__}: {error}"[:1000], _is_lost_connection(error)
            return client.call({"op": "failed", "rank": rank, "generation": generation, "error": said, "lost": lost})[0]
    return {}


def _is_lost_connection(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in said for words in _LOST_CONNECTION)


def _follows(verdict: Message, rank: int) -> str:
    """Whose failure came before this one, and where to see it; empty if none did."""
    if names := verdict.get("missing"):
        return f"after node {', '.join(names)} had gone"
    if node := verdict.get("elsewhere"):
        return f"after a rank of node {node} had failed, see there"
    first = verdict.get("first", rank)
    return "" if first == rank else f"after rank {first} had failed, see there"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _record(error: BaseException, follows: str) -> None:
    """Write the file that torchrun reads, as `torch.distributed.elastic.multiprocessing.errors` does."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not name or Path(name).exists():  # @record has written it
        return
    stack, timestamp = "".join(traceback.format_exception(error)), int(time.time())
    if follows:
        # In whole seconds, of which torchrun takes the earliest: the first one must not be tied with.
        stack, timestamp = f"{type(error).__name__}: {follows}", timestamp + 1
    extra = {"py_callstack": stack, "timestamp": str(timestamp)}
    message = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
    with contextlib.suppress(OSError):  # a full disk must not hide the exception, which is on stderr anyway
        Path(name).write_text(json.dumps(message))


def note(keeper: Keeper, rank: int, generation: int, error: str, *, lost: bool) -> Message:
    """At the snapshot process: a worker has failed. Says which one of the node did first, which nodes are gone, and on
    which other node one has failed.

    lost: it looks as if another process had gone, so that it is worth finding out which.
    """
    with keeper.changed:
        if generation != keeper.generation:
            return {}
        if keeper.first_failure is None:
            keeper.first_failure = rank
            keeper.event("worker failed", rank=rank, error=error)
        first, pulse = keeper.first_failure, keeper.pulse
    missing, elsewhere = pulse.who_is_gone() if pulse and lost else ([], "")
    return {"first": first, "missing": missing, "elsewhere": elsewhere}
