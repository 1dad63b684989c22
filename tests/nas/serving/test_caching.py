# SPDX-License-Identifier: Apache-2.0
"""Caches against every cache there could be, and batches that lose no token."""

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.serving.batching import Batching, batches_of, known_from, shared_of
from refound.nas.serving.caching import Belady, Cache, Lfu, Lru, Policy, Steps, hit_rates, replay
from refound.nas.serving.errors import PlanError

from .traces import chained

STEPS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), min_size=1, max_size=8)
MAKERS: dict[str, Callable[[Steps], Policy]] = {
    "lru": lambda _: Lru(),
    "lfu": lambda _: Lfu(),
    "belady": Belady,
    "belady 2": lambda steps: Belady(steps, 2),
}


def least_loads(steps: Steps, slots: int) -> int:
    """The fewest loads of any cache, by trying all that it could hold after each step."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for items in steps:
        reached: dict[frozenset[int], int] = {}
        for held, cost in states.items():
            missing = [item for item in items if item not in held]
            if not missing:
                options = [held]
            else:
                pool = held.union(items)
                size = min(slots, len(pool))
                options = [frozenset(kept) for kept in combinations(pool, size) if set(items) <= set(kept)]
            for kept in options:
                total = cost + len(missing)
                reached[kept] = min(reached.get(kept, total), total)
        states = reached
    return min(states.values())


@st.composite
def fitting(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Steps that each fit into the slots."""
    slots = draw(st.integers(1, 4))
    sets = st.lists(st.integers(0, 5), min_size=1, max_size=min(slots, 3), unique=True)
    return draw(st.lists(sets, min_size=1, max_size=9)), slots


@settings(deadline=None, max_examples=300)
@given(fitting())
def test_belady_loads_the_least_there_is(made: tuple[list[list[int]], int]) -> None:
    steps, slots = made
    least = least_loads(steps, slots)
    assert replay(steps, slots, Belady(steps)).loads == least
    for name, make in MAKERS.items():
        assert replay(steps, slots, make(steps)).loads >= least, name


@settings(deadline=None, max_examples=100)
@given(STEPS, st.integers(1, 4), st.sampled_from(sorted(MAKERS)))
def test_every_policy_keeps_to_its_slots(steps: list[list[int]], slots: int, name: str) -> None:
    cache = Cache(slots, MAKERS[name](steps))
    for items in steps:
        before = set(cache.resident)
        missing = cache.ask(items)
        assert set(items) - before <= set(missing) <= set(items) and len(set(missing)) == len(missing)
        assert len(items) > slots or not set(missing) & before
        assert len(cache.resident) <= slots
        assert cache.resident <= before.union(items)
        assert len(items) > slots or set(items) <= cache.resident
        assert missing or cache.resident == before


def test_policies_by_hand() -> None:
    steps = [[0], [0], [1], [2], [0], [1]]
    assert replay(steps, 2, Lru()).loads == 5  # 0, 1, 2 for 0, 0 for 1, 1 for 2
    assert replay(steps, 2, Lfu()).loads == 4  # 0 stays
    assert replay(steps, 2, Belady(steps)).loads == 4
    assert replay(steps, 2, Belady(steps, 0)).loads == replay(steps, 2, Lru()).loads  # knows nothing: LRU
    with pytest.raises(PlanError, match="0 slots"):
        replay(steps, 0, Lru())


def test_belady_goes_by_what_is_believed_and_known() -> None:
    """Hits are those of the true steps, however wrong the guess is; and a use that is not known yet counts as none."""
    steps = [[0], [0], [1], [2], [0], [1]]
    few, wrong = [[0], [1], [2], [0]], [[0], [1], [2], [1]]
    assert replay(few, 2, Belady(few)).loads == 3
    assert replay(few, 2, Belady(wrong)).loads == 4  # 0 is given up for 2, since 1 is believed to come next
    late = [dict.fromkeys(items, step) for step, items in enumerate(steps)]  # nothing is known beforehand: LRU
    assert replay(steps, 2, Belady(steps, None, late)).loads == replay(steps, 2, Lru()).loads == 5
    soon = [dict.fromkeys(items, step - 1) for step, items in enumerate(steps)]
    assert replay(steps, 2, Belady(steps, None, soon)).loads == 4  # that 0 comes is known when 2 is loaded


def test_a_guess_is_not_the_true_routing() -> None:
    """A look-ahead by a guess that is right is the bound; by one that is always wrong it hits less."""
    experts, _ = chained(layers=3, experts=16, tokens=800, faith=0.6, seed=2, top_k=2)
    right = {name: one.hit_rate for name, one in hit_rates(experts, 16, 5, predicted=experts).items()}
    wrong = {name: one.hit_rate for name, one in hit_rates(experts, 16, 5, predicted=(experts + 5) % 16).items()}
    assert right["belady-predicted"] == right["belady-look-ahead"] == wrong["belady-look-ahead"]
    assert wrong["belady-predicted"] < right["lru"] < right["belady-predicted"]


def test_devices_are_asked_for_their_own_experts() -> None:
    experts, _ = chained(layers=2, experts=8, tokens=400, faith=0.6, seed=2, top_k=2)
    device_of = np.arange(8)[None, :].repeat(2, 0) % 2
    found = hit_rates(experts, 8, 4, device_of=device_of)  # each device has room for its four
    assert {one.loads for one in found.values()} == {16} and found["lru"].requests == 2 * 400 * 2
    assert hit_rates(experts, 8, 4)["belady"].loads > 16
    with pytest.raises(PlanError, match="of one device"):
        hit_rates(experts, 8, 4, scope="shared", device_of=device_of)


def test_a_token_is_known_when_the_one_before_it_is_made() -> None:
    how = Batching(batch=2, active=2, patience=8)
    starts, experts = np.array([0, 3, 5, 7]), np.zeros((1, 7, 1), np.int16)
    found = batches_of(experts, starts, 1, how, expert_aware=False)
    assert [one.tolist() for one in found] == [[0, 3], [1, 4], [2, 5], [6]]
    # the third sequence is opened when the second has ended, after step 1
    assert known_from(starts, found, how).tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_a_longer_look_ahead_hits_more_on_a_long_trace() -> None:
    experts, _ = chained(layers=3, experts=16, tokens=1500, faith=0.6, seed=2, top_k=2)
    found = {ahead: hit_rates(experts, 16, 5, look_ahead=ahead)["belady-look-ahead"].hit_rate for ahead in (1, 8, 64)}
    all_of = hit_rates(experts, 16, 5)
    assert all_of["lru"].hit_rate < found[8] < found[64] <= all_of["belady"].hit_rate
    assert found[1] < found[8]
    shared = hit_rates(experts, 16, 15, scope="shared")
    assert shared["belady"].requests == all_of["belady"].requests == 3 * 1500 * 2
    assert shared["belady"].hit_rate > shared["lru"].hit_rate


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
)
def test_batches_hold_every_token_once_and_in_order(
    lengths: list[int], batch: int, active: int, patience: int, expert_aware: bool
) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(starts[-1])
    experts = np.random.default_rng(0).integers(0, 8, (2, tokens, 2)).astype(np.int16)
    how = Batching(batch=batch, active=active, patience=patience)
    found = batches_of(experts, starts, 8, how, expert_aware=expert_aware)
    order = np.concatenate(found) if found else np.empty(0, int)
    assert sorted(order.tolist()) == list(range(tokens))
    assert all(len(one) <= batch for one in found)
    step_of = {token: step for step, one in enumerate(found) for token in one.tolist()}
    for first, last in pairwise(starts):
        steps = [step_of[token] for token in range(first, last)]
        assert steps == sorted(set(steps))  # one a step at most
    if tokens:
        # who is overdue comes first, and no more than all open ones can be so at once
        assert shared_of(experts, starts, found).longest_wait <= patience + -(-active // batch)


def test_batches_by_experts_share_more() -> None:
    """32 sequences of two kinds that use different experts: a batch of one kind needs half as many."""
    draw, length = np.random.default_rng(0), 16
    kind = np.repeat(np.arange(32) % 2, length)
    experts = (draw.integers(0, 8, (4, 32 * length, 2)) + 8 * kind[None, :, None]).astype(np.int16)
    starts = np.arange(33) * length
    how = Batching(batch=8, active=32, patience=16)
    plain = shared_of(experts, starts, batches_of(experts, starts, 16, how, expert_aware=False))
    aware = shared_of(experts, starts, batches_of(experts, starts, 16, how, expert_aware=True))
    assert aware.unique < 0.75 * plain.unique
    assert aware.per_token < 0.75 * plain.per_token
    assert plain.unique == pytest.approx(plain.per_token * 8)
    with pytest.raises(PlanError, match="at least 1"):
        Batching(batch=0)
