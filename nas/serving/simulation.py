# SPDX-License-Identifier: Apache-2.0
"""Replay a routing trace on devices, event by event: what waits for what, and how long.

A step is a batch; its layers follow one another, and in each:

- *messages*: hidden states go to the devices of their experts, and what these computed goes where the token is next.
  Each device sends one message at a time; a message has a latency and a bandwidth, within a node or between nodes.
- *loads*: experts that a device does not hold come from host memory, or from disk over it, one after another on that
  device's bus and on the node's disk. Without foresight a load waits for the layer's router. A predictor knows as far
  as it is right, from the step's start. A pre-gating router that is never wrong (`known`, a bound) could start a load
  as soon as the layer's slots are free and the token's id is there, in a step before too. What is wanted now goes
  before what is foreseen; wrong guesses cost the bus.
- *computing*: a device waits for its messages and its loads, then reads each expert it needs once and multiplies.

A token is either at home, where every layer's results come back to (a fixed device), or it *moves*: from layer to layer
it is on the device with most of its experts (ExFlow: contexts are on all devices). Attention, dense parts, routers and
the time to gather contexts are not simulated, so times compare plans with each other and are no promise of an engine.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .caching import Belady, Cache, Lfu, Lru, Policy
from .devices import Devices

CachePolicy = Literal["lru", "lfu", "belady"]
Foresight = Literal["none", "predicted", "known"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scenario:
    """One way to serve a trace: experts (layers, tokens, top_k) int."""

    name: str
    device_of: np.ndarray
    """(layers, experts)."""
    home: np.ndarray | None
    """The device of each token, (tokens,); None: tokens move."""
    batches: Sequence[np.ndarray]
    """Tokens of each step."""
    expert_bytes: np.ndarray
    """(layers, experts): with fewer bits, fewer."""
    hidden_bytes: float
    parameters: float
    """Weights of one expert, whatever their bits; a token multiplies by each once."""
    policy: CachePolicy = "lru"
    look_ahead: int = 0
    """Steps that are known beforehand, for `belady`."""
    known_from: np.ndarray | None = None
    """The step from which each token's id is known, (tokens,), for `belady` and `known`; None: from the first."""
    believed: np.ndarray | None = None
    """What `belady` takes for the routing, (layers, tokens, candidates); None: the true one, which makes a bound."""
    foresight: Foresight = "none"
    guessed: np.ndarray | None = None
    """For `predicted`: (layers, tokens, candidates)."""
    in_host: np.ndarray
    """(layers, experts) bool: which experts host memory keeps; others come from disk."""
    slots: int = 0
    """Experts of a layer that a device keeps; 0: as many as its memory holds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a replay saw. Times in seconds."""

    name: str
    tokens: int
    steps: int
    seconds: float
    step_ms: dict[str, float] = field(hash=False)
    """mean, p50, p95 and p99 of a step."""
    hit_rate: float
    """Of experts asked for, those that were in a device's memory."""
    loaded_gb: float
    """From hosts to devices, wrong guesses included."""
    hops: float
    """Hidden states sent from device to device, a token and layer."""
    node_hops: float
    """Those among them that cross nodes."""
    unique: float
    """Experts that a batch needs in a layer."""
    busy: dict[str, float] = field(hash=False)
    """Shares of the time that computing, links and buses were in use, the mean over devices."""

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, object]:
        return {**self.__dict__, "tokens_s": self.tokens_s}


class _Queue:
    """Things that do one job at a time, first come, first served."""

    def __init__(self, count: int) -> None:
        self.free, self.used = np.zeros(count), np.zeros(count)

    def run(self, index: int, ready_s: float, seconds: float) -> float:
        begin = max(ready_s, float(self.free[index]))
        self.free[index] = begin + seconds
        self.used[index] += seconds
        return begin + seconds


@dataclass(frozen=True)
class _Foreseen:
    """A load that waits for its turn."""

    layer: int
    expert: int
    ready_s: float
    is_wanted: bool


class Replay:
    """One scenario on the devices, from nothing used to the last step's end."""

    def __init__(self, experts: np.ndarray, devices: Devices, scenario: Scenario) -> None:
        self.experts, self.devices, self.scenario = experts.astype(np.int64), devices, scenario
        self.layers, self.count = scenario.device_of.shape
        self.where = np.stack([scenario.device_of[layer][self.experts[layer]] for layer in range(self.layers)])
        self.compute, self.bus = _Queue(devices.count), _Queue(devices.count)
        self.link, self.disk = _Queue(devices.count), _Queue(devices.nodes)
        self.node_of = devices.node_of
        self.caches = self._caches()
        self.slots_free = np.zeros((self.layers, devices.count))
        self.late: dict[tuple[int, int], list[int]] = {}
        """By layer and device: what will be loaded when the layer's router asks for it."""
        self.arrived: dict[tuple[int, int], float] = {}
        """By layer and device: when the last of what it needs has come."""
        self.foreseen: list[deque[_Foreseen]] = [deque() for _ in range(devices.count)]
        self.asked = self.loads = self.unique = 0
        self.loaded_bytes = 0.0
        self.sent = np.zeros((devices.count, devices.count), np.int64)
        self.began: list[float] = []
        """Of each step until now."""

    def _caches(self) -> list[list[Cache | None]]:
        """For each layer and device; None: all of its experts fit."""
        mean_bytes = float(self.scenario.expert_bytes.mean())
        slots = self.scenario.slots or self.devices.slots(mean_bytes, self.layers)
        found: list[list[Cache | None]] = []
        for layer in range(self.layers):
            row: list[Cache | None] = []
            for device in range(self.devices.count):
                mine = np.flatnonzero(self.scenario.device_of[layer] == device)
                if len(mine) <= slots:
                    row.append(None)
                    continue
                cache = Cache(slots, self._policy(layer, set(mine.tolist())))
                cache.resident = set(mine[:slots].tolist())
                row.append(cache)
            found.append(row)
        return found

    def _policy(self, layer: int, own: set[int]) -> Policy:
        if self.scenario.policy == "belady":
            believed = self.experts if self.scenario.believed is None else self.scenario.believed
            steps = [self._known(believed[layer], batch, own) for batch in self.scenario.batches]
            return Belady([list(step) for step in steps], self.scenario.look_ahead, steps)
        return Lfu() if self.scenario.policy == "lfu" else Lru()

    def _known(self, routing: np.ndarray, batch: np.ndarray, own: set[int]) -> dict[int, int]:
        """Of the device's own experts those that a batch needs, and since which step that is known."""
        found: dict[int, int] = {}
        since = self.scenario.known_from
        for token, experts in zip(batch.tolist(), routing[batch].tolist(), strict=True):
            step = 0 if since is None else int(since[token])
            for expert in own.intersection(experts):
                found[expert] = min(found.get(expert, step), step)
        return found

    def run(self) -> Outcome:
        now, taken = 0.0, []
        at = np.arange(self.experts.shape[1]) % self.devices.count
        for batch in self.scenario.batches:
            began, place = now, at[batch] if self.scenario.home is None else self.scenario.home[batch]
            self.began.append(began)
            self._foresee(batch, began)
            for layer in range(self.layers):
                now, place = self._layer(layer, batch, place, now)
            at[batch] = place
            taken.append(now - began)
        return self._outcome(now, np.array(taken))

    def _layer(self, layer: int, batch: np.ndarray, place: np.ndarray, now: float) -> tuple[float, np.ndarray]:
        """When the layer's results are where the tokens are next, and where that is."""
        where = self.where[layer, batch]  # (tokens, top_k)
        there = np.zeros((len(batch), self.devices.count), bool)
        there[np.arange(len(batch))[:, None], where] = True
        after = place if self.scenario.home is not None else self._moved(where, place)
        self.unique += len(np.unique(self.experts[layer, batch]))
        loaded = self._load(layer, now)
        arrived = self._send(self._pairs(place, there), np.full(self.devices.count, now))
        done = np.full(self.devices.count, now)
        for device in np.flatnonzero(there.any(0)).tolist():
            done[device] = self._compute(layer, batch, where, device, max(arrived[device], loaded[device]))
            self.slots_free[layer, device] = done[device]
        back = self._send(self._pairs(after, there).T, done)
        return float(max(back.max(), done.max())), after

    def _moved(self, where: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The device with most of a token's experts; of equals where it is, then the first."""
        votes = np.zeros((len(where), self.devices.count))
        np.add.at(votes, (np.arange(len(where))[:, None], where), 1.0)
        votes[np.arange(len(where)), place] += 0.5
        return votes.argmax(1)

    def _pairs(self, place: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Hidden states from each device to each: (devices, devices)."""
        found = np.zeros((self.devices.count, self.devices.count), np.int64)
        np.add.at(found, place, there.astype(np.int64))
        np.fill_diagonal(found, 0)
        return found

    def _send(self, states: np.ndarray, ready_s: np.ndarray) -> np.ndarray:
        """When all that is sent to each device is there: (devices,)."""
        arrived = ready_s.copy()
        self.sent += states
        events = [(float(ready_s[source]), int(source), int(target)) for source, target in np.argwhere(states)]
        heapq.heapify(events)
        while events:
            ready, source, target = heapq.heappop(events)
            size = float(states[source, target]) * self.scenario.hidden_bytes
            near = self.node_of[source] == self.node_of[target]
            latency = (self.devices.link_us if near else self.devices.network_us) * 1e-6
            seconds = size / ((self.devices.link_gb_s if near else self.devices.network_gb_s) * 1e9)
            # The wire is busy for the bytes; the latency passes beside the next message.
            arrived[target] = max(arrived[target], self.link.run(source, ready, seconds) + latency)
        return arrived

    def _foresee(self, batch: np.ndarray, began: float) -> None:
        """Settle what each layer will have to load, and queue what is known of it now."""
        for layer in range(self.layers):
            needed, guessed = np.unique(self.experts[layer, batch]), self._guesses(layer, batch)
            owner = self.scenario.device_of[layer]
            for device in range(self.devices.count):
                cache, wanted = self.caches[layer][device], needed[owner[needed] == device].tolist()
                self.asked += len(wanted)
                if cache is None:
                    continue
                wrong = {e for e in guessed if owner[e] == device and e not in cache.resident}.difference(wanted)
                missing = cache.ask(wanted) if wanted else []
                self.loads += len(missing)
                free_s = float(self.slots_free[layer, device])
                if self.scenario.foresight == "known":
                    since = self._known(self.experts[layer], batch, set(missing))
                    early = {expert: self.began[since[expert]] for expert in missing}
                else:
                    early = {expert: began for expert in missing if expert in guessed}
                self.late[layer, device] = [expert for expert in missing if expert not in early]
                queue = self.foreseen[device]
                queue.extend(_Foreseen(layer, expert, max(free_s, at_s), True) for expert, at_s in early.items())
                queue.extend(_Foreseen(layer, expert, max(free_s, began), False) for expert in sorted(wrong))

    def _load(self, layer: int, now: float) -> np.ndarray:
        """When each device has the layer's experts: (devices,)."""
        ready = np.full(self.devices.count, now)
        for device, queue in enumerate(self.foreseen):
            while queue and max(queue[0].ready_s, float(self.bus.free[device])) < now:
                self._fetch(queue.popleft(), device)
            while queue and queue[0].layer <= layer:
                job = queue.popleft()
                if job.is_wanted:  # a wrong guess that has not begun when the router speaks is dropped
                    self._fetch(job, device)
            for expert in self.late.pop((layer, device), ()):
                self._fetch(_Foreseen(layer, expert, now, True), device)
            ready[device] = max(now, self.arrived.pop((layer, device), now))
        return ready

    def _guesses(self, layer: int, batch: np.ndarray) -> set[int]:
        if self.scenario.foresight != "predicted" or self.scenario.guessed is None:
            return set()
        return set(np.unique(self.scenario.guessed[layer, batch]).tolist())

    def _fetch(self, job: "_Foreseen", device: int) -> None:
        size, ready_s = float(self.scenario.expert_bytes[job.layer, job.expert]), job.ready_s
        self.loaded_bytes += size
        if not self.scenario.in_host[job.layer, job.expert]:
            seconds = self.devices.disk_us * 1e-6 + size / (self.devices.disk_gb_s * 1e9)
            ready_s = self.disk.run(int(self.node_of[device]), ready_s, seconds)
        seconds = self.devices.host_us * 1e-6 + size / (self.devices.host_gb_s * 1e9)
        done = self.bus.run(device, ready_s, seconds)
        if job.is_wanted:
            self.arrived[job.layer, device] = max(done, self.arrived.get((job.layer, device), 0.0))

    def _compute(self, layer: int, batch: np.ndarray, where: np.ndarray, device: int, ready_s: float) -> float:
        mine = self.experts[layer, batch][where == device]
        size = float(self.scenario.expert_bytes[layer, np.unique(mine)].sum())
        multiply = 2 * self.scenario.parameters * len(mine) / (self.devices.tflops * 1e12)
        return self.compute.run(device, ready_s, max(size / (self.devices.memory_gb_s * 1e9), multiply))

    def _outcome(self, seconds: float, taken: np.ndarray) -> Outcome:
        tokens = int(sum(len(batch) for batch in self.scenario.batches))
        apart = self.node_of[:, None] != self.node_of[None, :]
        steps, milliseconds = len(taken), 1000 * taken
        ranks = {"p50": 50, "p95": 95, "p99": 99}
        queues = {"compute": self.compute, "link": self.link, "bus": self.bus}
        return Outcome(
            name=self.scenario.name,
            tokens=tokens,
            steps=steps,
            seconds=seconds,
            step_ms={"mean": float(milliseconds.mean())}
            | {name: float(np.percentile(milliseconds, rank)) for name, rank in ranks.items()},
            hit_rate=1 - self.loads / self.asked if self.asked else 1.0,
            loaded_gb=self.loaded_bytes / 1e9,
            hops=float(self.sent.sum()) / (tokens * self.layers),
            node_hops=float(self.sent[apart].sum()) / (tokens * self.layers),
            unique=self.unique / (steps * self.layers),
            busy={name: float(queue.used.mean() / seconds) for name, queue in queues.items()},
        )


def simulate(experts: np.ndarray, devices: Devices, scenario: Scenario) -> Outcome:
    """Replay `scenario` over a trace's routing, (layers, tokens, top_k)."""
    return Replay(experts, devices, scenario).run()


def in_host_of(load: np.ndarray, expert_bytes: np.ndarray, devices: Devices) -> np.ndarray:
    """Which experts the hosts keep, the most used first, as far as their memory goes: (layers, experts) bool.

    load: how often each was used, (layers, experts). Every host keeps what its own GPUs may ask for, so the room of
    one counts as often as there are hosts.
    """
    order = np.argsort(-load.ravel(), kind="stable")
    total = np.cumsum(expert_bytes.ravel()[order])
    kept = np.zeros(load.size, bool)
    kept[order[total <= devices.nodes * devices.host_gb * 1e9]] = True
    return kept.reshape(load.shape)
