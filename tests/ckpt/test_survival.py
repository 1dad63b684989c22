# SPDX-License-Identifier: Apache-2.0
"""The survival formulas against counting every case, against drawing at random, and at their limits."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.ckpt.stripes import Group, choose_groups
from refound.ckpt.survival import (
    fall_rate,
    run_survival,
    sample_runs,
    sample_survival,
    survival_probability,
)

MIXED = (Group(first=0, k=3, m=1), Group(first=4, k=2, m=1), Group(first=7, k=1, m=2))


def counted(groups: tuple[Group, ...], lost_nodes: int) -> Fraction:
    """By looking at every set of lost nodes."""
    sets = list(itertools.combinations(range(sum(group.n for group in groups)), lost_nodes))
    survived = [s for s in sets if all(len(set(s).intersection(g.members)) <= g.m for g in groups)]
    return Fraction(len(survived), len(sets))


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(groups, id=name)
        for name, groups in {
            "mirror": choose_groups(12, 1, 1),
            "(3, 1)": choose_groups(12, 3, 1),
            "(4, 2)": choose_groups(12, 4, 2),
            "(1, 2)": choose_groups(12, 1, 2),
            "no parity": choose_groups(12, 1, 0),
            "one group": choose_groups(10, 8, 2),
            "chosen for 13": choose_groups(13),
            "mixed": MIXED,
        }.items()
    ],
)
def test_closed_form_counts_every_set_of_lost_nodes(groups: tuple[Group, ...]) -> None:
    for lost in range(sum(group.n for group in groups) + 1):
        assert survival_probability(groups, lost) == counted(groups, lost), lost


def test_known_values() -> None:
    mirror, parity, double = choose_groups(16, 1, 1), choose_groups(16, 7, 1), choose_groups(16, 6, 2)
    assert survival_probability(mirror, 2) == Fraction(14, 15)
    assert survival_probability(parity, 2) == Fraction(8, 15)
    assert survival_probability(double, 2) == 1


@given(groups=st.integers(1, 40), replicas=st.integers(2, 5), lost=st.integers(0, 8))
def test_replication_meets_the_bound_of_gemini(groups: int, replicas: int, lost: int) -> None:
    """GEMINI (SOSP '23), N divisible by m replicas: >= max(0, 1 - N C(N-m, f-m) / (m C(N, f))), = 1 for f < m."""
    nodes = groups * replicas
    lost = min(lost, nodes)
    exact = survival_probability(choose_groups(nodes, 1, replicas - 1), lost)
    if lost < replicas:
        assert exact == 1
    else:
        lost_sets = groups * math.comb(nodes - replicas, lost - replicas)
        bound = 1 - Fraction(lost_sets, math.comb(nodes, lost))
        assert exact >= bound
        if lost < 2 * replicas:  # no two groups can both be lost: nothing is counted twice
            assert exact == bound


@given(count=st.integers(1, 30), k=st.integers(1, 8), m=st.integers(0, 3), lost=st.integers(0, 9))
def test_survival_falls_with_losses_and_rises_with_parity(count: int, k: int, m: int, lost: int) -> None:
    n = k + m
    groups = choose_groups(count * n, k, m)
    lost = min(lost, count * n - 1)
    here = survival_probability(groups, lost)
    assert 0 <= here <= 1
    assert survival_probability(groups, lost + 1) <= here
    assert (here == 1) is (lost <= m)
    if k > 1:  # the same groups with one parity more
        assert survival_probability(choose_groups(count * n, k - 1, m + 1), lost) >= here


@pytest.mark.parametrize(("k", "m"), [(1, 1), (7, 1), (6, 2), (5, 3)])
@pytest.mark.parametrize("lost", [2, 3, 12])
def test_closed_form_agrees_with_drawing(k: int, m: int, lost: int) -> None:
    groups, trials = choose_groups(64, k, m), 20_000
    exact = float(survival_probability(groups, lost))
    drawn = sample_survival(groups, lost, trials=trials, seed=7)
    assert abs(drawn - exact) <= 4 * math.sqrt(exact * (1 - exact) / trials)


@pytest.mark.parametrize(("k", "m"), [(1, 0), (1, 1), (7, 1), (6, 2), (3, 5)])
@pytest.mark.parametrize("repair_s", [300.0, 20_000.0])
def test_fall_rate_agrees_with_drawing_and_the_run_is_bounded(k: int, m: int, repair_s: float) -> None:
    groups, rate, run_s, runs = choose_groups(16, k, m), 1e-5, 2e5, 1500
    expected = fall_rate(groups, rate, repair_s) * run_s
    drawn = sample_runs(groups, rate, repair_s, run_s, runs=runs, seed=3)
    assert abs(drawn.mean_falls - expected) <= 4 * drawn.standard_error(expected)
    bound = run_survival(expected / run_s, run_s)
    sigma = math.sqrt(max(bound * (1 - bound), 1 / runs) / runs)
    assert drawn.survived_share >= bound - 4 * sigma
    if repair_s * rate < 0.01 or m == 0:  # short repairs: the bound is the value
        assert drawn.survived_share <= bound + 4 * sigma


def test_falls_at_the_limits() -> None:
    mirror = choose_groups(8, 1, 1)
    assert fall_rate(choose_groups(8, 1, 0), 1e-6, 600.0) == pytest.approx(8e-6)  # without parity every loss is fatal
    assert fall_rate(mirror, 0.0, 600.0) == 0.0
    assert fall_rate(mirror, 1e-6, 0.0) == 0.0
    assert fall_rate(mirror, 1e-6, math.inf) == pytest.approx(8e-6)  # never repaired: each partner is missing
    assert run_survival(0.0, math.inf) == 1.0
    assert run_survival(1e-3, math.inf) == 0.0
    assert fall_rate(mirror, 1e-9, 600.0) == pytest.approx(8 * 1e-9 * 1e-9 * 600, rel=1e-5)  # nothing cancels


@settings(max_examples=50)
@given(
    k=st.integers(2, 8),
    m=st.integers(1, 3),
    rate=st.floats(1e-9, 1e-5),
    repair_s=st.floats(1, 1e5),
    more=st.floats(1.01, 10),
)
def test_falls_rise_with_rate_and_repair_and_sink_with_parity(
    k: int, m: int, rate: float, repair_s: float, more: float
) -> None:
    groups = choose_groups(4 * (k + m), k, m)
    here = fall_rate(groups, rate, repair_s)
    assert fall_rate(groups, rate * more, repair_s) > here
    assert fall_rate(groups, rate, repair_s * more) > here
    assert fall_rate(choose_groups(4 * (k + m), k - 1, m + 1), rate, repair_s) < here


def test_more_losses_than_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4 nodes"):
        survival_probability(choose_groups(4), 5)
