# SPDX-License-Identifier: Apache-2.0
"""Balanced assignment costs what the n x n assignment costs, and keeps the sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.moe.flow import balanced_assignment
from scipy.optimize import linear_sum_assignment


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 6), each=st.integers(1, 8), ties=st.booleans())
def test_it_is_as_cheap_as_the_assignment_of_every_place(seed: int, groups: int, each: int, ties: bool) -> None:
    draw = np.random.default_rng(seed)
    sizes = draw.multinomial(groups * each, np.ones(groups) / groups)
    cost = draw.normal(size=(groups * each, groups))
    cost = np.round(cost) if ties else cost
    found = balanced_assignment(cost, sizes.tolist())
    assert np.array_equal(np.bincount(found, minlength=groups), sizes)
    places = cost[:, np.repeat(np.arange(groups), sizes)]
    best = places[linear_sum_assignment(places)].sum()
    assert cost[np.arange(len(found)), found].sum() == pytest.approx(best, abs=1e-6)


def test_equal_costs_are_no_trouble() -> None:
    found = balanced_assignment(np.zeros((9, 3)), [3, 3, 3])
    assert np.array_equal(np.bincount(found), [3, 3, 3])


def test_what_is_no_problem_of_this_kind() -> None:
    with pytest.raises(ValueError, match="do not hold 4 things"):
        balanced_assignment(np.zeros((4, 2)), [1, 2])
    with pytest.raises(ValueError, match="no number"):
        balanced_assignment(np.full((2, 2), np.nan), [1, 1])
