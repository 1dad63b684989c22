# SPDX-License-Identifier: Apache-2.0
"""How scores compose: limits, and parameters that are found again in data made with them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.compose import Composition, fit_children, fit_p

SCORES = st.floats(1e-6, 1e3)


@settings(deadline=None)
@given(SCORES, SCORES, st.floats(0.5, 6))
def test_one_alone_is_itself_and_two_lie_between_the_larger_and_the_sum(a: float, f: float, p: float) -> None:
    form = Composition(p=p)
    assert form.layer(a, 0) == a and form.layer(0, f) == f
    both = form.layer(a, f)
    assert both == form.layer(f, a) and both >= max(a, f)
    if p >= 1:
        assert both <= (a + f) * (1 + 1e-9)
    assert Composition(p=1).layer(a, f) == pytest.approx(a + f)


@settings(deadline=None)
@given(st.floats(0.6, 5), st.integers(0, 99))
def test_the_power_is_found_in_joint_scores(p: float, seed: int) -> None:
    draw, form = random.Random(seed), Composition(p=p)
    singles = [(a := draw.uniform(0.1, 2), a * draw.uniform(0.6, 1.5)) for _ in range(6)]
    found = fit_p([(a, f, form.layer(a, f)) for a, f in singles])
    assert found == pytest.approx(p, rel=1e-2)


def test_without_probes_scores_add() -> None:
    assert fit_p([]) == 1 and fit_p([(0.0, 1.0, 1.0), (1.0, 1.0, -1e-12)]) == 1


@settings(deadline=None)
@given(st.floats(0.2, 5), st.floats(0.6, 2.5))
def test_scale_and_power_of_children_are_found(scale: float, power: float) -> None:
    sums = [0.1, 0.3, 1.0, 2.0, 4.0]
    found = fit_children(sums, [scale * total**power for total in sums])
    assert found == pytest.approx((scale, power), rel=1e-6)


def test_one_child_fixes_the_scale_and_near_ones_no_power() -> None:
    assert fit_children([2.0], [3.0]) == pytest.approx((1.5, 1.0))
    assert fit_children([1.0, 1.01], [1.0, 2.0])[1] == 1
    assert fit_children([], []) == (1.0, 1.0)
