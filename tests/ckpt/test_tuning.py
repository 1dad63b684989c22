# SPDX-License-Identifier: Apache-2.0
"""`every="auto"`: the rule itself, what is refused, and that all ranks take their snapshots after the same steps."""

import itertools
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.queues import SimpleQueue

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.client import find_nodes
from refound.ckpt.conf import PluginConfig
from refound.ckpt.errors import ConfigError, DamageError, ProtocolError
from refound.ckpt.held import bucket_checksums
from refound.ckpt.link import Link, Place
from refound.ckpt.protection import Protection, protect
from refound.ckpt.stripes import BUCKET_BYTES
from refound.ckpt.tuning import MOST_STEPS, AutoInterval, Costs, FixedInterval, IntervalTuner, Tuning

from .alone import opened
from .cluster import PATIENCE_S

COSTS = Costs(stall_ms=20.0, step_ms=100.0, budget=0.01)
AMOUNTS = st.floats(0, 1e7)
ANY_COSTS = st.builds(Costs, stall_ms=AMOUNTS, step_ms=st.floats(0.01, 1e7), budget=st.floats(1e-4, 0.5))


# --- the rule ------------------------------------------------------------------------------------------------------


@given(costs=ANY_COSTS, commit_ms=AMOUNTS)
def test_the_fewest_steps_within_the_budget_and_after_the_commit(costs: Costs, commit_ms: float) -> None:
    every = IntervalTuner().choose(costs, commit_ms).every

    def is_enough(every: int, tolerance: float) -> bool:
        stall = costs.stall_ms <= every * costs.budget * costs.step_ms * tolerance
        return stall and commit_ms <= every * costs.step_ms * tolerance

    assert 1 <= every <= MOST_STEPS
    assert every == MOST_STEPS or is_enough(every, 1 + 1e-9)
    assert every == 1 or not is_enough(every - 1, 1 - 1e-9)


@given(costs=ANY_COSTS, commit_ms=AMOUNTS, wobble=st.lists(st.floats(0.9, 1.1), min_size=1, max_size=40))
def test_what_hardly_varies_changes_little_and_never_goes_back(
    costs: Costs, commit_ms: float, wobble: list[float]
) -> None:
    tuner = IntervalTuner()
    chosen = [tuner.choose(replace(costs, stall_ms=costs.stall_ms * by), commit_ms * by).every for by in wobble]
    assert chosen == sorted(chosen) or min(chosen) <= 3  # of two or three steps, one is a large part
    assert chosen[-1] <= 1.3 * chosen[0] + 1


@given(told=st.lists(st.tuples(ANY_COSTS, AMOUNTS), min_size=1, max_size=30))
def test_it_is_a_function_of_what_it_was_told(told: list[tuple[Costs, float]]) -> None:
    one, other = IntervalTuner(), IntervalTuner()
    assert [one.choose(*each) for each in told] == [other.choose(*each) for each in told]


def test_known_values_and_retuning() -> None:
    tuner = IntervalTuner()
    assert tuner.choose(COSTS, 50.0).every == 20  # 20 ms / (1% of 100 ms)
    assert "20.0 ms" in tuner.choose(COSTS, 50.0).why
    for _ in range(5):
        slower = tuner.choose(replace(COSTS, stall_ms=40.0), 50.0)
    assert slower.every == 40
    for _ in range(5):
        less = tuner.choose(replace(COSTS, stall_ms=35.0), 50.0)
    assert less.every == 40  # not worth a change
    for _ in range(5):
        free = tuner.choose(replace(COSTS, stall_ms=0.0), 450.0)
    assert (free.every, "the commit decides" in free.why) == (5, True)
    assert IntervalTuner().choose(replace(COSTS, stall_ms=0.0), 0.0).every == 1
    outlier = IntervalTuner()
    assert [outlier.choose(COSTS, 0.0).every for _ in range(3)] == [20] * 3
    assert outlier.choose(replace(COSTS, stall_ms=5000.0), 0.0).every == 20  # once in a while the machine hiccups


# --- the snapshot process ------------------------------------------------------------------------------------------


def snapshot(step: int) -> SnapshotId:
    return SnapshotId(generation=1, step=step)


def test_the_slowest_rank_and_the_tightest_budget_count() -> None:
    lead, other = Tuning(), Tuning()
    lead.reported(snapshot(3), {"stall_ms": 1.0, "step_ms": 90, "budget": 0.05})
    lead.reported(snapshot(3), {"stall_ms": 2.0, "step_ms": 100, "budget": 0.05})
    other.reported(snapshot(3), {"stall_ms": 4.0, "step_ms": 80, "budget": 0.01})
    for node in (lead, other):
        lead.heard(snapshot(3), node.told(snapshot(3)))
    decision = lead.decide(snapshot(3), 0.0)
    assert decision["every"] == 4
    other.decided(snapshot(3), decision)
    assert other.decision(snapshot(3)) == decision
    assert other.every == 4
    assert other.decision(snapshot(2)) == {}


def test_ranks_with_a_fixed_interval_hear_nothing_of_it() -> None:
    tuning = Tuning()
    tuning.reported(snapshot(1), None)
    assert tuning.told(snapshot(1)) == tuning.decide(snapshot(1), 5.0) == {}
    tuning.decided(snapshot(1), {"persist": True})
    assert (tuning.every, tuning.decision(snapshot(1))) == (None, {})


@pytest.mark.parametrize(
    "costs",
    [7, [], {}, {"stall_ms": -1, "step_ms": 1, "budget": 1}, {"stall_ms": float("nan"), "step_ms": 1, "budget": 1},
     {"stall_ms": True, "step_ms": 1, "budget": 1}, {"stall_ms": "1", "step_ms": 1, "budget": 1}],
)  # fmt: skip
def test_nonsense_for_costs_is_refused(costs: object) -> None:
    tuning = Tuning()
    with pytest.raises(ProtocolError, match="costs"):
        tuning.reported(snapshot(1), costs)
    if costs is not None:
        with pytest.raises(ProtocolError, match="costs"):
            tuning.heard(snapshot(1), {"costs": costs})


@pytest.mark.parametrize(
    "message",
    [{"every": 0, "why": ""}, {"every": True, "why": ""}, {"every": 10**9, "why": ""}, {"every": 2},
     {"every": 2, "why": "x" * 1000}, {"every": "2", "why": ""}],
)  # fmt: skip
def test_nonsense_for_a_decision_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        Tuning().decided(snapshot(1), message)


# --- all together, in real snapshot processes ----------------------------------------------------------------------


def attached(job: str, nodes: int) -> list[Attachment]:
    return [attach(job, "127.0.0.1", PluginConfig(node=f"n{i}")) for i in range(nodes)]


def train(place: Place, steps: range, told: "SimpleQueue[tuple[int, tuple[list[int], list[str]]]]") -> None:
    """A rank with a clock of its own: each measures something else, and the costs of snapshots rise on the way."""
    draw, taken, said = random.Random(place.rank), list[int](), list[str]()
    link, auto, at_s, stall_ms = Link(place), AutoInterval(0.01, said.append), 0.0, 0.0
    try:
        for step in steps:
            at_s += draw.uniform(0.9, 1.1) * 100.0  # a step of so long that commits never decide
            if not auto.is_due(step, lambda: None):
                continue
            auto.measured(step, at_s, stall_ms)
            stall_ms = draw.uniform(1000, 1900 + 1000 * place.rank) * (4 if step > 75 else 1)
            at_s += stall_ms / 1000
            slot = link.begin(step, BUCKET_BYTES)
            slot.array[:] = step % 251
            link.complete(step, bucket_checksums(slot.array), {}, auto.agreed(link, step))
            taken.append(step)
        assert link.wait_committed(taken[-1], int(PATIENCE_S * 1000))
        told.put((place.rank, (taken, said)))
    finally:
        link.close()


def trained(places: list[Place], steps: range) -> tuple[list[int], list[str]]:
    """A process a rank, all at once: the steps of their snapshots, which must be the same, and what rank 0 said."""
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    ranks = [context.Process(target=train, args=(place, steps, told), daemon=True) for place in places]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE_S)
        assert rank.exitcode == 0
    results: dict[int, tuple[list[int], list[str]]] = dict(told.get() for _ in ranks)
    told.close()
    assert all(taken == results[0][0] for taken, _ in results.values())
    return results[0]


def test_all_ranks_take_their_snapshots_after_the_same_steps(job: str) -> None:
    attachments = attached(job, 3)
    taken, said = trained(opened(job, attachments), range(1, 151))
    gaps = [later - earlier for earlier, later in itertools.pairwise(taken)]
    assert gaps[0] == 1
    assert len(set(gaps)) >= 3  # it was tuned, and tuned again when snapshots cost more
    assert gaps[-1] > 4  # 4 s and more of stall, 100 s a step, one percent
    assert len(said) == len({*said}) >= 2
    assert "stalls training" in said[0]
    assert {status["every"] for status in find_nodes(job)} == {gaps[-1]}
    # A restart measures anew: what was known belonged to processes that are gone.
    again, _ = trained(opened(job, attachments), range(taken[-1] + 1, taken[-1] + 40))
    assert again[:2] == [taken[-1] + 1, taken[-1] + 2]
    assert len(again) < 39
    for attachment in attachments:
        attachment.leave(success=True)


def test_who_waits_for_a_commit_that_cannot_come_is_told(job: str) -> None:
    """Two ranks that should hold the same and do not: nothing is committed any more."""
    attachments = attached(job, 2)
    links = [Link(place) for place in opened(job, attachments)]
    for rank, link in enumerate(links):
        slot = link.begin(1, BUCKET_BYTES)
        slot.array[:] = 1
        link.complete(1, bucket_checksums(slot.array), {"0,1": rank})
    with pytest.raises(DamageError, match="should hold the same"):
        links[0].interval(1)  # the lead's
    for link in links:
        link.close()
    for attachment in attachments:
        attachment.leave(success=True)


def test_protect_tunes_itself(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With hardly any stall allowed it soon takes none at all; what it took is restored."""
    (attachment,) = attached(job, 1)
    (place,) = opened(job, [attachment])
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    protection = Protection(
        {"model": model, "optimizer": optimizer}, every="auto", stall_budget=1e-9, replicas=True, place=place
    )
    taken: list[int] = []
    for _ in range(40):
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        before = protection._last_snapshot
        protection.end_step()
        protection._idle.wait(PATIENCE_S)
        taken += [protection._last_snapshot] if protection._last_snapshot != before else []
    assert protection.close(timedelta(seconds=PATIENCE_S))
    assert taken[0] == 1
    assert len(taken) < 10
    assert capsys.readouterr().err.count(f"a snapshot every {MOST_STEPS} steps") == 1
    (status,) = find_nodes(job)
    assert status["committed"]["step"] == taken[-1]
    attachment.leave(success=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"every": 0}, "every=0 must be at least 1, or 'auto'"),
        ({"every": "often"}, "every='often'"),
        ({"every": "auto", "stall_budget": 0.0}, "stall_budget=0.0"),
        ({"every": "auto", "stall_budget": float("nan")}, "stall_budget=nan"),
    ],
)
def test_what_protect_refuses(arguments: dict[str, object], told: str) -> None:
    build: Callable[..., Protection] = protect
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        build(model=torch.nn.Linear(1, 1), **arguments)


def test_fixed_intervals_count_the_job_s_steps() -> None:
    fixed = FixedInterval(5)
    assert [step for step in range(1, 16) if fixed.is_due(step, lambda: None)] == [5, 10, 15]
