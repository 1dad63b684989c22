# SPDX-License-Identifier: Apache-2.0
"""Who holds what: parity rotates, nobody holds two symbols of a stripe, and groups tile the nodes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.errors import ConfigError
from refound.ckpt.stripes import Group, choose_groups, chunk_buckets

CODES = [(k, m) for k in range(1, 11) for m in range(1, 5)]


@pytest.mark.parametrize(("k", "m"), CODES)
def test_each_member_holds_k_data_and_m_parity_chunks(k: int, m: int) -> None:
    group = Group(first=0, k=k, m=m)
    assert len(group.stripes) == group.n == k + m
    data, parity = Counter[int](), Counter[int]()
    for number, stripe in enumerate(group.stripes):
        assert stripe.number == number
        assert sorted(stripe.holders) == list(range(k + m))  # every symbol on another member
        assert (len(stripe.data), len(stripe.parity)) == (k, m)
        data.update(stripe.data)
        parity.update(stripe.parity)
    assert set(data.values()) == {k} and set(parity.values()) == {m}
    for member in range(group.n):
        assert [s.number for s in group.data_stripes(member)] == [s.number for s in group.stripes if member in s.data]
        assert len(group.data_stripes(member)) == k and len(group.parity_stripes(member)) == m


@pytest.mark.parametrize(("k", "m"), CODES)
def test_no_loss_of_m_members_takes_more_than_m_symbols_of_a_stripe(k: int, m: int) -> None:
    group = Group(first=0, k=k, m=m)
    for first in range(group.n):
        lost = {(first + i) % group.n for i in range(m)}
        assert all(len(lost.intersection(stripe.holders)) == m for stripe in group.stripes)


def test_raim5_is_the_case_of_one_parity() -> None:
    stripes = Group(first=0, k=3, m=1).stripes
    assert [s.parity for s in stripes] == [(0,), (1,), (2,), (3,)]
    assert [s.data for s in stripes] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]


def test_a_group_without_parity_has_no_stripes() -> None:
    assert Group(first=0, k=1, m=0).stripes == ()


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=14), st.integers(1, 10))
def test_k_chunks_hold_the_longest_vector_and_no_spare_bucket(vectors: list[int], k: int) -> None:
    chunk = chunk_buckets(vectors, k)
    assert chunk * k >= max(vectors) and (chunk - 1) * k < max(max(vectors), 1)


@pytest.mark.parametrize("nodes", range(1, 65))
def test_chosen_groups_tile_any_number_of_nodes(nodes: int) -> None:
    groups = choose_groups(nodes)
    assert [p for group in groups for p in group.members] == list(range(nodes))
    losses = 0 if nodes == 1 else 1 if nodes <= 5 else 2
    assert {group.m for group in groups} == {losses}
    assert all(group.k >= 1 and group.n <= 10 for group in groups)
    sizes = [group.n for group in groups]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 12), st.integers(0, 4), st.integers(1, 64))
def test_a_wish_is_followed_to_the_letter_or_refused_with_what_fits(k: int, m: int, nodes: int) -> None:
    if nodes % (k + m) == 0:
        groups = choose_groups(nodes, k, m)
        assert [p for group in groups for p in group.members] == list(range(nodes))
        assert {(group.k, group.m) for group in groups} == {(k, m)}
        return
    with pytest.raises(ConfigError) as raised:
        choose_groups(nodes, k, m)
    text = str(raised.value)
    assert f"k={k},m={m} needs a multiple of {k + m} nodes and this job has {nodes}" in text
    assert "leave k and m out" in text
    if nodes == 1:
        return
    offers = text.partition("what fits: ")[2].partition(", or")[0].split(", ")
    assert offers
    for offer in offers:
        fits = {key: int(value) for key, value in (pair.split("=") for pair in offer.split(","))}
        assert choose_groups(nodes, **fits)  # what is advised works
