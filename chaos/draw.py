# SPDX-License-Identifier: Apache-2.0
"""Which schedules a campaign runs: random ones, each from a seed of its own, and sets that leave nothing out."""

import itertools
import random
from collections.abc import Iterator

from .points import POINTS
from .schedule import ACTIONS, DISK_ACTIONS, LASTING, Fault, Schedule

MEMORY_ACTIONS = tuple(action for action in ACTIONS if action not in DISK_ACTIONS)
_LOSSES = ("kill-worker", "lose-node", "flip-data")
_IN_RECOVERY = ("kill-worker", "kill-smp", "lose-node", "stop-smp", "flip-data", "no-memory", "partition")
_CODES = ((1, 1), (2, 1), (2, 1), (2, 2))
_SHARES = {"kill-worker": 2, "kill-smp": 3, "lose-node": 4, "kill-agent": 2, "flip-data": 2}
"""How often an action is drawn, where not once."""


def random_schedule(seed: int) -> Schedule:
    """1 to 3 faults, some of them while the job recovers from another."""
    rng = random.Random(f"smp {seed}")
    (k, m), disk, steps = rng.choice(_CODES), rng.random() < 0.25, rng.randint(3, 4)
    faults = [_random_fault(rng, k + m, steps, disk) for _ in range(rng.choice((1, 2, 2, 3)))]
    if rng.random() < 0.5:
        faults.append(_random_fault(rng, k + m, steps, disk, stage="rendezvous"))
    return Schedule(k=k, m=m, steps=steps, seed=seed, disk=disk, hasty=rng.random() < 0.3, faults=tuple(faults))


def _random_fault(rng: random.Random, nodes: int, steps: int, disk: bool, stage: str = "") -> Fault:
    stage = stage or rng.choice(("step", "step", "disk" if disk else "step", "rendezvous"))
    at = rng.choice([name for name, point in POINTS.items() if point.stage == stage])
    actions = [action for action in ACTIONS if disk or action not in DISK_ACTIONS]
    action = rng.choices(actions, [_SHARES.get(action, 1) for action in actions])[0]
    node, point = rng.randrange(nodes), POINTS[at]
    on = node if rng.random() < 0.5 else rng.randrange(nodes)
    on = 0 if point.lead else max(1, on) if point.others else on
    return Fault(
        action=action,
        node=node,
        step=rng.randint(1, steps),
        at=at,
        on=on,
        nth=rng.randint(1, nodes - 1)
        if at in ("telling", "prepared")
        else rng.choice((1, 1, 2))
        if stage == "disk"
        else 1,
        for_ms=rng.randint(50, 800) if action in LASTING else 0,
        byte=rng.choice((rng.randrange(200), rng.randrange(1 << 20))),
        notice_ms=rng.choice((0, 0, 20, 200)),
    )


def every_single() -> Iterator[Schedule]:
    """Every action of the memory tier on every node at every point of a snapshot, one a schedule, on 2 + 1 nodes."""
    step = [name for name, point in POINTS.items() if point.stage == "step"]
    for action, at, node in itertools.product(MEMORY_ACTIONS, step, range(3)):
        for on, nth in _places(at, node, 3):
            fault = Fault(action=action, node=node, step=2, at=at, on=on, nth=nth, byte=_bytes(action, at, node))
            yield Schedule(faults=(fault,))


def every_on_disk() -> Iterator[Schedule]:
    """Every action that storage or its writers can meet, at every point of a checkpoint, on 2 + 1 nodes."""
    actions = ("kill-smp", "lose-node", "kill-worker", "stop-smp", "no-memory", *DISK_ACTIONS)
    disk = [name for name, point in POINTS.items() if point.stage == "disk"]
    for action, at, node in itertools.product(actions, disk, range(3)):
        for nth in (1, 2) if at in ("fsync", "named") else (1,):
            on = 0 if POINTS[at].lead else node
            fault = Fault(action=action, node=node, step=3, at=at, on=on, nth=nth)
            yield Schedule(disk=True, steps=4, faults=(fault,))


def every_recovery() -> Iterator[Schedule]:
    """A node is lost, and something else falls at every point of the recovery, on every node of 2 + 2."""
    back = [name for name, point in POINTS.items() if point.stage == "rendezvous"]
    first = Fault(action="lose-node", node=1, step=2, at="begun")
    for action, at, node in itertools.product(_IN_RECOVERY, back, range(4)):
        notice_ms = 200 if at == "sealed" else 0
        second = Fault(action=action, node=node, step=2, at=at, on=node, notice_ms=notice_ms)
        yield Schedule(m=2, steps=2, faults=(first, second))


def every_pair() -> Iterator[Schedule]:
    """Every two of the losses, on both of 1 + 1 nodes, at every two points of the same snapshot."""
    points = ("half", "encode", "decided", "telling", "committed")
    singles = list(itertools.product(_LOSSES, range(2), points))
    for (a, node_a, at_a), (b, node_b, at_b) in itertools.combinations_with_replacement(singles, 2):
        faults = (
            Fault(action=a, node=node_a, step=2, at=at_a, notice_ms=100),
            Fault(action=b, node=node_b, step=2, at=at_b, notice_ms=100),
        )
        yield Schedule(k=1, m=1, steps=2, faults=faults)


SETS = {"single": every_single, "disk": every_on_disk, "recovery": every_recovery, "pairs": every_pair}


def _places(at: str, node: int, nodes: int) -> list[tuple[int, int]]:
    """Where (and when for how many times) a point can be reached for a fault on `node`."""
    if at in ("telling", "prepared"):
        return [(0, nth) for nth in range(1, nodes)]
    if POINTS[at].lead:
        return [(0, 1)]
    return [(max(1, node), 1) if POINTS[at].others else (node, 1)]


def _bytes(action: str, at: str, node: int) -> int:
    """Another byte of the wire for every place: heads, JSON and bodies are all met."""
    return (list(POINTS).index(at) * 3 + node) * 7 if action in ("flip-wire", "cut-wire") else 0
