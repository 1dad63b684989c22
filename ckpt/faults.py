# SPDX-License-Identifier: Apache-2.0
"""Fault schedules as values: who is killed or paused, after which step.

A schedule is a tuple of `Fault`s. The same text (`node=1 step=7 kill`) serves the command line, the tests and
the logs, and `parse_fault(str(fault)) == fault` always holds. Nothing here starts or restarts a process:
whoever runs the job watches its steps, signals the `target_pids(...)`, and brings back what the target says:

- `rank`: the worker process of that rank. torchrun restarts the group.
- `node`: torchrun agent, workers and SMP of that node; an empty node with the same arguments follows.
- `agent`: the torchrun agent alone, so that its workers are orphans; the agent is launched again.
- `smp`: the snapshot management process alone.
"""

import difflib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TARGETS = ("rank", "node", "agent", "smp")
ACTIONS = ("kill", "stop")
DEFAULT_STOP_MS = 2000
_STOP_SHARE = 0.2
EXAMPLE = "node=1 step=7 kill"


class FaultSyntaxError(ValueError):
    """A fault that cannot be read; the message names the word and the nearest one that is understood."""


class FaultRangeError(ValueError):
    """A fault that names a node, rank or step which the job does not have."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`action` falls on `target` number `index` when `step` has been complete for `after_ms` milliseconds.

    `kill` is SIGKILL. `stop` is SIGSTOP, and SIGCONT `for_ms` milliseconds later: a machine that hangs.
    Indices count from 0, steps are completed steps and count from 1.

    Raises:
        FaultSyntaxError: for an unknown target or action, or a number out of range.
    """

    target: str
    index: int
    step: int
    action: str = "kill"
    after_ms: int = 0
    for_ms: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise FaultSyntaxError(_unknown(self.target, TARGETS, "target"))
        if self.action not in ACTIONS:
            raise FaultSyntaxError(_unknown(self.action, ACTIONS, "action"))
        for name, least in (("index", 0), ("step", 1), ("after_ms", 0), ("for_ms", 0)):
            if getattr(self, name) < least:
                raise FaultSyntaxError(f"{name} is {getattr(self, name)}; the least is {least}")
        if self.action == "kill" and self.for_ms:
            raise FaultSyntaxError("for_ms belongs to stop; what is killed stays dead")
        if self.action == "stop" and not self.for_ms:
            object.__setattr__(self, "for_ms", DEFAULT_STOP_MS)

    def __str__(self) -> str:
        words = [f"{self.target}={self.index}", f"step={self.step}", self.action]
        if self.after_ms:
            words.append(f"after_ms={self.after_ms}")
        if self.action == "stop":
            words.append(f"for_ms={self.for_ms}")
        return " ".join(words)


def parse_fault(text: str) -> Fault:
    """Reads `node=1 step=7 kill`; the words may come in any order, `after_ms=` and `for_ms=` are optional.

    Raises:
        FaultSyntaxError: naming the bad word and the nearest valid one.
    """
    values: dict[str, Any] = {}
    for word in text.split():
        key, equals, number = word.partition("=")
        if equals:
            value = _number(text, word, key, number)
            fields = {"target": key, "index": value} if key in TARGETS else {key: value}
        elif key in ACTIONS:
            fields = {"action": key}
        else:
            raise FaultSyntaxError(f"in {text!r}: {_unknown(key, ACTIONS, 'action')}")
        if values.keys() & fields.keys():
            raise FaultSyntaxError(f"in {text!r}: {word!r} says again what an earlier word said")
        values |= fields
    needed = (("a target", "index"), ("step=", "step"), ("an action", "action"))
    if missing := [word for word, key in needed if key not in values]:
        raise FaultSyntaxError(f"in {text!r}: {' and '.join(missing)} missing; write it like {EXAMPLE!r}")
    try:
        return Fault(**values)
    except FaultSyntaxError as error:
        raise FaultSyntaxError(f"in {text!r}: {error}") from error


def check_schedule(faults: Iterable[Fault], *, nodes: int, ranks: int, steps: int) -> None:
    """Refuses a schedule that the job of `nodes` nodes, `ranks` ranks and `steps` steps could never meet.

    Raises:
        FaultRangeError: for an index that is not there, or a step that is not before the last one.
    """
    for fault in faults:
        count = ranks if fault.target == "rank" else nodes
        if fault.index >= count:
            raise FaultRangeError(f"{fault}: the job has {count} {fault.target}s, numbered 0 to {count - 1}")
        if fault.step >= steps:
            raise FaultRangeError(
                f"{fault}: the job ends with step {steps}, so step={fault.step} leaves nothing to recover; "
                f"use step=1 to step={steps - 1}"
            )


def random_schedule(seed: int, nodes: int, ranks: int, steps: int, count: int) -> tuple[Fault, ...]:
    """`count` faults at different steps of a job of `steps` steps, in order; the same seed gives the same.

    Each falls up to 400 ms after its step, so that over many seeds they hit copy, exchange and commit. Four of five are
    kills; the others stop their target for up to two seconds.

    Raises:
        ValueError: if there are not `count` steps between the first and the last.
    """
    if not 0 <= count <= steps - 2:
        raise ValueError(f"{count} faults do not fit into {steps} steps: at most {max(steps - 2, 0)} do")
    rng = random.Random(seed)
    faults = []
    for step in sorted(rng.sample(range(1, steps - 1), count)):
        target = rng.choice(TARGETS)
        index = rng.randrange(ranks if target == "rank" else nodes)
        after_ms, stops = rng.randrange(400), rng.random() < _STOP_SHARE
        action, for_ms = ("stop", rng.randint(200, DEFAULT_STOP_MS)) if stops else ("kill", 0)
        faults.append(Fault(target=target, index=index, step=step, action=action, after_ms=after_ms, for_ms=for_ms))
    return tuple(faults)


def target_pids(fault: Fault, nodes: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> tuple[int, ...]:
    """The process ids that the fault falls on, the agent first so that it cannot replace what dies after it.

    Args:
        nodes: a status for each: `node`, `pid` (of the SMP), `agent_pid`, `workers` (each `rank`, `pid`).
        names: node index to node name.

    Raises:
        LookupError: if the target is not running just now.
    """
    found: list[int | None] = []
    for status in nodes:
        workers = {int(worker["rank"]): int(worker["pid"]) for worker in status.get("workers") or ()}
        if fault.target == "rank":
            found += [pid for rank, pid in workers.items() if rank == fault.index]
        elif status["node"] == names.get(fault.index):
            agent, smp = status.get("agent_pid"), status.get("pid")
            found += {"agent": [agent], "smp": [smp], "node": [agent, smp, *workers.values()]}[fault.target]
    pids = tuple(int(pid) for pid in found if pid)
    if not pids:
        raise LookupError(f"{fault}: no running {fault.target} {fault.index}")
    return pids


def _number(text: str, word: str, key: str, number: str) -> int:
    known = (*TARGETS, "step", "after_ms", "for_ms")
    if key not in known:
        raise FaultSyntaxError(f"in {text!r}: {_unknown(key, known, 'key')}")
    if not (number.isascii() and number.isdigit() and len(number) <= 9):
        raise FaultSyntaxError(f"in {text!r}: {word!r} needs a whole number after '=', as in {key}=1")
    return int(number)


def _unknown(word: str, known: tuple[str, ...], kind: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"unknown {kind} {word!r}, did you mean {near[0]!r}? (known: {', '.join(known)})"
