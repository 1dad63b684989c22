# SPDX-License-Identifier: Apache-2.0
"""The tree that is chosen is the best there is, and a tree is what it says."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.adapters.heads.decode_tree import Shape, Tree, best_shape, chain, expected_tokens
from refound.adapters.heads.errors import HeadsUsageError

SHARES = st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=2), min_size=2, max_size=2)


def paths(shape: Shape) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for parent, rank in zip(shape.parents[1:], shape.ranks, strict=True):
        found.append((*found[parent], rank))
    return set(found[1:])


@given(accuracy=SHARES, budget=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_no_other_tree_of_that_size_is_better(accuracy: list[list[float]], budget: int) -> None:
    accuracy = [sorted(head, reverse=True) for head in accuracy]
    shape = best_shape(accuracy, budget)

    def worth(path: tuple[int, ...]) -> float:
        value = 1.0
        for head, rank in zip(accuracy, path, strict=False):
            value *= head[rank]
        return value

    every = [path for depth in (1, 2) for path in product(range(2), repeat=depth)]
    best = max(
        sum(map(worth, chosen))
        for chosen in combinations(every, budget)
        if all(path[:-1] in (*chosen, ()) for path in chosen)
    )
    assert expected_tokens(shape, accuracy) == pytest.approx(1 + best)
    assert len(paths(shape)) == budget and all(path[:-1] in (*paths(shape), ()) for path in paths(shape))


def test_a_shape_is_filled_with_candidates() -> None:
    shape = best_shape([[0.6, 0.3], [0.5, 0.4]], 4)
    assert paths(shape) == {(0,), (1,), (0, 0), (0, 1)}
    tree = shape.fill(7, [[10, 11], [20, 21]])
    told = {(tree.tokens[parent], token) for parent, token in zip(tree.parents[1:], tree.tokens[1:], strict=True)}
    assert told == {(7, 10), (7, 11), (10, 20), (10, 21)} and tree.tokens[0] == 7
    assert expected_tokens(Shape(), [[0.5]]) == 1
    assert best_shape([[0.5, 0.0]], 9).ranks == (0,)  # what is never right is not asked


@pytest.mark.parametrize("accuracy", [[], [[1.5]], [[-0.1]]])
def test_accuracies_that_cannot_be(accuracy: list[list[float]]) -> None:
    with pytest.raises(HeadsUsageError):
        best_shape(accuracy, 3)


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_what_is_no_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no tree"):
        Tree(tokens=tuple(range(len(parents))), parents=parents)
    assert chain([4, 5, 6]).parents == (-1, 0, 1)
