# SPDX-License-Identifier: Apache-2.0
"""Fault schedules of the snapshot tier as values: what falls on which node, at which point of which step.

One text serves the command line, the tests and the logs, and `parse_schedule(str(schedule)) == schedule`:

    code=2+1 steps=3 seed=7: lose-node node=1 step=2 at=decided; stop-smp node=0 step=2 at=data for_ms=300
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..ckpt.faults import FaultRangeError, FaultSyntaxError
from .points import POINTS

ACTIONS: dict[str, str] = {
    "kill-worker": "the node's worker is killed",
    "kill-smp": "the node's snapshot process is killed, and its memory with it",
    "kill-agent": "the node's agent is killed; its worker is an orphan",
    "lose-node": "agent, worker and snapshot process are killed; an empty node follows",
    "stop-worker": "SIGSTOP for a while",
    "stop-smp": "SIGSTOP for a while",
    "flip-data": "one bit flips in every slot of the node's rank",
    "flip-parity": "one bit flips in every parity chunk of the node",
    "flip-wire": "one bit flips in what others say to the node, or it to them",
    "cut-wire": "connections to the node break in the middle of a message",
    "partition": "the node and the others do not reach each other for a while",
    "partition-lost": "the same for good: the others go on with an empty node, and the stale one returns at the end",
    "no-memory": "the node's snapshot process gets no more memory for a while (RLIMIT_AS)",
    "fill-disk": "the storage of checkpoints is full, or its quota is, until the step is over",
    "tear-file": "the node's newest checkpoint file loses its second half, as if storage had lied about fsync",
}
DISK_ACTIONS = ("fill-disk", "tear-file")
LASTING = {"stop-worker": 300, "stop-smp": 300, "partition": 300, "no-memory": 500}
"""Action → milliseconds that it lasts, where the schedule does not say."""
WIRE_ACTIONS = ("flip-wire", "cut-wire")
PARTITIONS = ("partition", "partition-lost")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`action` falls on `node` (a position) when `on` reaches the point `at` of `step` for the `nth` time.

    Points of recovery belong to the first rendezvous in or after that step. Raises FaultSyntaxError.
    """

    action: str
    node: int
    step: int
    at: str
    on: int = -1
    """-1: the node itself, or the lead for the points that only the lead reaches."""
    nth: int = 1
    for_ms: int = 0
    byte: int = 0
    """Which byte of memory, or of what is sent from then on, has its bit flipped or is the last before the cut."""
    notice_ms: int = 0
    """How long the job takes to notice; what is still alive goes on meanwhile."""

    def __post_init__(self) -> None:
        _check_known(self.action, ACTIONS, "action")
        _check_known(self.at, POINTS, "point")
        for name, least in (("node", 0), ("step", 1), ("on", -1), ("nth", 1), ("for_ms", 0), ("byte", 0)):
            if getattr(self, name) < least:
                raise FaultSyntaxError(f"{name}={getattr(self, name)}: the least is {least}")
        if self.action in LASTING and not self.for_ms:
            object.__setattr__(self, "for_ms", LASTING[self.action])

    @property
    def where(self) -> int:
        """The position that is to reach the point."""
        return self.on if self.on >= 0 else 0 if POINTS[self.at].lead else self.node

    def __str__(self) -> str:
        return f"{self.action} {_words(self, skip=('action',))}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One run to be: k + m nodes of a rank each, so many steps, and what falls. Raises FaultRangeError."""

    k: int = 2
    m: int = 1
    steps: int = 3
    seed: int = 0
    """Of the bytes of the state, and of where bits flip."""
    disk: bool = False
    """Whether every step is also written to storage, and the end is proven from there."""
    hasty: bool = False
    """Whether training goes on while parity is still being rebuilt."""
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        for fault in self.faults:
            if fault.node >= self.nodes or fault.on >= self.nodes:
                raise FaultRangeError(f"{fault}: the job has nodes 0 to {self.nodes - 1}")
            if fault.step > self.steps:
                raise FaultRangeError(f"{fault}: the job has {self.steps} steps")
            if (fault.action in DISK_ACTIONS or POINTS[fault.at].stage == "disk") and not self.disk:
                raise FaultRangeError(f"{fault}: this needs 'disk' in front of the colon")

    @property
    def nodes(self) -> int:
        return self.k + self.m

    def __str__(self) -> str:
        words = [f"code={self.k}+{self.m}", f"steps={self.steps}", f"seed={self.seed}"]
        words += [name for name in ("disk", "hasty") if getattr(self, name)]
        return " ".join(words) + ": " + "; ".join(map(str, self.faults))


def parse_schedule(text: str) -> Schedule:
    """Read what `str` of a schedule gave. Raises FaultSyntaxError or FaultRangeError."""
    head, colon, tail = text.partition(":")
    if not colon:
        raise FaultSyntaxError(f"{text!r} has no colon; write it like 'code=2+1 steps=3: {_EXAMPLE}'")
    values: dict[str, Any] = {}
    for word in head.split():
        name, equals, value = word.partition("=")
        if not equals:
            _check_known(name, {"disk": "", "hasty": ""}, "word")
            values[name] = True
        elif name == "code":
            k, _, m = value.partition("+")
            values |= {"k": _number(word, k), "m": _number(word, m)}
        else:
            _check_known(name, {"code": "", "steps": "", "seed": ""}, "word")
            values[name] = _number(word, value)
    return Schedule(**values, faults=tuple(_parse_fault(part) for part in tail.split(";") if part.strip()))


_EXAMPLE = "lose-node node=1 step=2 at=decided"


def _parse_fault(text: str) -> Fault:
    action, *words = text.split()
    kinds = {field.name: field.type for field in fields(Fault)}
    values: dict[str, Any] = {"action": action}
    for word in words:
        name, _, value = word.partition("=")
        _check_known(name, kinds, "word")
        values[name] = value if name == "at" else _number(word, value)
    if missing := [name for name in ("node", "step", "at") if name not in values]:
        raise FaultSyntaxError(f"in {text!r}: {' and '.join(missing)} missing; write it like {_EXAMPLE!r}")
    return Fault(**values)


def _words(value: Any, skip: tuple[str, ...]) -> str:
    words = []
    for field in fields(value):
        found = getattr(value, field.name)
        if field.name not in skip and (field.default is MISSING or found != field.default):
            words.append(f"{field.name}={found}")
    return " ".join(words)


def _number(word: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise FaultSyntaxError(f"{word!r} needs a whole number")
    return int(text)


def _check_known(word: str, known: Mapping[str, Any], kind: str) -> None:
    if word not in known:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
        raise FaultSyntaxError(f"unknown {kind} {word!r}, did you mean {near[0]!r}? (known: {', '.join(known)})")
