# SPDX-License-Identifier: Apache-2.0
"""The data's place: each sample exactly once an epoch, whatever the ranks were."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.errors import ConfigError
from refound.ckpt.position import Position
from torch.utils.data import DataLoader


def ranks(samples: int, batch: int, world: int, state: dict[str, Any] | None = None, **more: Any) -> list[Position]:
    found = [Position(samples, batch=batch, rank=rank, world_size=world, **more) for rank in range(world)]
    for position in found if state else []:
        position.load_state_dict(state or {})
    return found


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6), st.data())
def test_each_sample_comes_once_an_epoch_and_steps_are_the_same_sets(
    samples: int, lives: list[tuple[int, int]], data: st.DataObject
) -> None:
    """lives: how many ranks there are, and for how many steps, before the job comes back with others."""
    batch = data.draw(st.integers(5, 12))
    lives = [(world if samples % batch == 0 or samples % batch >= world else 1, steps) for world, steps in lives]
    undisturbed = Position(samples, batch=batch, seed=3, rank=0, world_size=1)
    expected = [sorted(share) for _ in range(24) for share in undisturbed.follow(undisturbed.batches)]
    state, found = None, []
    for world, steps in lives:
        positions = ranks(samples, batch, world, state, seed=3)
        for _ in range(steps):
            shares = []
            while len(shares) < world:  # one step: an epoch that is over gives nothing, and the next begins
                shares += [share for p in positions for share in take_one(p)]
            found.append(sorted(sample for share in shares for sample in share))
            assert all(shares)
            states = [p.state_dict() for p in positions]
            assert all(s == states[0] for s in states)
            state = states[0]
    assert found == expected[: len(found)]


def take_one(position: Position) -> list[list[int]]:
    """The first share that following gives; the position is then as it is inside the loop's body."""
    for share in position.follow(position.batches):
        return [share]
    return []


def test_a_whole_epoch_holds_every_sample_once_and_the_next_is_in_another_order() -> None:
    epochs = []
    position = Position(23, batch=5, rank=0, world_size=1)
    while position.epoch < 2:
        epochs.append([n for share in position.follow(position.batches) for n in share])
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 2
    assert epochs[0] != epochs[1]
    dropped = Position(23, batch=5, drop_last=True, shuffle=False, rank=0, world_size=1)
    assert len(dropped.batches) == 4
    assert [n for share in dropped.follow(dropped.batches) for n in share] == list(range(20))


def test_a_loader_that_reads_ahead_does_not_move_the_position() -> None:
    position = Position(24, batch=4, rank=1, world_size=2)
    loader = DataLoader(list(range(24)), batch_sampler=position.batches, num_workers=1, prefetch_factor=4)
    for number, _ in enumerate(position.follow(loader), start=1):
        assert position.done == 4 * number
    assert (position.epoch, position.done) == (1, 0)


@given(st.integers(2, 5), st.integers(5, 9))
def test_weighted_shares_average_to_the_mean_of_the_batch(world: int, batch: int) -> None:
    values = np.random.default_rng(0).random(batch)
    means = []
    for position in ranks(batch, batch, world):
        for share in position.follow(position.batches):
            means.append(values[share].mean() * position.weight)
    assert np.isclose(np.mean(means), values.mean())


@pytest.mark.parametrize(
    ("samples", "more", "words"),
    [
        (10, {"batch": 1}, "leaves some of 3 ranks without any"),
        (10, {"batch": 9}, "leave a last batch of 1, which 3 ranks cannot share"),
        (0, {"batch": 9}, "0 samples"),
        (9, {"batch": 9, "rank": 3}, "rank 3 is none of 3 ranks"),
    ],
)
def test_what_does_not_fit_together_is_refused(samples: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Position(samples, **{"rank": 0, "world_size": 3, **more})


def test_a_position_in_other_data_is_refused() -> None:
    position = Position(10, batch=5, rank=0, world_size=1)
    with pytest.raises(ConfigError, match="samples=11 and now is 10"):
        position.load_state_dict(Position(11, batch=11, rank=0, world_size=1).state_dict())
