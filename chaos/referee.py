# SPDX-License-Identifier: Apache-2.0
"""Runs one schedule: plays the agents and the training loop over real processes, lets faults fall, judges what follows.

What it holds the snapshot processes to: whatever is restored is what was saved, to the bit; what was once committed
comes back as long as no more positions are lost or damaged than the code has parity; everything else is refused with a
reason; and nothing takes longer than its patience.
"""

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..ckpt import wire
from ..ckpt.agreement import Decision, SnapshotId, decide
from .house import PATIENCE, House
from .node import Node
from .points import POINTS
from .schedule import Fault, Schedule
from .strike import Strikes
from .template import Child
from .verdict import Restart, Verdict

_TICK_S = 0.02
_TRIES = 12
_PHASES = {"begin": "begun", "half": "half", "fill": "filled", "complete": "", "commit": ""}
"""What a worker is told to do for a snapshot, in order, and the point that it has then come to."""


class HungError(Exception):
    """Something did not come within the campaign's patience."""


class WrongError(Exception):
    """What was restored is not what was saved, or not what had to be. The first argument is the outcome."""


class _RestartError(Exception):
    """The job must come together again: torchrun would restart its workers."""


class Referee:
    """One schedule over one house."""

    def __init__(self, schedule: Schedule, house: House, verdict: Verdict) -> None:
        self._schedule, self._house, self.verdict = schedule, house, verdict
        self._pending = list(schedule.faults)
        self._strikes = Strikes(house, schedule)
        self._pool = ThreadPoolExecutor(schedule.nodes)
        self._step, self._generation = 0, 0
        self._safe: SnapshotId | None = None
        self._take = 0
        """Counts snapshots that were begun: what fell during an earlier one does not touch a later one's slot."""
        self._lost: dict[int, int] = {}
        """Position → take in which its memory was lost or damaged, since the last snapshot that was committed whole."""
        self._armed: list[Fault] = []
        self._restart_at: float | None = None

    def run(self) -> None:
        """To the end. Raises HungError, WrongError or SnapshotError."""
        self._rendezvous()
        while self._step < self._schedule.steps:
            try:
                self._snapshot(self._step + 1)
            except _RestartError:
                self._rendezvous()
        self._prove()
        self._pool.shutdown(wait=False)

    def _prove(self) -> None:
        """All workers start once more, from storage if there is any; and the job goes on."""
        self._strikes.end_all()
        for position, stray in self._house.strays:
            self._house.nodes[position].lose()
            self._house.nodes[position] = stray
            self._lost[position] = self._take
        self._house.strays.clear()
        if self._house.root:
            self._safe = None  # all memory goes now, so only storage is held to anything
            for position, node in enumerate(self._house.nodes):
                node.lose()
                self._house.nodes[position] = self._house.new_node()
                self._lost[position] = self._take
        self._rendezvous()
        for _ in range(_TRIES):
            try:
                return self._snapshot(self._step + 1)
            except _RestartError:
                self._rendezvous()
        raise WrongError("failed", f"no snapshot after the end could be taken: {self.verdict.troubles[-1:]}")

    # --- a snapshot --------------------------------------------------------------------------------------------

    def _snapshot(self, step: int) -> None:
        self._take += 1
        take = self._take
        self._arm([f for f in self._pending if f.step == step and POINTS[f.at].stage != "rendezvous"])
        for op, point in _PHASES.items():
            for node in self._house.nodes:
                self._tell(node, {"op": op, "step": step})
            self._until(self._all_replied, f"workers to {op} step {step}")
            if op == "commit":
                self._safe = SnapshotId(generation=self._generation, step=step)
            for fault in [f for f in self._armed if f.at == point]:
                self._fall(fault)
        # Workers hear of a commit a moment before their nodes are past it.
        self._until(lambda: not any(f.at == "committed" and f.nth == 1 for f in self._armed), "nodes to be past it")
        self._lost = {position: at for position, at in self._lost.items() if at >= take}
        if self._schedule.disk:
            self._until(lambda: self._is_on_disk(step), f"the checkpoint of step {step}")
        self._until(lambda: not self._strikes.are_passing, "what was to pass")
        self._house.empty_disk()
        for node in self._house.nodes:
            node.unlimit()
        self._arm([])
        self._step = step

    def _tell(self, node: Node, message: dict[str, Any]) -> None:
        if node.worker is not None:
            node.worker.replies.clear()
            with contextlib.suppress(OSError):  # it has died, which the next look at it shows
                wire.send(node.worker.sock, message)

    def _all_replied(self) -> bool:
        found = [node.worker.replies[-1:] if node.worker is not None else [] for node in self._house.nodes]
        return all(replies and "error" not in replies[0] for replies in found)

    def _is_on_disk(self, step: int) -> bool:
        """Whether the lead has finished a checkpoint of this step, or said why not."""
        try:
            status = self._house.nodes[0].status()
        except OSError:
            return False  # it has died, which the next look at it shows
        if status["generation"] != self._generation:
            raise _RestartError("another generation")
        done = status["checkpoint"] and status["checkpoint"]["step"] >= step
        return done or any(e["kind"] == "checkpoint failed" and e["step"] == step for e in status["events"])

    # --- faults ------------------------------------------------------------------------------------------------

    def _arm(self, faults: Sequence[Fault]) -> None:
        """Wait for these, and for no others."""
        before, self._armed = {f.where for f in self._armed}, list(faults)
        for position in before | {fault.where for fault in faults}:
            smp = self._house.nodes[position].smp
            points = {f.at: f.nth for f in faults if f.where == position and POINTS[f.at].owner is not None}
            if smp is not None and smp.alive and not smp.is_silent:
                smp.replies.clear()
                with contextlib.suppress(OSError):  # it has died just now
                    wire.send(smp.sock, {"arm": points})
                while not smp.replies and not smp.is_silent:
                    self._hear()

    def _reached(self, node: Node, point: str) -> None:
        position = self._house.nodes.index(node) if node in self._house.nodes else -1
        for fault in [f for f in self._armed if f.at == point and f.where == position]:
            self._fall(fault)
        if node.smp is not None and node.smp.alive:
            with contextlib.suppress(OSError):  # it has died of the fault
                wire.send(node.smp.sock, {"go": True})

    def _fall(self, fault: Fault) -> None:
        """The moment has come."""
        self._armed.remove(fault)
        self._pending.remove(fault)
        self.verdict.fallen += 1
        done = self._strikes.fall(fault)
        if done.loses:
            self._lost[fault.node] = self._take
        if done.restarts:
            due = time.monotonic() + fault.notice_ms / 1000
            self._restart_at = due if self._restart_at is None else min(due, self._restart_at)

    # --- waiting -----------------------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while not condition():
            if time.monotonic() > deadline:
                raise HungError(f"{what} did not come to pass in {PATIENCE.total_seconds():.0f} s")
            self._hear()
            self._check()

    def _hear(self) -> None:
        """What processes have said, for a moment."""
        said: dict[int, tuple[Node, Child]] = {}
        for node in self._house.everyone():
            for child in (node.smp, node.worker):
                if child is not None and not child.is_silent:
                    said[child.sock.fileno()] = (node, child)
        poll = select.poll()
        for fd in said:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(_TICK_S * 1000):
            node, child = said[fd]
            if child not in (node.smp, node.worker):
                continue  # a fault has just taken it away
            try:
                message, _, _ = wire.receive(child.sock)
            except OSError:
                child.is_silent = True
                continue
            if "reached" in message:
                self._reached(node, message["reached"])
            else:
                child.replies.append(message)

    def _check(self) -> None:
        """Raises _RestartError when torchrun would have noticed something."""
        if self._restart_at is not None:
            if time.monotonic() >= self._restart_at:
                raise _RestartError("a fault")
            return  # its consequences are not noticed before it is
        for node in self._house.nodes:
            if node.smp is not None and node.smp.is_silent:
                raise _RestartError(f"the snapshot process of {node.name} has died")
            if node.worker is not None and node.worker.is_silent:
                raise _RestartError(f"the worker of {node.name} has died")
            for reply in node.worker.replies if node.worker else ():
                if "error" in reply:
                    self.verdict.troubles.append(f"{node.name}: {reply['error']}")
                    raise _RestartError(reply["error"])

    # --- coming together ---------------------------------------------------------------------------------------

    def _rendezvous(self) -> None:
        for _ in range(_TRIES):
            self._restart_at = None
            try:
                return self._come_together()
            except TimeoutError as error:
                raise HungError(f"an agent had no answer in {PATIENCE.total_seconds():.0f} s") from error
            except (_RestartError, OSError) as error:
                self._strikes.note(str(error))
        raise WrongError("failed", f"{_TRIES} rendezvous in a row came to nothing: {self._strikes.notes[-3:]}")

    def _come_together(self) -> None:
        self._take += 1
        self._arm([])
        due = [f for f in self._pending if f.step <= self._step + 1 and POINTS[f.at].stage == "rendezvous"]
        due = due if self.verdict.restarts else []  # the first of all has nothing to recover
        for position, node in enumerate(self._house.nodes):
            if self._strikes.is_gone(node):
                self._house.nodes[position] = self._house.new_node()
                continue
            node.end_worker()
            node.unlimit()
        for node in self._house.nodes:
            node.start()
        views = self._of_all(lambda node: node.agent.inventory() if node.agent else None, "nodes to say what they hold")
        self._check_orphans()
        views = self._house.views_as_seen([view for view in views if view is not None])
        self._armed = [fault for fault in due if fault.at == "sealed"]
        for fault in list(self._armed):
            self._fall(fault)
        self._check()
        decision = decide(views)
        by_name = {node.name: node for node in self._house.nodes}
        self._house.nodes[:] = [by_name[view.name] for view in decision.nodes]
        expected = self._expected()
        self._arm([fault for fault in due if fault in self._pending])
        self._of_all(lambda node: node.agent.open(views, "") if node.agent else None, "nodes to go on")
        self._generation = decision.generation
        self._restore(decision, expected)

    def _of_all(self, ask: Callable[[Node], Any], what: str) -> list[Any]:
        """Ask all agents' connections at once, while faults may fall. Raises ConnectionError or SnapshotError."""
        futures: list[Future[Any]] = [self._pool.submit(ask, node) for node in self._house.nodes]
        self._until(lambda: all(future.done() for future in futures), what)
        return [future.result() for future in futures]

    def _check_orphans(self) -> None:
        for node in self._house.nodes:
            for orphan in node.orphans:
                if orphan.alive:
                    raise WrongError("wrong", f"the orphaned worker of {node.name} may still write")

    def _expected(self) -> SnapshotId | None:
        """What the job must go on from, or something newer; None if more is lost than is covered."""
        memory = self._safe if len(self._lost) <= self._schedule.m else None
        found = [snapshot for snapshot in (memory, self._house.safe_checkpoint()) if snapshot is not None]
        return max(found, default=None)

    def _restore(self, decision: Decision, expected: SnapshotId | None) -> None:
        for rank, node in enumerate(self._house.nodes):
            place = {"socket": str(node.path), "job": node.job, "generation": self._generation, "rank": rank}
            node.start_worker(place | {"world_size": self._schedule.nodes, "local_world_size": 1}, self._schedule.seed)
        self._until(self._all_replied, "workers to join")
        for node in self._house.nodes:
            self._tell(node, {"op": "restore"})
        self._until(self._all_replied, f"workers to restore {decision.snapshot}")
        replies = [node.worker.replies[-1] for node in self._house.nodes if node.worker]
        self._judge(decision, expected, replies)
        gave_up = self._safe is not None and (decision.snapshot is None or decision.snapshot < self._safe)
        self._safe = decision.snapshot if decision.source == "memory" else None
        self._step = decision.snapshot.step if decision.snapshot else 0
        self.verdict.restarts.append(
            Restart(
                source=_farthest([reply["facts"]["source"] for reply in replies]),
                step=self._step,
                expected_step=expected.step if expected else None,
                gave_up=gave_up,
                why=decision.notes,
            )
        )
        if not self._schedule.hasty or any(POINTS[f.at].stage == "rendezvous" for f in self._armed):
            self._until(self._is_whole, "nodes to be whole again")
            self._lost = {position: at for position, at in self._lost.items() if at >= self._take}
        self._check()

    def _judge(self, decision: Decision, expected: SnapshotId | None, replies: list[dict[str, Any]]) -> None:
        wrong = {rank: reply["wrong_bytes"] for rank, reply in enumerate(replies) if reply["wrong_bytes"]}
        if wrong:
            raise WrongError("wrong", f"{decision.snapshot} was restored with other bytes (rank: count): {wrong}")
        if {reply["facts"]["step"] for reply in replies} != {decision.snapshot.step if decision.snapshot else 0}:
            raise WrongError("wrong", f"workers went on from different steps: {replies}")
        if expected and (decision.snapshot is None or decision.snapshot < expected):
            raise WrongError("lost", f"{decision.snapshot} was restored and {expected} is covered: {decision.notes}")
        gave_up = self._safe and (decision.snapshot is None or decision.snapshot < self._safe)
        if gave_up and not decision.notes and any(view.held for view in decision.nodes):
            raise WrongError("lost", f"{self._safe} is lost and nobody said why")

    def _is_whole(self) -> bool:
        try:
            return all(node.status()["phase"] != "recovering" for node in self._house.nodes)
        except OSError:
            return False  # one has died, which the next look at it shows


def _farthest(sources: list[str]) -> str:
    """Of what the nodes went on from, the one that cost most."""
    return max(sources, key=("memory", "parity", "disk", "start").index)
