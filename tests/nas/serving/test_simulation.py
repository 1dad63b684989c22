# SPDX-License-Identifier: Apache-2.0
"""The replay by hand on small cases, and what no replay may break."""

from dataclasses import replace

import numpy as np
import pytest
from refound.nas.serving.affinity import affinity_of
from refound.nas.serving.devices import Devices
from refound.nas.serving.placement import capacities, contiguous, place
from refound.nas.serving.simulation import Scenario, in_host_of, simulate

from .traces import chained

# 1 MB at 1 GB/s is a millisecond; nothing else takes time unless a test says so.
FREE = Devices(
    gpus=2,
    memory_gb=1,
    link_gb_s=1e9,
    link_us=0,
    network_gb_s=1e9,
    network_us=0,
    host_us=0,
    disk_us=0,
    host_gb_s=1,
    memory_gb_s=1e9,
    tflops=1e9,
)
MB = 1e6


def scenario(experts: np.ndarray, device_of: np.ndarray, batches: list[list[int]], **changes: object) -> Scenario:
    base = Scenario(
        name="test",
        device_of=device_of,
        home=np.zeros(experts.shape[1], int),
        batches=[np.array(batch) for batch in batches],
        expert_bytes=np.full(device_of.shape, MB),
        hidden_bytes=MB,
        parameters=1.0,
        in_host=np.ones(device_of.shape, bool),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_messages_by_hand() -> None:
    """Two tokens at home on device 0; their one expert is on device 1, over a link of a millisecond a state."""
    experts = np.array([[[1], [1]]])
    devices = replace(FREE, link_gb_s=1, link_us=500)
    found = simulate(experts, devices, scenario(experts, np.array([[0, 1]]), [[0, 1]]))
    assert found.seconds == pytest.approx(2 * (2e-3 + 0.5e-3))  # two states there and back
    assert found.hops == pytest.approx(2) and found.node_hops == 0
    assert found.hit_rate == 1 and found.loaded_gb == 0
    apart = replace(devices, nodes=2, gpus=1, network_gb_s=0.5)
    found = simulate(experts, apart, scenario(experts, np.array([[0, 1]]), [[0, 1]]))
    assert found.seconds == pytest.approx(2 * 4e-3) and found.node_hops == pytest.approx(2)
    # a token that moves stays on device 1: it went there once, and came from where it was (device 0 or 1)
    moving = simulate(experts, devices, scenario(experts, np.array([[0, 1]]), [[0, 1]], home=None))
    assert moving.hops == pytest.approx(0.5) and moving.seconds == pytest.approx(1e-3 + 0.5e-3)


def test_loads_by_hand() -> None:
    """One device with a slot for each of two layers: experts 0, 1, 0 are asked for, and 0 is there at first."""
    experts = np.array([[[0], [1], [0]], [[0], [0], [0]]])
    devices = replace(FREE, gpus=1, memory_gb=0.0025)  # one slot a layer
    base = scenario(experts, np.zeros((2, 2), int), [[0], [1], [2]])
    found = simulate(experts, devices, base)
    assert found.hit_rate == pytest.approx(4 / 6)
    assert found.seconds == pytest.approx(2e-3) and found.loaded_gb == pytest.approx(0.002)
    # from disk it takes as long again, before it goes over the bus
    slow = simulate(experts, replace(devices, disk_gb_s=1), replace(base, in_host=np.zeros((2, 2), bool)))
    assert slow.seconds == pytest.approx(4e-3)


def test_what_is_foreseen_is_loaded_beside_the_computing() -> None:
    """Computing a layer takes as long as a load: with foresight the loads of layer 1 hide behind layer 0."""
    experts = np.array([[[0]] * 4, [[0], [1], [0], [1]]])
    devices = replace(FREE, gpus=1, memory_gb=0.0025, memory_gb_s=1)
    base = scenario(experts, np.zeros((2, 2), int), [[0], [1], [2], [3]])
    none = simulate(experts, devices, base)
    assert none.seconds == pytest.approx(8e-3 + 3e-3)
    known = simulate(experts, devices, replace(base, foresight="known"))
    assert known.seconds == pytest.approx(8e-3) and known.hit_rate == none.hit_rate
    right = replace(base, foresight="predicted", guessed=experts)
    assert simulate(experts, devices, right).seconds == pytest.approx(8e-3)
    # decoding one sequence: no token's id is there before the step in which it is computed
    since = np.arange(4)
    late = simulate(experts, devices, replace(base, foresight="known", known_from=since))
    assert late.seconds == pytest.approx(8e-3) and late.loaded_gb == known.loaded_gb
    wrong = replace(base, foresight="predicted", guessed=1 - experts)
    found = simulate(experts, devices, wrong)
    assert found.seconds >= none.seconds and found.loaded_gb > none.loaded_gb
    assert found.hit_rate == none.hit_rate


def test_a_step_before_the_token_is_made_loads_nothing() -> None:
    """One layer: a load can hide behind the step before it only if the token's id is known there."""
    experts = np.array([[[0], [1], [0], [1]]])
    devices = replace(FREE, gpus=1, memory_gb=0.0015, memory_gb_s=1)
    base = scenario(experts, np.zeros((1, 2), int), [[0], [1], [2], [3]], foresight="known", slots=1)
    late = simulate(experts, devices, replace(base, known_from=np.arange(4)))
    none = simulate(experts, devices, replace(base, foresight="none"))
    assert late.seconds == pytest.approx(none.seconds)


def test_decoding_knows_each_sequences_next_token_only() -> None:
    """Belady with all that comes loads less than with what is there when it must choose, which is at least LRU's."""
    experts, _ = chained(layers=2, experts=16, tokens=600, faith=0.5, seed=3, top_k=2)
    devices = replace(FREE, gpus=1, memory_gb=0.0125)
    base = scenario(experts, np.zeros((2, 16), int), [[token] for token in range(600)], policy="belady", look_ahead=64)
    ahead = simulate(experts, devices, base)
    one = simulate(experts, devices, replace(base, known_from=np.arange(600)))
    lru = simulate(experts, devices, replace(base, policy="lru"))
    assert one.hit_rate == lru.hit_rate < ahead.hit_rate  # a single sequence: nothing is known beforehand
    wrong = simulate(experts, devices, replace(base, believed=(experts + 5) % 16))
    assert wrong.hit_rate < lru.hit_rate


def test_slots_that_are_asked_for_are_the_slots() -> None:
    experts, _ = chained(layers=2, experts=16, tokens=200, faith=0.5, seed=3, top_k=2)
    base = scenario(experts, np.zeros((2, 16), int), [[token] for token in range(200)])
    found = [simulate(experts, replace(FREE, gpus=1), replace(base, slots=slots)).hit_rate for slots in (2, 6, 0)]
    assert found[0] < found[1] < found[2] == 1


def test_computing_is_bound_by_reading_or_by_multiplying() -> None:
    experts = np.zeros((1, 100, 1), int)
    devices = replace(FREE, gpus=1, memory_gb_s=1, tflops=1)
    base = scenario(experts, np.zeros((1, 1), int), [list(range(100))], parameters=1e6)
    assert simulate(experts, devices, base).seconds == pytest.approx(1e-3)  # 1 MB is read once for all
    many = replace(base, parameters=1e8)
    assert simulate(experts, devices, many).seconds == pytest.approx(2 * 1e8 * 100 / 1e12)


def test_plans_help_where_they_should() -> None:
    """On routing that follows itself: placement saves hops, Belady loads, foresight time."""
    experts, ids = chained(layers=4, experts=16, tokens=800, faith=0.8, seed=0, top_k=2)
    devices = Devices(gpus=4, memory_gb=0.004 * 2.5, host_gb=1, link_gb_s=10)
    spread = contiguous(4, capacities(16, 4))
    batches = [list(range(first, first + 4)) for first in range(400, 800, 4)]
    base = scenario(experts, spread, batches, home=None)
    plain = simulate(experts, devices, base)
    assert 0 < plain.hit_rate < 1
    placed = place(affinity_of(experts[:, :400], 16), devices.distance(1.0)).device_of
    assert simulate(experts, devices, replace(base, device_of=placed)).hops < 0.8 * plain.hops
    belady = simulate(experts, devices, replace(base, policy="belady", look_ahead=16))
    assert belady.hit_rate > plain.hit_rate and belady.loaded_gb < plain.loaded_gb
    known = simulate(experts, devices, replace(base, foresight="known"))
    assert known.seconds < plain.seconds and known.hit_rate == plain.hit_rate
    assert simulate(experts, devices, replace(base, policy="lfu")).tokens == plain.tokens == 400
    home = simulate(experts, devices, replace(base, home=ids % 4))
    assert home.hops > plain.hops  # there and back


def test_replays_are_alike_and_whole() -> None:
    experts, _ = chained(layers=3, experts=8, tokens=64, faith=0.5, seed=0, top_k=2)
    base = scenario(experts, contiguous(3, capacities(8, 2)), [list(range(8 * n, 8 * n + 8)) for n in range(8)])
    devices = replace(FREE, memory_gb=0.0095, link_gb_s=10, memory_gb_s=100)
    one, other = (simulate(experts, devices, base) for _ in range(2))
    assert one == other
    assert one.steps == 8 and one.tokens == 64
    assert one.step_ms["p50"] <= one.step_ms["p95"] <= one.step_ms["p99"]
    assert one.step_ms["mean"] * 8 == pytest.approx(1000 * one.seconds)
    assert all(0 <= share <= 1 + 1e-9 for share in one.busy.values())
    unique = [len(np.unique(layer[batch])) for batch in base.batches for layer in experts]
    assert one.unique == pytest.approx(np.mean(unique))
    one_device = simulate(
        experts, replace(devices, gpus=1, memory_gb=1), replace(base, device_of=np.zeros((3, 8), int))
    )
    assert one_device.hops == 0 and one_device.hit_rate == 1


def test_hosts_keep_what_is_used_most() -> None:
    load = np.array([[5, 1], [3, 9]])
    kept = in_host_of(load, np.full((2, 2), MB), replace(FREE, host_gb=0.0025))
    assert kept.tolist() == [[True, False], [False, True]]
