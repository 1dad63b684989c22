# SPDX-License-Identifier: Apache-2.0
"""A short, always equal slice of the protocol fuzzing; `make fuzz` sends a million messages."""

import pytest

from . import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_that_is_sent_harms_a_snapshot_process(seed: int) -> None:
    told: list[str] = []
    figures = fuzz.run(6000, seed, told.append)
    assert figures["messages"] >= 6000 and told
    assert set(figures["by_kind"]) == {attack.__name__ for _, attack in fuzz.ATTACKS}


def test_the_same_seed_sends_the_same() -> None:
    draws = [[fuzz.malformed(fuzz.Random(7)) for _ in range(3)] for _ in range(2)]
    assert draws[0] == draws[1]


def test_a_changed_state_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge judges: a message that does get through is an error."""

    def honest(target: fuzz.Target, rng: fuzz.Random) -> int:
        target.job.snapshot(3, target.data)
        return 1

    monkeypatch.setattr(fuzz, "ATTACKS", [(1, honest)])
    with pytest.raises(fuzz.FuzzError, match="its state has changed"):
        fuzz.run(1, 1, lambda _: None)
