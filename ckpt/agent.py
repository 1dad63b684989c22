# SPDX-License-Identifier: Apache-2.0
"""What both doors into torchrun do in the agent: settings, words to the user, workers' environment, the end."""

import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.metrics.api import MetricHandler, configure, getStream

from .attach import Attachment
from .errors import ConfigError, SnapshotError
from .hang import HANG_ENV
from .spares import Spare, Spares, told_modules

SOCKET_ENV, GENERATION_ENV, JOB_ENV = "REFOUND_SOCKET", "REFOUND_GENERATION", "REFOUND_JOB"
NO_SHARED_STORE_ENV = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def with_spares(attachment: Attachment, first: Mapping[str, Spare] | None = None) -> Spares | None:
    """Have this agent start its workers from warm spares, if it is to. first: as `Spares` takes them."""
    if not attachment.warm_spares:
        return None
    spares = Spares(attachment.warm_spares, lambda: told_modules(attachment.path), first)
    spares.install()
    return spares


def worker_environment(attachment: Attachment, generation: int) -> dict[str, str]:
    """What a worker needs to find its snapshot process."""
    return {
        SOCKET_ENV: os.fspath(attachment.path),
        GENERATION_ENV: str(generation),
        JOB_ENV: attachment.job,
        HANG_ENV: str(attachment.hang_s),
    }


class Outcome(MetricHandler):
    """Whether the agent's workers have succeeded, from torchrun's own metrics: `shutdown()` does not say."""

    def __init__(self, others: MetricHandler) -> None:
        self._others = others
        self.success = False

    @classmethod
    def watch(cls) -> "Outcome":
        outcome = cls(getStream("torchelastic").handler)
        configure(outcome, group="torchelastic")
        return outcome

    def emit(self, metric_data: Any) -> None:
        if ".run_success_" in metric_data.name and metric_data.value:
            self.success = True
        self._others.emit(metric_data)


class plain_errors:
    """Turn a user's mistake into one line and exit code 2: torchrun would print three tracebacks."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SnapshotError):
            print(f"refound: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error


def check_checkpoint_dir(directory: str) -> None:
    """Better now than at the first checkpoint."""
    if directory:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it cannot be written to", directory)
        except OSError as error:
            raise ConfigError(
                f"checkpoint_dir={directory}: {error.strerror}; name a directory you can write"
            ) from error


def announce(decision: Any, rank: int) -> None:
    """Say, on one node, where training goes on from and why not from something newer."""
    if rank == 0 and (decision.snapshot is not None or decision.notes):
        for note in decision.notes:
            print(f"refound: {note}", file=sys.stderr)
        where = {
            "memory": "memory",
            "disk": "the checkpoint on disk",
            "start": "the start: nothing can be restored",
        }
        step = f" at step {decision.snapshot.step}" if decision.snapshot else ""
        print(f"refound: going on from {where[decision.source]}{step}", file=sys.stderr, flush=True)


def leave(attachment: Attachment | None, *, success: bool) -> None:
    """The agent ends. Only the success of its workers frees their snapshots."""
    if attachment is None or not attachment.alive():
        return
    attachment.leave(success=success)
    if not success:
        print(
            f"refound: the snapshots of job {attachment.job!r} stay in memory for {attachment.lease_s:.0f} s; run the "
            f"same command to go on, or free them with: refound stop {attachment.job}",
            file=sys.stderr,
            flush=True,
        )
