# SPDX-License-Identifier: Apache-2.0
"""Live progress on a stream: one line that is rewritten on a terminal, one line for each step elsewhere."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from .records import StartRecord, StepRecord
from .recovery import SOURCES

_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Shows a run: step, loss, snapshot age, stall, the health of the nodes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrites = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._began_s = time.monotonic()
        self._shown: StepRecord | None = None

    def say(self, text: str) -> None:
        """An event: a line that stays."""
        elapsed = time.monotonic() - self._began_s
        self._write(f"{_CLEAR_LINE if self._rewrites else ''}{elapsed:6.1f} s  {text}\n")

    def show(
        self, run: str, steps: int, last: StepRecord | None, nodes: Sequence[Mapping[str, Any]], expected: Sequence[str]
    ) -> None:
        """The state now. `last` is the newest record, `nodes` the statuses there are, `expected` all nodes' names."""
        line = describe(run, steps, last, nodes, expected)
        if self._rewrites:
            width = os.get_terminal_size(self._stream.fileno()).columns
            self._write(_CLEAR_LINE + f"{time.monotonic() - self._began_s:6.1f} s  {line}"[: width - 1])
        elif last is not None and last != self._shown:
            self.say(line)
        self._shown = last

    def close(self) -> None:
        """Leaves the stream at the beginning of a line."""
        if self._rewrites:
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def describe(
    run: str, steps: int, last: StepRecord | None, nodes: Sequence[Mapping[str, Any]], expected: Sequence[str]
) -> str:
    """One line: `faulted  step 7/12  loss 3.4031  snapshot 7, 0.4 s old  stall 2 ms  nodes 2/3 (node1 lost)`."""
    words = [f"{run:9s}", f"step {last.step if last else 0:>2d}/{steps}"]
    if last is not None:
        words.append(f"loss {last.loss:.4f}")
    commits = [status["committed"] for status in nodes if status.get("committed")]
    if commits:
        oldest = min(commits, key=lambda commit: commit["step"])
        words.append(f"snapshot {oldest['step']}, {oldest['age_s']:.1f} s old")
    if last is not None:
        words.append(f"stall {last.stall_ms:.0f} ms")
    here = {status["node"] for status in nodes if status.get("workers")}
    missing = [name for name in expected if name not in here]
    words.append(
        f"nodes {len(expected) - len(missing)}/{len(expected)}" + (f" (no {', '.join(missing)})" if missing else "")
    )
    return "  ".join(words)


def describe_starts(starts: Sequence[StartRecord]) -> str:
    """What a restart brought back: `training on from step 7: rank 0, 2 from memory, rank 1 from parity (0.21 s)`."""
    if all(start.source is None for start in starts):
        return f"training from step {starts[0].step} on"
    parts = []
    for source in SOURCES:
        ranks = [str(start.rank) for start in starts if (start.source or "start") == source]
        if ranks:
            parts.append(f"rank {', '.join(sorted(ranks))} from {source}")
    slowest = max(start.restore_s for start in starts)
    return f"training on from step {starts[0].step}: {'; '.join(parts)} ({slowest:.2f} s)"
