# SPDX-License-Identifier: Apache-2.0
"""Placements against every placement there is, and what a hop is."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.serving.affinity import affinity_of, hops_of, load_of
from refound.nas.serving.balance import balanced, limits_of
from refound.nas.serving.devices import Devices
from refound.nas.serving.errors import PlanError
from refound.nas.serving.placement import (
    Placement,
    capacities,
    contiguous,
    cost_of,
    exact,
    improve,
    place,
    states_of,
    sweep,
)

from .traces import chained

FLAT = Devices(memory_gb=1).distance(1.0)


def every_placement(experts: int, layers: int, capacity: np.ndarray) -> np.ndarray:
    """(placements, layers, experts), by trying all."""
    slots = np.repeat(np.arange(len(capacity)), capacity).tolist()
    layer = sorted(set(permutations(slots)))
    return np.array(list(product(layer, repeat=layers)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Up to 3 layers of up to 4 experts on up to 4 devices in up to 2 nodes."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    nodes, gpus = draw(st.sampled_from([(1, 2), (2, 1), (1, 3), (2, 2)]))
    nodes, gpus = (nodes, gpus) if nodes * gpus <= experts else (1, 2)
    numbers = st.lists(st.integers(0, 9), min_size=(layers - 1) * experts**2, max_size=(layers - 1) * experts**2)
    affinity = np.array(draw(numbers), dtype=float).reshape(layers - 1, experts, experts)
    return affinity, Devices(nodes=nodes, gpus=gpus, memory_gb=1).distance(1.0)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_the_exact_placement_is_the_best_of_all(problem: tuple[np.ndarray, np.ndarray]) -> None:
    affinity, distance = problem
    capacity = capacities(affinity.shape[1], len(distance))
    every = every_placement(affinity.shape[1], len(affinity) + 1, capacity)
    found = exact(affinity, distance, capacity)
    assert found.cost == pytest.approx(min(cost_of(one, affinity, distance) for one in every))
    assert states_of(capacity) ** (len(affinity) + 1) == len(every)


@settings(deadline=None, max_examples=60)
@given(problems(), st.randoms(use_true_random=False))
def test_sweeps_keep_the_balance_and_never_cost_more(problem: tuple[np.ndarray, np.ndarray], random: object) -> None:
    affinity, distance = problem
    capacity = capacities(affinity.shape[1], len(distance))
    start = contiguous(len(affinity) + 1, capacity)
    found = improve(start, affinity, distance, capacity)
    assert cost_of(found, affinity, distance) <= cost_of(start, affinity, distance) + 1e-9
    for row in found:
        assert np.bincount(row, minlength=len(capacity)).tolist() == capacity.tolist()


@pytest.mark.parametrize("faith", [0.9, 0.5, 0.2])
def test_sweeps_come_near_the_optimum(faith: float) -> None:
    """8 experts on 4 devices: each expert has one that follows it in that share of tokens, more or less."""
    experts, _ = chained(layers=5, experts=8, tokens=2000, faith=faith, seed=3)
    affinity, capacity = affinity_of(experts, 8), capacities(8, 4)
    best = exact(affinity, FLAT, capacity)
    swept = sweep(affinity, FLAT, capacity)
    assert best.is_optimal and not swept.is_optimal
    assert best.cost < cost_of(contiguous(5, capacity), affinity, FLAT) * (1 - 0.8 * faith * 0.75)
    assert best.cost <= swept.cost <= 1.05 * best.cost


def test_a_large_placement_cuts_hops_on_tokens_it_has_not_seen() -> None:
    experts, _ = chained(layers=6, experts=32, tokens=4000, faith=0.8, seed=1)
    devices = Devices(nodes=2, gpus=4, memory_gb=1)
    found = place(affinity_of(experts[:, :2000], 32), devices.distance(1.0))
    held = experts[:, 2000:]
    before = hops_of(held, contiguous(6, capacities(32, 8)), devices.node_of)
    after = hops_of(held, found.device_of, devices.node_of)
    assert not found.is_optimal  # too many to be sure, and not said to be
    assert after.cross_device < 0.5 * before.cross_device
    assert after.cross_node < 0.5 * before.cross_node
    assert after.messages < before.messages


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(1, 4), (2, 2), (1, 3)]))
def test_no_device_gets_busier_than_it_may(seed: int, shape: tuple[int, int]) -> None:
    """Routing where a few experts are taken most."""
    draw = np.random.default_rng(seed)
    share = draw.dirichlet(np.full(8, 0.3))
    experts = np.stack([draw.permutation(8)[draw.choice(8, (60, 1), p=share)] for _ in range(3)])
    devices = Devices(nodes=shape[0], gpus=shape[1], memory_gb=1)
    capacity, distance = capacities(8, devices.count), devices.distance(1.0)
    affinity, load = affinity_of(experts, 8), load_of(experts, 8)
    free = sweep(affinity, distance, capacity, starts=3).device_of
    found, usual = balanced(free, affinity, distance, load, capacity), contiguous(3, capacity)
    assert cost_of(free, affinity, distance) <= cost_of(found, affinity, distance) + 1e-9
    assert cost_of(found, affinity, distance) <= cost_of(usual, affinity, distance) + 1e-9
    for row, tokens, limit in zip(found, load, limits_of(load, capacity), strict=True):
        assert np.bincount(row, minlength=len(capacity)).tolist() == capacity.tolist()
        assert np.bincount(row, weights=tokens).max() <= limit


def test_balance_costs_little_where_work_is_even() -> None:
    experts, _ = chained(layers=6, experts=32, tokens=4000, faith=0.8, seed=1)
    affinity, load, capacity = affinity_of(experts, 32), load_of(experts, 32), capacities(32, 4)
    free = place(affinity, FLAT)
    even = balanced(free.device_of, affinity, FLAT, load, capacity)
    assert cost_of(even, affinity, FLAT) <= 1.05 * free.cost


def test_hops_by_hand() -> None:
    """Two layers, two tokens of two experts: experts 0 and 1 on device 0, 2 and 3 on device 1."""
    experts = np.array([[[0, 1], [0, 2]], [[0, 2], [0, 2]]], dtype=np.int16)
    device_of = np.array([[0, 0, 1, 1]] * 2)
    found = hops_of(experts, device_of, np.array([0, 0]))
    # the first token's pairs: 0→0, 0→1, 0→0, 0→1; the second's: 0→0, 0→1, 1→0, 1→1
    assert found.cross_device == pytest.approx(0.5) and found.cross_node == 0
    # the first sends one state from device 0 to 1; the second one there and one back
    assert found.messages == pytest.approx(1.5)
    assert found.imbalance == pytest.approx(1.5)
    assert affinity_of(experts, 4).sum() == pytest.approx(2)  # one hop a token
    assert load_of(experts, 4).tolist() == [[2, 1, 1, 0], [2, 0, 2, 0]]


def test_more_devices_than_experts_are_refused() -> None:
    with pytest.raises(PlanError, match="at most 4 devices"):
        place(np.zeros((1, 4, 4)), Devices(gpus=5, memory_gb=1).distance(1.0))


def test_one_layer_has_no_hops() -> None:
    found = place(np.zeros((0, 8, 8)), FLAT)
    assert isinstance(found, Placement) and found.cost == 0
    assert hops_of(np.zeros((1, 3, 2), np.int16), found.device_of, np.zeros(4, int)).cross_device == 0
