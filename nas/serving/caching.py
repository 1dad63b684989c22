# SPDX-License-Identifier: Apache-2.0
"""Which experts stay in a GPU's slots while others wait in host memory: four policies, and what each would hit.

A *step* asks for a set of experts, that of one token or of one batch in one layer. They are computed together, as
fused kernels do, so all of them are in slots at once; what is missing is loaded into slots that others give up. A step
that asks for more than there are slots is done in parts, those present first. Nothing is loaded before it is asked for:
that is prefetching, which hides time and changes no hit (see `simulation`).

Belady (1966) gives up what is needed last; no policy loads less, as long as each step's experts fit into the slots
(tests try every cache there could be). It needs the future. A pre-gating router or tables (Read-ME, 2410.19123) guess
it for the tokens in their queue: what they guess to be needed within `look_ahead` stays by next use, and what is not by
last use, as LRU does. Hits are always counted on what is really asked for. With the true routing in the guess's place
the figure is that of a router that is never wrong, and with `look_ahead=None` a bound for any cache. In decoding a
queue has only each open sequence's next token: `known_from` says since when a use is known.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .errors import PlanError

Scope = Literal["layer", "shared"]
"""`layer`: slots of its own for each layer. `shared`: one pool for all layers."""
Steps = Sequence[Sequence[int]]
"""The items that each step asks for, each once."""


class Policy(Protocol):
    """Says what is worth its slot. One is made for each replay."""

    def used(self, step: int, items: Sequence[int]) -> None:
        """The step asked for these."""
        ...

    def worth(self, item: int) -> tuple[float, ...]:
        """What has the least worth is given up, of equal ones the larger number."""
        ...


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def used(self, step: int, items: Sequence[int]) -> None:
        self._last.update(dict.fromkeys(items, step))

    def worth(self, item: int) -> tuple[float, ...]:
        return (self._last.get(item, -1),)


class Lfu(Lru):
    """Least frequently used since the start, of equal ones the least recently used."""

    def __init__(self) -> None:
        super().__init__()
        self._count: dict[int, int] = {}

    def used(self, step: int, items: Sequence[int]) -> None:
        super().used(step, items)
        for item in items:
            self._count[item] = self._count.get(item, 0) + 1

    def worth(self, item: int) -> tuple[float, ...]:
        return (self._count.get(item, 0), *super().worth(item))


class Belady(Lru):
    """What is needed next within `look_ahead` steps, then the most recently used. None: all steps are known.

    steps: what is believed of them, be it right or wrong. known_from: for each step, since which step it is known that
    an item is needed there; without it, and where it names no item, from the start.
    """

    def __init__(
        self, steps: Steps, look_ahead: int | None = None, known_from: Sequence[Mapping[int, int]] | None = None
    ) -> None:
        super().__init__()
        self._uses: dict[int, list[int]] = {}
        for step, items in enumerate(steps):
            for item in items:
                self._uses.setdefault(item, []).append(step)
        self._known_from = known_from
        self._look_ahead, self._now = len(steps) if look_ahead is None else look_ahead, 0

    def used(self, step: int, items: Sequence[int]) -> None:
        super().used(step, items)
        self._now = step

    def worth(self, item: int) -> tuple[float, ...]:
        uses = self._uses.get(item, ())
        for place in range(bisect_right(uses, self._now), len(uses)):
            step = uses[place]
            if step - self._now > self._look_ahead:
                break
            if self._known_from is None or self._known_from[step].get(item, 0) <= self._now:
                return (1, -step)
        return (0, *super().worth(item))


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a replay counted."""

    requests: int
    loads: int

    @property
    def hit_rate(self) -> float:
        return 1 - self.loads / self.requests if self.requests else 0.0


def replay(steps: Steps, slots: int, policy: Policy) -> Cached:
    """Count the loads of a policy that starts with nothing.

    Raises:
        PlanError: if there is no slot.
    """
    cache, requests, loads = Cache(slots, policy), 0, 0
    for items in steps:
        requests += len(items)
        loads += len(cache.ask(items))
    return Cached(requests=requests, loads=loads)


class Cache:
    """The slots, a step at a time."""

    def __init__(self, slots: int, policy: Policy) -> None:
        if slots < 1:
            raise PlanError(f"{slots} slots hold no expert; give at least 1")
        self.slots, self.policy, self.resident, self._step = slots, policy, set[int](), 0

    def ask(self, items: Sequence[int]) -> list[int]:
        """Compute these; returns what had to be loaded."""
        if len(items) > self.slots:
            ordered = sorted(items, key=lambda item: item not in self.resident)
            parts = [ordered[start : start + self.slots] for start in range(0, len(ordered), self.slots)]
        else:
            parts = [items]
        missing: list[int] = []
        self.policy.used(self._step, items)
        self._step += 1
        for part in parts:
            fresh = [item for item in part if item not in self.resident]
            if fresh:
                self._make_room(part)
            missing += fresh
        return missing

    def _make_room(self, items: Sequence[int]) -> None:
        others = self.resident.difference(items)
        room = self.slots - len(items)
        if len(others) > room:
            ranked = sorted(others, key=lambda item: (*self.policy.worth(item), -item), reverse=True)
            others = ranked[:room]
        self.resident = {*others, *items}


def layer_steps(experts: np.ndarray, batches: Sequence[np.ndarray] | None = None) -> list[list[list[int]]]:
    """For each layer, what each step asks of it: a step is a token, or with `batches` (indices of tokens) one of those.

    experts: (layers, tokens, top_k).
    """
    if batches is None:
        return [layer.astype(np.int64).tolist() for layer in experts]
    return [[np.unique(layer[batch]).tolist() for batch in batches] for layer in experts]


def policies(steps: Steps, look_ahead: int, predicted: Steps | None = None) -> dict[str, Policy]:
    """One of each kind, for these steps. look_ahead: in steps. predicted: what was guessed of them.

    `belady-predicted` is a policy that can be had; `belady-look-ahead` (a guess that is always right) and `belady` (no
    end to the queue) are bounds.
    """
    guessing: dict[str, Policy] = {} if predicted is None else {"belady-predicted": Belady(predicted, look_ahead)}
    return {
        "lru": Lru(),
        "lfu": Lfu(),
        **guessing,
        "belady-look-ahead": Belady(steps, look_ahead),
        "belady": Belady(steps),
    }


def hit_rates(
    experts: np.ndarray,
    count: int,
    slots: int,
    *,
    scope: Scope = "layer",
    look_ahead: int = 64,
    batches: Sequence[np.ndarray] | None = None,
    predicted: np.ndarray | None = None,
    device_of: np.ndarray | None = None,
) -> dict[str, Cached]:
    """All policies over a routing (layers, tokens, top_k) of `count` experts a layer.

    slots: of each layer, or with `shared` of all layers together. look_ahead: in tokens or batches, whose ids are known
    as those of a prompt are. predicted: what was guessed of the routing, (layers, tokens, candidates). device_of:
    (layers, experts), the device of each expert, each of which has so many slots and is asked for its own experts only.

    Raises:
        PlanError: if there is no slot, or devices are to share one pool.
    """
    if scope == "shared" and device_of is not None:
        raise PlanError("slots shared by all layers are of one device; give no placement")
    guess: list[list[list[int]]] | None = None if predicted is None else layer_steps(predicted, batches)
    pools, believed = (_pools(found, count, scope, device_of) for found in (layer_steps(experts, batches), guess))
    assert pools is not None
    if scope == "shared":
        look_ahead *= len(experts)
    totals: dict[str, tuple[int, int]] = {}
    for index, steps in enumerate(pools):
        for name, policy in policies(steps, look_ahead, None if believed is None else believed[index]).items():
            found, before = replay(steps, slots, policy), totals.get(name, (0, 0))
            totals[name] = (before[0] + found.requests, before[1] + found.loads)
    return {name: Cached(requests=requests, loads=loads) for name, (requests, loads) in totals.items()}


def _pools(
    layers: list[list[list[int]]] | None, count: int, scope: Scope, device_of: np.ndarray | None
) -> list[list[list[int]]] | None:
    """What each pool of slots is asked for: a layer's, all layers', or a layer's on one device."""
    if layers is None:
        return None
    if scope == "shared":
        return [
            [
                [layer * count + item for item in layers[layer][step]]
                for step in range(len(layers[0]))
                for layer in range(len(layers))
            ]
        ]
    if device_of is None:
        return layers
    found = []
    for steps, row in zip(layers, device_of.tolist(), strict=True):
        for device in sorted(set(row)):
            found.append([[item for item in items if row[item] == device] for items in steps])
    return found
