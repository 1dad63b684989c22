# SPDX-License-Identifier: Apache-2.0
"""FFN widths that share one set of channels, and the library that is made of them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.export.architecture import FFN
from refound.nas.activations import LayerData, compute_activations
from refound.nas.jobs import Store
from refound.nas.library import LibraryMaker, library_job
from refound.nas.nested import DOWN, GATE, UP, balanced, nested_order, train_nested
from refound.nas.ranks import Ranks
from refound.nas.recipe import Library, Recipe
from refound.nas.search import Search

from .small import recipe, teacher

WIDTHS = (24, 48, 72)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("nested")
    library = Library(steps=24, batch=4, lr=2e-3, nested=True)
    return recipe(teacher(folder / "model", layers=2), folder / "out", library=library)


def maker(wanted: Recipe) -> tuple[Search, LibraryMaker]:
    search = Search(wanted, lambda _: None, Ranks())
    for job in search._activations:
        if not search.store.is_done(job):
            search.store.put(job, *compute_activations(search.teacher, job))
    return search, LibraryMaker(search.teacher, search.space, search.store, search._activations)


@given(st.permutations(range(12)), st.sets(st.integers(1, 12), min_size=1))
def test_each_width_is_a_prefix(order: list[int], widths: set[int]) -> None:
    kept = {width: torch.tensor(sorted(order[:width])) for width in widths}
    found = nested_order(kept)
    for width, channels in kept.items():
        assert sorted(found[:width].tolist()) == channels.tolist()


def test_channels_that_are_not_nested_are_refused() -> None:
    with pytest.raises(ValueError, match="width 2 are not among"):
        nested_order({1: torch.tensor([0]), 2: torch.tensor([1, 2])})


@given(st.integers(0, 40), st.integers(0, 9))
def test_a_cycle_takes_every_width_once(steps: int, seed: int) -> None:
    found = balanced(WIDTHS, steps, seed)
    assert len(found) == steps
    cycles = [found[start : start + 3] for start in range(0, steps, 3)]
    assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
    assert found == balanced(WIDTHS, steps, seed)


def test_widths_share_their_channels_whatever_is_asked_for_first(wanted: Recipe) -> None:
    answers = []
    for widths in (WIDTHS, WIDTHS[::-1]):
        _, library = maker(wanted)
        answers.append({width: library.compute(1, "ffn", FFN(width=width)) for width in widths})
    for width in WIDTHS:
        (weights, facts), (others, again) = (answer[width] for answer in answers)
        assert facts == again and facts["loss"] <= facts["start"]
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    trained = [answers[0][width][0] for width in WIDTHS if answers[0][width][1]["loss"] < answers[0][width][1]["start"]]
    assert len(trained) >= 2, "training was of use"
    for small, large in pairwise(trained):
        for name in (GATE, UP):
            assert torch.equal(small[name], large[name][: len(small[name])])
        assert not torch.equal(small[DOWN], large[DOWN][:, : small[DOWN].shape[1]])


def test_without_training_it_is_the_closed_form(wanted: Recipe) -> None:
    """The down projections are then those of the teacher's own channels: as good as one made for each width alone."""
    still = replace(wanted, library=replace(wanted.library, lr=0.0))
    search, library = maker(still)
    data = LayerData(search.teacher, search.store, search._activations, 0)
    for width in WIDTHS:
        _, facts = library.compute(0, "ffn", FFN(width=width))
        assert facts["loss"] == pytest.approx(facts["start"], rel=0.05)
    weights = {name: tensor.float() for name, tensor in search.teacher.layer_weights[0].items()}
    made = train_nested(data, weights, library._grams["fit"], library._kept, still.library, 0)
    rows = {tuple(row.tolist()) for row in weights[GATE]}
    assert all(tuple(row.tolist()) in rows for row in made[24][GATE])


def test_only_nested_jobs_have_other_names(wanted: Recipe, tmp_path: Path) -> None:
    search, _ = maker(wanted)
    plain = Search(replace(wanted, library=replace(wanted.library, nested=False)), lambda _: None, Ranks()).teacher
    job, other = (library_job(one, 0, "ffn", FFN(width=24)) for one in (search.teacher, plain))
    assert "nested" in job.key["settings"] and "nested" not in other.key["settings"]
    linear = [library_job(one, 0, "ffn", FFN(kind="linear")).id for one in (search.teacher, plain)]
    assert linear[0] == linear[1]
    wider = replace(wanted, space=replace(wanted.space, ffn_percent=(75, 50)))
    again = Search(wider, lambda _: None, Ranks()).teacher
    assert library_job(again, 0, "ffn", FFN(width=48)).id != library_job(search.teacher, 0, "ffn", FFN(width=48)).id
    assert not Store(tmp_path).is_done(job)
