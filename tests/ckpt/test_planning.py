# SPDX-License-Identifier: Apache-2.0
"""Plans as a whole: what is compared, what is recommended, what is refused, and the check that must be able to fail."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.ckpt.errors import ConfigError
from refound.ckpt.goodput import expected_goodput
from refound.ckpt.plan_check import check_plan
from refound.ckpt.planning import CostPlan, Job, Planned, make_cost_plan
from refound.ckpt.simulation import simulate

JOB = Job(
    nodes=64,
    gpus_per_node=8,
    state_bytes=840e9,
    step_s=4.0,
    run_s=30 * 86400.0,
    mtbf_s=30 * 3600.0,
    node_loss_share=0.75,
    stall_s=0.04,
    copy_bytes_s=10e9,
    network_bytes_s=2e9,
    storage_bytes_s=20e9,
    load_s=42.0,
    disk_every_s=1800.0,
    disk_stall_s=0.04,
    restart_s=60.0,
    replace_s=300.0,
    ram_bytes=500e9,
    target_survival=0.99,
)


def job(**changes: Any) -> Job:
    return replace(JOB, **changes)


def named(plan: CostPlan, name: str) -> Planned:
    return next(planned for planned in plan.schemes if planned.name == name)


def test_no_parity_mirror_several_codes_the_chosen_and_yours_are_compared() -> None:
    plan = make_cost_plan(job(k=30, m=2))
    names = [planned.name for planned in plan.schemes]
    assert {"(1, 0)", "(1, 1)", "(3, 1)", "(6, 2)", "(5, 3)", "(15, 1)", "(30, 2)"} <= set(names)
    assert len(names) == len(set(names))
    assert [planned.name for planned in plan.schemes if planned.is_yours] == ["(30, 2)"]
    (chosen,) = [planned for planned in plan.schemes if planned.is_chosen]
    assert chosen.name == "1 x (8, 2) + 6 x (7, 2)"
    assert plan.baseline.name == "storage, as you have it"
    assert names[-1] == "storage, as often as is best"


def test_the_recommended_is_the_smallest_that_fits_and_survives() -> None:
    for target, ram_bytes in ((0.9, 500e9), (0.99, 500e9), (0.999999, 500e9), (0.999, 50e9)):
        plan = make_cost_plan(job(target_survival=target, ram_bytes=ram_bytes))
        recommended = plan.recommended
        assert recommended is not None
        assert recommended.run_survival >= target
        assert recommended.peak_bytes <= ram_bytes
        for other in plan.schemes:
            if other.in_memory and other.run_survival >= target and other.peak_bytes <= ram_bytes:
                assert other.cost.memory_bytes >= recommended.cost.memory_bytes


def test_what_cannot_be_had_is_said() -> None:
    plan = make_cost_plan(job(ram_bytes=30e9))
    assert plan.recommended is None
    assert "39.4 GB" in plan.why  # (1, 0) while a checkpoint is written: 3 D
    without_checkpoints = make_cost_plan(job(ram_bytes=30e9, disk_every_s=math.inf))
    assert without_checkpoints.recommended is not None  # then it is 2 D
    assert without_checkpoints.baseline.name == "storage, as often as is best"
    nearest = make_cost_plan(job(ram_bytes=42e9, target_survival=1.0)).recommended
    assert nearest is not None
    assert nearest.name == "(15, 1)"


def test_intervals_are_whole_steps_daly_s_and_no_sooner_than_the_commit() -> None:
    plan = make_cost_plan(JOB)
    assert {planned.every_steps for planned in plan.schemes if planned.in_memory} == {23}  # sqrt(2 · 0.04 · 108000) / 4
    slow = make_cost_plan(job(network_bytes_s=0.1e9))
    mirror = named(slow, "(1, 1)")
    assert mirror.every_steps * JOB.step_s >= mirror.scheme.commit_s > 92
    assert named(slow, "(1, 0)").every_steps == 23  # sends nothing
    free = make_cost_plan(job(stall_s=0.0, step_s=30.0))
    assert {planned.every_steps for planned in free.schemes if planned.in_memory} == {1}


@pytest.mark.parametrize("name", ["(7, 1)", "storage, as you have it"])
def test_the_interval_is_the_best_there_is(name: str) -> None:
    """No other number of steps has a noticeably better goodput (storage: than its best row)."""
    plan = make_cost_plan(job(stall_s=2.0, disk_stall_s=2.0))
    planned = named(plan, name) if name.startswith("(") else plan.schemes[-1]
    for steps in range(1, 1000):
        scheme = replace(planned.scheme, interval_s=steps * JOB.step_s)
        if scheme.interval_s >= scheme.commit_s:
            assert expected_goodput(scheme, JOB.faults).useful <= planned.goodput.useful + 2e-4, steps


def test_snapshots_in_memory_beat_slow_storage_and_the_note_says_when_they_hardly_do() -> None:
    slow = make_cost_plan(job(storage_bytes_s=0.2e9, load_s=4200.0, mtbf_s=6 * 3600.0))
    assert slow.recommended is not None
    assert slow.recommended.goodput.useful > slow.schemes[-1].goodput.useful + 0.05
    assert not any("memory gains little" in note for note in slow.notes)
    assert any("longer than --disk-every-min" in note for note in slow.notes)
    fast = make_cost_plan(job(storage_bytes_s=2e12, load_s=1.0))
    assert any("memory gains little" in note for note in fast.notes)


def test_goodput_is_what_runs_show() -> None:
    plan = make_cost_plan(job(mtbf_s=3 * 3600.0))
    assert plan.recommended is not None
    for planned in (plan.recommended, *plan.schemes[-2:]):
        runs = simulate(planned.scheme, plan.job.faults, plan.job.run_s, runs=40, seed=1)
        assert runs.goodput.useful == pytest.approx(planned.goodput.useful, abs=0.01)


def test_the_check_agrees_and_finds_what_is_wrong() -> None:
    """Survival of (1, 1) after two losses is 98.4%: said to be 97%, or with falls twice as many, it must not pass."""
    plan = make_cost_plan(job(nodes=16, mtbf_s=1800.0, run_s=3 * 86400.0))
    assert all(each.agrees for each in check_plan(plan, trials=20_000, runs=200, seed=3))
    mirror = named(plan, "(1, 1)")
    wrong = {
        "survives 2 lost at once": replace(mirror, survival={**mirror.survival, 2: mirror.survival[2] - 0.014}),
        "falls a run": replace(mirror, falls_per_s=2 * mirror.falls_per_s),
        "whole run, at least": replace(mirror, run_survival=1.0),
    }
    for what, planned in wrong.items():
        found = check_plan(replace(plan, schemes=(planned,)), trials=20_000, runs=200, seed=3)
        assert [each.what for each in found if not each.agrees] == [what]


def test_a_run_of_very_many_losses_is_checked_on_a_part_of_it() -> None:
    plan = make_cost_plan(job(nodes=16, mtbf_s=60.0, run_s=90 * 86400.0))  # 97,200 node losses
    mirror = named(plan, "(1, 1)")
    assert all(each.agrees for each in check_plan(replace(plan, schemes=(mirror,)), trials=2000, runs=20, seed=3))
    wrong = replace(mirror, falls_per_s=1.5 * mirror.falls_per_s)
    assert not all(each.agrees for each in check_plan(replace(plan, schemes=(wrong,)), trials=2000, runs=20, seed=3))


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        job(nodes=64, step_s=0.0, run_s=math.inf, stall_s=-1.0, node_loss_share=1.5, gpus_per_node=0, k=6, m=1)
    for part in ("step_s=0", "run_s must be finite", "stall_s=-1", "node_loss_share=1.5", "gpus_per_node=0", "k=6,m=1"):
        assert part in str(caught.value), part


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(1, 300),
    state_bytes=st.floats(1e6, 1e14),
    mtbf_s=st.one_of(st.floats(1.0, 1e8), st.just(math.inf)),
    share=st.floats(0, 1),
    stall_s=st.floats(0, 100),
    disk_every_s=st.one_of(st.floats(1.0, 1e6), st.just(math.inf)),
)
def test_every_job_has_a_plan_whose_figures_make_sense(
    nodes: int, state_bytes: float, mtbf_s: float, share: float, stall_s: float, disk_every_s: float
) -> None:
    plan = make_cost_plan(
        job(
            nodes=nodes,
            state_bytes=state_bytes,
            mtbf_s=mtbf_s,
            node_loss_share=share,
            stall_s=stall_s,
            disk_every_s=disk_every_s,
        )
    )
    assert any(planned.is_chosen for planned in plan.schemes)
    for planned in plan.schemes:
        useful = planned.goodput
        assert 0 <= useful.useful <= 1
        assert useful.useful + useful.stall + useful.rework + useful.down == pytest.approx(1)
        assert planned.every_steps >= 1
        assert 0 <= planned.run_survival <= 1
        chances = [planned.survival[lost] for lost in sorted(planned.survival)]
        assert chances == sorted(chances, reverse=True)
