# SPDX-License-Identifier: Apache-2.0
"""Letting one fault fall on a house, and ending what it does after a while."""

import random
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass

from .house import House
from .node import Node, go_on, pause
from .schedule import Fault, Schedule


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What follows from a fault."""

    restarts: bool = False
    """Whether the job has to come together again."""
    loses: bool = False
    """Whether the node's memory is lost or damaged."""


class Strikes:
    """The faults of one schedule, as they fall."""

    def __init__(self, house: House, schedule: Schedule) -> None:
        self._house = house
        self._rng = random.Random(f"strike {schedule.seed}")
        self._gone: set[Node] = set()
        self._passing: dict[threading.Timer, Callable[[], None]] = {}
        self.notes: list[str] = []
        """Why rendezvous had to be begun again."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def is_gone(self, node: Node) -> bool:
        """Whether an empty node must take its place."""
        return node in self._gone

    @property
    def are_passing(self) -> bool:
        """Whether something that was to last a while lasts still."""
        return any(timer.is_alive() for timer in self._passing)

    def end_all(self) -> None:
        """End at once what was to last a while, or for good."""
        for timer, end in self._passing.items():
            timer.cancel()
            end()
        self._passing.clear()
        for _, stray in self._house.strays:
            self._house.reach_again(stray)

    def fall(self, fault: Fault) -> Effect:
        """Do it."""
        node = self._house.nodes[fault.node]
        falls: dict[str, Callable[[], Effect]] = {
            "kill-worker": lambda: self._kill_worker(node),
            "kill-smp": lambda: self._kill_smp(node),
            "kill-agent": lambda: self._kill_agent(node),
            "lose-node": lambda: self._lose(node),
            "stop-worker": lambda: self._stop(node.worker, fault.for_ms),
            "stop-smp": lambda: self._stop(node.smp, fault.for_ms),
            "flip-data": lambda: self._flip(node, "rank"),
            "flip-parity": lambda: self._flip(node, "parity"),
            "flip-wire": lambda: self._flip_wire(node, fault.byte),
            "cut-wire": lambda: self._cut_wire(node, fault.byte),
            "partition": lambda: self._partition(node, fault.for_ms),
            "partition-lost": lambda: self._give_up(node, fault.node),
            "no-memory": lambda: self._no_memory(node, fault.for_ms),
            "fill-disk": self._fill_disk,
            "tear-file": lambda: self._tear(fault.node),
        }
        return falls[fault.action]()

    # --- processes ---------------------------------------------------------------------------------------------

    def _kill_worker(self, node: Node) -> Effect:
        if node.worker is not None:
            node.worker.kill()
        return Effect(restarts=True)

    def _kill_smp(self, node: Node) -> Effect:
        if node.smp is not None:
            node.smp.kill()
        return Effect(restarts=True, loses=True)

    def _kill_agent(self, node: Node) -> Effect:
        node.lose_agent()
        return Effect(restarts=True)

    def _lose(self, node: Node) -> Effect:
        node.lose()
        self._gone.add(node)
        return Effect(restarts=True, loses=True)

    def _stop(self, child: object, for_ms: int) -> Effect:
        pause(child)  # pyright: ignore[reportArgumentType]
        self._later(for_ms, lambda: go_on(child))  # pyright: ignore[reportArgumentType]
        return Effect()

    def _later(self, after_ms: int, end: Callable[[], None]) -> None:
        timer = threading.Timer(after_ms / 1000, end)
        timer.daemon = True
        self._passing[timer] = end
        timer.start()

    # --- memory ------------------------------------------------------------------------------------------------

    def _flip(self, node: Node, kind: str) -> Effect:
        return Effect(loses=node.smp is not None and node.smp.alive and node.flip(kind, self._rng) > 0)

    def _no_memory(self, node: Node, for_ms: int) -> Effect:
        if node.smp is not None and node.smp.alive:
            node.limit(resource.RLIMIT_AS)
            self._later(for_ms, node.unlimit)
        return Effect()

    # --- network -----------------------------------------------------------------------------------------------

    def _flip_wire(self, node: Node, byte: int) -> Effect:
        if node.gate:
            node.gate.flip(byte)
        return Effect()

    def _cut_wire(self, node: Node, byte: int) -> Effect:
        if node.gate:
            node.gate.cut(byte + 1)
        return Effect()

    def _partition(self, node: Node, for_ms: int) -> Effect:
        self._house.cut_off(node)
        self._later(for_ms, lambda: self._house.reach_again(node))
        return Effect()

    def _give_up(self, node: Node, position: int) -> Effect:
        self._house.cut_off(node)
        self._house.strays.append((position, node))
        self._gone.add(node)
        return Effect(restarts=True, loses=True)

    # --- storage -----------------------------------------------------------------------------------------------

    def _fill_disk(self) -> Effect:
        self._house.fill_disk()
        return Effect()

    def _tear(self, rank: int) -> Effect:
        self._house.tear(rank)
        return Effect()
