# SPDX-License-Identifier: Apache-2.0
"""The events of a snapshot process as lines of JSON: `--rdzv-conf=event_log=/var/log/my-job`.

One file a node, NODE.jsonl in a folder of the job; only ever appended to. At 16 MiB it becomes NODE.jsonl.1, in place
of an older one, so that it never takes more than twice that. Written by a thread of its own: a directory that hangs
or is full costs lines, of which the next one tells how many, and nothing else.
"""

import contextlib
import json
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

LARGEST_BYTES = 16 << 20
_MOST_WAITING = 4096


class EventLog:
    """Appends events to a file, in order, in the background."""

    def __init__(self, path: Path, *, largest_bytes: int = LARGEST_BYTES) -> None:
        self.path, self._largest_bytes = path, largest_bytes
        self._changed = threading.Condition()
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="event log", daemon=True)
        self._thread.start()

    def write(self, event: dict[str, Any]) -> None:
        """Take an event; never blocks and never fails."""
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                self._lost += 1
                return
            self._waiting.append(event)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Write what waits, for no longer than this."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
                lost = self._lost
            try:
                self._append(event | ({"lost_before": lost} if lost else {}))
            except (OSError, ValueError, TypeError):
                with self._changed:
                    self._lost += 1
                    self._changed.notify_all()
                continue
            with self._changed:
                self._lost -= lost

    def _append(self, event: dict[str, Any]) -> None:
        line = (json.dumps(event, default=str) + "\n").encode()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.path, flags, 0o600)
        try:
            size_bytes = os.fstat(fd).st_size
            if size_bytes and size_bytes + len(line) > self._largest_bytes:
                self.path.replace(self.path.with_suffix(self.path.suffix + ".1"))
                os.close(fd)
                fd, size_bytes = os.open(self.path, flags, 0o600), 0
            if size_bytes and os.pread(fd, 1, size_bytes - 1) != b"\n":
                line = b"\n" + line  # whoever wrote before was cut short: its line is lost, this one is not
            written = os.write(fd, line)
            if written < len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)


def log_file(directory: str, job: str, node: str) -> Path:
    """Where a node's events go; what a name has that a file's cannot have is replaced."""
    safe = ["".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_" for name in (job, node)]
    return Path(directory) / safe[0] / f"{safe[1]}.jsonl"
